"""examples/detector.py: killed and resumed anywhere, its average is that of the whole run."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import polyak
from deep import differences
from test_examples import EXAMPLES, load

EPOCHS = 4
FIELDS = {"epoch", "best_fitness", "model", "ema", "updates", "optimizer", "exact"}


class KilledError(Exception):
    """In the place of a kill."""


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("RANK", raising=False)
    return load("detector", monkeypatch)


@pytest.fixture
def whole(example: Any, tmp_path: Path) -> Any:
    """What the run that is never stopped ends with."""
    (tmp_path / "whole").mkdir()
    return example.main(tmp_path / "whole", EPOCHS)


def read(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def check_same(example: Any, folder: Path, whole: Any) -> None:
    """The run in `folder` ended with the bits, and the files, of the whole run beside it."""
    for name in ("last.pt", "best.pt"):
        assert list(differences(read(folder / name), read(folder.parent / "whole" / name))) == []
    ours = polyak.load_weights(folder / "averaged.safetensors")
    assert set(ours) == set(whole.average)
    assert all(torch.equal(ours[name], whole.average[name]) for name in ours)


def raise_at(wanted: int) -> Any:
    def on_step(step: int) -> None:
        if step == wanted:
            raise KilledError

    return on_step


def test_stopped_in_the_middle_of_epochs_it_ends_the_same(
    example: Any, whole: Any, tmp_path: Path
) -> None:
    """In the first epoch, between two micro-batches of a step, at the first and the last one."""
    folder = tmp_path / "stopped"
    folder.mkdir()
    for step in (3, 8, 9, 14, 17, 28, 32):
        with pytest.raises(KilledError):
            example.main(folder, EPOCHS, raise_at(step))
    result = example.main(folder, EPOCHS)
    assert result.updates == whole.updates == EPOCHS * example.BATCHES // example.ACCUMULATE
    assert result.best_fitness == whole.best_fitness
    assert all(torch.equal(result.average[name], whole.average[name]) for name in whole.average)
    check_same(example, folder, whole)


def test_stopped_while_it_writes_it_ends_the_same(
    example: Any, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once before each file: also between the best and the last, of which one is new then."""
    folder = tmp_path / "stopped"
    folder.mkdir()
    write, tried = example.write_whole, set()

    def broken(state: Any, path: Path) -> None:
        if (state["epoch"], path.name) not in tried:
            tried.add((state["epoch"], path.name))
            path.with_name(f".{path.name}.partial").write_bytes(b"half a file")
            raise KilledError
        write(state, path)

    monkeypatch.setattr(example, "write_whole", broken)
    while True:
        try:
            example.main(folder, EPOCHS)
            break
        except KilledError:
            assert len(tried) <= 2 * EPOCHS
    assert len(tried) > EPOCHS
    check_same(example, folder, whole)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on this system")
def test_a_killed_process_is_taken_up_by_the_next(example: Any, whole: Any, tmp_path: Path) -> None:
    """SIGKILL in the third epoch: nothing of the process is left but its files."""
    folder = tmp_path / "killed"
    folder.mkdir()
    code = (
        "import os, pathlib, signal, sys, torch, detector\n"
        "torch.set_num_threads(1)\n"
        "die = lambda step: step == 21 and os.kill(os.getpid(), signal.SIGKILL)\n"
        f"detector.main(pathlib.Path(sys.argv[1]), {EPOCHS}, die)"
    )
    paths = [str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert read(folder / "last.pt")["epoch"] == 1
    example.main(folder, EPOCHS)
    check_same(example, folder, whole)


def test_the_files_hold_what_yolov5_keeps(example: Any, whole: Any, tmp_path: Path) -> None:
    """Epoch, best fitness, model and average in half precision, updates, optimizer."""
    for name in ("last.pt", "best.pt"):
        state = read(tmp_path / "whole" / name)
        assert set(state) == FIELDS
        for part in ("model", "ema"):
            assert set(state[part]) == set(example.Detector().state_dict())
            assert {t.dtype for t in state[part].values() if t.is_floating_point()} == {
                torch.float16
            }
            fresh = example.Detector()
            fresh.load_state_dict(state[part], strict=True)
        assert set(state["optimizer"]) == {"state", "param_groups"}
        assert state["updates"] == 4 * (state["epoch"] + 1)
    last = read(tmp_path / "whole" / "last.pt")
    assert last["epoch"] == EPOCHS - 1
    assert last["best_fitness"] == whole.best_fitness
    for name, value in whole.average.items():
        assert torch.equal(last["ema"][name], value.half() if value.is_floating_point() else value)


def test_the_best_checkpoint_is_the_best_also_after_a_resume(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best score is in the file, so a worse epoch after a resume does not take its place."""
    scores = {0: 0.3, 1: 0.5, 2: 0.4, 3: 0.45}
    running: list[int] = []

    def score(model: Any) -> float:
        return scores[min(running[-1], 3)]

    write = example.Run.validate_and_save

    def noted(run: Any, folder: Path) -> None:
        running.append(run.epoch)
        write(run, folder)

    monkeypatch.setattr(example.Run, "validate_and_save", noted)
    monkeypatch.setattr(example, "fitness", score)
    example.main(tmp_path, 2)
    result = example.main(tmp_path, EPOCHS)
    assert running == [0, 1, 2, 3]
    assert result.best_fitness == 0.5
    assert read(tmp_path / "best.pt")["epoch"] == 1
    assert read(tmp_path / "last.pt")["epoch"] == 3
    assert read(tmp_path / "last.pt")["best_fitness"] == 0.5


def test_a_step_that_the_scaler_skips_is_no_update(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One micro-batch with boxes that are no numbers: one update less, and a finite average."""
    whole = example.batches

    def damaged(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for index, (images, boxes) in enumerate(whole(epoch)):
            if (epoch, index) == (1, 3):
                boxes = torch.full_like(boxes, math.nan)
            yield images, boxes

    monkeypatch.setattr(example, "batches", damaged)
    result = example.main(tmp_path, 2)
    assert result.updates == 2 * example.BATCHES // example.ACCUMULATE - 1
    assert all(tensor.isfinite().all() for tensor in result.average.values())


def test_processes_that_are_not_the_main_one_keep_and_write_nothing(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert example.main(tmp_path, 1) is None
    assert list(tmp_path.iterdir()) == []


def test_the_average_of_the_whole_example_is_better(example: Any, tmp_path: Path) -> None:
    """At a constant learning rate the boxes of the live model keep jumping."""
    result = example.main(tmp_path)
    live = example.Detector()
    live.load_state_dict(read(tmp_path / "last.pt")["exact"]["model"])
    assert result.best_fitness > example.fitness(live.eval()) + 0.01


def test_the_shadow_loop_and_polyak_s_lines_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit at each evaluation, and nearer the truth than the live weights."""
    result = load("shadow_loop", monkeypatch).main()
    assert result.shadow == result.average
    assert len(result.live) == 6
    assert result.average[-1] < result.live[-1] / 2


def test_a_tensor_beyond_half_precision_is_kept_in_full(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1e5 is no float16: in the live model and in the average that tensor alone stays float32."""
    name = "layers.1.running_var"
    build = example.Detector.__init__

    def wide(detector: Any) -> None:
        build(detector)
        detector.state_dict()[name].fill_(1e5)

    monkeypatch.setattr(example.Detector, "__init__", wide)
    run = example.Run()
    state = run.checkpoint(run.ema)
    for part in ("model", "ema"):
        assert state[part][name].tolist() == [1e5] * 8
        assert state[part]["layers.0.weight"].dtype == torch.float16
        example.Detector().load_state_dict(state[part])
