"""What docs/teachers.md says of the mean teacher, from the example it is taken from."""

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.prove
def test_mean_teacher_beats_its_supervised_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five seeds, paired: above the supervised network, and above its average, with intervals.

    Over agreement with the live network it gains nothing that five seeds could show: the page says
    so, and must be changed when that changes.
    """
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("mean_teacher")
    supervised, averaged, own_teacher = example.main()
    assert supervised.low > 0.0
    assert averaged.low > 0.0
    assert own_teacher.low < 0.0 < own_teacher.high
