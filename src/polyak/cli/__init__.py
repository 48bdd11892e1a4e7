"""The command `polyak`: parse arguments, make one call into a room below, print."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

_LIBRARIES = ("typer", "rich")
STOPPED = 130  # the exit code of shells for Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 done, 1 an error of ours, 2 wrong usage, 130 Ctrl-C.

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
    try:
        from ._app import run  # needs the libraries that were just looked for

        code = run(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt:
        code = STOPPED
    if code == STOPPED:
        print("polyak: stopped; no file is left half written.", file=sys.stderr)
    return code
