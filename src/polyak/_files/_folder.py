"""Folders of weights as Hugging Face lays them out: one file or shards with an index."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .._errors import ArgumentError
from ._checkpoint import Contents, Files
from ._safetensors import noted_ties, read_header
from ._torch import read_torch

# In the order in which Hugging Face's own libraries look for them.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
    "adapter_model.bin",
)
_INDEX = ".index.json"
_LARGEST_JSON = 2**27  # bytes of an index or a config
_LARGEST_SIDE_FILE = 2**27
_SIDE_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".yaml", ".vocab", ".bpe", ".py")
_OF_TRAINING = ("trainer_state.json", "training_args.json")


def read_folder(folder: Path, files: Files) -> Contents:
    """The weights of a folder, whatever the format, and the files that belong to them."""
    present = {entry.name for entry in folder.iterdir()}
    known = [name for name in _WEIGHTS if name in present]
    if not known:  # another name, such as a variant's
        indexes = sorted(name for name in present if name.endswith(f".safetensors{_INDEX}"))
        known = indexes or sorted(name for name in present if name.endswith(".safetensors"))
        if len(known) != 1:
            raise ArgumentError(
                f"path must be a folder with one checkpoint, got {len(known)} in {str(folder)!r} "
                f"{known[:3]} beside {len(present) - len(known)} other files. "
                "Give the path of the file or folder that is meant."
            )
    chosen = inside(folder, known[0])
    return read_index(chosen, files) if known[0].endswith(_INDEX) else read_one(chosen, files)


def read_one(path: Path, files: Files) -> Contents:
    """One file of weights in a folder, with what belongs to it."""
    if path.suffix == ".safetensors":
        stored, metadata = read_header(files.open(path))
        contents = Contents("safetensors file", stored, metadata, trusted_ties(stored, metadata))
    else:
        contents = Contents("torch file", _mapping(read_torch(files.open(path)), path))
    return _with_side_files(contents, path.parent, files)


def read_index(path: Path, files: Files) -> Contents:
    """Shards, and of each the tensors that the index lists for it; others it may have too."""
    folder, index = path.parent, read_json(path, files)
    listed = index.get("weight_map")
    if not (
        isinstance(listed, dict)
        and listed
        and all(isinstance(shard, str) for shard in listed.values())
    ):
        raise ArgumentError(
            f"{path.name} must have a weight_map of names to files, got none. "
            "Download the folder again."
        )
    shards: dict[str, dict[str, None]] = {}
    for name, shard in listed.items():
        shards.setdefault(shard, {})[name] = None
    places = {shard: inside(folder, shard, listed_in=path.name) for shard in shards}
    tree: dict[str, object] = {}
    metadata: dict[str, str] = {}
    for shard, names in shards.items():
        found, words = _shard(places[shard], files)
        missing = sorted(names.keys() - found.keys())
        if missing:
            raise ArgumentError(
                f"{shard} must hold the tensors that {path.name} lists for it, got no "
                f"{missing[:3]}. Download the folder again."
            )
        tree |= {name: found[name] for name in names}
        metadata |= words
    kind = "safetensors" if path.name.endswith(f".safetensors{_INDEX}") else "torch"
    plural = "s" if len(shards) > 1 else ""
    contents = Contents(
        f"sharded {kind}, {len(shards)} file{plural}",
        {name: tree[name] for name in listed},
        metadata,
        trusted_ties(tree, metadata),
    )
    return _with_side_files(contents, folder, files)


def _shard(path: Path, files: Files) -> tuple[Mapping[str, object], dict[str, str]]:
    file = files.open(path)
    if path.suffix == ".safetensors":
        return read_header(file)
    return _mapping(read_torch(file), path), {}


def _mapping(value: object, path: Path) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ArgumentError(
            f"{path.name} must hold tensors by name, got another object. Save a state dict, not a "
            "model or a list."
        )
    return value


def trusted_ties(tensors: Iterable[str], metadata: Mapping[str, str]) -> dict[str, str]:
    """The ties that metadata notes, and not its other words that happen to look like one.

    Ours are listed as ties. Others note them as {dropped name: kept name} beside anything: there a
    name without a dot, such as "license", is one only where the metadata has no other words.
    """
    noted = noted_ties(tensors, metadata)
    listed = noted_ties(tensors, {"polyak": metadata.get("polyak", "{}")})
    only_ties = metadata.keys() <= {*noted, "format", "polyak"}
    return {n: kept for n, kept in noted.items() if only_ties or n in listed or "." in n}


def is_weights_name(name: str) -> bool:
    """Whether a folder's weights are looked for under this name."""
    return name in _WEIGHTS


def inside(folder: Path, name: str, *, listed_in: str | None = None) -> Path:
    """A file of the folder by its plain name, or an `ArgumentError` when it is none.

    A link may not lead out of the folder, except into the blobs of the Hugging Face cache that the
    folder belongs to: `models--x/snapshots/<revision>/name` links to `models--x/blobs/<hash>`.
    """
    by = "" if listed_in is None else f", which {listed_in} lists,"
    plain = name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}
    path = folder / name if plain else folder
    if not plain:
        raise ArgumentError(
            f"{name!r:.80}{by} must be a plain name of a file in the folder. "
            "Write an index without folders in it."
        )
    try:
        real, home = path.resolve(strict=True), folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle; half a letter
        raise ArgumentError(
            f"{name!r:.80}{by} must be a file in {str(folder)!r}, got none. Download it again."
        ) from error
    allowed = {home}
    if home.parent.name == "snapshots":
        allowed.add(home.parent.parent / "blobs")
    if real.parent not in allowed:
        raise ArgumentError(
            f"{name!r:.80}{by} must lie in its folder, got a link out of it. "
            "Copy the file into the folder."
        )
    return path


def read_json(path: Path, files: Files) -> dict[str, Any]:
    """A small file that holds a mapping in JSON."""
    file = files.open(path)
    if file.size > _LARGEST_JSON:
        raise ArgumentError(
            f"{path.name} must be a small file, got {file.size} bytes. Check that it is JSON."
        )
    try:
        value = json.loads(file.read(0, file.size).decode())
    except (ValueError, RecursionError) as error:
        raise ArgumentError(
            f"{path.name} must be JSON, got {error!s:.80}. Download the folder again."
        ) from error
    if not isinstance(value, dict):
        raise ArgumentError(
            f"{path.name} must hold names in JSON, got {type(value).__name__}. "
            "Download the folder again."
        )
    return value


def _with_side_files(contents: Contents, folder: Path, files: Files) -> Contents:
    """What lies beside weights and belongs to the model: its config, its tokenizer."""
    side = []
    for path in sorted(folder.iterdir()):
        wanted = path.suffix in _SIDE_FILES and path.name not in _OF_TRAINING
        if not wanted or path.name.startswith(".") or path.name.endswith(_INDEX):
            continue
        try:
            inside(folder, path.name)
        except ArgumentError:
            continue  # a link to elsewhere is not followed
        if path.is_file() and path.stat().st_size <= _LARGEST_SIDE_FILE:
            side.append(path)
    config = folder / "config.json"
    hints: dict[str, Any] = {}
    if config in side:
        # It only helps to recognise an average: a broken one is no reason to refuse the weights.
        with suppress(ArgumentError):
            hints = read_json(config, files)
    return Contents(
        contents.kind, contents.tree, contents.metadata, contents.ties, tuple(side), hints
    )
