"""Trouble on purpose, and a count of what torch does."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Snags(TorchDispatchMode):
    """Count the operations of torch and the bytes they allocate; raise at the n-th."""

    def __init__(self, at: int | None = None, error: type[BaseException] = RuntimeError) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.at, self.error = at, error
        self.calls = self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise self.error("a snag")
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self.bytes += tensor.untyped_storage().nbytes()
        return result


def press() -> None:
    """Press Ctrl-C."""
    signal.raise_signal(signal.SIGINT)


@contextmanager
def pressed_at_line(*lines: int, of: tuple[str, ...]) -> Iterator[list[str]]:
    """Press Ctrl-C before the n-th line that this thread runs in modules that begin so."""
    passed: list[str] = []

    def in_lines(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            passed.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
            if len(passed) in lines:
                press()
        return in_lines

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        return in_lines if frame.f_globals.get("__name__", "").startswith(of) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield passed
    finally:
        sys.settrace(before)


@contextmanager
def interrupted_in(method: str, call: int) -> Iterator[None]:
    """Raise KeyboardInterrupt instead of the n-th call of this method of tensors."""
    plain, left = getattr(Tensor, method), iter(range(1, call))

    def interrupted(self: Tensor, *args: Any) -> Tensor:
        if not next(left, 0):
            raise KeyboardInterrupt
        return plain(self, *args)  # type: ignore[no-any-return]

    with patch.object(Tensor, method, interrupted):
        yield
