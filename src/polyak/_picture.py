"""One plain picture in a file; matplotlib is imported when one is drawn."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ._errors import ArgumentError
from ._files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINE, MARK, BAND = "#264653", "#e76f51", "#d4ece9"
_FORMATS = (".png", ".svg", ".pdf")


_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def shares_along_x(axes: "Axes") -> None:
    """Write shares of the run as percent, on a logarithmic axis."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xticks([share for share in _SHARES if low <= share <= high])
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g} %")


def check_picture(path: Path) -> None:
    """Raise what `picture` would, before the work whose result it is to show."""
    if path.suffix not in _FORMATS:
        raise ArgumentError(f"path must end in {', '.join(_FORMATS)}, got {str(path)!r}.")
    try:
        import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError(
            'a picture needs matplotlib. Install it with: pip install "polyak[study]"'
        ) from error


@contextmanager
def picture(path: str | PathLike[str]) -> "Iterator[Axes]":
    """Yield axes to draw on; at the end of the block they are in the file, whole or not at all.

    Raises:
        ArgumentError: a name that does not end in .png, .svg or .pdf.
        ImportError: matplotlib is missing.
    """
    target = Path(path)
    check_picture(target)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    yield axes
    with written_whole(target) as temporary:
        figure.savefig(temporary, format=target.suffix.lstrip("."), dpi=150)
