"""Damaged and malicious checkpoints, and what must hold when one of them is opened.

A case is a file or folder with damage in one place: bytes flipped, cut or added, or a value of its
header, index or pickle replaced by one that a careless reader would trust. Opening and reading it
must end in an error of polyak, or in what an independent reader finds in the same bytes; within a
second, with memory of the order of the file, without running anything, inside of its folder.
"""

import copy
import gc
import io
import json
import os
import pickle
import random
import resource
import sys
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import polyak
from polyak._files import open_checkpoint

SECONDS = 1.0  # of the processor; a busy machine may take longer
PATIENCE = 20.0  # seconds by the clock, which a wait for something would exceed
ROOM = 2**26  # bytes of address space that opening any of these small files may take
Weights = dict[str, Tensor]
Oracle = Callable[[], Weights | None]  # what another reader finds; None: it has no answer


@dataclass(frozen=True)
class Case:
    """A damaged checkpoint.

    Args:
        path: the file or folder.
        what: the damage in words.
        oracle: an independent reader of the same bytes.
    """

    path: Path
    what: str
    oracle: Oracle


def weights() -> Weights:
    """Small tensors of several widths, one without elements and one without dimensions."""
    generator = torch.Generator().manual_seed(5)
    return {
        "body.weight": torch.randn(4, 3, generator=generator),
        "body.bias": torch.randn(4, generator=generator).to(torch.bfloat16),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "mask": torch.tensor([True, False, True]),
        "wide": torch.randn(5, generator=generator, dtype=torch.float64),
    }


# ── what must hold ───────────────────────────────────────────────────────────────────────────────

_opened: list[str] | None = None


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str | bytes | Path):
        path = os.fsdecode(arguments[0])
        if not path.endswith((".py", ".pyc")):  # Python imports an encoding when it first needs it
            _opened.append(path)


sys.addaudithook(_note_opened)


@contextmanager
def paths_opened() -> Iterator[list[str]]:
    """The paths of all files that are opened in the block."""
    global _opened
    found: list[str] = []
    _opened = found
    try:
        yield found
    finally:
        _opened = None


@contextmanager
def limited_memory(room: int) -> Iterator[None]:
    """No more than `room` bytes of address space beyond what the process has."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def read_all(path: Path) -> Weights:
    """Everything that polyak finds, each tensor whole and also in two stretches."""
    found = {}
    with open_checkpoint(path) as checkpoint:
        for name, info in checkpoint.tensors.items():
            whole = checkpoint.read(name)
            middle = info.numel // 2
            halves = checkpoint.read(name, 0, middle), checkpoint.read(name, middle)
            assert same(torch.cat(halves), whole)
            found[name] = whole.view(info.shape)
    return found


def check(case: Case, canary: Path) -> bool:
    """Open and read a case; return whether it was refused."""
    folder = case.path if case.path.is_dir() else case.path.parent
    found: Weights | None = None
    message = ""
    gc.disable()  # a collection that falls into this case is not its doing
    with limited_memory(ROOM), paths_opened() as opened:
        begin, clock = time.process_time(), time.monotonic()
        try:
            found = read_all(case.path)
        except polyak.AveragingError as error:
            message = str(error)
        seconds, waited = time.process_time() - begin, time.monotonic() - clock
    gc.enable()
    assert seconds < SECONDS, f"{case.what}: {seconds:.2f} s"
    assert waited < PATIENCE, f"{case.what}: {waited:.2f} s"
    assert len(message) < 1000, f"{case.what}: {message:.2000}"
    assert not canary.exists(), f"{case.what}: the pickle was executed"
    outside = [path for path in opened if Path(path).resolve().parent != folder.resolve()]
    assert not outside, f"{case.what}: opened {outside}"
    if found is None:
        return True
    expected = case.oracle()
    if expected is not None:
        assert found.keys() == expected.keys(), f"{case.what}: {found.keys()}"
        wrong = [name for name in expected if not same(found[name], expected[name])]
        assert not wrong, f"{case.what}: {wrong}"
    return False


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN too."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    copies = (torch.empty(t.numel(), dtype=t.dtype).copy_(t.detach().reshape(-1)) for t in (a, b))
    return torch.equal(*(t.view(torch.uint8) for t in copies))


# ── damage ───────────────────────────────────────────────────────────────────────────────────────


def damaged_bytes(data: bytes, pick: random.Random, low: int = 0, high: int | None = None) -> bytes:
    """Some bytes between `low` and `high` flipped, set, cut out, doubled, or the end cut off."""
    high = len(data) if high is None else high
    at = pick.randrange(low, max(high, low + 1))
    kind = pick.randrange(7)
    if kind <= 2:
        out = bytearray(data)
        for _ in range(pick.choice((1, 1, 2, 8))):
            out[pick.randrange(low, high)] ^= 1 << pick.randrange(8)
        return bytes(out)
    if kind == 3:
        extreme = pick.choice((b"\xff", b"\x00", b"\x7f", b"\x80")) * pick.choice((1, 2, 4, 8))
        return data[:at] + extreme + data[at + len(extreme) :]
    if kind == 4:
        return data[:at] + data[at + pick.randrange(1, 9) :]
    if kind == 5:
        return data[:at] + data[at : at + pick.randrange(1, 9)] + data[at:]
    return data[:at]


def nested(depth: int) -> Any:
    """A list in a list in a list."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def odd_value(pick: random.Random) -> Any:
    """A value that a header should not have in this place."""
    return pick.choice(
        (
            -1,
            0,
            1,
            2**31,
            2**63 - 1,
            2**63,
            2**64,
            10**30,
            1.5,
            -0.0,
            float("nan"),
            float("inf"),
            True,
            None,
            "",
            "a",
            "../outside",
            "/etc/passwd",
            "\ud800",
            "F32",
            "I64",
            "F4",
            [],
            {},
            [0, 2**62],
            [2**62, 0],
            [0, 8],
            [2**32, 2**32],
            [1] * 70,
            nested(50),
        )
    )


