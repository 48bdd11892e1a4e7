"""Safetensors files: tensors by name and a few words about them, no code.

Eight bytes of length, a header in JSON, then the elements; the format is described at
https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._errors import ArgumentError
from ._atomic import written_whole
from ._bytes import File
from ._stored import Stored, TensorInfo, checked_shape

_LONGEST_HEADER = 100_000_000  # bytes, as every reader of the format has it
_NOTED = "__metadata__"

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
NAMES = {dtype: name for name, dtype in DTYPES.items()}


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


def read_header(file: File) -> tuple[dict[str, Stored], dict[str, str]]:
    """Tensors by name in the order of their bytes, and the metadata; all of it checked.

    Every byte of the file belongs to the header or to exactly one tensor.
    """
    header, begin = _parsed(file)
    metadata = header.pop(_NOTED, None)
    if metadata is None:  # absent, or null as other writers have it
        metadata = {}
    if not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise _damaged(file, "its metadata is not words by name")
    tensors = {name: _entry(file, name, entry, begin) for name, entry in header.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].info.nbytes)))
    expected = begin
    for name, stored in ordered.items():
        if stored.offset != expected:
            raise _damaged(file, f"{name!r:.80} does not begin where the tensor before it ends")
        expected += stored.info.nbytes
    if expected != file.size:
        raise _damaged(file, f"its tensors end at byte {expected} of {file.size}")
    return ordered, metadata


def _parsed(file: File) -> tuple[dict[str, Any], int]:
    """The header as a dict, and where the elements begin."""
    if file.size < 8:
        raise _damaged(file, f"it has {file.size} bytes")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(file.size - 8, _LONGEST_HEADER):
        raise _damaged(file, f"its header claims {length} bytes of {file.size}")
    try:
        header = json.loads(file.read(8, length).decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header is not JSON: {error!s:.80}") from error
    if not isinstance(header, dict):
        raise _damaged(file, "its header holds no names")
    return header, 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    # Half of a surrogate pair is no text; this raises, as a ValueError, where there is one.
    "".join(word for pair in pairs for word in pair if isinstance(word, str)).encode()
    return found


def _entry(file: File, name: str, entry: object, begin: int) -> Stored:
    """One tensor of the header, its place checked against its shape and the file."""
    if not (isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}):
        raise _damaged(file, f"{name!r:.80} lacks its dtype, shape or offsets")
    if not (isinstance(entry["dtype"], str) and entry["dtype"] in DTYPES):
        raise ArgumentError(
            f"{file.path.name}: the dtype of {name!r:.80} must be one of {', '.join(DTYPES)}, "
            f"got {entry['dtype']!r:.40}. Convert it, or leave the tensor out."
        )
    info = TensorInfo(DTYPES[entry["dtype"]], checked_shape(entry["shape"], name, file.path.name))
    place = entry["data_offsets"]
    if not (isinstance(place, list) and [type(offset) for offset in place] == [int, int]):
        raise _damaged(file, f"the offsets of {name!r:.80} are not two whole numbers")
    first, end = place
    if not 0 <= first <= end <= file.size - begin or end - first != info.nbytes:
        raise _damaged(file, f"the offsets of {name!r:.80} do not fit its shape or the file")
    return Stored(file, begin + first, info)


def noted_ties(tensors: Iterable[str], metadata: Mapping[str, str]) -> dict[str, str]:
    """Names that were dropped for a tie, with the name that was kept.

    `safetensors.torch.save_model` notes them as {dropped name: kept name} beside {"format": "pt"},
    and so do we; `save` also lists them under "polyak", where no other key can take their place.
    """
    present = set(tensors)
    noted = {name: kept for name, kept in metadata.items() if name != "format"}
    try:
        ours = json.loads(metadata.get("polyak", "{}"))["ties"]
        noted |= {name: kept for name, kept in ours.items() if isinstance(kept, str)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # another writer's words
    return {name: kept for name, kept in noted.items() if name not in present and kept in present}


def _damaged(file: File, why: str) -> ArgumentError:
    return ArgumentError(
        f"path must be a whole safetensors file, got {str(file.path)!r} ({why}). "
        "Copy or download it again."
    )


# ── writing ──────────────────────────────────────────────────────────────────────────────────────


def encoded_header(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file, and the byte at which each tensor begins.

    Wide elements come first, so that every tensor is aligned to its element; else the order is
    kept, and the same call gives the same bytes.
    """
    header: dict[str, Any] = {_NOTED: dict(metadata)}
    offsets, end = {}, 0
    for name, info in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        offsets[name], end = end, end + info.nbytes
        header[name] = {
            "dtype": NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offsets[name], end],
        }
    try:
        words = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(f"names must be valid text, got {error.object!r:.80}.") from error
    words += b" " * (-len(words) % 8)
    if len(words) > _LONGEST_HEADER:
        raise ArgumentError(
            f"tensors must be few enough for a header of {_LONGEST_HEADER} bytes, got "
            f"{len(words)}. Pass max_shard_size."
        )
    begin = 8 + len(words)
    return len(words).to_bytes(8, "little") + words, {n: begin + at for n, at in offsets.items()}


def check_known(tensors: Mapping[str, TensorInfo], remedy: str) -> None:
    """Raise unless the format can hold tensors of these names and dtypes."""
    foreign = [name for name, info in tensors.items() if info.dtype not in NAMES]
    if foreign:
        raise ArgumentError(
            f"safetensors must be given dtypes that it knows, got {tensors[foreign[0]].dtype} for "
            f"{foreign[:3]}. {remedy}"
        )
    if _NOTED in tensors:
        raise ArgumentError(f"safetensors must be given other names, got {_NOTED!r}. {remedy}")


def element_bytes(values: Tensor) -> memoryview:
    """The bytes of a tensor, row by row, without a copy where it lies so in memory already."""
    plain = values.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # Not reshape: it keeps the odd stride that a single element may have.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy().data


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file whole or not at all."""
    infos = {name: TensorInfo(value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    check_known(infos, "Use torch.save(average.weights(), path) instead.")
    with written_whole(path) as temporary:
        save_file(tensors, str(temporary), metadata={**metadata, "format": "pt"})


def save_file(tensors: Mapping[str, Tensor], filename: str, metadata: Mapping[str, str]) -> None:
    """Write header and tensors one after another."""
    infos = {name: TensorInfo(value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    header, offsets = encoded_header(infos, metadata)
    with open(filename, "wb") as file:
        file.write(header)
        for name in offsets:
            file.write(element_bytes(tensors[name]))
