"""Which weights of a checkpoint are meant: averages beside live ones, ties, odd neighbours."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import polyak
from files.hostile import Runs, save_dcp
from files.layouts import optimizer
from polyak._files import open_checkpoint

Weights = dict[str, Tensor]


def state(value: float) -> Weights:
    """A model whose every number is `value`."""
    return {"body.weight": torch.full((2, 3), value), "body.bias": torch.full((2,), value)}


def contents(path: Path, *, key: str | None = None) -> dict[str, float]:
    """The first element of every tensor."""
    return {name: t.flatten()[0].item() for name, t in polyak.load_weights(path, key=key).items()}


LIVE = {"body.weight": 1.0, "body.bias": 1.0}
EMA = {"body.weight": 2.0, "body.bias": 2.0}


# ── ties ─────────────────────────────────────────────────────────────────────────────────────────


def by_torch(saved: dict[str, Any], folder: Path) -> Path:
    torch.save(saved, folder / "last.pt")
    return folder / "last.pt"


def by_dcp(saved: dict[str, Any], folder: Path) -> Path:
    save_dcp(saved, folder / "dcp")
    return folder / "dcp"


@pytest.mark.parametrize("saved_by", [by_torch, by_dcp])
def test_equal_values_are_no_tie(saved_by: Callable[..., Path], tmp_path: Path) -> None:
    """A frozen bias stays 0 though the trained one beside it is 0 when the state is saved."""
    frozen, trained = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.Sequential(frozen, trained)
    for layer in (frozen, trained):
        nn.init.zeros_(layer.bias)
    frozen.requires_grad_(False)
    average = polyak.Average(model, polyak.Uniform())
    for value in (1.0, 3.0):
        with torch.no_grad():
            trained.bias.fill_(value)
        average.update()
    with torch.no_grad():
        trained.bias.zero_()
    path = saved_by({"model": model.state_dict(), "average": average.state_dict()}, tmp_path)
    found = polyak.load_weights(path)
    assert found["0.bias"].tolist() == [0.0] * 4
    assert found["1.bias"].tolist() == [2.0] * 4


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 3, bias=False)
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("saved_by", [by_torch, by_dcp])
def test_a_tied_weight_is_averaged_under_each_name(
    saved_by: Callable[..., Path], tmp_path: Path
) -> None:
    """The state lists its ties, for formats that write every name on its own."""
    model = Tied()
    average = polyak.Average(model, polyak.Uniform())
    for value in (1.0, 3.0):
        with torch.no_grad():
            model.embed.weight.fill_(value)
        average.update()
    assert average.state_dict()["ties"] == {"head.weight": "embed.weight"}
    path = saved_by({"model": model.state_dict(), "average": average.state_dict()}, tmp_path)
    assert contents(path) == {"embed.weight": 2.0, "head.weight": 2.0}
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.aliases == {"head.weight": "embed.weight"}


def test_a_state_without_ties_loads() -> None:
    """They are for readers of the file, not needed to go on."""
    average = polyak.Average(Tied(), polyak.Uniform())
    average.update()
    saved = average.state_dict()
    del saved["ties"]
    polyak.Average(Tied(), polyak.Uniform()).load_state_dict(saved)
    saved["ties"] = {"head.weight": 3}
    with pytest.raises(polyak.ArgumentError, match=r"'head\.weight' as str, got int"):
        polyak.Average(Tied(), polyak.Uniform()).load_state_dict(saved)


def test_words_of_metadata_are_no_ties(tmp_path: Path) -> None:
    """{"license": "w"} says nothing of a tensor called license; {"head.w": "w"} does."""
    path = tmp_path / "a.safetensors"
    words = {"license": "w", "head.w": "w", "about": "a test"}
    safetensors.torch.save_file({"w": torch.ones(1)}, path, words)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.aliases == {"head.w": "w"}


def test_a_merge_lists_its_ties_as_such(tmp_path: Path) -> None:
    """Also of names without a dot, among any other words."""
    w = torch.ones(3)
    torch.save({"a": w, "b": w}, tmp_path / "tied.pt")
    out = tmp_path / "out.safetensors"
    polyak.merge([tmp_path / "tied.pt"], out=out)
    found, words = safetensors.torch.load_file(out), {}
    with safetensors.safe_open(str(out), framework="pt") as file:
        words = file.metadata()
    assert json.loads(words["polyak"])["ties"] == {"b": "a"}
    safetensors.torch.save_file(found, out, {"polyak": words["polyak"], "about": "a test"})
    assert contents(out) == {"a": 1.0, "b": 1.0}


# ── averages by their name ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("live", "average"),
    [
        ("model", "ema"),
        ("model", "model_ema"),
        ("state_dict", "ema_state_dict"),
        ("model", "ema_model"),
        ("model_state_dict", "ema_model_state_dict"),
        ("net", "EMA"),
        ("G", "G.ema"),
    ],
)
def test_an_average_is_known_by_its_name(live: str, average: str, tmp_path: Path) -> None:
    """It comes before the live weights, and says so; `key` gives those."""
    path = tmp_path / "last.pt"
    torch.save({live: state(1.0), average: state(2.0), "optimizer": optimizer()}, path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.origin == f"EMA under {average!r}"
    assert contents(path) == EMA
    assert contents(path, key=live) == LIVE
    with open_checkpoint(path, key=live) as checkpoint:
        assert checkpoint.origin is None


def test_an_average_in_a_place_of_its_own_is_known_too(tmp_path: Path) -> None:
    """`ema.shadow` and its settings."""
    path = tmp_path / "last.pt"
    ema = {"shadow": state(2.0), "decay": 0.99}
    torch.save({"model": state(1.0), "ema": ema, "ema_settings": {"decay": torch.ones(())}}, path)
    assert contents(path) == EMA
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.origin == "EMA under 'ema.shadow'"
    torch.save({"ema": {"online_model": state(1.0), "ema_model": state(2.0)}}, path)
    assert contents(path) == EMA
    with open_checkpoint(path, key="ema.online_model") as checkpoint:
        assert checkpoint.origin is None


@pytest.mark.parametrize("live", ["model.", ""])
def test_an_average_among_the_names_of_the_model_is_known(live: str, tmp_path: Path) -> None:
    """As a module saves it whose part `model_ema` follows another one."""
    path = tmp_path / "last.ckpt"
    both = {f"{live}{n}": t for n, t in state(1.0).items()}
    both |= {f"model_ema.{n}": t for n, t in state(2.0).items()}
    torch.save({"state_dict": both}, path)
    assert contents(path) == EMA
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.origin == "EMA under 'state_dict.model_ema'"
    assert len(contents(path, key="state_dict")) == 4
    if live:
        assert contents(path, key="state_dict.model") == LIVE


def test_names_of_litema_get_their_dots_back(tmp_path: Path) -> None:
    """Latent diffusion stores `model.body.weight` as `model_ema.bodyweight`."""
    path = tmp_path / "last.ckpt"
    both: Weights = {f"model.{n}": t for n, t in state(1.0).items()}
    both |= {f"model_ema.{n.replace('.', '')}": t for n, t in state(2.0).items()}
    both |= {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(7)}
    both |= {"first_stage.w": torch.ones(1)}
    torch.save({"state_dict": both}, path)
    assert contents(path) == EMA
    assert len(contents(path, key="state_dict")) == 7


def test_a_part_that_is_called_ema_is_not_taken_for_an_average(tmp_path: Path) -> None:
    """Its names are none of the model's: all of them belong together."""
    path = tmp_path / "last.pt"
    torch.save({"encoder.w": torch.ones(1), "ema.codes": torch.ones(2)}, path)
    assert contents(path).keys() == {"encoder.w", "ema.codes"}
    # `schema` and `cinema` do not have the word in them.
    torch.save({"cinema": state(1.0)}, path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.origin is None


def test_several_averages_of_ema_pytorch_need_a_key(tmp_path: Path) -> None:
    """PostHocEMA holds some, each with its step; their live model is not taken instead."""
    path = tmp_path / "last.pt"
    saved: dict[str, Any] = {"step": torch.tensor(40)}
    for number, value in enumerate((2.0, 3.0)):
        part = {"initted": torch.tensor(True), "step": torch.tensor(40)}
        part |= {f"ema_model.{n}": t for n, t in state(value).items()}
        saved |= {f"ema_models.{number}.{name}": tensor for name, tensor in part.items()}
    torch.save({"model": state(1.0), "ema": saved}, path)
    with pytest.raises(polyak.ArgumentError, match=r"key must say .*'ema\.ema_models\.0' \(2 tens"):
        open_checkpoint(path)
    assert contents(path, key="ema.ema_models.0") == EMA
    with open_checkpoint(path, key="ema.ema_models.1") as checkpoint:
        assert (checkpoint.origin, checkpoint.step) == ("ema-pytorch EMA", 40.0)


# ── places ───────────────────────────────────────────────────────────────────────────────────────


def test_what_an_error_lists_can_be_passed_as_key(tmp_path: Path) -> None:
    """Also the top, whose name is empty."""
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(2), "inner": {"v": torch.zeros(1)}}, path)
    with pytest.raises(polyak.ArgumentError, match=r"one of '' \(1 tensors\), 'inner' \(1 tensors"):
        open_checkpoint(path)
    assert contents(path, key="") == {"w": 1.0}
    assert contents(path, key="inner") == {"v": 0.0}
    with pytest.raises(polyak.ArgumentError, match=r"key must be the name of a place .* got 3"):
        open_checkpoint(path, key=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["optimus", "schednet", "ringer", "rngnet", "scalernet"])
