"""Checkpoints of every format: the tensors that are in them, in bounded memory, nothing run."""

import errno
import gc
import io
import json
import os
import pickle
import random
import shutil
import time
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import polyak
from files.hostile import (
    Runs,
    check,
    colliding,
    dcp_cases,
    index_cases,
    limited_memory,
    repeated_call,
    rewritten,
    safetensors_cases,
    same,
    save_dcp,
    saved,
    torch_cases,
    weights,
    wide_views,
    with_pickle,
    with_program,
)
from files.layouts import LAYOUTS, Net, live_and_average
from polyak._files import (
    Checkpoint,
    TensorInfo,
    _atomic,
    _bytes,
    checkpoint_writer,
    folder_written_whole,
    open_checkpoint,
)
from snags import pressed_at_line

Weights = dict[str, Tensor]


def contents(path: Path, *, key: str | None = None) -> Weights:
    """All tensors of a checkpoint."""
    with open_checkpoint(path, key=key) as checkpoint:
        return {n: checkpoint.read(n).view(i.shape) for n, i in checkpoint.tensors.items()}


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert same(found[name], expected[name]), name


def infos(tensors: Weights) -> dict[str, TensorInfo]:
    return {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


# ── every format, the same tensors ───────────────────────────────────────────────────────────────


def as_safetensors(tensors: Weights, folder: Path) -> Path:
    safetensors.torch.save_file(tensors, folder / "a.safetensors", {"format": "pt"})
    return folder / "a.safetensors"


def as_shards(tensors: Weights, folder: Path) -> Path:
    names = list(tensors)
    listed: dict[str, str] = {}
    for shard, part in {"one.safetensors": names[::2], "two.safetensors": names[1::2]}.items():
        safetensors.torch.save_file({n: tensors[n] for n in part}, folder / shard)
        listed |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": {name: listed[name] for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


def as_torch(tensors: Weights, folder: Path) -> Path:
    torch.save(tensors, folder / "a.pt")
    return folder / "a.pt"


def as_legacy(tensors: Weights, folder: Path) -> Path:
    torch.save(tensors, folder / "a.pt", _use_new_zipfile_serialization=False)
    return folder / "a.pt"


def as_torch_shards(tensors: Weights, folder: Path) -> Path:
    names = list(tensors)
    torch.save({n: tensors[n] for n in names[::2]}, folder / "one.bin")
    torch.save({n: tensors[n] for n in names[1::2]}, folder / "two.bin")
    listed = {n: ("one.bin", "two.bin")[i % 2] for i, n in enumerate(names)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": listed}))
    return folder


def as_dcp(tensors: Weights, folder: Path) -> Path:
    save_dcp({"model": tensors}, folder)
    return folder


FORMATS = {
    "safetensors file": as_safetensors,
    "sharded safetensors, 2 files": as_shards,
    "torch file": as_torch,
    "legacy torch file": as_legacy,
    "sharded torch, 2 files": as_torch_shards,
    "torch distributed checkpoint": as_dcp,
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_tensors_that_were_saved(kind: str, tmp_path: Path) -> None:
    """Bit for bit, with dtype and shape known before, and the format in plain words."""
    path = FORMATS[kind](weights(), tmp_path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.kind == kind
        assert checkpoint.origin is None
        assert dict(checkpoint.tensors) == infos(weights())
        assert (checkpoint.aliases, checkpoint.left_out, checkpoint.prefix) == ({}, (), "")
    assert_same(contents(path), weights())
    assert_same(polyak.load_weights(path), weights())


@pytest.mark.parametrize("kind", FORMATS)
def test_every_stretch_is_that_of_the_flattened_tensor(kind: str, tmp_path: Path) -> None:
    """Whatever lies on disk: [start, stop) of the rows, in memory of its own."""
    cube = torch.arange(2 * 3 * 4, dtype=torch.int16).view(2, 3, 4)
    path = FORMATS[kind]({"cube": cube, "w": torch.ones(1)}, tmp_path)
    with open_checkpoint(path) as checkpoint:
        for start in range(25):
            for stop in range(start, 25):
                piece = checkpoint.read("cube", start, stop)
                assert torch.equal(piece, cube.view(-1)[start:stop])
        checkpoint.read("cube").zero_()
        assert torch.equal(checkpoint.read("cube"), cube.view(-1))


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float8_e5m2, torch.uint16, torch.bool])
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files_hold_every_dtype(dtype: torch.dtype, legacy: bool, tmp_path: Path) -> None:
    """Also those that torch saves with a storage of mere bytes."""
    tensor = torch.tensor([0.0, 1.0, 2.0]).to(dtype)
    path = tmp_path / "a.pt"
    torch.save({"x": tensor, "w": torch.ones(1)}, path, _use_new_zipfile_serialization=not legacy)
    assert_same(contents(path), {"x": tensor, "w": torch.ones(1)})


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x[1:, ::3],
        lambda x: x[:, 5],
        lambda x: x[3],
        lambda x: x[0, :1].expand(4, 7),
        lambda x: x.view(30, 5, 40).permute(2, 0, 1),
        lambda x: x.view(3, 10, 20, 10).to(memory_format=torch.channels_last),
        lambda x: x.as_strided((5, 5), (1, 1)),
        lambda x: x[:0],
    ],
)
def test_views_are_read_as_torch_reads_them(view: Any, legacy: bool, tmp_path: Path) -> None:
    """Transposed, cut, expanded, overlapping: any stretch, by any way through the storage."""
    base = torch.arange(6000.0).view(30, 200)
    path = tmp_path / "a.pt"
    torch.save({"base": base, "view": view(base)}, path, _use_new_zipfile_serialization=not legacy)
    expected = view(base).reshape(-1)
    pick = random.Random(0)
    with open_checkpoint(path) as checkpoint:
        assert same(checkpoint.read("view"), expected)
        for _ in range(50):
            start, stop = sorted(pick.choices(range(len(expected) + 1), k=2))
            assert same(checkpoint.read("view", start, stop), expected[start:stop])


