"""FSDP2: the average is sharded as the model is, and the run goes on with another number of ranks.

    torchrun --nproc-per-node 2 examples/fsdp2.py run --until 100
    torchrun --nproc-per-node 3 examples/fsdp2.py run               needs pip install scikit-learn

Each rank averages the shards it holds, so an update sends nothing. Model, optimizer and average go
into one folder of torch.distributed.checkpoint, each rank writing what it has, and come back on any
number of ranks: the second line finishes what the first began. Inside `applied()` FSDP2 gathers the
averaged weights where it gathered the trained ones. The export at the end is an ordinary file.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import polyak

STEPS, EVERY, BATCH = 200, 50, 96
TEST = 400  # images that nobody trains on


@dataclass(frozen=True)
class Result:
    """How the run ended, as this rank saw it.

    Args:
        started: the step that was resumed from.
        updates: of the average, in all processes that worked on the run.
        live: accuracy of the trained weights on test images.
        averaged: that of their average.
        held: bytes of the average on this rank.
    """

    started: int
    updates: int
    live: float
    averaged: float
    held: int


def build() -> nn.Sequential:
    torch.manual_seed(0)  # the same first weights on every rank
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.Linear(64, 10))


class Run:
    """Everything that the next step depends on, built anew in every process."""

    def __init__(self) -> None:
        bunch = load_digits()
        self.images = torch.tensor(bunch.data, dtype=torch.float32) / 16.0
        self.labels = torch.tensor(bunch.target)
        self.model = build()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in self.model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-3)
        self.average = polyak.Average(self.model, polyak.Power(sigma_rel=0.1))
        self.average.follow(self.optimizer)
        self.step = 0

    def train_step(self) -> None:
        """One step on a batch that depends on its number alone, whoever takes part."""
        random = torch.Generator().manual_seed(self.step)
        batch = torch.randint(TEST, len(self.images), (BATCH,), generator=random)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        mine = batch[rank::ranks]
        loss = nn.functional.cross_entropy(self.model(self.images[mine]), self.labels[mine])
        self.optimizer.zero_grad()
        # FSDP2 takes the mean over the ranks; shares may be uneven, so each gets its due.
        (loss * len(mine) * ranks / BATCH).backward()
        self.optimizer.step()
        self.step += 1

    @torch.no_grad()
    def accuracy(self) -> float:
        """Of the model as it is now; all ranks compute it, since all hold a part of the model."""
        guesses = self.model(self.images[:TEST]).argmax(dim=1)
        return float((guesses == self.labels[:TEST]).float().mean())

    def accuracies(self) -> tuple[float, float]:
        """Live, and averaged."""
        live = self.accuracy()
        with self.average.applied():
            return live, self.accuracy()

    def save(self, folder: Path) -> None:
        """Write a checkpoint: every rank its shards. A run of your own would remove old ones."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "average": self.average.state_dict()}
        dcp.save(state, checkpoint_id=folder / f"step-{self.step:06d}")

    def resume(self, folder: Path) -> None:
        """Take up the newest whole checkpoint, if there is one, of any number of ranks."""
        # DCP writes its metadata last: a checkpoint that was interrupted has none.
        whole = sorted(folder.glob("step-*/.metadata"))
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
    started = run.step
    say(f"{dist.get_world_size()} ranks start at step {started}", flush=True)
    while run.step < until:
        run.train_step()
        if run.step % EVERY == 0 or run.step == until:
            live, averaged = run.accuracies()
            say(f"step {run.step:4}: accuracy {live:.1%} live, {averaged:.1%} averaged", flush=True)
            run.save(folder)
    # All ranks call, the first one writes.
    polyak.save(run.average, folder / "averaged.safetensors")
    shards = [t.to_local() for t in run.average.tensors.values() if isinstance(t, DTensor)]
    held = sum(shard.nbytes for shard in shards)
    say(f"this rank holds {held:,} bytes of the average")
    return Result(started, run.average.updates, *run.accuracies(), held)


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