def damaged_json(value: Any, pick: random.Random) -> Any:
    """One entry at some depth replaced, removed, moved or added."""
    value = copy.deepcopy(value)
    here = value
    while True:
        keys: list[Any] = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            return value
        key = pick.choice(keys)
        if isinstance(here[key], dict | list) and here[key] and pick.random() < 0.7:
            here = here[key]
            continue
        kind = pick.randrange(4)
        if kind <= 1:
            here[key] = odd_value(pick)
        elif kind == 2:
            other = pick.choice(keys)
            here[key], here[other] = here[other], here[key]
        elif isinstance(here, dict):
            here[odd_key(pick)] = here.pop(key)
        else:
            here.append(odd_value(pick))
        return value


def odd_key(pick: random.Random) -> str:
    return pick.choice(("", "x" * 300, "__metadata__", "dtype", "a/b", "../c", "\ud800", "\x00"))


# ── safetensors ──────────────────────────────────────────────────────────────────────────────────


def safetensors_cases(folder: Path, seed: int, count: int) -> Iterator[Case]:
    """Headers that lie about lengths, shapes, dtypes and places."""
    pick = random.Random(seed)
    good = safetensors.torch.save(weights(), {"format": "pt", "tied": "count"})
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    path = folder / "model.safetensors"

    def oracle() -> Weights | None:
        try:
            found = safetensors.torch.load(path.read_bytes())
        except (SafetensorError, UnicodeError) as error:
            raise AssertionError(f"safetensors itself refuses the file: {error}") from error
        with open_checkpoint(path) as checkpoint:  # ties are ours to add
            return found | {n: found[kept] for n, kept in checkpoint.aliases.items()}

    for number in range(count):
        kind = pick.randrange(5)
        if kind <= 1:
            words = json.dumps(damaged_json(header, pick)).encode()
            data = len(words).to_bytes(8, "little") + words + good[8 + length :]
        elif kind == 2:
            data = damaged_bytes(good, pick, 8, 8 + length)
        elif kind == 3:
            wrong = pick.choice((0, 1, length - 1, length + 1, len(good), 2**31, 2**63, 2**64 - 1))
            data = wrong.to_bytes(8, "little") + good[8:]
        else:
            data = pick.choice((deep_header, long_number, twice, damaged_bytes))(good, pick)
        path.write_bytes(data)
        yield Case(path, f"safetensors {seed}/{number}", oracle)


