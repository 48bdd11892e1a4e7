"""Files that are there whole, or not at all."""

import glob
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .._errors import ArgumentError

_HOST = re.sub(r"\W", "-", socket.gethostname())


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; what is written there becomes `path` at the end.

    Synced before it is renamed, so that a crash leaves the old file or the new one. When the block
    raises, the temporary file is removed and `path` is as it was.
    """
    if not path.parent.is_dir():
        raise ArgumentError(f"path must lie in a folder that exists, got {str(path)!r}.")
    if path.is_dir():
        raise ArgumentError(f"path must name a file, got the folder {str(path)!r}.")
    temporary = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.partial")
    _sweep(path)
    try:
        yield temporary
        os.chmod(temporary, _mode(path))  # some writers make files that only their owner may read
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def _sweep(path: Path) -> None:
    """Remove what processes of this host left here when they were killed while writing `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{_HOST}.*.partial"):
        pid = left.name.removesuffix(".partial").rpartition(".")[2]
        if pid.isdecimal() and not _is_running(int(pid)):
            left.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's, but there
    return True


def _mode(path: Path) -> int:
    """The permissions of the file that is replaced, or those of any new file."""
    try:
        return path.stat().st_mode & 0o777
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
