"""Files that are there whole, or not at all."""

import errno
import fcntl
import glob
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .._errors import ArgumentError
from .._interrupts import interrupts_held

# Some file systems keep locks within one host: what another host holds must not look left behind.
_HOST = re.sub(r"\W", "-", socket.gethostname())
_TEMPORARY, _HELD, _ASIDE = ".partial", ".held", ".aside"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`; what is written there becomes `path` at the end.

    Synced before it is renamed, so that a crash leaves the old file or the new one. When the block
    raises, the temporary file is removed and `path` is as it was. Several may write one path at
    the same time: the last one to end has it.
    """
    check_place(path)
    if path.exists() and not path.is_file():
        what = "the folder" if path.is_dir() else "the pipe, socket or device"
        raise ArgumentError(f"path must name a file, got {what} {str(path)!r}.")
    _sweep(path)
    with _held(path, _TEMPORARY) as temporary:
        # The permissions of the file that is replaced, or those of any new file.
        mode = stat.S_IMODE((path if path.exists() else temporary).stat().st_mode) & 0o777
        yield temporary
        os.chmod(temporary, mode)  # some writers make files that only their owner may read
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)


@contextmanager
def folder_written_whole(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it becomes `path` at the end.

    Every file in it is synced before. A folder cannot be exchanged in one step: with `replace` the
    old one is moved aside, the new one takes the name, and the old one is removed; a crash between
    leaves nothing under the name, never half of something, and the next write puts the old one
    back first.
    """
    with folder_for_a_while(path) as temporary:  # then the new folder, or the old one, goes
        _check_free(path, replace)
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        _check_free(path, replace)
        _take_name(temporary, path)
        _sync(path.parent)


@contextmanager
def folder_for_a_while(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which goes at the end.

    What a process that was killed meanwhile leaves goes with the next call for the same `path`.
    """
    check_place(path)
    _sweep(path)
    with _held(path, _HELD) as held:
        temporary = held.with_suffix(_TEMPORARY)
        temporary.mkdir()
        try:
            yield temporary
        finally:
            _remove(temporary)


def check_place(path: Path) -> None:
    """Raise unless `path` and the names beside it that are used on the way can be files."""
    if not os.path.isdir(path.parent):
        raise ArgumentError(f"path must lie in a folder that exists, got {str(path)!r}.")
    added = len(f"..{_HOST}.{_token()}{_TEMPORARY}")
    longest, given = os.pathconf(path.parent, "PC_NAME_MAX") - added, len(os.fsencode(path.name))
    if given > longest:
        raise ArgumentError(
            f"path must end in a name of at most {longest} bytes, as a temporary file beside it "
            f"adds {added}, got {given} in {path.name!r:.40}. Choose a shorter name."
        )


def _check_free(path: Path, replace: bool) -> None:
    if os.path.lexists(path) and not replace:
        raise ArgumentError(f"path must be a new folder, got {str(path)!r} which is there.")


def _take_name(temporary: Path, path: Path) -> None:
    if not os.path.lexists(path):
        os.rename(temporary, path)
        return
    aside = temporary.with_suffix(_ASIDE)
    with interrupts_held():  # one that comes right after a rename would not know of it
        os.rename(path, aside)
        try:
            os.rename(temporary, path)
        except BaseException:
            os.rename(aside, path)
            raise
        # Removed under this name: nobody puts it back, half there, should this be killed meanwhile.
        os.rename(aside, temporary)


# ── names beside it, and whose they are ──────────────────────────────────────────────────────────


@contextmanager
def _held(path: Path, ending: str) -> Iterator[Path]:
    """A new file beside `path`, locked while the block runs; then removed, if it is still there.

    No name can be foreseen, nothing that is there is opened, and no link is followed. The lock
    tells a file in use from one that was left behind: the system opens it when a process dies.
    """
    while True:
        held = path.with_name(f".{path.name}.{_HOST}.{_token()}{ending}")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        descriptor = os.open(held, flags, 0o666)
        try:
            _lock(descriptor, wait=True)
            if not os.path.lexists(held):
                continue  # swept away between the two calls above
            yield held
            return
        finally:
            if not any(map(os.path.lexists, _folders_of(held))):  # else the next sweep needs it
                held.unlink(missing_ok=True)
            os.close(descriptor)


def _folders_of(held: Path) -> list[Path]:
    """The folders that a file with this ending stands for: one written, and one moved aside."""
    return [held.with_suffix(end) for end in (_ASIDE, _TEMPORARY)] if held.suffix == _HELD else []


def _sweep(path: Path) -> None:
    """Remove what processes of this host left here when they were killed while writing `path`.

    A folder that such a process had moved aside gets its name again.
    """
    for left in list(path.parent.glob(f".{glob.escape(path.name)}.{_HOST}.*")):
        if left.suffix not in (_TEMPORARY, _HELD):
            continue
        # Only files: a folder has one beside it that says whether it is in use.
        try:
            descriptor = os.open(left, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue  # a folder, a link, somebody else's, or gone since
        try:
            if _lock(descriptor, wait=False):
                if left.suffix == _HELD:
                    _clear(left, path)
                left.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _clear(held: Path, path: Path) -> None:
    """Put back, or remove, the folders that belong to a file that nobody holds any more."""
    aside = held.with_suffix(_ASIDE)
    if aside.is_dir() and not os.path.lexists(path):
        os.rename(aside, path)
    for folder in _folders_of(held):
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a folder, or the link to one that stood in its place."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Lock a file that is open; False when it is locked, or when nobody can tell."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        # Some shared file systems have no locks. There nothing is ever swept away.
        if error.errno in (errno.EWOULDBLOCK, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            return False
        raise
    return True


def _token() -> str:
    return secrets.token_hex(8)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
