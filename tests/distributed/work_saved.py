"""What the tests of checkpoints over ranks run on ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from spread import LAYOUTS, Net, Values, mine, same, tensors_of, train, value, wholes
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import polyak
from ranks import count_collectives

SAVED, LATER = 20, 30  # updates before the checkpoint, and at the end

Average = polyak.Average


def build(layout: str, model: nn.Module, kind: str) -> Average:
    """An average of the model of a layout; "replicas" share one out over ranks."""
    shard = dist.group.WORLD if layout.startswith("replicas") else None
    if kind == "narrow":
        return Average(model, dtype=torch.bfloat16, rounding="stochastic", seed=5, shard=shard)
    return Average(model, polyak.Power(sigma_rel=0.1), shard=shard)


def trained(layout: str, kind: str, steps: int) -> tuple[nn.Module, Average]:
    """A model of that layout after so many steps, and its average."""
    model = LAYOUTS[layout].net()
    train(tensors_of(model), 0)
    average = build(layout, model, kind)
    go_on(model, average, range(1, steps + 1))
    return model, average


def go_on(model: nn.Module, average: Average, steps: range) -> None:
    for step in steps:
        train(tensors_of(model), step)
        average.update()


def expected() -> dict[str, dict[int, Values]]:
    """The averages of a model on one rank, at the checkpoint and at the end."""
    return {
        kind: {steps: wholes(trained("alone", kind, steps)[1].tensors) for steps in (SAVED, LATER)}
        for kind in ("wide", "narrow")
    }


# ── save here, load there ────────────────────────────────────────────────────────────────────────


def save(layout: str, folder: Path) -> None:
    averages = {kind: trained(layout, kind, SAVED)[1] for kind in ("wide", "narrow")}
    dcp_save(averages, checkpoint_id=folder / layout)


def load(layout: str, folders: list[Path], values: dict[str, dict[int, Values]], how: str) -> None:
    """Load what each of the other layouts has saved into a fresh run of this one, and go on."""
    model = LAYOUTS[layout].net()
    live = tensors_of(model)
    for folder in folders:
        train(live, 77)
        averages = {kind: build(layout, model, kind) for kind in values}
        laid_out = parts(averages)
        for average in averages.values():
            average.update(now=3)  # another clock and history, which must go
        if how == "dcp.load":
            dcp_load(averages, checkpoint_id=folder)
        else:
            for kind, average in averages.items():
                polyak.load_checkpoint(average, folder, key=kind)
        assert parts(averages) == laid_out
        same(wholes(live), {n: value(n, 77, live[n]) for n in sorted(live)}, "live")
        check(averages, values, SAVED, f"{folder.name} in {layout}")
        for step in range(SAVED + 1, LATER + 1):
            train(live, step)
            for average in averages.values():
                average.update()
        check(averages, values, LATER, f"{folder.name} in {layout}, later")


def check(
    averages: dict[str, Average], values: dict[str, dict[int, Values]], steps: int, what: str
) -> None:
    for kind, average in averages.items():
        same(wholes(average.tensors), values[kind][steps], f"{kind} of {what}")
        assert (average.updates, average.now) == (steps, steps), what


def parts(averages: dict[str, Average]) -> dict[str, list[torch.Size]]:
    """What this rank holds."""
    return {kind: [mine(t).shape for t in a.tensors.values()] for kind, a in averages.items()}


def save_asynchronously(layout: str, folder: Path, values: dict[str, dict[int, Values]]) -> None:
    """Training goes on while the file is written: it holds the moment of the call."""
    model, average = trained(layout, "wide", SAVED)
    future: Any = dcp_async_save({"wide": average}, checkpoint_id=folder)
    go_on(model, average, range(SAVED + 1, LATER + 1))
    future.result()
    same(wholes(average.tensors), values["wide"][LATER], "trained on")
    dist.barrier()
    polyak.load_checkpoint(average, folder, key="wide")
    same(wholes(average.tensors), values["wide"][SAVED], "saved")


def save_while_applied(layout: str, folder: Path) -> None:
    """F5: a checkpoint in the middle of an evaluation has both, each in its place."""
    model, average = trained(layout, "wide", SAVED)
    before, averaged = wholes(tensors_of(model)), wholes(average.tensors)
    with average.applied():
        dcp_save({"average": average}, checkpoint_id=folder)
    model, average = trained(layout, "wide", 3)
    polyak.load_checkpoint(average, folder, key="average")
    same(wholes(average.tensors), averaged, "average")
    got = wholes(tensors_of(model))
    same({n: got[n] for n in averaged}, {n: before[n] for n in averaged}, "live")


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────


class Longer(Net):
    """One tensor more."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.zeros(4))