def test_a_transposed_tensor_is_read_in_bounded_memory(tmp_path: Path) -> None:
    """A stretch of it takes memory of the order of the stretch, not of the tensor."""
    base = torch.randn(1_000, 2_000)
    torch.save({"t": base.t()}, tmp_path / "a.pt")
    reads: list[int] = []
    with open_checkpoint(tmp_path / "a.pt") as checkpoint, pytest.MonkeyPatch.context() as patch:
        plain = _bytes.File.read_elements

        def noting(self: Any, offset: int, count: int, dtype: torch.dtype) -> Tensor:
            reads.append(count)
            return plain(self, offset, count, dtype)

        patch.setattr(_bytes.File, "read_elements", noting)
        assert torch.equal(checkpoint.read("t", 500, 1_700), base.t().reshape(-1)[500:1_700])
    assert max(reads) <= 3 * 1_200 + 4_096


# ── ties ─────────────────────────────────────────────────────────────────────────────────────────


def test_tied_names_are_known_in_torch_files(tmp_path: Path) -> None:
    """The same view of the same bytes is a tie; a part of them is not."""
    w = torch.ones(4, 4)
    torch.save({"a": w, "b": w, "part": w[:2], "t": w.t()}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert checkpoint.aliases == {"b": "a"}
        assert list(checkpoint.tensors) == ["a", "b", "part", "t"]


def test_noted_ties_are_listed_under_each_name(tmp_path: Path) -> None:
    """As safetensors' save_model and polyak.save note them."""
    model = Net()
    safetensors.torch.save_model(model, str(tmp_path / "a.safetensors"))
    polyak.save(polyak.Average(model), tmp_path / "b.safetensors")
    for name in ("a", "b"):
        with open_checkpoint(tmp_path / f"{name}.safetensors") as checkpoint:
            assert checkpoint.aliases in (
                {"encode.weight": "decode.weight"},
                {"decode.weight": "encode.weight"},
            )
            assert checkpoint.tensors.keys() == model.state_dict().keys()


# ── averages of others ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("library", LAYOUTS)
def test_averages_of_other_libraries_are_recognised(library: str, tmp_path: Path) -> None:
    """The average, not the live weights beside it; loaded strictly into the plain model."""
    make, origin, step = LAYOUTS[library]
    path = make(tmp_path)
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.origin, checkpoint.step) == (origin, step)
    fresh = Net()
    polyak.load_weights(path, fresh)
    _, average = live_and_average()
    fresh.load_state_dict(polyak.load_weights(path), strict=True)
    assert average["norm.weight"][0] == 2  # the live ones are 1
    assert torch.equal(fresh.norm.weight.detach(), average["norm.weight"])
    assert fresh.norm.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("library", "key"),
    [
        ("ema-pytorch", "model"),
        ("ema-pytorch", "ema.online_model"),
        ("timm", "state_dict"),
        ("lightning", "current_model_state"),
    ],
)
def test_the_live_weights_are_there_for_who_asks(library: str, key: str, tmp_path: Path) -> None:
    """By the way to them, also where only a prefix of names leads there."""
    path = LAYOUTS[library][0](tmp_path)
    found = contents(path, key=key)
    assert found.keys() == Net().state_dict().keys()
    assert torch.equal(found["norm.weight"], torch.ones(4))


def trained_average() -> tuple[nn.Module, polyak.Average]:
    model = Net()
    average = polyak.Average(model, polyak.Uniform())
    for step in (10, 20, 40):
        with torch.no_grad():
            model.encode.weight.add_(1)
            model.get_buffer("norm.num_batches_tracked").add_(1)
        average.update(step)
    return model, average


@pytest.mark.parametrize("lent", [False, True])
def test_a_resume_checkpoint_gives_the_full_averaged_set(lent: bool, tmp_path: Path) -> None:
    """The average, completed from the model beside it, tied names too; by torch.save and DCP."""
    model, average = trained_average()
    expected = average.weights()
    adam = torch.optim.Adam(model.parameters())

    def state() -> dict[str, Any]:
        both = {"average": average.state_dict(), "optimizer": adam.state_dict()}
        return {"model": nn.DataParallel(model).state_dict(), **both}

    if lent:
        with average.applied():
            torch.save(state(), tmp_path / "last.pt")
    else:
        torch.save(state(), tmp_path / "last.pt")
        save_dcp(state(), tmp_path / "dcp")
        assert_same(polyak.load_weights(tmp_path / "dcp"), expected)
    with open_checkpoint(tmp_path / "last.pt") as checkpoint:
        assert (checkpoint.origin, checkpoint.step) == ("polyak average", 40.0)
        assert checkpoint.aliases == {"decode.weight": "encode.weight"}
    assert_same(polyak.load_weights(tmp_path / "last.pt"), expected)


def test_several_averages_are_told_apart_by_their_key(tmp_path: Path) -> None:
    """None of them is the one that is meant, so all are listed."""
    model = Net()
    averages = polyak.Averages(model, {"short": polyak.Uniform(), "long": polyak.Power(gamma=3.0)})
    averages.update(5)
    path = tmp_path / "last.pt"
    torch.save({"model": model.state_dict(), "ema": averages.state_dict()}, path)
    with pytest.raises(polyak.ArgumentError, match=r"one of 'ema.averages.short' .* and|'ema.aver"):
        open_checkpoint(path)
    assert_same(contents(path, key="ema.averages.long"), averages["long"].weights())


def test_a_saved_average_says_so(tmp_path: Path) -> None:
    """From its metadata, with its time."""
    _, average = trained_average()
    polyak.save(average, tmp_path / "a.safetensors")
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        assert (checkpoint.origin, checkpoint.step) == ("polyak average", 40.0)


def test_two_saves_of_one_average_are_the_same_file(tmp_path: Path) -> None:
    """The order of tensors and metadata is that of the average, whatever the run."""
    _, average = trained_average()
    for name in ("a", "b"):
        polyak.save(average, tmp_path / f"{name}.safetensors")
    a, b = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("a", "b"))
    assert a == b


# ── places and names ─────────────────────────────────────────────────────────────────────────────


def test_the_usual_places_are_found_beside_other_things(tmp_path: Path) -> None:
    """A random state is no weight, an optimizer's moments are not the model's."""
    good = weights()
    for place in ("state_dict", "model", "model_state_dict", "net"):
        state = {
            place: good,
            "rng": torch.get_rng_state(),
            "optimizer": {"exp_avg": good},
            "step": 7,
        }
        torch.save(state, tmp_path / "a.pt")
        with open_checkpoint(tmp_path / "a.pt") as checkpoint:
            assert checkpoint.step == 7.0
        assert_same(contents(tmp_path / "a.pt"), good)


