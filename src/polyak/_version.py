"""Which polyak is this? Written into the files that it makes."""

from importlib.metadata import PackageNotFoundError, version


def version_of_polyak() -> str:
    """The installed version, in words."""
    try:
        return version("polyak")
    except PackageNotFoundError:  # used from a source tree that was never installed
        return "unknown"
