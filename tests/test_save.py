"""Averaged weights in a file: whole or not at all, and loadable without polyak."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

import polyak
from polyak._files import _atomic, _writer, written_whole


class Net(nn.Module):
    """A batch norm, so that there are buffers of both kinds, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.head = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


class Tied(nn.Module):
    """Two names for one matrix of 400 kB."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(1_000, 100, bias=False)
        self.decode = nn.Linear(1_000, 100, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decode(x)
        return out


class Stateful(nn.Module):
    """Extra state is not a tensor: it has no place in the format."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.seen = 0

    def get_extra_state(self) -> Any:
        return {"seen": self.seen}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]


def averaged(model: nn.Module) -> polyak.Average:
    """An average that differs from its model in every floating value."""
    average = polyak.Average(model, polyak.Uniform())
    for step in range(3):
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                if tensor.is_floating_point() or tensor.is_complex():
                    tensor.add_(0.1 + 0.01 * step)
                else:
                    tensor.add_(1)
        average.update()
    return average


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata())


def test_a_file_loads_strictly_into_a_fresh_model(tmp_path: Path) -> None:
    """By polyak, and by safetensors alone; every value has the bits of `weights()`."""
    average = averaged(Net())
    polyak.save(average, tmp_path / "averaged.safetensors")

    plain, ours = Net(), Net()
    plain.load_state_dict(safetensors.torch.load_file(tmp_path / "averaged.safetensors"))
    returned = polyak.load_weights(tmp_path / "averaged.safetensors", ours)

    assert same(plain.state_dict(), average.weights())
    assert same(ours.state_dict(), average.weights())
    assert same(returned, average.weights())


def test_a_file_says_what_it_is(tmp_path: Path) -> None:
    """The rule, the time, the updates and who wrote it, readable without polyak."""
    model = Net()
    average = polyak.Average(model, polyak.Exponential(half_life=50), now=10)
    average.update(40)
    polyak.save(average, tmp_path / "a.safetensors")

    about = json.loads(metadata(tmp_path / "a.safetensors")["polyak"])
    assert metadata(tmp_path / "a.safetensors")["format"] == "pt"
    assert about["rule"] == "Exponential(half_life=50)"
    assert (about["now"], about["updates"], about["initial_weight"]) == (40, 1, 0.0)
    assert isinstance(about["polyak"], str)


@pytest.mark.parametrize(
    ("ties", "least", "most"), [("drop", 400_000, 410_000), ("copy", 800_000, 810_000)]
)
def test_tied_weights_are_written_once_or_under_each_name(
    ties: Literal["drop", "copy"], least: int, most: int, tmp_path: Path
) -> None:
    """Once, as `safetensors.torch.save_model` does, or twice for a bare `load_state_dict`."""
    average = averaged(Tied())
    path = tmp_path / "tied.safetensors"
    polyak.save(average, path, ties=ties)
    expected = average.weights()["encode.weight"]

    assert least <= path.stat().st_size <= most
    if ties == "copy":
        fresh = Tied()
        fresh.load_state_dict(safetensors.torch.load_file(path), strict=True)
        assert torch.equal(fresh.decode.weight, expected)
    models = [Tied(), Tied()]
    polyak.load_weights(path, models[0])
    if ties == "drop":
        safetensors.torch.load_model(models[1], path)
    else:
        models.pop()
    for model in models:
        assert torch.equal(model.encode.weight, expected)
        assert model.decode.weight is model.encode.weight
    assert set(polyak.load_weights(path)) == {"encode.weight", "decode.weight"}


def test_a_file_of_safetensors_itself_is_read(tmp_path: Path) -> None:
    """Ties are noted in its metadata the same way."""
    model = Tied()
    safetensors.torch.save_model(model, str(tmp_path / "m.safetensors"))

    fresh = Tied()
    polyak.load_weights(tmp_path / "m.safetensors", fresh)

    assert torch.equal(fresh.decode.weight, model.decode.weight)


def test_a_tied_weight_may_be_called_like_a_key_of_the_metadata(tmp_path: Path) -> None:
    """A dropped name becomes a key beside our own; neither may overwrite the other."""
    model = nn.Module()
    model.a = nn.Parameter(torch.ones(2))
    model.polyak = model.a
    model.format = model.a
    average = averaged(model)
    path = tmp_path / "a.safetensors"
    polyak.save(average, path)

    assert set(polyak.load_weights(path)) == {"a", "format", "polyak"}
    assert "rule" in json.loads(metadata(path)["polyak"])


def test_half_precision_is_for_files(tmp_path: Path) -> None:
    """`dtype` casts the floating tensors; integers and the average stay as they are."""
    average = averaged(Net())
    polyak.save(average, tmp_path / "half.safetensors", dtype=torch.float16)

    loaded = polyak.load_weights(tmp_path / "half.safetensors")
    for name, tensor in average.weights().items():
        if tensor.is_floating_point():
            assert loaded[name].dtype == torch.float16
            assert torch.equal(loaded[name], tensor.to(torch.float16))
        else:
            assert torch.equal(loaded[name], tensor)
    assert {t.dtype for t in average.tensors.values()} == {torch.float32}


