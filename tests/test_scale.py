"""The page "At scale": its tables come from the model of the costs, and the model is arithmetic."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model, as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("costs")


def test_tables_of_the_page_are_those_of_the_model(costs: Any) -> None:
    """Nobody has typed a number; `python benchmarks/costs.py` writes them anew."""
    page = costs.PAGE.read_text()
    found = json.loads(costs.RESULTS.read_text())
    assert costs.written(page, costs.Machine(), found) == page


def test_promises_that_count_are_kept_in_the_results(costs: Any) -> None:
    """The committed measurement: half of the average, half of the time, within 25 %."""
    promises = json.loads(costs.RESULTS.read_text())["promises"]
    judged = [said for said in promises.values() if said["counts"]]
    assert len(judged) == 2
    for said in judged:
        assert 0.375 <= said["measured"] <= 0.625


def test_sharded_model_costs_by_hand(costs: Any) -> None:
    """8e9 parameters on 64 GPUs in 8 shards (HSDP): each has 1e9 of them."""
    setup = costs.Setup(8e9, ranks=64, shards=8)
    assert setup.held == 4e9
    assert setup.training == 16e9
    assert setup.update_moves == 12e9
    assert setup.applied_receives == 0
    # Three copies of 4 bytes are 6 accesses, one fingerprint reads once; there and back.
    assert setup.applied_moves == 2 * (6 * 4 + 4) * 1e9
    assert setup.applied_holds == 16 * 2**20
    assert setup.checkpoint == 4 * 8e9 / 64
    assert setup.update_takes(costs.Machine(memory=3e12)) == pytest.approx(4e-3)
    assert costs.Setup(8e9, ranks=64, shards=8, live=2).update_moves == 10e9
    assert costs.Setup(8e9, ranks=64, shards=8, live=2).applied_holds == 2e9


def test_shared_out_average_costs_by_hand(costs: Any) -> None:
    """1e9 parameters, whole on each of 4 ranks, the average cut in 4; or kept whole."""
    cut, whole = (costs.Setup(1e9, ranks=4, shards=n, whole=True) for n in (4, 1))
    assert (cut.held, whole.held) == (1e9, 4e9)
    assert cut.training == whole.training == 16e9
    assert (cut.update_moves, whole.update_moves) == (3e9, 12e9)
    assert (cut.applied_receives, whole.applied_receives) == (3e9, 0)
    assert (cut.applied_holds, whole.applied_holds) == (4e9, 16 * 2**20)
    assert cut.checkpoint == whole.checkpoint == 1e9
    machine = costs.Machine(memory=1e12, nvlink=3e11, network=3e10, node=4)
    # 3e9 bytes inside a node, then a copy, a gather and two writes of 4 bytes each.
    assert cut.applied_takes(machine) == pytest.approx(3e9 / 3e11 + 28e9 / 1e12)
    # Elements travel in the dtype that is wanted: 2 bytes of each for bfloat16.
    assert costs.Setup(1e9, ranks=4, shards=4, live=2, whole=True).applied_receives == 1.5e9
    assert (cut.export_receives(saved=2), cut.export_receives(saved=4)) == (1.5e9, 3e9)
    assert cut.export_takes(machine, saved=2) == pytest.approx(1.5e9 / 3e11 + 2e9 / machine.disk)


@pytest.mark.parametrize(
    ("number", "words"),
    [(4e9, "4 GB"), (62.5e6, "62.5 MB"), (999.9e6, "1 GB"), (1.116e9, "1.12 GB"), (0, "0 B")],
)
def test_bytes_in_words(costs: Any, number: float, words: str) -> None:
    assert costs.in_bytes(number) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0042, "4.2 ms"),
        (4.2e-6, "4.2 µs"),
        (1000, "16.7 min"),
        (7200, "2 h"),
        (0.25, "250 ms"),
        (5e-7, "500 ns"),
    ],
)
def test_times_in_words(costs: Any, seconds: float, words: str) -> None:
    assert costs.in_time(seconds) == words
