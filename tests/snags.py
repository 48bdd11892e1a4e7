"""Trouble on purpose, and a count of what torch does."""

from typing import Any

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