def test_a_value_that_the_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    """70000 in float16 would be inf: refused with the name, nothing written, nothing touched."""
    live = {"small": torch.ones(2), "huge": torch.full((2,), 70_000.0)}
    average = polyak.Average(live)
    path = tmp_path / "half.safetensors"

    with pytest.raises(polyak.ArgumentError, match=r"'huge' must fit torch.float16"):
        polyak.save(average, path, dtype=torch.float16)
    with pytest.raises(polyak.ArgumentError, match=r"'huge' must fit torch.float16"):
        average.weights(torch.float16)

    assert os.listdir(tmp_path) == []
    assert average.tensors["huge"].tolist() == [70_000.0, 70_000.0]
    assert average.weights(torch.bfloat16)["huge"].isfinite().all()


def test_infinities_that_are_meant_may_be_exported() -> None:
    """A mask of -inf fits every dtype that has one."""
    average = polyak.Average({"mask": torch.tensor([0.0, -math.inf])})

    assert average.weights(torch.float16)["mask"].tolist() == [0.0, -math.inf]


# ── whole or not at all ──────────────────────────────────────────────────────────────────────────


def fails_before_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    def encoded_header(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(_writer, "encoded_header", encoded_header)


def fails_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    write, left = os.pwrite, iter([True, True])

    def pwrite(descriptor: int, data: Any, at: int) -> int:
        if next(left, False):
            return write(descriptor, data, at)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", pwrite)


def fails_to_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError("input/output error")

    monkeypatch.setattr(os, "fsync", fsync)


def fails_to_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(source: Any, target: Any) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize(
    "breaks", [fails_before_writing, fails_half_way, fails_to_sync, fails_to_rename]
)
def test_a_failure_leaves_the_old_file_and_nothing_else(
    breaks: Callable[[pytest.MonkeyPatch], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever it breaks: no temporary file stays, the old file keeps every byte."""
    average = averaged(Net())
    path = tmp_path / "averaged.safetensors"
    polyak.save(average, path)
    before = path.read_bytes()
    average.reset()

    with monkeypatch.context() as broken:
        breaks(broken)
        with pytest.raises((OSError, KeyboardInterrupt)):
            polyak.save(average, path)

    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["averaged.safetensors"]
    polyak.save(average, path)
    assert path.read_bytes() != before


def test_a_file_is_synced_before_it_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a crash could leave the name of the old file on half of the new one."""
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noting_sync(descriptor: int) -> None:
        order.append("sync")
        fsync(descriptor)

    def noting_replace(source: Path, target: Path) -> None:
        order.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_sync)
    monkeypatch.setattr(os, "replace", noting_replace)

    polyak.save(averaged(Net()), tmp_path / "a.safetensors")

    assert order == ["sync", "rename", "sync"]  # the last one is the folder's


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    """And so is a folder in the place of a file; neither is made or removed."""
    average = averaged(Net())

    with pytest.raises(polyak.ArgumentError, match="path must lie in a folder that exists"):
        polyak.save(average, tmp_path / "no" / "such" / "a.safetensors")
    with pytest.raises(polyak.ArgumentError, match="path must name a file, got the folder"):
        polyak.save(average, tmp_path)

    assert os.listdir(tmp_path) == []


# ── what cannot be written or read ───────────────────────────────────────────────────────────────


def test_complex128_is_refused(tmp_path: Path) -> None:
    """The format does not know it; the error says what does."""
    average = polyak.Average({"z": torch.ones(2, dtype=torch.complex128)})

    with pytest.raises(polyak.ArgumentError, match=r"complex128 for \['z'\].*torch.save"):
        polyak.save(average, tmp_path / "z.safetensors")

    assert os.listdir(tmp_path) == []


def test_complex64_is_written(tmp_path: Path) -> None:
    """Bit for bit."""
    live = {"z": torch.tensor([1.0 + 2.0j, -0.5j])}
    polyak.save(polyak.Average(live), tmp_path / "z.safetensors")

    assert torch.equal(polyak.load_weights(tmp_path / "z.safetensors")["z"], live["z"])


def test_every_layout_is_written(tmp_path: Path) -> None:
    """Channels-last, transposed, scalar and empty tensors come back equal."""
    live = {
        "image": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 4).t(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "count": torch.tensor(2**53 + 1),
    }
    polyak.save(polyak.Average(live), tmp_path / "a.safetensors")

    assert same(polyak.load_weights(tmp_path / "a.safetensors"), live)


def test_extra_state_is_refused(tmp_path: Path) -> None:
    """Leaving it out would load a model that is not the one that was saved."""
    with pytest.raises(polyak.ArgumentError, match=r"extra state \['_extra_state'\]"):
        polyak.save(averaged(Stateful()), tmp_path / "a.safetensors")

    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("ties", ["keep", None])
def test_ties_must_be_said_in_known_words(ties: Any, tmp_path: Path) -> None:
    """A typo must not write another file."""
    with pytest.raises(polyak.ArgumentError, match="ties must be 'drop' or 'copy'"):
        polyak.save(averaged(Net()), tmp_path / "a.safetensors", ties=ties)


def test_a_missing_file_is_said_so(tmp_path: Path) -> None:
    """With the builtin that everyone catches."""
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        polyak.load_weights(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("damage", ["empty", "text", "cut short"])
def test_a_broken_file_is_refused(damage: str, tmp_path: Path) -> None:
    """Before a model is touched."""
    path = tmp_path / "a.safetensors"
    polyak.save(averaged(Net()), path)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"not tensors", "cut short": whole[:-8]}[damage])
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    with pytest.raises(polyak.ArgumentError, match="path must be a whole safetensors file"):
        polyak.load_weights(path, model)

    assert same(model.state_dict(), before)


def test_the_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    """Names and shapes are compared before the first write."""
    path = tmp_path / "a.safetensors"
    polyak.save(averaged(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))), path)
    for other, message in {
        nn.Sequential(nn.Linear(3, 4)): r"2 only in the file \['1.bias', '1.weight'\]",
        nn.Sequential(
            nn.Linear(3, 4), nn.Linear(4, 3)
        ): r"'1.weight' must (be|have shape) \[3, 4\]",
    }.items():
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(polyak.MatchError, match=message):
            polyak.load_weights(path, other)
        assert same(other.state_dict(), before)