def deep_header(good: bytes, pick: random.Random) -> bytes:
    depth = pick.choice((1_000, 100_000))
    words = pick.choice((b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth))
    return len(words).to_bytes(8, "little") + words


def long_number(good: bytes, pick: random.Random) -> bytes:
    words = b'{"a":{"dtype":"F32","shape":[' + b"9" * pick.choice((40, 5_000)) + b"]}}"
    return len(words).to_bytes(8, "little") + words


def twice(good: bytes, pick: random.Random) -> bytes:
    entry = '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    words = f"{{{entry},{entry}}}".encode()
    return len(words).to_bytes(8, "little") + words + b"\x01"


# ── the index of shards ──────────────────────────────────────────────────────────────────────────


def index_cases(folder: Path, seed: int, count: int) -> Iterator[Case]:
    """Indexes that name other tensors, other files, files elsewhere and links."""
    pick = random.Random(seed)
    (folder.parent / "outside.safetensors").write_bytes(safetensors.torch.save(weights()))
    good = weights()
    shards = {"one.safetensors": list(good)[:3], "two.safetensors": list(good)[3:]}
    for shard, names in shards.items():
        safetensors.torch.save_file({name: good[name] for name in names}, folder / shard)
    listed = {name: shard for shard, names in shards.items() for name in names}
    index: dict[str, Any] = {"metadata": {"total_size": 99}, "weight_map": listed}
    path = folder / "model.safetensors.index.json"
    link = folder / "link.safetensors"
    link.symlink_to(folder.parent / "outside.safetensors")
    elsewhere = (
        "../outside.safetensors",
        str(folder.parent / "outside.safetensors"),
        "link.safetensors",
        "..",
        ".",
        "",
        "missing.safetensors",
        "two.safetensors/../one.safetensors",
        "./one.safetensors",
        "one.safetensors\x00",
        path.name,
    )
    text = json.dumps(index)
    for number in range(count):
        kind = pick.randrange(3)
        if kind == 0:
            data = json.dumps(damaged_json(index, pick)).encode()
        elif kind == 1:
            name, where = pick.choice(list(good)), pick.choice(elsewhere)
            changed = copy.deepcopy(index)
            changed["weight_map"][name] = where
            data = json.dumps(changed).encode()
        else:
            data = damaged_bytes(text.encode(), pick)
        path.write_bytes(data)
        yield Case(folder, f"index {seed}/{number}: {data[:300]!r}", lambda: good)


# ── files of torch.save ──────────────────────────────────────────────────────────────────────────


def torch_cases(folder: Path, seed: int, count: int, canary: Path) -> Iterator[Case]:
    """Archives and pickles that lie, and pickles that would run something."""
    pick = random.Random(seed)
    state = OrderedDict(weights())
    state["view"] = state["wide"][1:4]
    state["turned"] = state["body.weight"].t()
    state["spread"] = torch.ones(1).expand(3)
    good = {legacy: saved({"model": state, "step": 3}, legacy=legacy) for legacy in (False, True)}
    path = folder / "last.pt"

    def oracle() -> Weights | None:
        try:
            found = torch.load(path, weights_only=True)
            inner = [value for value in found.values() if isinstance(value, dict)]
            place = found.get("model") or (inner[0] if inner else found)
            return {n: t for n, t in place.items() if isinstance(t, Tensor) and type(n) is str}
        except Exception:  # whatever torch says: it has no answer to compare with
            return None

    for number in range(count):
        legacy = pick.random() < 0.2
        kind = pick.randrange(4)
        if kind == 0:
            data = damaged_bytes(good[legacy], pick)
        elif kind == 1 and not legacy:
            data = with_pickle(good[False], lambda pickled: damaged_bytes(pickled, pick))
        elif kind <= 2:
            data = with_pickle(saved(malicious(state, canary, pick)), lambda pickled: pickled)
        else:
            data = odd_archive(good[False], pick)
        path.write_bytes(data)
        yield Case(path, f"torch {seed}/{number} ({kind=}, {legacy=})", oracle)


