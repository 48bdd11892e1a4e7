"""Which parameters do the classes of other code bases average?"""

from torch import Tensor, nn

from .._roles import Role


def frozen_too(name: str, tensor: Tensor) -> Role | None:
    """Average frozen parameters as well: they may be unfrozen later, and then must follow.

    Not those of a library's own kind (a quantised base), which never are.
    """
    average = type(tensor) is nn.Parameter and (tensor.is_floating_point() or tensor.is_complex())
    return "average" if average else None
