"""What the tests of the examples run on ranks: the examples."""

import importlib
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, folder: Path, until: int) -> Any:
    """The example's own `main`, as `torchrun` would call it after joining the ranks."""
    sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name).main(folder, until)
