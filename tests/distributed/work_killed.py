"""What the proofs of interrupted and large saves run on ranks."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from spread import LAYOUTS, Values, mine, same, tensors_of, train, wholes
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import polyak

MOMENTS = ["planning", "before writing", "half-way", "after writing", "finishing"]


class Doomed(FileSystemWriter):
    """Writes a checkpoint, and kills its own process at a moment of the save.

    Args:
        path: the folder.
        moment: one of `MOMENTS`, or "" to live.
    """

    def __init__(self, path: Path, moment: str) -> None:
        super().__init__(path)
        self.moment = moment

    def _reach(self, moment: str) -> None:
        if moment == self.moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def prepare_local_plan(self, plan: Any) -> Any:
        self._reach("planning")
        return super().prepare_local_plan(plan)

    def write_data(self, plan: Any, planner: Any) -> Any:
        self._reach("before writing")
        if self.moment == "half-way":
            (Path(self.path) / f"__{dist.get_rank()}_0.distcp").write_bytes(b"PK\x03\x04 half")
            self._reach("half-way")
        written = super().write_data(plan, planner)
        written.wait()
        self._reach("after writing")
        return written

    def finish(self, metadata: Any, results: Any) -> None:
        self._reach("finishing")  # on the first rank only, which writes the metadata
        super().finish(metadata, results)


def build() -> tuple[nn.Module, polyak.Average]:
    model = LAYOUTS["fsdp-3"].net()
    train(tensors_of(model), 0)
    return model, polyak.Average(model)


def killed_while_saving(folder: Path, moment: str, victim: int) -> str:
    """One good checkpoint, then one in which the victim dies; what the others are told."""
    model, average = build()
    for step in (1, 2):
        train(tensors_of(model), step)
        average.update()
    dcp_save({"average": average}, checkpoint_id=folder / "good")
    train(tensors_of(model), 3)
    average.update()
    doom = moment if dist.get_rank() == victim else ""
    try:
        dcp_save({"average": average}, storage_writer=Doomed(folder / "doomed", doom))
    except BaseException as error:  # torch's CheckpointException is no Exception
        return f"{type(error).__name__}: {error}"
    return ""


def expected() -> Values:
    model = LAYOUTS["alone"].net()
    train(tensors_of(model), 0)
    average = polyak.Average(model)
    for step in (1, 2):
        train(tensors_of(model), step)
        average.update()
    return wholes(average.tensors)


def goes_on(folder: Path, values: Values) -> str:
    """The good one loads; the other is refused, and the average is as before."""
    model = LAYOUTS["fsdp-2"].net()
    average = polyak.Average(model)
    polyak.load_checkpoint(average, folder / "good", key="average")
    same(wholes(average.tensors), values, "good")
    try:
        polyak.load_checkpoint(average, folder / "doomed", key="average")
    except (polyak.AveragingError, FileNotFoundError) as error:
        same(wholes(average.tensors), values, "after the refusal")
        return str(error)
    raise AssertionError("half a checkpoint was taken for a whole one")


# ── memory ───────────────────────────────────────────────────────────────────────────────────────

SIDE, LAYERS = 4096, 20  # 64 MiB a tensor, 1.25 GiB in all


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for number in range(LAYERS):
            layer = nn.Linear(SIDE, SIDE, bias=False, device="meta")
            self.add_module(f"layer{number}", layer)


def export(path: Path, way: str) -> int:
    """Save a large average; by how many bytes this rank's memory was larger meanwhile."""
    model = Stack()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if way == "fsdp":
        for layer in model.children():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            mine(parameter).fill_(number + 1)
    shard = None if way == "fsdp" else dist.group.WORLD
    average = polyak.Average(model, shard=shard)
    average.update()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory("VmRSS")
    polyak.save(average, path)
    return memory("VmHWM") - before


def memory(field: str) -> int:
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)]
    return int(line.split()[1]) * 1024