def test_several_places_are_listed(tmp_path: Path) -> None:
    """With the number of tensors in each, and `key` chooses."""
    torch.save({"G": weights(), "D": {"w": torch.ones(2)}}, tmp_path / "a.pt")
    with pytest.raises(polyak.ArgumentError, match=r"one of 'G' \(6 tensors\), 'D' \(1 tensors\)"):
        open_checkpoint(tmp_path / "a.pt")
    assert_same(contents(tmp_path / "a.pt", key="D"), {"w": torch.ones(2)})
    with pytest.raises(polyak.ArgumentError, match=r"key must be a place .* there are 'G', 'D'"):
        open_checkpoint(tmp_path / "a.pt", key="E")


def test_only_a_wrapper_common_to_all_names_is_stripped(tmp_path: Path) -> None:
    """And a model with a part called `module` still loads."""
    inner = {f"module._orig_mod.{name}": tensor for name, tensor in weights().items()}
    torch.save(inner, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert checkpoint.prefix == "module._orig_mod."
    assert_same(contents(tmp_path / "a.pt"), weights())
    torch.save({**inner, "head": torch.ones(1)}, tmp_path / "b.pt")
    assert contents(tmp_path / "b.pt").keys() == {*inner, "head"}

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 1)

    model, fresh = Part(), Part()
    torch.save(model.state_dict(), tmp_path / "c.pt")
    polyak.load_weights(tmp_path / "c.pt", fresh)
    assert_same(fresh.state_dict(), model.state_dict())
    polyak.save(polyak.Average(model), tmp_path / "c.safetensors")
    assert contents(tmp_path / "c.safetensors").keys() == model.state_dict().keys()