def test_a_model_may_be_called_nearly_like_an_optimizer(name: str, tmp_path: Path) -> None:
    """Words of names count, not their beginnings."""
    torch.save({name: state(1.0), "optimizer": state(3.0)}, tmp_path / "a.pt")
    assert contents(tmp_path / "a.pt") == LIVE


@pytest.mark.parametrize("name", ["g_optimizer", "optim_state_dict", "lr_schedulers", "amp_scaler"])
def test_the_state_of_what_trains_is_no_model(name: str, tmp_path: Path) -> None:
    """Wherever the word is in its name; or by its contents."""
    torch.save({"net": state(1.0), name: {"moments": state(3.0)}}, tmp_path / "a.pt")
    assert contents(tmp_path / "a.pt") == LIVE
    torch.save({"net": state(1.0), "o": {"m": state(3.0), "param_groups": []}}, tmp_path / "b.pt")
    assert contents(tmp_path / "b.pt") == LIVE


def test_what_cannot_be_read_is_named_when_nothing_else_is_there(tmp_path: Path) -> None:
    """A whole model instead of its state dict; a tensor that is yet to be conjugated."""
    path = tmp_path / "a.pt"
    torch.save({"epoch": 3, "inner": {"model": nn.Linear(1, 1)}}, path)
    with pytest.raises(
        polyak.ArgumentError, match=r"got torch\.nn.*Linear as 'inner\.model'\. Loa"
    ):
        open_checkpoint(path)
    torch.save({"w": torch.ones(2, dtype=torch.complex64).conj()}, path)
    with pytest.raises(polyak.ArgumentError, match=r"conjugated .* as 'w'\. Save it with"):
        open_checkpoint(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(polyak.ArgumentError, match=r"got none\. Save a state dict"):
        open_checkpoint(path)


def test_objects_beside_tensors_are_left_out_and_what_may_be_a_weight_is_not(
    tmp_path: Path,
) -> None:
    """The settings of a program are none; what a function would make could be."""
    path = tmp_path / "a.pt"
    torch.save({**state(1.0), "args": argparse.Namespace(lr=0.1)}, path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.left_out == ("args",)
    assert contents(path) == LIVE
    for value in (Runs(tmp_path / "canary"), torch.eye(2).to_sparse(), nn.Linear(1, 1)):
        torch.save({**state(1.0), "x": value}, path)
        with pytest.raises(polyak.ArgumentError, match=r" as 'x'\. "):
            open_checkpoint(path)


# ── folders ──────────────────────────────────────────────────────────────────────────────────────


def test_a_broken_config_is_no_reason_to_refuse_weights(tmp_path: Path) -> None:
    """It only helps to recognise an average."""
    safetensors.torch.save_file(state(1.0), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{broken")
    assert contents(tmp_path) == LIVE


def test_a_shard_may_hold_more_than_the_index_lists(tmp_path: Path) -> None:
    """What is listed is taken from where it is listed; what is missing there is named."""
    safetensors.torch.save_file({**state(1.0), "old": torch.ones(1)}, tmp_path / "one.safetensors")
    other = {"body.weight": torch.full((2, 3), 9.0), "body.bias": torch.zeros(2)}
    safetensors.torch.save_file(other, tmp_path / "two.safetensors")
    listed = {"body.weight": "one.safetensors", "body.bias": "two.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": listed}))
    assert contents(tmp_path) == {"body.weight": 1.0, "body.bias": 0.0}
    index.write_text(json.dumps({"weight_map": {**listed, "head": "two.safetensors"}}))
    with pytest.raises(polyak.ArgumentError, match=r"two\.safetensors must hold .* no \['head'\]"):
        open_checkpoint(tmp_path)
