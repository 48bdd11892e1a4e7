"""Which tensors are meant by names in a file, when the model that was saved was wrapped?"""

from collections.abc import Container, Iterable

_WRAPPERS = ("module.", "_orig_mod.")  # what DDP and compile put before the names in a file


def bare_names(names: Iterable[str], known: Container[str]) -> dict[str, str]:
    """Return each name without the prefixes of wrappers, which all of them must have.

    They are taken off until some name is a known one: a model may have a layer called module.
    """
    bare = {name: name for name in names}
    while bare and not any(name in known for name in bare.values()):
        wrapper = next((w for w in _WRAPPERS if all(n.startswith(w) for n in bare.values())), None)
        if wrapper is None:
            break
        bare = {name: short.removeprefix(wrapper) for name, short in bare.items()}
    return bare
