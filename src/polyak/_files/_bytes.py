"""Bytes of a file at a position: from any thread, nothing mapped, few files open at once."""

import os
import stat
import threading
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from .._errors import ArgumentError, OrderError

_OPEN_AT_ONCE = 128  # over all checkpoints: thousands of shards must not use up the descriptors


class _Descriptor:
    """An open file that closes itself once nobody reads from it any more."""

    def __init__(self, path: Path) -> None:
        # Not blocking: the name may be that of a pipe, which would wait for a writer.
        self.number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def __del__(self) -> None:
        if hasattr(self, "number"):  # the file may not have opened
            os.close(self.number)


class File:
    """A regular file, read by position.

    Plain positioned reads into fresh memory: pages of a mapped file would count as resident. The
    file is opened again as needed. It is refused when it is no longer the one that was checked, or
    was written to since, as `torch.save` writes over a file that is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._closed = False
        self._descriptor: _Descriptor | None = None
        self._identity: tuple[int, ...] = ()
        self.size = os.fstat(self._open().number).st_size

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset`, all of them or an `ArgumentError`."""
        buffer = bytearray(min(count, max(0, self.size - offset)))
        if len(buffer) < count:
            raise self._too_short(offset + count)
        self._fill(memoryview(buffer), offset)
        return bytes(buffer)

    def read_elements(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """`count` elements that lie one after another from byte `offset` on."""
        if offset + count * dtype.itemsize > self.size:
            raise self._too_short(offset + count * dtype.itemsize)
        elements = torch.empty(count, dtype=dtype, device="cpu")
        if count:
            self._fill(elements.view(torch.uint8).numpy().data, offset)
        return elements

    def close(self) -> None:
        """Read no more."""
        with _lock:
            self._closed, self._descriptor = True, None
            _recent.pop(self, None)

    def _fill(self, buffer: memoryview, offset: int) -> None:
        descriptor = self._open()
        while buffer:  # the system reads at most 2 GiB at once
            count = os.preadv(descriptor.number, [buffer], offset)
            if not count:
                raise self._too_short(offset + len(buffer))
            buffer, offset = buffer[count:], offset + count
        # After the bytes are here, so that none of them can be newer than what was checked.
        self._check_unchanged(descriptor)

    def _open(self) -> _Descriptor:
        """The descriptor, opened again if it was given up for others."""
        with _lock:
            if self._closed:
                raise OrderError(f"{self.path.name} must be read while its checkpoint is open.")
            if self._descriptor is None:
                self._descriptor = self._opened()
            _recent[self] = None
            _recent.move_to_end(self)
            while len(_recent) > _OPEN_AT_ONCE:
                # A thread that reads from it now holds it too, so it closes only after that.
                _recent.popitem(last=False)[0]._descriptor = None
            return self._descriptor

    def _opened(self) -> _Descriptor:
        descriptor = _Descriptor(self.path)
        if not stat.S_ISREG(os.fstat(descriptor.number).st_mode):
            raise ArgumentError(f"path must be a file or a folder, got {str(self.path)!r}.")
        self._identity = self._identity or _identity(descriptor)
        self._check_unchanged(descriptor)
        return descriptor

    def _check_unchanged(self, descriptor: _Descriptor) -> None:
        if _identity(descriptor) != self._identity:
            raise ArgumentError(
                f"{self.path.name} must stay as it is while it is read, got another file or other "
                "bytes. Start again once nothing writes to it."
            )

    def _too_short(self, needed: int) -> ArgumentError:
        return ArgumentError(
            f"{self.path.name} must have at least {needed} bytes, got {self.size} or fewer. "
            "The file was cut short; copy it again."
        )


def _identity(descriptor: _Descriptor) -> tuple[int, ...]:
    """Which file it is, and when it was written to."""
    status = os.fstat(descriptor.number)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


_lock = threading.Lock()
_recent: OrderedDict[File, None] = OrderedDict()  # the open files, the one used last at the end
