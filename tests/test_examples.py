"""The examples run, and show what they say they show."""

import importlib.util
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_plain_loop_ends_nearer_the_truth_with_the_average(tmp_path: Path) -> None:
    """At a constant learning rate the average of a noisy fit is nearer than its last weights."""
    live, averaged = load("plain_loop").main(tmp_path)
    assert averaged < live / 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["averaged.safetensors", "last.pt"]
