"""The command `polyak`: parse arguments, make one call into a room below, print."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

_LIBRARIES = ("typer", "rich")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code: 0 done, 1 an error of ours, 2 wrong usage.

    Args:
        arguments: words after `polyak`; None takes those of this process.
    """
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        print(
            f"the command line must have {' and '.join(_LIBRARIES)} installed, got no "
            f'{" and no ".join(missing)}. Run: pip install "polyak[cli]"',
            file=sys.stderr,
        )
        return 1
    from ._app import run  # needs the libraries that were just looked for

    return run(sys.argv[1:] if arguments is None else list(arguments))
