"""Files that are there whole, or not at all."""

import glob
import os
import re
import shutil
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
    temporary = _temporary(path)
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


@contextmanager
def folder_written_whole(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it becomes `path` at the end.

    Every file in it is synced before. A folder cannot be exchanged in one step: with `replace` the
    old one is moved aside, the new one takes the name, and the old one is removed; a crash between
    leaves nothing under the name, never half of something, and the next write puts the old one
    back first.
    """
    if not path.parent.is_dir():
        raise ArgumentError(f"path must lie in a folder that exists, got {str(path)!r}.")
    _put_back(path)
    if os.path.lexists(path) and not replace:
        raise ArgumentError(f"path must be a new folder, got {str(path)!r} which is there.")
    temporary = _temporary(path)
    _sweep(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        _take_name(temporary, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_name(temporary: Path, path: Path) -> None:
    if not os.path.lexists(path):
        os.rename(temporary, path)
        return
    aside = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.aside")
    os.rename(path, aside)
    try:
        os.rename(temporary, path)
    except BaseException:
        os.rename(aside, path)
        raise
    shutil.rmtree(aside)


def _put_back(path: Path) -> None:
    """Give a folder its name again that a killed process had moved aside; or remove it."""
    for aside in _left_behind(path, ".aside"):
        if os.path.lexists(path):
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(aside, path)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.partial")


def _sweep(path: Path) -> None:
    """Remove what processes of this host left here when they were killed while writing `path`."""
    for left in _left_behind(path, ".partial"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _left_behind(path: Path, ending: str) -> Iterator[Path]:
    """What processes of this host that run no more named after `path`."""
    for left in list(path.parent.glob(f".{glob.escape(path.name)}.{_HOST}.*{ending}")):
        pid = left.name.removesuffix(ending).rpartition(".")[2]
        if pid.isdecimal() and not _is_running(int(pid)):
            yield left


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