def test_complex_weights_do_not_load_into_a_real_model(tmp_path: Path) -> None:
    """Half of every value would be lost without a word."""
    path = tmp_path / "a.safetensors"
    polyak.save(polyak.Average({"weight": torch.ones(1, 2, dtype=torch.complex64)}), path)
    model = nn.Linear(2, 1, bias=False)

    with pytest.raises(polyak.MatchError, match="'weight'"):
        polyak.load_weights(path, model)


def test_wrappers_do_not_matter(tmp_path: Path) -> None:
    """A file written from a wrapped model loads into a bare one, and the other way round."""
    path = tmp_path / "a.safetensors"
    model = Net()
    polyak.save(averaged(nn.DataParallel(model)), path)
    bare, wrapped = Net(), nn.DataParallel(Net())

    polyak.load_weights(path, bare)
    polyak.load_weights(path, wrapped)

    assert same(bare.state_dict(), wrapped.module.state_dict())
    assert set(polyak.load_weights(path)) == set(bare.state_dict())


def test_any_average_can_be_saved(tmp_path: Path) -> None:
    """A window and a member of several too, each with its own rule."""
    model = Net()
    window = polyak.Window(model, 3)
    several = polyak.Averages(model, {"a": polyak.Uniform()})
    for each, rule in ((window, "Window(k=3"), (several["a"], "Uniform()")):
        path = tmp_path / "a.safetensors"
        polyak.save(each, path)
        assert rule in json.loads(metadata(path)["polyak"])["rule"]
        assert same(polyak.load_weights(path), each.weights())


def test_saving_inside_applied_saves_the_average(tmp_path: Path) -> None:
    """The averaged set, though the live model holds it at that moment."""
    model = Net()
    average = averaged(model)
    expected = average.weights()

    with average.applied():
        polyak.save(average, tmp_path / "a.safetensors")

    assert same(polyak.load_weights(tmp_path / "a.safetensors"), expected)


def test_a_cap_that_was_never_reached_is_said_when_the_weights_are_saved(tmp_path: Path) -> None:
    """The decay of a `CountRamp` does nothing in a short run: one warning, at `save`."""
    average = polyak.Average({"w": torch.ones(1)}, polyak.CountRamp(0.999))
    for _ in range(10):
        average.update()
    with pytest.warns(polyak.AveragingWarning, match=r"CountRamp.*8,990"):
        polyak.save(average, tmp_path / "a.safetensors")
    polyak.save(average, tmp_path / "b.safetensors")  # said once


def test_what_a_killed_process_left_behind_is_swept_away(tmp_path: Path) -> None:
    """A temporary file that nobody holds any more goes; one that is being written stays."""
    path = tmp_path / "a.safetensors"
    average = polyak.Average(nn.Linear(2, 1))
    with written_whole(path) as alive:
        left = alive.with_name(f".{path.name}.{_atomic._HOST}.0.partial")
        left.touch()
        polyak.save(average, path)
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([alive.name, path.name])
    assert os.listdir(tmp_path) == [path.name]