class Runs:
    """Something whose pickle makes a folder when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def malicious(state: Weights, canary: Path, pick: random.Random) -> Any:
    """A checkpoint with a command among or beside its tensors."""
    runs = Runs(canary)
    return pick.choice(
        (
            runs,
            {"model": runs},
            {**state, "x": runs},
            {"model": state, "args": runs},
            {"model": {**state, "deep": {"er": [runs]}}},
            {"model": state, "step": runs},
        )
    )


def saved(value: Any, *, legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def with_pickle(archive: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The archive with its pickle changed, all else as it was."""
    return rewritten(archive, lambda name, data: change(data) if name.endswith(".pkl") else data)


def rewritten(
    archive: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED
) -> bytes:
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(archive)) as old,
        zipfile.ZipFile(stream, "w", compression) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))
    return stream.getvalue()


def odd_archive(archive: bytes, pick: random.Random) -> bytes:
    """Compressed, another byte order, a damaged directory, odd pickles."""
    kind = pick.randrange(5)
    if kind == 0:
        return rewritten(archive, lambda _, data: data, zipfile.ZIP_DEFLATED)
    if kind == 1:
        order = pick.choice((b"big", b"", b"little "))
        return rewritten(archive, lambda n, data: order if n.endswith("byteorder") else data)
    if kind == 2:
        start = archive.rindex(b"PK\x01\x02")
        return damaged_bytes(archive, pick, start)
    if kind == 3:
        shorter = pick.choice((0, 1, 4))
        return rewritten(archive, lambda n, data: data[:shorter] if "/data/" in n else data)
    return with_pickle(archive, lambda _: odd_pickle(pick))


def odd_pickle(pick: random.Random) -> bytes:
    """Programs that fill the stack, the memory or the call stack of a careless reader."""
    many = pick.choice((1_000, 100_000))
    return b"\x80\x02" + pick.choice(
        (
            b"]" + b"]q\x00" * many + b"a" * many + b".",  # deep lists
            b")" + b"\x85" * many + b"}" + b"2" + b"0s.",  # deep tuples
            b"}" + b")" + b"\x85" * many + b"K\x01s.",  # a deep tuple as a key
            b"N" + b"r\xff\xff\xff\x7f" + b".",  # a memory of 2**31 entries
            b"X\xff\xff\xff\x7fa.",  # a text longer than the file
            b"\x8b\xff\xff\xff\x7f.",  # a number longer than the file
            b"\x8e" + b"\xff" * 7 + b"\x7f.",
            b"]q\x00" + b"(" + b"h\x00" * 30 + b"e" + b".",  # a list that holds itself
            b"}q\x00" + b"X\x01\x00\x00\x00ah\x00s.",  # a dict that holds itself
            b"".join(b"]q%c(h%ch%ce" % (i, i - 1, i - 1) for i in range(1, 200)).replace(
                b"(h\x00h\x00e", b"", 1
            ) + b".",  # each list twice in the next
            b"(" * many + b".",
            b"\x80\x05\x95" + b"\xff" * 8 + b".",
        )
    )  # fmt: skip


# ── small files that ask for much ────────────────────────────────────────────────────────────────


def with_program(program: bytes) -> bytes:
    """A file of torch.save with this in place of its pickle."""
    return with_pickle(saved({"w": torch.ones(1)}), lambda _: program)


def wide_views(count: int) -> bytes:
    """Each of 8 to 16 MiB, and each of the same four bytes."""
    one = torch.zeros(1)
    return saved({str(n): one.expand(2**22 - n) for n in range(count)})


def repeated_call(function: bytes, close: bytes, times: int) -> bytes:
    """One list (`close` is "l") or tuple ("t") of 10,000 pairs, made into something else."""
    pairs = b"".join(b"J" + n.to_bytes(4, "little") + b"N\x86" for n in range(10_000))
    kept = b"(" + pairs + close + b"q\x000c" + function + b"\nq\x010]("
    return b"\x80\x02" + kept + b"h\x01h\x00\x85R" * times + b"e."


def colliding(count: int) -> bytes:
    """Keys of one hash, which a dict would compare with each other."""
    keys = ((2**61 - 1) * n for n in range(1, count + 1))
    items = b"".join(b"\x8a\x10" + key.to_bytes(16, "little", signed=True) + b"N" for key in keys)
    return b"\x80\x02}(" + items + b"u."


