"""The speed benchmark judges rightly, and the pages say what it found."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyak

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results" / "updates.json"
MARK = "benchmarks/speed.py -->"
PAGES = [
    page for page in (ROOT / "docs" / "speed.md", ROOT / "README.md") if MARK in page.read_text()
]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports a module of benchmarks/."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def time_of(who: str, seconds: float, **case: Any) -> dict[str, Any]:
    """One row of the results; the limit takes 10 microseconds."""
    where = {"model": "MLP", "live": "float32", "averages": 1} | case
    return {**where, "who": who, "seconds": seconds, "of_limit": seconds / 10e-6}


def results(*rows: dict[str, Any], wrong: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    """Results with these times, where everyone else gives the right answer and has a block."""
    names = ["polyak", "polyak, no guard", "quick", "slow"]
    answers = [
        {"who": who, "live": live, "right": (who, live) not in wrong, "returns": True}
        for who in names
        for live in ("float32", "bfloat16")
    ]
    return {
        "device": "cpu",
        "quick": False,
        "how": dict.fromkeys(names, ""),
        "answers": answers,
        "updates": list(rows),
        "uses": [],
    }


# ── the pages ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_what_the_results_give(page: Path, benchmark: Any) -> None:
    """Nobody wrote a number by hand: making the tables anew changes nothing."""
    speed = benchmark("speed")
    assert speed.written(page.read_text(), *speed.results()) == page.read_text()


def test_the_page_says_that_no_gpu_was_measured(benchmark: Any) -> None:
    """As long as there are no results of a GPU."""
    _, on_gpu = benchmark("speed").results()
    said = "Not measured on a GPU yet" in (ROOT / "docs" / "speed.md").read_text()
    assert said == (on_gpu is None)


def test_results_of_a_smoke_test_are_refused(benchmark: Any) -> None:
    """They are of one round of small models."""
    with pytest.raises(SystemExit, match="whole run"):
        benchmark("speed").written("", {"quick": True}, None)


def test_a_page_with_half_of_a_mark_is_refused(benchmark: Any) -> None:
    """Else the rest of the page would be taken for the table."""
    speed = benchmark("speed")
    found, _ = speed.results()
    with pytest.raises(SystemExit, match="both"):
        speed.written("<!-- speed-made: benchmarks/speed.py -->\n", found, None)


# ── the promises ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("seconds", "kept"), [(20e-6, True), (20.1e-6, False)])
def test_a_promise_is_kept_up_to_its_bound(seconds: float, kept: bool, benchmark: Any) -> None:
    """20 microseconds for the MLP are kept, a tenth more is not."""
    promises = benchmark("promises").judge(results(time_of("polyak", seconds)))
    assert promises["MLP: update, microseconds"]["kept"] is kept


def test_whoever_is_wrong_is_not_compared_with(benchmark: Any) -> None:
    """An average that never moves is quick; the fastest right one is what counts."""
    rows = [
        time_of("polyak", 20e-6, live="bfloat16"),
        time_of("quick", 20e-6, live="bfloat16"),
        time_of("slow", 50e-6, live="bfloat16"),
    ]
    judge = benchmark("promises").judge
    name = "MLP: bfloat16 into float32, of the fastest right peer"
    everyone = judge(results(*rows))[name]
    without = judge(results(*rows, wrong=[("quick", "bfloat16")]))[name]
    assert (everyone["measured"], everyone["kept"]) == (pytest.approx(1.0), False)
    assert (without["measured"], without["kept"]) == (pytest.approx(0.4), True)


@pytest.mark.parametrize(
    ("model", "peer", "limit"), [("ResNet-50-like", 1.0, 1.4), ("GPT-2-like", 1.0, 1.15)]
)
def test_large_models_have_four_promises(
    model: str, peer: float, limit: float, benchmark: Any
) -> None:
    """Without the guard against peer and limit, with it against that without."""
    rows = [
        time_of("polyak", 24e-6, model=model),
        time_of("polyak, no guard", 12e-6, model=model),
        time_of("quick", 10e-6, model=model),
    ]
    found = benchmark("promises").judge(results(*rows))
    assert {name: (said["measured"], said["at most"]) for name, said in found.items()} == {
        f"{model}: update without the guard, of the fastest right peer": (
            pytest.approx(1.2),
            peer,
        ),
        f"{model}: update without the guard, of the limit": (pytest.approx(1.2), limit),
        f"{model}: update, of that without the guard": (pytest.approx(2.0), 1.6),
    }


def test_what_nobody_can_be_compared_with_is_not_kept(benchmark: Any) -> None:
    """Else an environment without the other libraries would keep every promise about them."""
    found = benchmark("promises").judge(results(time_of("polyak", 1e-6)))
    assert found["MLP: update, of the fastest right peer"] == {
        "measured": None,
        "at most": 0.4,
        "kept": False,
    }


def test_the_block_is_judged_by_memory_and_time(benchmark: Any) -> None:
    """65 MB are too much, 1.3 times the fastest are not; who returns nothing is left out."""
    found = results()
    found["uses"] = [
        {"what": "block", "who": "polyak", "seconds": 1.3, "extra": 65e6},
        {"what": "block", "who": "slow", "seconds": 1.0, "extra": 500e6},
        {"what": "block", "who": "quick", "seconds": 0.1, "extra": 0},
    ]
    for one in found["answers"]:
        one["returns"] = one["who"] != "quick"
    kept = {name: said["kept"] for name, said in benchmark("promises").judge(found).items()}
    assert kept == {
        "GPT-2-like: applied(), extra MB": False,
        "GPT-2-like: applied() in and out, of the fastest right peer": True,
    }


def test_a_block_that_cannot_be_judged_is_not_kept(benchmark: Any) -> None:
    """A system that does not tell of memory, and nobody else who has a block."""
    found = results()
    found["uses"] = [{"what": "block", "who": "polyak", "seconds": 1.0, "extra": None}]
    promises = benchmark("promises").judge(found)
    assert [said["kept"] for said in promises.values()] == [False, False]
    assert {said["measured"] for said in promises.values()} == {None}
    table = benchmark("speed").promised({"promises": promises})
    assert table.count("not measured") == 2
    assert [benchmark("promises").shown(one) for one in (None, 0.12345)] == [
        "not measured",
        "0.123",
    ]


# ── the measuring ────────────────────────────────────────────────────────────────────────────────


def named(name: str, benchmark: Any) -> Any:
    """One of the contestants."""
    return next(one for one in benchmark("peers").CONTESTANTS if one.name == name)


@pytest.mark.parametrize(
    ("name", "live", "right"),
    [
        ("polyak", "float32", True),
        ("polyak", "bfloat16", True),
        ("torch AveragedModel", "float32", True),
        ("torch AveragedModel", "bfloat16", False),  # rounds each step away
    ],
)
def test_the_oracle_tells_right_from_wrong(
    name: str, live: str, right: bool, benchmark: Any
) -> None:
    """An average of bfloat16 that rounds to nearest does not follow; in float32 it does."""
    answer = benchmark("updates").answer(named(name, benchmark), live, "cpu")
    assert answer.right is right
    assert answer.returns is True


def test_a_block_that_shows_nothing_is_found_out(benchmark: Any) -> None:
    """The live model has to hold the average inside."""
    model = nn.Linear(2, 1)

    def ones() -> list[Tensor]:
        return [torch.ones_like(p) for p in model.parameters()]

    def block() -> AbstractContextManager[None]:
        return nullcontext()

    running = benchmark("peers").Running(lambda: None, ones, lambda n: 0.5, model, block)
    assert benchmark("updates").returns(running) is False


def test_scratch_that_a_class_keeps_is_counted(benchmark: Any) -> None:
    """Memory is found through the garbage collector, not by asking the class."""
    meters = benchmark("meters")
    before = meters.storages()
    hidden = {"scratch": [torch.empty(1000)]}
    after = meters.storages()
    assert sum(after[place] for place in after.keys() - before.keys()) == 4000
    del hidden


def test_peak_memory_sees_what_is_gone_at_the_end(benchmark: Any) -> None:
    """64 MiB that live for a moment only, within what the allocator does by itself."""
    with benchmark("meters").peak_memory("cpu") as peak:
        torch.ones(2**24)
    if peak.bytes is None:
        pytest.skip("this system does not tell the peak of a process")
    assert 60 * 2**20 < peak.bytes < 80 * 2**20


def test_a_smoke_test_runs(tmp_path: Path) -> None:
    """Everything that is measured, on the smallest model, with whoever is installed."""
    out = tmp_path / "found.json"
    subprocess.run(
        [sys.executable, "benchmarks/updates.py", "--quick", "--models", "MLP", "--out", str(out)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(polyak.__file__).parents[1]),
            "OMP_NUM_THREADS": "1",
        },
        check=True,
        capture_output=True,
    )
    found = json.loads(out.read_text())
    assert found["quick"]
    assert found["promises"] == {}
    held = {
        (row["who"], row["live"], row["averages"]): row["bytes"]
        for row in found["updates"]
        if row["who"] in ("polyak", "torch AveragedModel")
    }
    elements = found["models"]["MLP"]["elements"]
    assert elements == 17 * 48 + 49 * 48 + 49 * 8
    for averages in (1, 4):
        # Each of torch's has a counter of eight bytes; in bfloat16 it averages in bfloat16.
        assert held["torch AveragedModel", "float32", averages] == averages * (4 * elements + 8)
        assert held["torch AveragedModel", "bfloat16", averages] == averages * (2 * elements + 8)
        assert held["polyak", "float32", averages] >= averages * 4 * elements
        assert held["polyak", "bfloat16", averages] >= averages * 4 * elements
