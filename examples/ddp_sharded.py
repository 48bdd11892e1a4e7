"""DDP with the average shared out over the ranks: each holds and updates its part of it.

    torchrun --nproc-per-node 2 examples/ddp_sharded.py run --until 100
    torchrun --nproc-per-node 2 examples/ddp_sharded.py run         needs pip install scikit-learn

Under DDP every rank holds the whole model, and could hold the whole average. `shard=` cuts it: 1/N
of the memory and of the work on each of N ranks. An update still sends nothing; `applied()` and the
export gather, so all ranks call them. Batch norm without `SyncBatchNorm` sees each rank's images
only: its averaged statistics differ by rank until `reduce_buffers` pools them.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

import polyak

STEPS, EVERY, BATCH = 200, 50, 96
TEST = 400  # images that nobody trains on


@dataclass(frozen=True)
class Result:
    """How the run ended, as this rank saw it.

    Args:
        started: the step that was resumed from.
        live: accuracy of the trained weights on test images.
        averaged: that of their average.
        apart: by how much this rank's averaged statistics changed when all ranks' were pooled.
        held: bytes of the average on this rank.
        whole: bytes of the whole average.
    """

    started: int
    live: float
    averaged: float
    apart: float
    held: int
    whole: int


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 128), nn.BatchNorm1d(128), nn.GELU(), nn.Linear(128, 64), nn.Linear(64, 10)
    )


class Run:
    """Everything that the next step depends on, built anew in every process."""

    def __init__(self) -> None:
        bunch = load_digits()
        self.images = torch.tensor(bunch.data, dtype=torch.float32) / 16.0
        self.labels = torch.tensor(bunch.target)
        self.model = build()
        self.ddp = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.2, momentum=0.9)
        self.average = polyak.Average(
            self.model, polyak.Power(sigma_rel=0.1), shard=dist.group.WORLD
        )
        self.average.follow(self.optimizer)
        self.step = 0

    def train_step(self) -> None:
        """One step on a batch that depends on its number alone."""
        random = torch.Generator().manual_seed(self.step)
        batch = torch.randint(TEST, len(self.images), (BATCH,), generator=random)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        mine = batch[rank::ranks]
        loss = nn.functional.cross_entropy(self.ddp(self.images[mine]), self.labels[mine])
        self.optimizer.zero_grad()
        # DDP takes the mean over the ranks; shares may be uneven, so each gets its due.
        (loss * len(mine) * ranks / BATCH).backward()
        self.optimizer.step()
        self.step += 1

    def pool_statistics(self) -> float:
        """Give every rank the statistics of all; how far this one was from them."""
        mine = {name: tensor.clone() for name, tensor in self.statistics().items()}
        polyak.reduce_buffers(self.average)
        pooled = self.statistics()
        return max(float((pooled[name] - mine[name]).abs().max()) for name in mine)

    def statistics(self) -> dict[str, Tensor]:
        """The averaged statistics of batch norm, as this rank has them."""
        return {n: tensor for n, tensor in self.average.tensors.items() if "running" in n}

    @torch.no_grad()
    def accuracy(self) -> float:
        """Of the model as it is now, in evaluation mode."""
        self.model.eval()
        guesses = self.model(self.images[:TEST]).argmax(dim=1)
        self.model.train()
        return float((guesses == self.labels[:TEST]).float().mean())

    def accuracies(self) -> tuple[float, float]:
        """Live, and averaged: every rank enters the block, since it gathers."""
        live = self.accuracy()
        with self.average.applied():
            return live, self.accuracy()

    def save(self, folder: Path) -> None:
        """Write a checkpoint: what all ranks hold once, of the average every rank its part."""
        polyak.check_ranks(self.average)  # or a replica that went astray would be saved as it is
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "average": self.average.state_dict()}
        dcp.save(state, checkpoint_id=folder / f"step-{self.step:06d}")

    def resume(self, folder: Path) -> None:
        """Take up the newest whole checkpoint, if there is one, of any number of ranks."""
        whole = sorted(folder.glob("step-*/.metadata"))  # which DCP writes last
        if not whole:
            return
        checkpoint = whole[-1].parent
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        dcp.load(state, checkpoint_id=checkpoint)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        polyak.load_checkpoint(self.average, checkpoint, key="average")
        self.step = int(self.average.now)  # the average knows how many steps were taken


def main(folder: Path, until: int = STEPS) -> Result:
    """Train up to step `until`, in a process group that has begun."""
    say = print if dist.get_rank() == 0 else lambda *_, **__: None
    run = Run()
    run.resume(folder)
    started, apart = run.step, 0.0
    say(f"{dist.get_world_size()} ranks start at step {started}", flush=True)
    while run.step < until:
        run.train_step()
        if run.step % EVERY == 0 or run.step == until:
            apart = run.pool_statistics()
            live, averaged = run.accuracies()
            say(f"step {run.step:4}: accuracy {live:.1%} live, {averaged:.1%} averaged", flush=True)
            run.save(folder)
    # All ranks call, the first one writes.
    polyak.save(run.average, folder / "averaged.safetensors")
    held, whole = bytes_of(run.average.tensors)
    say(f"this rank holds {held:,} bytes of an average of {whole:,}")
    return Result(started, *run.accuracies(), apart, held, whole)


def bytes_of(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """What this rank holds of some tensors, and what all of them take together."""

    def local(tensor: Any) -> Tensor:
        held: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        return held

    return (
        sum(local(tensor).nbytes for tensor in tensors.values()),
        sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
    )


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path, help="of the run: checkpoints and the result")
    options.add_argument("--until", type=int, default=STEPS, help="stop at this step")
    asked = options.parse_args()
    dist.init_process_group("gloo")  # "nccl" and one GPU a rank in a run of your own
    try:
        main(asked.folder, asked.until)
    finally:
        dist.destroy_process_group()