def test_what_is_no_tensor_is_named(tmp_path: Path) -> None:
    """Plain values and extra state are left out and listed; anything else is refused."""
    extra = {"version": 2, "body._extra_state": Runs(tmp_path / "canary")}
    torch.save({**weights(), **extra}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert checkpoint.left_out == ("version", "body._extra_state")
        assert checkpoint.tensors.keys() == weights().keys()
    for value, words in (
        (Runs(tmp_path / "canary"), r"posix\.mkdir as 'x'"),
        (torch.ones(2).to_sparse(), r"_rebuild_sparse_tensor as 'x'"),
        (torch.ones(2, dtype=torch.complex64).conj(), "conjugated"),
    ):
        torch.save({**weights(), "x": value}, tmp_path / "b.pt")
        with pytest.raises(polyak.ArgumentError, match=words):
            open_checkpoint(tmp_path / "b.pt")
    assert not (tmp_path / "canary").exists()


def test_parameters_and_tensors_with_attributes_are_tensors(tmp_path: Path) -> None:
    """Whatever torch wraps around them in the pickle."""
    marked, plain = nn.Parameter(torch.ones(2)), torch.ones(3)
    marked.no_decay = True  # type: ignore[attr-defined]
    plain.note = "x"  # type: ignore[attr-defined]
    state = OrderedDict(a=nn.Parameter(torch.ones(1)), b=marked, c=plain)
    torch.save(state, tmp_path / "a.pt")
    assert_same(contents(tmp_path / "a.pt"), {k: v.detach() for k, v in state.items()})


# ── folders ──────────────────────────────────────────────────────────────────────────────────────


def test_side_files_are_the_small_ones_that_belong_to_the_model(tmp_path: Path) -> None:
    """Config and tokenizer, no other weights, no optimizer, no link to elsewhere."""
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors.torch.save_file(weights(), folder / "model.safetensors")
    kept = ["config.json", "merges.txt", "spiece.model", "tokenizer.json"]
    for name in [*kept, "optimizer.pt", "trainer_state.json", ".hidden.json", "rng.pth"]:
        (folder / name).write_text("{}")
    (tmp_path / "secret.json").write_text("{}")
    (folder / "link.json").symlink_to(tmp_path / "secret.json")
    with open_checkpoint(folder) as checkpoint:
        assert [path.name for path in checkpoint.side_files] == kept


def test_the_cache_of_hugging_face_is_read_through_its_links(tmp_path: Path) -> None:
    """A snapshot holds links to blobs beside it; a link to anywhere else is refused."""
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "1", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    safetensors.torch.save_file(weights(), blobs / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    assert_same(contents(snapshot), weights())

    shutil.move(blobs / "abc", tmp_path / "abc")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "abc")
    with pytest.raises(polyak.ArgumentError, match="must lie in its folder, got a link out of it"):
        open_checkpoint(snapshot)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    """One error, before anything is read."""
    as_shards(weights(), tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(polyak.ArgumentError, match=r"'two.safetensors', which model.safetensors.i"):
        open_checkpoint(tmp_path)


def test_a_folder_without_one_checkpoint_is_refused(tmp_path: Path) -> None:
    """None, or several under unknown names."""
    with pytest.raises(polyak.ArgumentError, match="got 0 in"):
        open_checkpoint(tmp_path)
    for name in ("a", "b"):
        safetensors.torch.save_file(weights(), tmp_path / f"{name}.safetensors")
    with pytest.raises(polyak.ArgumentError, match=r"got 2 in .*\['a.safetensors', 'b.safe"):
        open_checkpoint(tmp_path)


def test_pieces_of_a_sharded_tensor_are_put_together(tmp_path: Path) -> None:
    """A grid of pieces in several files, as ranks write them; assembled by slices."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    whole = torch.randn(7, 5, 3)
    chunks, places = [], {}
    for rank, rows in enumerate((slice(0, 3), slice(3, 7))):
        data = b""
        for columns in (slice(0, 2), slice(2, 5)):
            piece = whole[rows, columns].clone()
            offset = torch.Size((rows.start, columns.start, 0))
            stored = saved(piece)
            index = MetadataIndex("w", offset)
            places[index] = _StorageInfo(f"__{rank}_0.distcp", len(data), len(stored))
            chunks.append(ChunkStorageMetadata(offset, piece.shape))
            data += stored
        (tmp_path / f"__{rank}_0.distcp").write_bytes(data)
    entry = TensorStorageMetadata(TensorProperties(torch.float32), whole.shape, chunks)
    metadata = Metadata({"w": entry}, None, places)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with open_checkpoint(tmp_path) as checkpoint:
        for start in range(0, 106, 5):
            for stop in range(start, 106, 7):
                expected = whole.reshape(-1)[start:stop]
                assert torch.equal(checkpoint.read("w", start, stop), expected)

    entry.chunks[1] = entry.chunks[0]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(polyak.ArgumentError, match="do not make up the whole"):
        open_checkpoint(tmp_path)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (pickle.dumps({"w": 1}), "a plain pickle"),
        (b"", "whole safetensors file"),
        (rewritten(saved({"w": torch.ones(1)}), lambda _, data: data, 8), "compressed"),
        (saved([torch.ones(1)]), "must hold tensors by name, got list"),
        (saved({"shadow_params": [torch.ones(1)], "decay": 0.9}), "shadow_params without names"),
        (saved({}), "got none"),
    ],
)
def test_what_is_no_checkpoint_is_refused_with_the_way_out(
    data: bytes, words: str, tmp_path: Path
) -> None:
    """By what it is."""
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(polyak.ArgumentError, match=words):
        open_checkpoint(tmp_path / "a")


def test_what_is_not_there_or_no_file_is_said(tmp_path: Path) -> None:
    """A pipe would wait for a writer for ever."""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_checkpoint(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(polyak.ArgumentError, match="path must be a file or a folder"):
        open_checkpoint(tmp_path / "pipe")


def test_an_unknown_dtype_is_refused_by_name(tmp_path: Path) -> None:
    """With those that are known."""
    header = json.dumps({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(polyak.ArgumentError, match=r"dtype of 'w' must be one of .*BF16.*got 'F4'"):
        open_checkpoint(tmp_path / "a.safetensors")


def test_elements_that_are_not_there_are_refused(tmp_path: Path) -> None:
    """Another name, a range outside, a closed checkpoint."""
    with open_checkpoint(as_safetensors(weights(), tmp_path)) as checkpoint:
        with pytest.raises(polyak.ArgumentError, match="name must be a tensor"):
            checkpoint.read("nothing")
        for start, stop in ((-1, 2), (2, 1), (0, 13)):
            with pytest.raises(polyak.ArgumentError, match="start and stop must be elements"):
                checkpoint.read("body.weight", start, stop)
    with pytest.raises(polyak.OrderError, match="while its checkpoint is open"):
        checkpoint.read("body.weight")


@pytest.mark.parametrize("change", ["cut", "replaced"])
def test_a_file_that_changes_while_it_is_open_is_refused(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut short, or another one under its name when it must be opened again."""
    monkeypatch.setattr(_bytes, "_OPEN_AT_ONCE", 1)
    path = as_safetensors(weights(), tmp_path)
    (tmp_path / "other").mkdir()
    other = as_safetensors(weights(), tmp_path / "other")
    with open_checkpoint(path) as checkpoint:
        if change == "cut":
            os.truncate(path, path.stat().st_size - 60)
        else:
            os.replace(shutil.copy(path, tmp_path / "new"), path)
            open_checkpoint(other).close()  # takes the one descriptor
        with pytest.raises(polyak.ArgumentError, match=r"cut short|must stay as it is"):
            _ = [checkpoint.read(name) for name in checkpoint.tensors]


def test_a_file_rewritten_in_place_while_it_is_open_is_refused(tmp_path: Path) -> None:
    """As torch.save does it: the same file, of the same size, with other weights."""
    path = tmp_path / "last.pt"
    torch.save({"w": torch.zeros(1_000)}, path)
    os.utime(path, ns=(0, 10**18))  # a while ago: clocks of file systems are coarse
    with open_checkpoint(path) as checkpoint:
        before = path.stat()
        assert not checkpoint.read("w").any()
        torch.save({"w": torch.ones(1_000)}, path)
        assert (path.stat().st_ino, path.stat().st_size) == (before.st_ino, before.st_size)
        with pytest.raises(polyak.ArgumentError, match="must stay as it is while it is read"):
            checkpoint.read("w", 10, 20)


def test_few_files_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many checkpoints there are, and from two threads."""
    monkeypatch.setattr(_bytes, "_OPEN_AT_ONCE", 3)
    open_before = len(os.listdir("/proc/self/fd"))
    checkpoints: list[Checkpoint] = []
    for number in range(8):
        (tmp_path / str(number)).mkdir()
        checkpoints.append(
            open_checkpoint(
                as_safetensors({"w": torch.full((1_000,), float(number))}, tmp_path / str(number))
            )
        )

    def read(number: int) -> bool:
        return bool((checkpoints[number % 8].read("w", number % 900) == number % 8).all())

    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(read, range(400)))
    assert len(os.listdir("/proc/self/fd")) <= open_before + 3
    for checkpoint in checkpoints:
        checkpoint.close()
    assert len(os.listdir("/proc/self/fd")) == open_before


# ── writing ──────────────────────────────────────────────────────────────────────────────────────


def test_elements_may_come_in_any_order_from_any_thread(tmp_path: Path) -> None:
    """The file is that of safetensors itself, and reads back the same."""
    good = weights()
    jobs = [(name, i) for name, tensor in good.items() for i in range(tensor.numel())]
    random.Random(0).shuffle(jobs)
    path = tmp_path / "a.safetensors"
    with checkpoint_writer(path, infos(good), metadata={"about": "a test"}) as writer:

        def write(job: tuple[str, int]) -> None:
            name, i = job
            writer.write(name, i, good[name].reshape(-1)[i : i + 1])

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(write, jobs))
    assert_same(safetensors.torch.load_file(path), good)
    assert_same(contents(path), good)
    with open_checkpoint(path) as checkpoint:
        assert dict(checkpoint.metadata) == {"about": "a test", "format": "pt"}
    with pytest.raises(polyak.OrderError, match="before the checkpoint is finished"):
        writer.write("count", 0, torch.tensor([1]))


def write_all(path: Path, tensors: Weights, **options: Any) -> None:
    with checkpoint_writer(path, infos(tensors), metadata={}, **options) as writer:
        for name, tensor in tensors.items():
            if name not in options.get("aliases", {}):
                writer.write(name, 0, tensor.reshape(-1))


def test_a_folder_is_sharded_with_an_index(tmp_path: Path) -> None:
    """Every shard below the limit, every tensor in the shard that the index says, config along."""
    good = {f"layer.{i}": torch.randn(100) for i in range(7)}
    config = tmp_path / "config.json"
    config.write_text('{"a": 1}')
    write_all(tmp_path / "out", good, max_shard_size=900, side_files=[config])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "config.json",
        *(f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)),
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "out" / names[-1]).read_text())
    assert index["metadata"]["total_size"] == 7 * 400
    for shard in names[1:-1]:
        held = safetensors.torch.load_file(tmp_path / "out" / shard)
        assert held.keys() == {n for n, where in index["weight_map"].items() if where == shard}
        assert sum(tensor.nbytes for tensor in held.values()) <= 900
    assert_same(contents(tmp_path / "out"), good)
    assert (tmp_path / "out" / "config.json").read_text() == '{"a": 1}'
    write_all(tmp_path / "single", good)
    assert os.listdir(tmp_path / "single") == ["model.safetensors"]


@pytest.mark.parametrize("folder", [False, True])
def test_ties_stay_ties(folder: bool, tmp_path: Path) -> None:
    """Noted, not written; both names are there when read."""
    good = {"a": torch.ones(3), "b": torch.ones(3)}
    path = tmp_path / ("out" if folder else "out.safetensors")
    write_all(path, good, aliases={"b": "a"})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.aliases == {"b": "a"}
    file = path / "model.safetensors" if folder else path
    assert safetensors.torch.load_file(file).keys() == {"a"}
    assert_same(contents(path), good)


def write_half(path: Path, tensors: Weights, failure: str) -> None:
    with checkpoint_writer(path, infos(tensors), metadata={}, force=True) as writer:
        writer.write("a", 0, 2 * tensors["a"])
        writer.write("b", 0, tensors["b"][:1])
        if failure == "raises":
            raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["out", "out.safetensors"])
def test_a_full_disk_is_told_with_the_name_of_the_file(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system says no more than that there is no space."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / where}'"):
        write_all(tmp_path / where, {"a": torch.ones(4)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["out", "out.safetensors"])
@pytest.mark.parametrize("failure", ["missing", "raises"])
def test_nothing_appears_unless_all_is_written(where: str, failure: str, tmp_path: Path) -> None:
    """A single element left out, or an error half-way: no file, no temporary one, the old stays."""
    good = {"a": torch.ones(4), "b": torch.zeros(2)}
    path = tmp_path / where
    for old in (False, True):
        if old:
            write_all(path, good)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises((polyak.ArgumentError, KeyboardInterrupt)):
            write_half(path, good, failure)
        assert sorted(tmp_path.rglob("*")) == before
        if old:
            assert_same(contents(path), good)


def test_overlapping_writes_do_not_hide_a_gap(tmp_path: Path) -> None:
    """Elements are counted by place, not by number: against a set of indices."""
    pick = random.Random(1)
    for number in range(60):
        count = pick.randrange(1, 9)
        writes = [(at, pick.randrange(at, count + 1)) for at in pick.choices(range(count), k=5)]
        covered = {index for start, stop in writes for index in range(start, stop)}
        path = tmp_path / f"{number}.safetensors"
        if len(covered) == count:
            write_stretches(path, count, writes)
        else:
            with pytest.raises(polyak.ArgumentError, match=r"1 tensors with some missing \['a'\]"):
                write_stretches(path, count, writes)
        assert path.exists() == (len(covered) == count)
    assert 0 < len(os.listdir(tmp_path)) < 60


def test_a_link_to_a_folder_is_replaced_without_a_trace(tmp_path: Path) -> None:
    """The link goes, not what it points to."""
    write_all(tmp_path / "real", {"a": torch.zeros(2)})
    (tmp_path / "out").symlink_to("real")
    with folder_written_whole(tmp_path / "out", replace=True) as fresh:
        (fresh / "new").touch()
    assert sorted(os.listdir(tmp_path)) == ["out", "real"]
    assert os.listdir(tmp_path / "out") == ["new"]
    assert os.listdir(tmp_path / "real") == ["model.safetensors"]


def test_ctrl_c_at_any_line_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    """Never none, and nothing beside it that the next write does not take away."""
    path = tmp_path / "out"
    points = heard = 0
    while True:
        points += 1
        write_all(path, {"a": torch.zeros(2)}, force=True)
        for lock in tmp_path.glob(".out.*.held"):
            lock.unlink()  # of this process: an empty file, which goes when it ends
        assert os.listdir(tmp_path) == ["out"], "swept, whatever it was"
        try:
            with pressed_at_line(points, of=("polyak._files._atomic",)) as passed:
                write_all(path, {"a": torch.ones(2)}, force=True)
        except KeyboardInterrupt:
            heard += 1
            there = float(contents(path)["a"][0])
            assert there in (0.0, 1.0), passed[-1]
        else:
            break
    assert 60 < points == heard + 1


def write_stretches(path: Path, count: int, stretches: list[tuple[int, int]]) -> None:
    announced = {"a": TensorInfo(torch.int8, (count,))}
    with checkpoint_writer(path, announced, metadata={}) as writer:
        for start, stop in stretches:
            writer.write("a", start, torch.zeros(stop - start, dtype=torch.int8))


def killed_at(module: Any, name: str, number: int, write: Callable[[], None]) -> None:
    """Write in a process that ends, as if killed, at this of its calls of a function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads that this fork has not
        pid = os.fork()
    if not pid:
        try:
            left, plain = iter(range(1, number)), getattr(module, name)
            setattr(module, name, lambda *a, **b: plain(*a, **b) if next(left, 0) else os._exit(77))
            write()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 77


def test_a_folder_that_a_killed_process_moved_aside_comes_back(tmp_path: Path) -> None:
    """Killed between the two renames: the next write finds the old folder under its name."""
    good = {"a": torch.ones(4)}
    write_all(tmp_path / "out", good)
    other = {"a": torch.zeros(4)}
    killed_at(os, "rename", 2, lambda: write_all(tmp_path / "out", other, force=True))
    assert {path.suffix for path in tmp_path.iterdir()} == {".aside", ".held", ".partial"}
    with pytest.raises(polyak.ArgumentError, match="which is there"):
        write_all(tmp_path / "out", good)
    assert_same(contents(tmp_path / "out"), good)
    write_all(tmp_path / "out", good, force=True)
    assert os.listdir(tmp_path) == ["out"]
    killed_at(shutil, "rmtree", 1, lambda: write_all(tmp_path / "out", other, force=True))
    assert_same(contents(tmp_path / "out"), other)
    shutil.rmtree(tmp_path / "out")  # the old one, half removed, must not take its place
    write_all(tmp_path / "out", other)
    assert os.listdir(tmp_path) == ["out"]
    assert_same(contents(tmp_path / "out"), other)


@pytest.mark.parametrize("where", ["out", "out.safetensors"])
def test_two_writers_of_one_path_do_not_mix(where: str, tmp_path: Path) -> None:
    """In one process too: each has its own files, and the last to end has the name."""
    announced = infos({"a": torch.ones(4)})
    path = tmp_path / where
    with ExitStack() as first, ExitStack() as second:
        writers = []
        for stack in (first, second):
            held = checkpoint_writer(path, announced, metadata={}, force=True)
            writers.append(stack.enter_context(held))
        for start in (0, 2):
            for number, writer in enumerate(writers):
                writer.write("a", start, torch.full((2,), float(number)))
        first.close()
        assert_same(contents(path), {"a": torch.zeros(4)})
        second.close()
        assert_same(contents(path), {"a": torch.ones(4)})
    assert os.listdir(tmp_path) == [where]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """Without force, the first of two writers to end has the name."""
    path = tmp_path / "out"
    with ExitStack() as later:
        held = checkpoint_writer(path, infos({"a": torch.ones(4)}), metadata={})
        later.enter_context(held).write("a", 0, torch.ones(4))
        write_all(path, {"a": torch.zeros(4)})
        with pytest.raises(polyak.ArgumentError, match="which is there"):
            later.close()
    assert_same(contents(path), {"a": torch.zeros(4)})
    assert os.listdir(tmp_path) == ["out"]


def test_a_temporary_file_is_new_and_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where somebody foresaw its name: what a link leads to stays as it is."""
    victim, path = tmp_path / "victim", tmp_path / "a.safetensors"
    victim.write_text("precious")
    monkeypatch.setattr(_atomic, "_token", lambda: "foreseen")
    with _atomic.written_whole(path) as temporary:
        temporary.write_text("x")
    temporary.symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_all(path, {"a": torch.ones(1)})
    assert victim.read_text() == "precious"
    assert temporary.is_symlink()
    assert path.read_text() == "x"


@pytest.mark.parametrize("kind", ["pipe", "device", "long"])
def test_only_files_are_replaced(kind: str, tmp_path: Path) -> None:
    """A pipe stays a pipe, and a name that leaves no room is said before anything is made."""
    path = tmp_path / ("n" * 240 + ".safetensors" if kind == "long" else "a.safetensors")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/null")
    before = os.listdir(tmp_path)
    words = "a name of at most" if kind == "long" else "must name a file, got the pipe"
    with pytest.raises(polyak.ArgumentError, match=words):
        write_all(path, {"a": torch.ones(1)})
    assert os.listdir(tmp_path) == before
    if kind == "long":
        with pytest.raises(polyak.ArgumentError, match=words):
            write_all(path.with_suffix(""), {"a": torch.ones(1)}, force=True)


def test_a_file_has_the_permissions_of_the_one_it_replaces(tmp_path: Path) -> None:
    """A new one those that the process gives to any file."""
    path = tmp_path / "a.safetensors"
    (tmp_path / "any").touch()
    write_all(path, {"a": torch.ones(1)})
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode
    path.chmod(0o640)
    write_all(path, {"a": torch.ones(1)})
    assert path.stat().st_mode & 0o777 == 0o640


def test_all_is_synced_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a crash could leave the name with nothing behind it; then the folder that has it."""
    done: list[str] = []
    for name in ("replace", "rename"):
        plain = getattr(os, name)

        def noting(old: Path, new: Path, plain: Any = plain) -> None:
            done.append(f"named {Path(new).name}")
            plain(old, new)

        monkeypatch.setattr(os, name, noting)
    sync = os.fsync

    def syncing(descriptor: int) -> None:
        done.append(f"synced {Path(os.readlink(f'/proc/self/fd/{descriptor}')).suffix}")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", syncing)
    write_all(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    assert done == ["synced .partial", "named a.safetensors", "synced "]
    done.clear()
    write_all(tmp_path / "out", {"a": torch.ones(1)})
    assert done == ["synced .safetensors", "synced .partial", "named out", "synced "]


def test_reads_and_writes_go_on_where_the_system_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may do less than it was asked for: here at most three bytes at once."""
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda f, data, at: write(f, bytes(data[:3]), at))
    monkeypatch.setattr(os, "preadv", lambda f, data, at: read(f, [data[0][:3]], at))
    write_all(tmp_path / "a.safetensors", {"a": torch.arange(9.0)})
    assert_same(contents(tmp_path / "a.safetensors"), {"a": torch.arange(9.0)})


def test_an_existing_folder_is_replaced_only_by_force(tmp_path: Path) -> None:
    """And only one of weights: nobody's home is removed for a typo."""
    good = {"a": torch.ones(4)}
    write_all(tmp_path / "out", good)
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(polyak.ArgumentError, match="Pass force=True"):
        write_all(tmp_path / "out", good)
    write_all(tmp_path / "out", good, force=True)
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / "home" / "photos").mkdir(parents=True)
    (tmp_path / "home" / "a.safetensors").touch()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "thesis.txt").touch()
    (tmp_path / "run").mkdir()
    for name in ("model.safetensors", "config.json", "optimizer.pt", "README.md"):
        (tmp_path / "run" / name).touch()
    (tmp_path / "steps").mkdir()
    for name in ("step-1.safetensors", "step-2.safetensors"):
        (tmp_path / "steps" / name).touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(polyak.ArgumentError, match=r"\['README.md', 'optimizer.pt'\]"):
        write_all(tmp_path / "run", good, force=True)
    for name in ("home", "texts", "steps"):
        with pytest.raises(polyak.ArgumentError, match="a folder of weights and nothing else"):
            write_all(tmp_path / name, good, force=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_announcements_and_writes_are_refused(tmp_path: Path) -> None:
    """Before anything is written, or without touching what is."""
    good = {"a": torch.ones(4)}
    path = tmp_path / "a.safetensors"
    for words, tensors, options in (
        ("dtypes that it knows", {"z": torch.ones(1, dtype=torch.complex128)}, {}),
        ("other names", {"__metadata__": torch.ones(1)}, {}),
        ("aliases must be", good, {"aliases": {"b": "c"}}),
        ("max_shard_size must be above 0", good, {"max_shard_size": 0}),
        ("path must be a folder", {**good, "b": torch.ones(4)}, {"max_shard_size": 16}),
        ("valid text", {"\ud800": torch.ones(1)}, {}),
    ):
        with pytest.raises(polyak.ArgumentError, match=words):
            write_all(path, tensors, **options)
    with pytest.raises(polyak.ArgumentError, match="side_files must be files that exist"):
        write_all(tmp_path / "out", good, side_files=[tmp_path / "no.json"])
    assert os.listdir(tmp_path) == []
    with checkpoint_writer(path, infos(good), metadata={}) as writer:
        for words, name, start, values in (
            ("name must be", "b", 0, torch.ones(1)),
            ("1-D and torch.float32", "a", 0, torch.ones(1, dtype=torch.float64)),
            ("1-D and torch.float32", "a", 0, torch.ones(1, 1)),
            ("leave room", "a", 2, torch.ones(3)),
            ("leave room", "a", -1, torch.ones(1)),
        ):
            with pytest.raises(polyak.ArgumentError, match=words):
                writer.write(name, start, values)
        writer.write("a", 0, good["a"])
    assert_same(contents(path), good)


# ── lies, one by one ─────────────────────────────────────────────────────────────────────────────


def entry(dtype: str, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, "'b' does not begin where"),
        ({"a": entry("U8", [2], 0, 2), "b": entry("U8", [4], 4, 8)}, "'b' does not begin where"),
        ({"a": entry("U8", [4], 0, 4)}, "end at byte"),
        ({"a": entry("F32", [4], 0, 8)}, "do not fit its shape or the file"),
        ({"a": entry("F32", [3], 0, 12)}, "do not fit its shape or the file"),
        ({"a": entry("U8", [8], 8, 0)}, "do not fit its shape or the file"),
        ({"a": entry("U8", [-8], 0, 8)}, "one that a tensor can have"),
        ({"a": entry("U8", [0, 2**62, 2**62], 0, 0)}, "one that a tensor can have"),
        ({"a": entry("U8", [8.0], 0, 8)}, "list of whole numbers"),
        ({"a": entry("U8", [True], 0, 8)}, "list of whole numbers"),
        ({"a": entry("U8", [8], False, 8)}, "not two whole numbers"),
        ({"a": {"dtype": "U8", "shape": [8]}}, "lacks its dtype, shape or offsets"),
        ({"__metadata__": {"a": 1}}, "not words by name"),
        ({"__metadata__": []}, "not words by name"),
        ([], "holds no names"),
    ],
)
def test_a_header_that_lies_is_refused(header: Any, words: str, tmp_path: Path) -> None:
    """Eight bytes of elements, and a header that says otherwise."""
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"12345678")
    with pytest.raises(polyak.ArgumentError, match=words):
        open_checkpoint(path)


