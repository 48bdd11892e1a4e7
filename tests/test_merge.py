"""Merging checkpoint files: the failures of the field (J1 to J10), coefficients, and refusals."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

import polyak
from polyak import ArgumentError, MatchError

State = Mapping[str, Tensor]


def saved(folder: Path, states: Mapping[str, State]) -> list[Path]:
    """Files by name, written by the reference library."""
    paths = []
    for name, state in states.items():
        paths.append(folder / name)
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(state), paths[-1])
    return paths


def ramp(folder: Path, steps: Sequence[int]) -> list[Path]:
    """Checkpoints of a run whose only weight is the step: a merge shows the mean step."""
    states = {
        f"step-{s:06d}.safetensors": {"w": torch.tensor([s], dtype=torch.float64)} for s in steps
    }
    return saved(folder, states)


def mean_step(files: Sequence[Path], **how: Any) -> float:
    out = files[0].parent / "merged.safetensors"
    polyak.merge(files, out=out, **how)
    return float(load_file(out)["w"].item())


def coefficients(merged: polyak.Merge) -> list[float]:
    return [one.coefficient for one in merged.ingredients]


# ── the failures of the field ────────────────────────────────────────────────────────────────────


def sharded(folder: Path, state: State, shards: int) -> Path:
    """A Hugging Face folder: shards, index and config."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "test"}')
    names = sorted(state)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: state[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_sharded(folder: Path) -> dict[str, Tensor]:
    """All tensors by way of the index, which must be right about each."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {}
    for name, file in index["weight_map"].items():
        with safe_open(str(folder / file), framework="pt") as shard:
            found[name] = shard.get_tensor(name)
    return found


def test_j1_ten_sharded_bf16_checkpoints_are_summed_wider(tmp_path: Path) -> None:
    """J1: within 0.5001 ulp of the exact mean, where a sum in bfloat16 is ulps away."""
    states = [
        {f"layer.{k}.w": (1.0 + torch.rand(50)).bfloat16() for k in range(4)} for _ in range(10)
    ]
    folders = [sharded(tmp_path / f"run-{i}", state, shards=2) for i, state in enumerate(states)]
    polyak.merge(folders, out=tmp_path / "merged", max_shard_size=220)
    found = read_sharded(tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").read_text() == '{"model_type": "test"}'

    worst, worst_in_bf16 = Fraction(0), Fraction(0)
    for name, result in found.items():
        assert result.dtype == torch.bfloat16
        naive = torch.stack([state[name] for state in states]).unbind()
        summed = sum(naive[1:], naive[0]) / 10
        for at in range(50):
            exact = sum((Fraction(state[name][at].item()) for state in states), Fraction(0)) / 10
            step = Fraction(1, 128)  # of bfloat16 between 1 and 2
            worst = max(worst, abs(Fraction(result[at].item()) - exact) / step)
            worst_in_bf16 = max(worst_in_bf16, abs(Fraction(summed[at].item()) - exact) / step)
    assert worst <= Fraction(5001, 10_000)
    assert worst_in_bf16 > 1  # else this test could not fail


def test_j2_integers_agree_or_come_from_a_named_source(tmp_path: Path) -> None:
    """J2: never divided, never truncated, exact beyond 2**53."""
    big = 2**60 + 1
    states = {
        f"{name}.safetensors": {
            "w": torch.tensor([float(index)]),
            "tracked": torch.tensor(big + index),
            "ids": torch.tensor([1, 2]),
        }
        for index, name in enumerate("ab")
    }
    files = saved(tmp_path, states)
    out = tmp_path / "out.safetensors"
    with pytest.raises(MatchError, match=r"must agree, got 1 tensors.*'tracked'.*integers="):
        polyak.merge(files, out=out)
    assert not out.exists()
    for source in (1, -1, files[1], "b.safetensors", str(files[1])):
        done = polyak.merge(files, out=out, integers=source)
        assert load_file(out)["tracked"].item() == big + 1
        assert load_file(out)["ids"].tolist() == [1, 2]
        assert (done.averaged, done.tensors) == (1, 3)
    with pytest.raises(ArgumentError, match=r"integers must be the path or the index .* got 'c'"):
        polyak.merge(files, out=out, integers="c")


def test_j3_coefficients_are_taken_as_asked(tmp_path: Path) -> None:
    """J3: 0.1 and 1.0 are refused or rescaled on request, never silently."""
    files = ramp(tmp_path, [0, 11])
    with pytest.raises(
        ArgumentError, match=r"coefficients must sum to 1, got 1.1 \(0.1, 1\). Pass normalize=True"
    ):
        mean_step(files, coefficients=[0.1, 1.0])
    assert mean_step(files, coefficients=[0.1, 1.0], normalize=True) == pytest.approx(10.0)
    assert mean_step(files, coefficients=[-0.5, 1.5]) == 16.5


@pytest.mark.parametrize(
    ("dtypes", "asked", "expected"),
    [
        ((torch.bfloat16, torch.bfloat16), None, torch.bfloat16),
        ((torch.float16, torch.bfloat16), None, torch.float32),
        ((torch.float16, torch.float32), None, torch.float32),
        ((torch.float16, torch.bfloat16), torch.float16, torch.float16),
        ((torch.bfloat16, torch.bfloat16), torch.float64, torch.float64),
    ],
)
def test_j4_output_dtype_is_the_one_asked_for(
    dtypes: tuple[torch.dtype, torch.dtype],
    asked: torch.dtype | None,
    expected: torch.dtype,
    tmp_path: Path,
) -> None:
    """J4: sums are wide whatever comes out; a third of 1 tells the dtypes apart."""
    states = {
        f"{i}.safetensors": {"w": torch.tensor([float(i)], dtype=dtype), "n": torch.tensor([7])}
        for i, dtype in enumerate((*dtypes, dtypes[0]))
    }
    out = tmp_path / "out.safetensors"
    polyak.merge(saved(tmp_path, states), out=out, coefficients=[1 / 3] * 3, dtype=asked)
    found = load_file(out)
    assert found["w"].dtype == expected
    assert found["w"].item() == 1.0
    assert found["n"].dtype == torch.int64
    assert os.path.getsize(out) - 8 - int.from_bytes(out.read_bytes()[:8], "little") == (
        expected.itemsize + 8
    )


def test_j5_shapes_and_names_are_compared_before_anything_is_written(tmp_path: Path) -> None:
    """J5: the tensors are named, and the folder is as it was."""
    files = saved(
        tmp_path,
        {
            "a.safetensors": {"w": torch.ones(2), "head.weight": torch.ones(100, 64)},
            "b.safetensors": {"w": torch.ones(2), "head.weight": torch.ones(10, 64)},
            "c.safetensors": {"w": torch.ones(2), "tail.weight": torch.ones(100, 64)},
            "d.safetensors": {"w": torch.ones(2).int(), "head.weight": torch.ones(100, 64)},
        },
    )
    before = sorted(tmp_path.iterdir())
    for other, message in (
        (files[1], r"b\.safetensors has 'head\.weight' \[10, 64\], a\.safetensors has .*\[100"),
        (files[2], r"1 only in the latter \['head\.weight'\] and 1 only in .* \['tail\.weight'\]"),
        (files[3], r"'w' must be of one kind, got int32 in d\.safetensors and float32"),
    ):
        with pytest.raises(MatchError, match=message):
            polyak.merge([files[0], other], out=tmp_path / "out.safetensors")
    assert sorted(tmp_path.iterdir()) == before


SPARSE = """
import json, struct, sys
import polyak

def peak():  # not ru_maxrss, which starts at the size of the process that started this one
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

folder, count, elements = sys.argv[1], int(sys.argv[2]), 2**23
entry = {"dtype": "BF16", "shape": [elements], "data_offsets": [0, 2 * elements]}
header = json.dumps({"w": entry})
files = []
for index in range(count):  # holes in a file read as zeros and take no disk
    files.append(f"{folder}/{index}.safetensors")
    with open(files[-1], "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header.encode())
        file.truncate(8 + len(header) + 2 * elements)
before = peak()
polyak.merge(files, out=f"{folder}/out.safetensors")
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_j6_memory_does_not_grow_with_the_checkpoints(tmp_path: Path) -> None:
    """J6: 24 files of 16 MiB, within 60 MiB of an idle process: less than four of them."""
    done = subprocess.run(
        [sys.executable, "-c", SPARSE, str(tmp_path), "24"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert int(done.stdout) < 60 * 1024  # KiB


class Tied(nn.Module):
    """A head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_j7_a_tied_head_stays_tied(form: str, tmp_path: Path) -> None:
    """J7: written once, as in the inputs, and whole for those who load the result."""
    models = [Tied(), Tied()]
    files = []
    for index, model in enumerate(models):
        files.append(tmp_path / f"{index}.{form}")
        if form == "torch":
            torch.save(model.state_dict(), files[-1])
        else:
            save_model(model, str(files[-1]))
    out = tmp_path / "out.safetensors"
    done = polyak.merge(files, out=out)
    assert done.tensors == 1
    assert len(load_file(out)) == 1

    found = Tied()
    polyak.load_weights(out, found)
    expected = (models[0].embed.weight + models[1].embed.weight) / 2
    assert torch.equal(found.head.weight, expected)
    assert found.head.weight is found.embed.weight


def test_j7_a_tie_that_only_one_input_has_is_no_tie(tmp_path: Path) -> None:
    """The result holds both tensors, each with its own mean."""
    tied = torch.ones(3)
    torch.save({"a": tied, "b": tied}, tmp_path / "tied.pt")
    torch.save({"a": torch.zeros(3), "b": torch.full((3,), 3.0)}, tmp_path / "loose.pt")
    out = tmp_path / "out.safetensors"
    polyak.merge([tmp_path / "tied.pt", tmp_path / "loose.pt"], out=out)
    found = load_file(out)
    assert (found["a"].tolist(), found["b"].tolist()) == ([0.5] * 3, [2.0] * 3)


@pytest.mark.parametrize("name", ["out.safetensors", "folder"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_j9_an_interrupted_merge_leaves_nothing(
    name: str, error: type[BaseException], tmp_path: Path
) -> None:
    """J9: no file under the final name, none under another."""
    states = {f"{i}.safetensors": {"w": torch.ones(2**21)} for i in range(2)}
    files = saved(tmp_path, states)
    before = sorted(tmp_path.rglob("*"))

    def stop(done: int, total: int) -> None:
        raise error

    with pytest.raises(error):
        polyak.merge(files, out=tmp_path / name, progress=stop)
    assert sorted(tmp_path.rglob("*")) == before


def test_j9_an_interrupted_merge_leaves_the_old_result(tmp_path: Path) -> None:
    """A file that was there before is there after, whole."""
    files = ramp(tmp_path, [0, 10])
    out = tmp_path / "merged.safetensors"
    polyak.merge(files, out=out)
    broken = saved(tmp_path, {"7.safetensors": {"w": torch.tensor([torch.nan]).double()}})
    with pytest.raises(ArgumentError, match=r"7\.safetensors must hold finite values"):
        polyak.merge([*files, *broken], out=out)
    assert load_file(out)["w"].item() == 5.0


def test_j10_a_mean_across_a_barrier_is_reported(tmp_path: Path) -> None:
    """J10: a uniform soup of unrelated models warns; test_soup.py has the rest."""
    files = saved(
        tmp_path,
        {
            "a.safetensors": {"w": torch.tensor([1.0])},
            "b.safetensors": {"w": torch.tensor([-1.0])},
        },
    )

    def accuracy(weights: dict[str, Tensor]) -> float:
        return abs(weights["w"].item())

    with pytest.warns(polyak.AveragingWarning, match="not trained from one start"):
        done = polyak.soup(files, accuracy, out=tmp_path / "out.safetensors", method="uniform")
    assert "worse than every checkpoint alone" in done.notes[0]


# ── coefficients ─────────────────────────────────────────────────────────────────────────────────

SCHEDULES = [
    polyak.Power(sigma_rel=0.1),
    polyak.Exponential(half_life=300),
    polyak.Uniform(),
    polyak.After(250, polyak.Uniform()),
    polyak.HalfLifeRamp(ratio=0.1),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_schedule_gives_what_an_average_updated_there_holds(
    schedule: polyak.Schedule, tmp_path: Path
) -> None:
    """A merge of checkpoints is the average of a run that was updated at just these steps."""
    steps = [100, 300, 400, 1000]
    live = {"w": torch.zeros(1, dtype=torch.float64)}
    average = polyak.Average(live, schedule)
    for step in steps:
        live["w"].fill_(step)
        average.update(now=step)
    expected = average.weights()["w"].item()
    # The order of the arguments does not matter: the steps do.
    assert mean_step(ramp(tmp_path, steps)[::-1], schedule=schedule) == pytest.approx(expected)


def test_schedule_without_debiasing_lets_the_first_stand_in_for_the_start(tmp_path: Path) -> None:
    """decay**n of the weight has nowhere else to go, and a note says so."""
    files = ramp(tmp_path, [1, 2, 3])
    schedule = polyak.Exponential(decay=0.5, debias=False)
    done = polyak.merge(files, out=tmp_path / "merged.safetensors", schedule=schedule)
    assert coefficients(done) == [0.25, 0.25, 0.5]
    assert "0.125 of the weight belongs to the weights at step 0" in done.notes[0]


def test_schedule_gives_a_checkpoint_of_step_0_the_initial_share(tmp_path: Path) -> None:
    """It is the initial weights."""
    schedule = polyak.Exponential(decay=0.5, debias=False)
    files = ramp(tmp_path, [0, 1, 2])
    done = polyak.merge(files, out=tmp_path / "merged.safetensors", schedule=schedule)
    assert (coefficients(done), done.notes) == ([0.25, 0.25, 0.5], ())


def test_window_takes_the_last_checkpoints(tmp_path: Path) -> None:
    """All that are at most so much older than the last; the others count 0 and are listed."""
    files = ramp(tmp_path, [100, 200, 300, 400])
    done = polyak.merge(files, out=tmp_path / "merged.safetensors", window=200)
    assert coefficients(done) == [0.0, 1 / 3, 1 / 3, 1 / 3]
    assert done.how == "plain mean of the last 200"
    assert load_file(done.out)["w"].item() == 300.0
    alone = polyak.merge(files, out=tmp_path / "merged.safetensors", window=50)
    assert "only step-000400.safetensors is within the window" in alone.notes[0]


CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda u: 1 - u,
    "cosine": lambda u: (1 + math.cos(math.pi * u)) / 2,
    "1-sqrt": lambda u: 1 - math.sqrt(u),
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("steps", [[0, 100], [0, 10, 20, 30, 40], [50, 60, 90, 250]], ids=str)
def test_curve_is_the_run_again_with_a_decaying_rate(
    curve: str, steps: list[int], tmp_path: Path
) -> None:
    """theta_0 + sum of rate * gradient, step by step, with other gradients between checkpoints."""
    length, parts = steps[-1] - steps[0], 2_000
    theta, decayed, thetas = 1.0, 1.0, [1.0]
    for index, (begin, end) in enumerate(pairwise(steps)):
        gradient = [3.0, -1.0, 0.5, 2.0][index]
        for part in range(parts):
            now = begin + (end - begin) * (part + 0.5) / parts
            move = gradient * (end - begin) / parts
            theta += move
            decayed += CURVES[curve]((now - steps[0]) / length) * move
        thetas.append(theta)
    states = {
        f"{step}.safetensors": {"w": torch.tensor([value], dtype=torch.float64)}
        for step, value in zip(steps, thetas, strict=True)
    }
    files = saved(tmp_path, states)
    assert mean_step(files, curve=curve) == pytest.approx(decayed, abs=2e-4 * length)
    assert mean_step(files, curve=CURVES[curve]) == pytest.approx(decayed, abs=2e-4 * length)


def test_linear_decay_over_many_checkpoints_is_nearly_their_plain_mean(tmp_path: Path) -> None:
    """SCIENCE 6.4: a window is a linear decay; the ends count half."""
    files = ramp(tmp_path, list(range(100, 1200, 100)))
    out = tmp_path / "merged.safetensors"
    done = polyak.merge(files, out=out, curve="linear", window=1000)
    assert coefficients(done) == pytest.approx([0.05, *[0.1] * 9, 0.05])
    assert math.fsum(coefficients(done)) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize(
    "curve", [lambda u: u, lambda u: 1 - 2 * u, lambda u: math.nan, lambda u: 2 - u]
)
def test_a_curve_that_does_not_fall_from_1_to_0_is_refused(
    curve: Callable[[float], float], tmp_path: Path
) -> None:
    """Coefficients below 0 are no decay."""
    with pytest.raises(ArgumentError, match="curve must fall and stay within"):
        mean_step(ramp(tmp_path, [1, 2, 3]), curve=curve)


# ── steps ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "names",
    [
        ["step-0100.safetensors", "step-0900.safetensors", "step-1000.safetensors"],
        ["v2_epoch1_step100.pt", "v2_epoch9_step900.pt", "v2_epoch9_step1000.pt"],
        ["checkpoint-100/model.st", "checkpoint-900/model.st", "checkpoint-1000/model.st"],
        ["run.100.ckpt", "run.900.ckpt", "run.1000.ckpt"],
    ],
    ids=lambda names: names[0],
)
def test_steps_are_the_last_number_of_each_name(names: list[str], tmp_path: Path) -> None:
    """Of the file, or of the folders above where the files are all called the same."""
    files = saved(tmp_path, {name: {"w": torch.zeros(1)} for name in names})
    done = polyak.merge(files, out=tmp_path / "out.safetensors", window=150)
    assert [one.step for one in done.ingredients] == [100.0, 900.0, 1000.0]
    assert coefficients(done) == [0.0, 0.5, 0.5]


def test_steps_that_the_files_tell_come_before_their_names(tmp_path: Path) -> None:
    """A file of `polyak.save` knows its clock, whatever somebody called it."""
    live = {"w": torch.zeros(1)}
    for name, now in (("3.safetensors", 10), ("2.safetensors", 20), ("1.safetensors", 30)):
        average = polyak.Average(live, polyak.Uniform())
        average.update(now=now)
        polyak.save(average, tmp_path / name)
    files = [tmp_path / f"{i}.safetensors" for i in (1, 2, 3)]
    done = polyak.merge(files, out=tmp_path / "out.safetensors", window=10)
    assert [(one.label, one.coefficient) for one in done.ingredients] == [
        ("3.safetensors", 0.0),
        ("2.safetensors", 0.5),
        ("1.safetensors", 0.5),
    ]
    assert any("3 of 3 are averages already" in note for note in done.notes)


def test_steps_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    """Two of one time, none at all, or as many as there are not checkpoints."""
    same = saved(
        tmp_path,
        {"1-fp16.safetensors": {"w": torch.ones(1)}, "2-fp16.safetensors": {"w": torch.ones(1)}},
    )
    out = tmp_path / "out.safetensors"
    with pytest.raises(ArgumentError, match=r"steps must be distinct, got 16 for 1-fp16"):
        polyak.merge(same, out=out, window=1)
    polyak.merge(same, out=out)  # a plain mean needs no steps
    none = saved(
        tmp_path,
        {"best.safetensors": {"w": torch.ones(1)}, "last.safetensors": {"w": torch.ones(1)}},
    )
    with pytest.raises(ArgumentError, match=r"or be given, got none for '.*best\.safetensors'"):
        polyak.merge(none, out=out, window=1)
    with pytest.raises(ArgumentError, match="steps must be one for each of the 2 checkpoints"):
        polyak.merge(none, out=out, window=1, steps=[1])
    assert coefficients(polyak.merge(none, out=out, window=1, steps=[1, 2])) == [0.5, 0.5]


@pytest.mark.parametrize("names", [("model-1.pt", "model-1.st"), ("a/7.pt", "a/7.st")], ids=str)
def test_files_that_differ_in_their_endings_only_have_one_step(
    names: tuple[str, str], tmp_path: Path
) -> None:
    """Neither their names nor any folder above tells them apart; the way up ends."""
    files = saved(tmp_path, {name: {"w": torch.ones(1)} for name in names})
    with pytest.raises(ArgumentError, match=r"steps must be distinct, got [17] for .*Pass steps="):
        polyak.merge(files, out=tmp_path / "out.safetensors", window=1)


# ── what the result says ─────────────────────────────────────────────────────────────────────────


def test_result_says_what_it_is_without_saying_where_it_was(tmp_path: Path) -> None:
    """Names and coefficients, no path of somebody's disk; a merge is recognised as one."""
    files = ramp(tmp_path, [1, 2])
    out = tmp_path / "merged.safetensors"
    polyak.merge(files, out=out, coefficients=[0.25, 0.75], steps=[1, 2])
    with safe_open(str(out), framework="pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata["polyak"])
    assert about["kind"] == "merged weights"
    assert about["how"] == "given coefficients"
    assert about["checkpoints"] == [
        {"name": "step-000001.safetensors", "coefficient": 0.25, "step": 1.0},
        {"name": "step-000002.safetensors", "coefficient": 0.75, "step": 2.0},
    ]
    assert str(tmp_path) not in str(metadata)
    again = polyak.merge([out], out=tmp_path / "again.safetensors", dtype=torch.bfloat16)
    assert again.ingredients[0].origin == "polyak merged weights"


def test_the_same_merge_gives_the_same_bytes(tmp_path: Path) -> None:
    """Threads finish in any order; the file does not show it."""
    states = {f"{i}.safetensors": {"w": torch.randn(2**20), "b": torch.randn(7)} for i in range(3)}
    files = saved(tmp_path, states)
    results = []
    for _ in range(3):
        polyak.merge(files, out=tmp_path / "out.safetensors")
        results.append((tmp_path / "out.safetensors").read_bytes())
    assert results[0] == results[1] == results[2]


def test_dry_run_tells_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    """The figures are those of the merge that follows; what is refused there is refused here."""
    files = ramp(tmp_path, [1, 2])
    before = sorted(tmp_path.iterdir())
    plan = polyak.merge(files, out=tmp_path / "merged.safetensors", dry_run=True)
    assert sorted(tmp_path.iterdir()) == before
    assert (plan.tensors, plan.elements, plan.bytes_read, plan.bytes_written) == (1, 1, 16, 8)
    done = polyak.merge(files, out=tmp_path / "merged.safetensors")
    assert not plan.written
    assert done.written
    assert done.ingredients == plan.ingredients


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    """The shortest tails that differ."""
    files = saved(
        tmp_path,
        {f"{run}/weights.safetensors": {"w": torch.zeros(1)} for run in ("left", "right")},
    )
    done = polyak.merge(files, out=tmp_path / "out.safetensors")
    labels = [one.label for one in done.ingredients]
    assert labels == ["left/weights.safetensors", "right/weights.safetensors"]


def test_averages_of_others_are_recognised(tmp_path: Path) -> None:
    """A timm checkpoint gives its average, and the merge says so; `key` has the last word."""
    for index in range(2):
        state = {"state_dict": {"w": torch.tensor([0.0])}, "state_dict_ema": {"w": torch.ones(1)}}
        torch.save(state, tmp_path / f"{index}.pt")
    files = [tmp_path / "0.pt", tmp_path / "1.pt"]
    out = tmp_path / "out.safetensors"
    done = polyak.merge(files, out=out)
    assert load_file(out)["w"].item() == 1.0
    assert "timm" in done.notes[0]
    polyak.merge(files, out=out, key="state_dict")
    assert load_file(out)["w"].item() == 0.0


def test_formats_can_be_mixed(tmp_path: Path) -> None:
    """A torch file, a safetensors file and a folder of shards, of one model."""
    torch.save({"a": torch.zeros(3), "b": torch.zeros(1)}, tmp_path / "0.pt")
    save_file({"a": torch.full((3,), 3.0), "b": torch.ones(1)}, tmp_path / "1.safetensors")
    sharded(tmp_path / "2", {"a": torch.full((3,), 6.0), "b": torch.full((1,), 2.0)}, shards=2)
    out = tmp_path / "out.safetensors"
    polyak.merge([tmp_path / "0.pt", tmp_path / "1.safetensors", tmp_path / "2"], out=out)
    found = load_file(out)
    assert (found["a"].tolist(), found["b"].tolist()) == ([3.0] * 3, [1.0])


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"coefficients": [0.5]}, "coefficients must be one for each of the 2 checkpoints, got 1"),
        ({"coefficients": [math.nan, 1.0]}, "coefficients must be finite"),
        ({"coefficients": [1.0, -1.0], "normalize": True}, "must have a sum above 0, got 0"),
        ({"coefficients": [0.5, 0.5], "curve": "linear"}, "from one place, got coefficients and c"),
        (
            {"schedule": polyak.Uniform(), "window": 3},
            "window must go with a plain mean or a curve",
        ),
        ({"window": 0}, "window must be above 0 and finite, got 0"),
        ({"window": math.nan}, "window must be above 0 and finite, got nan"),
        ({"normalize": True}, "normalize must go with coefficients"),
        ({"curve": "sqrt"}, "curve must be one of linear, cosine, 1-sqrt or a function"),
        ({"dtype": torch.int64}, "dtype must be a floating point dtype of 16 bits or more"),
        ({"dtype": torch.complex64}, "dtype must be a floating point dtype of 16 bits or more"),
        ({"nonfinite": "skip"}, "nonfinite must be 'raise' or 'ignore', got 'skip'"),
        ({"schedule": polyak.Uniform(), "steps": [-1, 1]}, "steps must be 0 or more"),
        ({"window": 1, "steps": [1, math.inf]}, "steps must be finite"),
    ],
)
def test_a_way_that_means_nothing_is_refused(
    how: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Before anything is written."""
    files = ramp(tmp_path, [1, 2])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ArgumentError, match=message):
        mean_step(files, **how)
    assert sorted(tmp_path.iterdir()) == before


def test_paths_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    """None, one string, one file twice, a result over an input or nowhere."""
    files = ramp(tmp_path, [1, 2])
    out = tmp_path / "out.safetensors"
    with pytest.raises(ArgumentError, match="at least one path, got none"):
        polyak.merge([], out=out)
    with pytest.raises(ArgumentError, match="must be a list of paths"):
        polyak.merge(str(files[0]), out=out)
    twice = [files[0], files[1], tmp_path / "." / files[0].name]
    with pytest.raises(ArgumentError, match="must be different files"):
        polyak.merge(twice, out=out)
    with pytest.raises(ArgumentError, match="out must not be one of the checkpoints"):
        polyak.merge(files, out=files[1])
    with pytest.raises(ArgumentError, match="out must lie in a folder that exists"):
        polyak.merge(files, out=tmp_path / "nowhere" / "out.safetensors")
    with pytest.raises(FileNotFoundError):
        polyak.merge([*files, tmp_path / "3.safetensors"], out=out)
    assert load_file(files[1])["w"].item() == 2.0


@pytest.mark.parametrize("given", ["folder", "index"])
def test_a_result_replaces_no_weights_of_an_input(given: str, tmp_path: Path) -> None:
    """Neither a shard, nor the same file by another name, nor what would be read before it."""
    folder = sharded(tmp_path / "a", {"w": torch.zeros(2)}, shards=1)
    shard = folder / "model-00001-of-00001.safetensors"
    other = saved(tmp_path, {"b.safetensors": {"w": torch.ones(2)}})[0]
    (tmp_path / "link.safetensors").symlink_to(shard)
    os.link(shard, tmp_path / "hard.safetensors")
    inputs = [folder if given == "folder" else folder / "model.safetensors.index.json", other]
    outs = [shard, tmp_path / "link.safetensors", tmp_path / "hard.safetensors", other]
    outs += [folder / "model.safetensors"] if given == "folder" else [folder]
    for out in outs:
        with pytest.raises(ArgumentError, match=r"one of the checkpoints, got .* Choose"):
            polyak.merge(inputs, out=out, force=True)
    assert load_file(shard)["w"].tolist() == [0.0, 0.0]
    polyak.merge(inputs, out=folder / "mean.safetensors")
    assert load_file(folder / "mean.safetensors")["w"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("ending", ["pt", "pth", "bin", "ckpt", "pkl"])
def test_a_result_is_safetensors_or_a_folder(ending: str, tmp_path: Path) -> None:
    """A name that means another format is no name of a folder."""
    files = ramp(tmp_path, [1, 2])
    with pytest.raises(ArgumentError, match=r"another format .* Pass x\.safetensors"):
        polyak.merge(files, out=tmp_path / f"x.{ending}")


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_shard_size_that_cannot_be_kept_is_refused(dry_run: bool, tmp_path: Path) -> None:
    """Also where nothing is written; one tensor may be larger than it."""
    files = saved(tmp_path, {"a.safetensors": {"v": torch.ones(2), "w": torch.ones(2)}})
    out = tmp_path / "out.safetensors"
    for size, message in (
        (15, r"max_shard_size must be at least the 16 bytes of a single file, got 15\. Pass a fol"),
        (0, "max_shard_size must be a whole number of bytes above 0, got 0"),
        (5.5, "max_shard_size must be a whole number of bytes above 0, got 5.5"),
    ):
        with pytest.raises(ArgumentError, match=message):
            polyak.merge(files, out=out, max_shard_size=size, dry_run=dry_run)  # type: ignore[arg-type]
    assert polyak.merge(files, out=out, max_shard_size=16, dry_run=dry_run).written != dry_run
    one = ramp(tmp_path, [1])
    assert polyak.merge(one, out=out, max_shard_size=3, dry_run=dry_run).written != dry_run


def test_a_sum_beyond_float64_says_what_to_do(tmp_path: Path) -> None:
    """The inputs are finite and so is their mean, but not their sum."""
    large = {"w": torch.tensor([1.5e308], dtype=torch.float64)}
    states = {f"{i}.safetensors": large for i in (1, 2)}
    with pytest.raises(ArgumentError, match=r"sums .* within float64, got more in 'w'.* leave out"):
        polyak.merge(saved(tmp_path, states), out=tmp_path / "out.safetensors")


def test_a_folder_that_exists_is_replaced_only_by_force(tmp_path: Path) -> None:
    """And never one that is an input."""
    folders = [sharded(tmp_path / name, {"w": torch.ones(2)}, shards=1) for name in ("a", "b")]
    out = tmp_path / "out"
    polyak.merge(folders, out=out)
    with pytest.raises(ArgumentError, match="out must be new, got the folder"):
        polyak.merge(folders, out=out)
    polyak.merge(folders, out=out, force=True)
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(ArgumentError, match="out must not be one of the checkpoints"):
        polyak.merge([tmp_path / "a"], out=tmp_path / "a", force=True)


def test_quantized_weights_are_not_averaged(tmp_path: Path) -> None:
    """Their numbers are codes; the means of codes are noise."""
    states = {
        f"{i}.safetensors": {"w": torch.tensor([1.0 + i]).to(torch.float8_e4m3fn)} for i in (1, 2)
    }
    with pytest.raises(MatchError, match=r"float8_e4m3fn.*dequantize first"):
        polyak.merge(saved(tmp_path, states), out=tmp_path / "out.safetensors")
