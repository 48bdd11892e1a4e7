"""Are the libraries of `polyak[study]` there? Imported first: one line says what to do."""

from importlib.util import find_spec

from polyak._errors import AveragingError

_LIBRARIES = {"sklearn": "scikit-learn", "scipy": "scipy", "matplotlib": "matplotlib"}
_LIBRARIES |= {"jinja2": "jinja2"}


class MissingLibraryError(AveragingError, ImportError):
    """A library that only the study needs is not installed."""


def check_libraries() -> None:
    """Raise `MissingLibraryError`, with the line that cures it, when one is not installed."""
    missing = [title for module, title in _LIBRARIES.items() if find_spec(module) is None]
    if missing:
        raise MissingLibraryError(
            f"polyak.study must have {', '.join(_LIBRARIES.values())}, got no "
            f'{", ".join(missing)}. Run: pip install "polyak[study]"'
        )


check_libraries()