def test_metadata_may_be_null(tmp_path: Path) -> None:
    """The format's own reader takes it for none."""
    header = {"__metadata__": None, "a": entry("F32", [2], 0, 8)}
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + b"12345678"
    (tmp_path / "a.safetensors").write_bytes(data)
    assert_same(contents(tmp_path / "a.safetensors"), safetensors.torch.load(data))


def test_a_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    """Readers differ in which of the two they take."""
    one = json.dumps(entry("U8", [1], 0, 1))
    text = f'{{"a":{one},"a":{one}}}'.encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"1")
    with pytest.raises(polyak.ArgumentError, match="occurs twice"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"K\x04K\x03\x86", b"K\x05K\x03\x86", "must lie in its storage"),
        (b"K\x04K\x03\x86", b"K\x04J\xff\xff\xff\xff\x86", "one that a tensor can have"),
        (b"K\x03K\x01\x86", b"K\x04K\x01\x86", "must lie in its storage"),
        (b"K\x03K\x01\x86", b"K\x03\x85", "must be a view of its storage"),
        (b"M\x2c\x01\x85", b"J\x00\x00\x00\x40\x85", "must not unfold to much more than the"),
        (b"X\x01\x00\x00\x001", b"X\x01\x00\x00\x000", "two dtypes or sizes"),
        (b"X\x01\x00\x00\x001", b"X\x01\x00\x00\x009", "storage '9' is not in it"),
    ],
)
def test_a_pickle_that_lies_is_refused(old: bytes, new: bytes, words: str, tmp_path: Path) -> None:
    """Shapes, strides and storages are checked against the bytes that are there."""
    state = {"w": torch.ones(4, 3), "n": torch.tensor([2, 3]), "e": torch.ones(1).expand(300)}
    good = saved(state)

    def change(name: str, data: bytes) -> bytes:
        if not name.endswith(".pkl"):
            return data
        assert old in data
        return data.replace(old, new, 1)

    (tmp_path / "a.pt").write_bytes(rewritten(good, change))
    with pytest.raises(polyak.ArgumentError, match=words):
        open_checkpoint(tmp_path / "a.pt")