def wider() -> Average:
    return Average(LAYOUTS["fsdp-2"].net(hidden=12), polyak.Power(sigma_rel=0.1))


def longer() -> Average:
    return Average(LAYOUTS["fsdp-2"].spread(Longer()), polyak.Power(sigma_rel=0.1))


def otherwise_scheduled() -> Average:
    return Average(LAYOUTS["fsdp-2"].net(), polyak.Uniform())


def windowed() -> polyak.Window:
    return polyak.Window(LAYOUTS["fsdp-2"].net(), 3)


def usual() -> Average:
    return trained("fsdp-2", "wide", 2)[1]


# What is loaded into; under which key; the error, and what it must say.
REFUSED: dict[str, tuple[Callable[[], Any], str, type[Exception], str]] = {
    "another width": (wider, "wide", polyak.MatchError, r"first\.(weight|bias)"),
    "a tensor more": (longer, "wide", polyak.MatchError, "extra"),
    "another schedule": (otherwise_scheduled, "wide", polyak.MatchError, "Uniform"),
    "another kind": (windowed, "wide", polyak.MatchError, "Window"),
    "another rounding": (usual, "narrow", polyak.AveragingError, "rounding|bfloat16"),
    "no such key": (usual, "ema", polyak.AveragingError, "ema"),
}


def load_is_refused(case: str, folder: Path) -> None:
    """Every rank says so, none waits for another, and nothing was written."""
    make, key, error, text = REFUSED[case]
    average = make()
    average.update()
    state = average.state_dict()
    before = {name: mine(tensor).clone() for name, tensor in average.tensors.items()}
    clock = dict(state["clock"])
    with pytest.raises(error, match=text):
        polyak.load_checkpoint(average, folder, key=key)
    same({n: mine(t) for n, t in average.tensors.items()}, before, "tensors")
    same(average.state_dict()["clock"], clock, "clock")
    average.update()


def folder_is_refused(layout: str, folder: Path) -> str:
    """What every rank says of a folder that is no whole checkpoint."""
    _, average = trained(layout, "wide", 2)
    before = {name: mine(tensor).clone() for name, tensor in average.tensors.items()}
    with pytest.raises((polyak.AveragingError, FileNotFoundError)) as caught:
        polyak.load_checkpoint(average, folder, key="wide")
    same({n: mine(t) for n, t in average.tensors.items()}, before, "tensors")
    average.update()
    return str(caught.value)


def load_file(layout: str, path: Path, values: dict[str, dict[int, Values]]) -> None:
    """What `torch.save` wrote on one rank, into an average over several: no rank talks."""
    model = LAYOUTS[layout].net()
    average = build(layout, model, "wide")
    average.update()
    with count_collectives() as counted:
        polyak.load_checkpoint(average, path)
    assert counted.total == 0
    check({"wide": average}, values, SAVED, "file")


def load_state(layout: str, values: dict[str, dict[int, Values]]) -> None:
    """From an average on one rank to one over several, and back, without a file."""
    _, alone = trained("alone", "wide", SAVED)
    model = LAYOUTS[layout].net()
    average, other = (
        build(layout, model, "wide"),
        polyak.Average(Net(), polyak.Power(sigma_rel=0.1)),
    )
    average.load_state_dict(alone.state_dict())
    check({"wide": average}, values, SAVED, "spread")
    other.load_state_dict(average.state_dict())
    check({"wide": other}, values, SAVED, "whole again")


# ── full export ──────────────────────────────────────────────────────────────────────────────────


EXPORTS = {"live": None, "narrow": torch.bfloat16}


def export(layout: str, folder: Path) -> None:
    """All ranks call, one writes: each is given a name of its own, and one file is made."""
    _, average = trained(layout, "wide", SAVED)
    for name, dtype in EXPORTS.items():
        path = folder / f"{dist.get_rank()}.{name}.safetensors"
        polyak.save(average, path, dtype=dtype)


def export_fails_everywhere(layout: str, folder: Path) -> list[str]:
    """What cannot be written is an error on each rank, and the next call finds them in step.

    Returns:
        Which errors this rank has seen.
    """
    model, average = trained(layout, "wide", SAVED)
    seen = []
    with pytest.raises(polyak.AveragingError) as caught:
        polyak.save(average, folder / "nowhere" / "averaged.safetensors")
    seen.append(caught.typename)
    with torch.no_grad():  # on the last rank: of most layouts it alone has these elements
        if dist.get_rank() == dist.get_world_size() - 1:
            mine(tensors_of(model)["second.weight"]).fill_(1e30)
    average.update()
    with pytest.raises(polyak.AveragingError) as caught:
        polyak.save(average, folder / "narrow.safetensors", dtype=torch.float16)
    seen.append(caught.typename)
    dist.barrier()
    assert not list(folder.glob("*"))
    dist.barrier()
    polyak.save(average, folder / "wide.safetensors")
    return seen


