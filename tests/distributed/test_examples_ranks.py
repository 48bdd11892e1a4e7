"""The examples for `torchrun` run, and show what they say they show.

Each is started by `torchrun` once, as its first lines say; what follows a stop runs in the harness,
which does not import everything again.
"""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from work_examples import EXAMPLES, run

import polyak
from ranks import run_on
from test_examples import load

STOP, END = 25, 60  # steps; checkpoints fall on the stop, 50 and the end


def torchrun(name: str, ranks: int, folder: Path, until: int) -> list[str]:
    """Run an example as its first lines say; the lines it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = [str(EXAMPLES / f"{name}.py"), str(folder), "--until", str(until)]
    done = subprocess.run(
        [*command, "--nproc-per-node", str(ranks), *script],
        capture_output=True,
        text=True,
        timeout=300,
    )
    # FSDP2 keeps gloo's threads alive after destroy_process_group, also without polyak: now and
    # then one of them meets the end of the interpreter and aborts, when all is printed and written.
    at_the_end = "terminate called without an active exception" in done.stderr
    assert done.returncode == 0 or at_the_end, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout.splitlines()


def leave_half_a_checkpoint(folder: Path, step: int) -> None:
    """What a run killed in the middle of a save leaves: data without the metadata."""
    unfinished = folder / f"step-{step:06d}"
    unfinished.mkdir()
    (unfinished / "__0_0.distcp").write_bytes(b"half a shard")


def accuracy_of_file(example: Any, folder: Path) -> float:
    """That of the exported weights in the plain model, on one process."""
    model = example.build()
    polyak.load_weights(folder / "averaged.safetensors", model)
    bunch = example.load_digits()
    images = torch.tensor(bunch.data, dtype=torch.float32)[: example.TEST] / 16.0
    labels = torch.tensor(bunch.target)[: example.TEST]
    with torch.no_grad():
        guesses = model.eval()(images).argmax(dim=1)
    return float((guesses == labels).float().mean())


def farthest(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest difference between two sets of weights of one model."""
    assert set(a) == set(b)
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def test_fsdp2_run_goes_on_with_another_number_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, a stop, three ranks: the run and the average of one process that never stopped."""
    example = load("fsdp2", monkeypatch)
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    first = torchrun("fsdp2", 2, parts, STOP)
    assert first[0] == "2 ranks start at step 0"
    leave_half_a_checkpoint(parts, STOP + 10)

    three = run_on(3, run, "fsdp2", parts, END)
    [one] = run_on(1, run, "fsdp2", whole, END)

    assert [r.started for r in three] == [STOP] * 3
    assert {r.updates for r in three} == {one.updates} == {END}
    # Every rank computed with the whole model, and holds its part of the average only.
    assert len({(r.live, r.averaged) for r in three}) == 1
    assert sum(r.held for r in three) == one.held
    assert max(r.held for r in three) < 0.36 * one.held
    # Three ranks add up the same gradients in another order.
    ours, theirs = (polyak.load_weights(f / "averaged.safetensors") for f in (parts, whole))
    early = example.build().state_dict()
    assert farthest(ours, early) > 0.05
    assert farthest(ours, theirs) < 1e-3
    assert accuracy_of_file(example, parts) == three[0].averaged > 0.85


def test_ddp_with_a_sharded_average_resumes_and_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the average on each of two ranks; all evaluate the same, and so does the file."""
    example = load("ddp_sharded", monkeypatch)
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    first = torchrun("ddp_sharded", 2, parts, STOP)
    assert first[0] == "2 ranks start at step 0"
    leave_half_a_checkpoint(parts, STOP + 10)

    resumed = run_on(2, run, "ddp_sharded", parts, END)
    straight = run_on(2, run, "ddp_sharded", whole, END)

    assert [r.started for r in resumed] == [STOP] * 2
    for results in (resumed, straight):
        assert len({r.averaged for r in results}) == 1  # live statistics are each rank's own
        for r in results:
            assert r.held < 0.52 * r.whole  # the statistics of batch norm are on every rank
            assert r.apart > 1e-4  # each had seen other images
    # The weights do not depend on whose statistics the checkpoint kept, so they are the same bits.
    ours, theirs = (polyak.load_weights(f / "averaged.safetensors") for f in (parts, whole))
    for name in dict(example.build().named_parameters()):
        assert torch.equal(ours[name], theirs[name]), name
    assert accuracy_of_file(example, parts) == resumed[0].averaged > 0.85