def test_a_key_is_not_hashed_however_deep_it_is(tmp_path: Path) -> None:
    """Hashing tuples a million deep ends the process: there is no stack for it."""
    deep = b"\x80\x02}X\x01\x00\x00\x00wK\x01s)" + b"\x85" * 1_000_000 + b"K\x01s."
    good = saved({"w": torch.ones(1)})
    (tmp_path / "a.pt").write_bytes(
        rewritten(good, lambda name, data: deep if name.endswith(".pkl") else data)
    )
    with pytest.raises(polyak.ArgumentError, match="got none"):
        open_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/passwd", "./one.safetensors", "..", "", "a\0", "b/../one"]
)
def test_an_index_names_plain_files_of_its_folder(name: str, tmp_path: Path) -> None:
    """Whether or not there is such a file."""
    folder = as_shards_in(tmp_path / "inner")
    safetensors.torch.save_file(weights(), tmp_path / "a.safetensors")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["count"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(polyak.ArgumentError, match="must be a plain name of a file in the folder"):
        open_checkpoint(folder)


def as_shards_in(folder: Path) -> Path:
    folder.mkdir()
    return as_shards(weights(), folder)


def test_dcp_metadata_that_lies_is_refused(tmp_path: Path) -> None:
    """A piece of another dtype, a name that the format does not have."""
    save_dcp({"w": torch.ones(3), "step": 1}, tmp_path)
    path = tmp_path / ".metadata"
    good = path.read_bytes()

    metadata = pickle.loads(good)
    metadata.state_dict_metadata["w"].properties.dtype = torch.int32
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(polyak.ArgumentError, match="a piece of 'w' is not what it should be"):
        open_checkpoint(tmp_path)

    metadata = pickle.loads(good)
    metadata.version = Runs(tmp_path / "canary")
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(polyak.ArgumentError, match=r"must mention only .*, got posix\.mkdir"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: wide_views(4_000), "must not unfold to much more than the file"),
        (lambda: wide_views(2), "must not unfold to much more than the file"),
        (
            lambda: with_program(repeated_call(b"collections\nOrderedDict", b"l", 2_000)),
            "a damaged one",
        ),
        (
            lambda: with_program(repeated_call(b"torch\nSize", b"t", 2_000)),
            "got list|must hold tensors by",
        ),
        (lambda: with_program(colliding(10_000)), "got none"),
    ],
)
def test_a_small_file_asks_for_little(
    make: Callable[[], bytes], words: str, tmp_path: Path
) -> None:
    """Neither the memory nor the time of many times its size: views, copies, clashing keys."""
    path = tmp_path / "a.pt"
    path.write_bytes(make())
    gc.collect()
    begin = time.process_time()
    with limited_memory(2**26), pytest.raises(polyak.ArgumentError, match=words):
        open_checkpoint(path)
    assert time.process_time() - begin < 1.0