# ── what belongs to one rank ─────────────────────────────────────────────────────────────────────


def part_of_another_rank(layout: str, folder: Path) -> None:
    """`if rank == 0: torch.save(...)` of a sharded average: no other rank may take it as its own.

    Into an average that is cut likewise, one that is whole, and a window; and by `load_checkpoint`.
    """
    model, average = trained(layout, "wide", 2)
    window = polyak.Window(model, 2, shard=average_group(layout))
    window.update()
    if dist.get_rank() == 0:
        torch.save({"average": average.state_dict()}, folder / "first.pt")
        torch.save({"window": window.state_dict()}, folder / "window.pt")
    dist.barrier()
    loaded: Any = torch.load(folder / "first.pt", weights_only=True)["average"]
    ring: Any = torch.load(folder / "window.pt", weights_only=True)["window"]
    go_on(model, average, range(3, 5))
    window.update()
    first = dist.get_rank() == 0
    for target, state in ((average, loaded), (window, ring)):
        before = {name: mine(tensor).clone() for name, tensor in target.tensors.items()}
        if not first:
            with pytest.raises(polyak.MatchError, match=r"part of the state.*\(0,"):
                target.load_state_dict(state)
            same({n: mine(t) for n, t in target.tensors.items()}, before, "refused")
            target.update(now=9)
    alone = Average(Net(), polyak.Power(sigma_rel=0.1))
    before = {name: tensor.clone() for name, tensor in alone.tensors.items()}
    with pytest.raises(polyak.AveragingError) as caught:  # here the first rank would need others
        alone.load_state_dict(loaded)
    assert caught.type is (polyak.OrderError if first else polyak.MatchError)
    same(alone.tensors, before, "alone")
    alone.update()
    with pytest.raises(polyak.AveragingError, match="DTensor in a file of torch"):
        polyak.load_checkpoint(average, folder / "first.pt")


def average_group(layout: str) -> Any:
    return dist.group.WORLD if layout.startswith("replicas") else None


def incidents(layout: str, folder: Path) -> list[int]:
    """A NaN in the part of the last rank, a checkpoint, and how many this rank counts after it."""
    model, average = trained(layout, "wide", 1)
    with torch.no_grad():
        if dist.get_rank() == dist.get_world_size() - 1:
            mine(tensors_of(model)["second.weight"]).fill_(float("nan"))
    average.update()
    counted = [sum(average.report().nonfinite.values())]
    dcp_save({"average": average.state_dict()}, checkpoint_id=folder)
    polyak.load_checkpoint(average, folder)
    return [*counted, sum(average.report().nonfinite.values())]


class Halves(nn.Module):
    """Two layers on two meshes, as experts beside data parallelism."""

    def __init__(self) -> None:
        super().__init__()
        meshes = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "experts"))
        self.dense, self.expert = nn.Linear(4, 4), nn.Linear(4, 4)
        fully_shard(self.dense, mesh=meshes["data"])
        for name, parameter in list(self.expert.named_parameters()):
            cut = distribute_tensor(parameter.detach(), meshes["experts"], [Shard(0)])
            setattr(self.expert, name, nn.Parameter(cut))


def two_meshes(folder: Path) -> str:
    """No mesh has all ranks, and the export gathers over both: an error of one stops all."""
    model = Halves()
    average = Average(model)
    polyak.save(average, folder / "whole.safetensors")
    with torch.no_grad():
        if dist.get_rank() == 3:
            mine(model.expert.weight).fill_(1e6)
    average.reset()
    with pytest.raises(polyak.AveragingError) as caught:
        polyak.save(average, folder / "narrow.safetensors", dtype=torch.float16)
    dist.barrier()
    polyak.save(average, folder / "again.safetensors")
    return caught.typename


def outside_of_the_mesh(folder: Path) -> None:
    """A tensor that the last rank has no part in, beside one that all have whole."""
    model = nn.Module()
    mesh = DeviceMesh("cpu", [0, 1])
    model.part = nn.Parameter(distribute_tensor(torch.arange(4.0), mesh, [Shard(0)]))
    model.all = nn.Parameter(torch.ones(2))
    average = Average(model)
    average.update()
    with average.applied():
        pass
    polyak.check_ranks(average)
    polyak.save(average, folder / "averaged.safetensors")
