"""DistributedDataParallel: each rank averages for itself, and all have the same average.

    python examples/ddp.py [FOLDER]

Two processes train one model, each on its half of every batch. DDP keeps their weights equal, so
their averages are equal too, bit for bit, and nothing has to be sent: any rank may save. One
process that sees the whole batches ends at the same average, up to the order of the sums.
"""

import sys
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import polyak

RANKS, BATCH, STEPS = 2, 32, 40
PATIENCE = timedelta(seconds=60)  # a rank whose partner died gives up


@dataclass(frozen=True)
class Result:
    """The averaged weights of each rank, and of one process that saw all the data."""

    ranks: list[dict[str, Tensor]]
    single: dict[str, Tensor]


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(BATCH, 4, generator=torch.Generator().manual_seed(step))
    return x, x.prod(dim=1, keepdim=True)


def train(model: nn.Module, mine: slice) -> polyak.Average:
    """Train on a part of each batch; `model` may be wrapped or not."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    average = polyak.Average(model, polyak.Exponential(half_life=10))
    average.follow(optimizer)
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        (model(x[mine]) - y[mine]).square().mean().backward()
        optimizer.step()
    return average


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = (Path(folder) / "meeting").as_uri()
    dist.init_process_group("gloo", meeting, PATIENCE, world_size=RANKS, rank=rank)
    try:
        share = BATCH // RANKS
        mine = slice(rank * share, (rank + 1) * share)
        average = train(DistributedDataParallel(build()), mine)
        # The names are those of the plain model. In a run of your own rank 0 alone would save.
        polyak.save(average, Path(folder) / f"rank{rank}.safetensors")
    finally:
        dist.destroy_process_group()


def main(folder: Path) -> Result:
    spawn(rank_main, args=(str(folder),), nprocs=RANKS)  # raises when a rank raised
    ranks = [polyak.load_weights(folder / f"rank{rank}.safetensors") for rank in range(RANKS)]
    single = train(build(), slice(None)).weights()

    same = all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    apart = max(float((ranks[0][name] - single[name]).abs().max()) for name in single)
    print(f"the ranks' averages are {'the same' if same else 'NOT the same'}")
    print(f"and differ by at most {apart:.1e} from that of one process")
    return Result(ranks, single)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
