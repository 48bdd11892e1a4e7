"""Any checkpoint, its format told from its contents."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .._errors import ArgumentError
from ._checkpoint import Checkpoint, Contents, Files
from ._choice import choose
from ._dcp import METADATA, read_dcp
from ._folder import read_folder, read_index, trusted_ties
from ._safetensors import read_header
from ._torch import LEGACY, ZIP, read_torch

_OTHERS = {
    b"GGUF": "a GGUF file; average before converting to it",
    b"\x89HDF": "an HDF5 file; save it as safetensors",
    b"\x80": "a plain pickle; load it with the program that wrote it, and save its tensors",
}


def open_checkpoint(path: str | os.PathLike[str], *, key: str | None = None) -> Checkpoint:
    """Open a checkpoint: tensors by name, to be read whole or by stretches.

    Read are safetensors files, sharded ones with an index, Hugging Face folders, files of
    `torch.save` (of every version, never running what they pickle) and folders of
    `torch.distributed.checkpoint`. The format is told from the contents. Names keep their form,
    except for a wrapper's prefix common to all of them (`module.`, `_orig_mod.`).

    Where several things are in a file, the average is taken when exactly one is recognised: of
    polyak, ema-pytorch, timm, torch's AveragedModel, diffusers, Lightning, or under a name with the
    word `ema`, such as `model_ema`; `origin` says whose. Else the one under a usual name
    (`state_dict`, `model`, `model_state_dict`, `module`), else the only one there is.

    Args:
        path: a file or folder.
        key: the way to other weights in it, such as "model" or "ema.shadow"; "" for those that lie
            at the top.

    Raises:
        FileNotFoundError: nothing of that name.
        ArgumentError: no checkpoint, a damaged one, or several weights that could be meant.
    """
    path = Path(path)
    if key is not None and not isinstance(key, str):
        raise ArgumentError(
            f"key must be the name of a place in the file, got {key!r}. "
            'Pass names with dots, like "ema.shadow".'
        )
    if not path.exists():
        raise FileNotFoundError(f"path must be a checkpoint, got {str(path)!r} which is not there.")
    files = Files()
    try:
        contents = _contents(path, files)
        choice = choose(contents, key, path.name)
    except BaseException:
        files.close()
        raise
    return Checkpoint(
        path=path,
        kind=contents.kind,
        origin=choice.origin,
        metadata=contents.metadata,
        step=choice.step,
        tensors={name: source.info for name, source in choice.tensors.items()},
        aliases=choice.ties,
        side_files=contents.side_files,
        left_out=choice.left_out,
        prefix=choice.prefix,
        _sources=choice.tensors,
        _files=files,
    )


@contextmanager
def open_contents(path: str | os.PathLike[str]) -> Iterator[Contents]:
    """All that a checkpoint holds, nested as it was saved; files stay open for the block.

    Raises:
        FileNotFoundError: nothing of that name.
        ArgumentError: no checkpoint, or a damaged one.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path must be a checkpoint, got {str(path)!r} which is not there.")
    files = Files()
    try:
        yield _contents(path, files)
    finally:
        files.close()


def _contents(path: Path, files: Files) -> Contents:
    if path.is_dir():
        dcp = (path / METADATA).is_file()
        return read_dcp(path, files) if dcp else read_folder(path, files)
    file = files.open(path)
    head = file.read(0, min(file.size, 16))
    if head.startswith((ZIP, LEGACY)):
        tree = read_torch(file)
        if not isinstance(tree, dict):
            raise ArgumentError(
                f"{path.name} must hold tensors by name, got {_words(tree)}. "
                "Save a state dict, not a model or a list."
            )
        return Contents("torch file" if head.startswith(ZIP) else "legacy torch file", tree)
    if head[:1] == b"{" and path.name.endswith(".json"):
        return read_index(path, files)
    for start, what in _OTHERS.items():
        if head.startswith(start) and head[8:9] != b"{":
            raise ArgumentError(
                f"path must be a checkpoint that polyak reads, got {str(path)!r}: {what}."
            )
    stored, metadata = read_header(file)
    return Contents("safetensors file", stored, metadata, trusted_ties(stored, metadata))


def _words(tree: object) -> str:
    what = getattr(tree, "what", None)
    return what if isinstance(what, str) else type(tree).__name__