# ── torch.distributed.checkpoint ─────────────────────────────────────────────────────────────────


def dcp_cases(folder: Path, seed: int, count: int, canary: Path) -> Iterator[Case]:
    """Metadata with other places, sizes and files, and metadata that would run something."""
    pick = random.Random(seed)
    good = weights()
    save_dcp({"model": good, "step": 3}, folder)
    path = folder / ".metadata"
    pickled = path.read_bytes()
    (folder / "link").symlink_to(folder.parent / "outside.safetensors")
    for number in range(count):
        kind = pick.randrange(3)
        metadata = pickle.loads(pickled)
        oracle: Oracle = no_answer
        if kind == 0:
            data = damaged_bytes(pickled, pick)
        elif kind == 1:
            damage_metadata(metadata, pick)
            data = pickle.dumps(metadata, protocol=pick.choice((2, 4, 5)))
            oracle = partial(assembled, folder, metadata)
        else:
            runs = Runs(canary)
            place = pick.choice((metadata, next(iter(metadata.storage_data.values()))))
            setattr(place, pick.choice(("storage_meta", "relative_path", "version")), runs)
            data = pickle.dumps(pick.choice((metadata, runs, {"a": runs})))
        path.write_bytes(data)
        yield Case(folder, f"dcp {seed}/{number} ({kind=})", oracle)


def no_answer() -> None:
    """Damaged metadata may mean anything."""


def save_dcp(state: dict[str, Any], folder: Path) -> None:
    """Save in this process alone, without the warning that there are no others."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp_save(state, checkpoint_id=folder, no_dist=True)


def damage_metadata(metadata: Any, pick: random.Random) -> None:
    """One field of one entry changed."""
    place = pick.choice(list(metadata.storage_data.values()))
    tensors = [t for t in metadata.state_dict_metadata.values() if hasattr(t, "chunks")]
    tensor = pick.choice(tensors)
    chunk = pick.choice(tensor.chunks)
    other = pick.choice(list(metadata.storage_data.values()))
    sizes = torch.Size(pick.choice(([], [1], [4, 3], [2**40], [2**62, 2], [0], [2, 2, 3])))
    files = ("../outside.safetensors", "/etc/passwd", "link", "missing", "", ".metadata", "..")

    def set_to(target: Any, name: str, value: Any) -> Callable[[], None]:
        return lambda: object.__setattr__(target, name, value)

    pick.choice(
        (
            set_to(place, "relative_path", pick.choice(files)),
            set_to(place, "offset", pick.choice((-1, 1, 2**40, 2**70, other.offset))),
            set_to(place, "length", pick.choice((-1, 0, 1, 2**40, 2**70, other.length))),
            set_to(place, "transform_descriptors", ["zstd"]),
            set_to(tensor, "size", sizes),
            set_to(chunk, "sizes", sizes),
            set_to(chunk, "offsets", sizes),
            lambda: tensor.chunks.append(chunk),
            lambda: tensor.chunks.clear(),
            set_to(tensor.properties, "dtype", pick.choice((torch.int8, torch.float16))),
            lambda: metadata.storage_data.popitem() and None,
            lambda: metadata.planner_data.clear(),
            set_to(metadata, "planner_data", dict.fromkeys(metadata.planner_data, ("model",))),
            set_to(metadata, "storage_data", None),
            set_to(metadata, "state_dict_metadata", {}),
        )
    )()


def assembled(folder: Path, metadata: Any) -> Weights | None:
    """The tensors by the slow way: every piece loaded by torch and put in its place."""
    found: Weights = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not hasattr(entry, "chunks"):
            continue
        whole = torch.zeros(entry.size, dtype=entry.properties.dtype)
        for index, place in metadata.storage_data.items():
            if index.fqn == name and whole.numel():
                data = (folder / place.relative_path).read_bytes()
                piece = data[place.offset : place.offset + place.length]
                tensor = torch.load(io.BytesIO(piece), weights_only=True)
                pairs = zip(index.offset, tensor.shape, strict=True)
                whole[tuple(slice(first, first + size) for first, size in pairs)] = tensor
        nested = name in metadata.planner_data
        found[name.removeprefix("model.") if nested else name] = whole
    return found