def test_views_that_share_their_bytes_are_read(tmp_path: Path) -> None:
    """Parts of a fused tensor beside it, and one name for each of many ties."""
    w = torch.randn(2**21)
    state = {"whole": w, "q": w[: 2**20], "k": w[2**20 :], "square": w.view(2**10, 2**11)}
    torch.save(state | {f"tied.{n}": w for n in range(20)}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert len(checkpoint.aliases) == 20
        assert torch.equal(checkpoint.read("k"), state["k"])


def test_pieces_that_are_stored_once_for_many_names_are_refused(tmp_path: Path) -> None:
    """Metadata that lets many tensors be the same 8 MiB, of which only four bytes are there."""
    save_dcp({str(n): torch.zeros(2) for n in range(8)}, tmp_path)
    path = tmp_path / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    piece = saved(torch.zeros(1).expand(2**21))
    (tmp_path / "one").write_bytes(piece)
    for entry in metadata.state_dict_metadata.values():
        entry.size = entry.chunks[0].sizes = torch.Size([2**21])
    for place in metadata.storage_data.values():
        place.relative_path, place.offset, place.length = "one", 0, len(piece)
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(polyak.ArgumentError, match="must not unfold to much more than the file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("protocol", [0, 1])
def test_pickles_of_old_protocols_are_told_apart_from_damage(protocol: int, tmp_path: Path) -> None:
    """Copying the file again would not help."""
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt", pickle_protocol=protocol)
    with pytest.raises(polyak.ArgumentError, match=r"protocol 0 or 1\. .* with protocol 2 or new"):
        open_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_storage_of_another_class_spoils_one_tensor_only(legacy: bool, tmp_path: Path) -> None:
    """Quantized values are not read; what lies beside and after them is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates quantized tensors
        odd = torch.quantize_per_tensor(torch.ones(5), 0.1, 0, torch.qint32)
        state = {"model": weights(), "calibration": {"q": odd, "w": torch.ones(2)}}
        torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    assert_same(contents(tmp_path / "a.pt"), weights())
    with pytest.raises(polyak.ArgumentError, match=r"qtensor as 'q'"):
        open_checkpoint(tmp_path / "a.pt", key="calibration")


def test_a_storage_of_an_unknown_class_spoils_one_tensor_only(tmp_path: Path) -> None:
    """Such as one of a torch of the future."""
    good = saved({"model": weights(), "other": {"x": torch.ones(3, dtype=torch.int16)}})
    data = with_pickle(good, lambda pickled: pickled.replace(b"ShortStorage", b"BriefStorage"))
    (tmp_path / "a.pt").write_bytes(data)
    assert_same(contents(tmp_path / "a.pt"), weights())
    with pytest.raises(
        polyak.ArgumentError, match=r"a tensor in a torch.BriefStorage as 'other\.x'"
    ):
        open_checkpoint(tmp_path / "a.pt", key="other")


def test_a_program_of_torchscript_is_refused(tmp_path: Path) -> None:
    """It has tensors, but its pickle is code's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        torch.jit.save(torch.jit.script(nn.Linear(2, 1)), tmp_path / "a.pt")
    with pytest.raises(polyak.ArgumentError, match="got a TorchScript program"):
        open_checkpoint(tmp_path / "a.pt")


def test_a_record_that_occurs_twice_in_an_archive_is_refused(tmp_path: Path) -> None:
    """Readers differ in which of the two they take."""
    (tmp_path / "a.pt").write_bytes(saved({"w": torch.ones(1)}))
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        (name,) = (name for name in archive.namelist() if name.endswith("/data/0"))
        archive.writestr(name, torch.zeros(1).numpy().tobytes())
    with pytest.raises(polyak.ArgumentError, match="a record occurs twice"):
        open_checkpoint(tmp_path / "a.pt")


# ── hostile input, in small; tests/prove/test_hostile_files.py has 20,000 ────────────────────────


@pytest.mark.parametrize("format", ["safetensors", "index", "torch", "dcp"])
def test_no_damaged_file_does_harm(format: str, tmp_path: Path) -> None:
    """Refused, or read as an independent reader reads it; nothing run, nothing else opened."""
    inner, canary = tmp_path / "inner", tmp_path / "canary"
    inner.mkdir()
    cases = {
        "safetensors": lambda: safetensors_cases(inner, 0, 100),
        "index": lambda: index_cases(inner, 0, 100),
        "torch": lambda: torch_cases(inner, 0, 100, canary),
        "dcp": lambda: dcp_cases(inner, 0, 100, canary),
    }[format]()
    refused = sum(check(case, canary) for case in cases)
    assert 30 < refused < 100


def test_a_header_is_not_believed_about_its_length(tmp_path: Path) -> None:
    """A claim of gigabytes takes no memory."""
    path = tmp_path / "a.safetensors"
    path.write_bytes((2**33).to_bytes(8, "little") + b"{}")
    tracemalloc.start()
    with pytest.raises(polyak.ArgumentError, match=r"claims 8589934592 bytes of 10"):
        open_checkpoint(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_the_canary_would_sing(tmp_path: Path) -> None:
    """The planted command does run where a pickle is trusted."""
    data = io.BytesIO(saved({"w": Runs(tmp_path / "canary")}))
    torch.load(data, weights_only=False)
    assert (tmp_path / "canary").exists()
