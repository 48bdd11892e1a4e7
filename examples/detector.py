"""A detector trained as YOLOv5 does it, with its ModelEMA: killed anywhere, it ends the same.

    python examples/detector.py [FOLDER]

A small network finds the bright box in a noisy image. Gradients are accumulated over micro-batches
under automatic mixed precision; the average is updated after each step that the optimizer really
takes, validated after each epoch, and kept in the best and in the last checkpoint.

Both hold what YOLOv5's do: epoch, best fitness, model and average in half precision (a tensor
beyond its range in full), the number of updates, the optimizer. From half precision no run goes on
bit for bit, so a last entry, "exact", holds the float32 weights, the average with its clock, and
the scaler. Kill the run and start it again with the same folder: it ends with the bits of a run
that was never stopped.

Under DistributedDataParallel only the main process (RANK 0, or none) keeps an average, validates
and writes; the others train. Nothing has to be sent, since DDP keeps their weights equal.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from resume import write_whole
from torch import Tensor, nn

import polyak
from polyak.compat.yolov5 import ModelEMA

EPOCHS, BATCHES, BATCH, ACCUMULATE, SIDE = 20, 8, 16, 2, 16
DECAY, TAU = 0.95, 10  # for 80 steps; YOLOv5 has 0.9999 and 2000


@dataclass(frozen=True)
class Result:
    """Where the run ended."""

    average: dict[str, Tensor]
    updates: int
    best_fitness: float


class Detector(nn.Module):
    """Says where the box is (x, y, width, height, in shares of the image)."""

    def __init__(self) -> None:
        super().__init__()
        self.names = ["box"]
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU()),
            *(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.SiLU()),
            *(nn.Flatten(), nn.Linear(16 * (SIDE // 4) ** 2, 4), nn.Sigmoid()),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Boxes of a batch of images."""
        boxes: Tensor = self.layers(images)
        return boxes


# ── data ─────────────────────────────────────────────────────────────────────────────────────────


def scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images with one bright box each, and the boxes."""
    random = torch.Generator().manual_seed(seed)
    size = torch.randint(4, 9, (count, 2), generator=random)
    corner = (torch.rand(count, 2, generator=random) * (SIDE - size + 1)).long()
    pixel = torch.arange(SIDE)
    inside = (pixel >= corner[..., None]) & (pixel < (corner + size)[..., None])
    images = (inside[:, 0, None, :] & inside[:, 1, :, None])[:, None].float()
    images += 0.5 * torch.randn(images.shape, generator=random)
    return images, torch.cat([corner + size / 2, size.float()], dim=1) / SIDE


def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The data of an epoch: a function of its number, so that there is no position to save."""
    images, boxes = scenes(BATCHES * BATCH, seed=epoch + 1)
    return zip(images.split(BATCH), boxes.split(BATCH), strict=True)


def fitness(model: nn.Module) -> float:
    """Mean overlap (intersection over union) of the boxes found with the true ones."""
    images, boxes = scenes(64, seed=0)
    with torch.no_grad():
        found = model(images)
    low = torch.maximum(*(b[:, :2] - b[:, 2:] / 2 for b in (found, boxes)))
    high = torch.minimum(*(b[:, :2] + b[:, 2:] / 2 for b in (found, boxes)))
    common = (high - low).clamp(min=0).prod(dim=1)
    return float((common / (found[:, 2:].prod(1) + boxes[:, 2:].prod(1) - common)).mean())


# ── the run ──────────────────────────────────────────────────────────────────────────────────────


class Run:
    """Everything that the next step depends on, built anew in every process."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.main_process = os.environ.get("RANK", "0") == "0"
        self.epoch, self.best_fitness = 0, 0.0
        self.model = Detector()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=1.0, momentum=0.9, nesterov=True
        )
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=20)
        self.ema: ModelEMA | None = None
        if self.main_process:
            self.ema = ModelEMA(self.model, DECAY, TAU)
            # In the place of ema.update(model) after the scaler's step, and better: a step that the
            # scaler skips is no update.
            self.ema.average.follow(self.optimizer)

    def train_epoch(self, on_step: Callable[[int], None]) -> None:
        """Accumulate micro-batches, step, and so update the average."""
        self.model.train()
        self.optimizer.zero_grad()
        for index, (images, boxes) in enumerate(batches(self.epoch), start=1):
            on_step(self.epoch * BATCHES + index)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = self.model(images)
            loss = nn.functional.smooth_l1_loss(found.float(), boxes, beta=0.05) / ACCUMULATE
            self.scaler.scale(loss).backward()
            if index % ACCUMULATE == 0:
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()

    def validate_and_save(self, folder: Path) -> None:
        """Score the average, and write the checkpoints."""
        if self.ema is None:
            return
        self.ema.update_attr(self.model, include=("names",))
        score = fitness(self.ema.ema)
        is_best = score > self.best_fitness
        self.best_fitness = max(score, self.best_fitness)
        state = self.checkpoint(self.ema)
        if is_best:
            # The best first: killed between the two, the run repeats this epoch and writes both.
            write_whole(state, folder / "best.pt")
        write_whole(state, folder / "last.pt")

    def checkpoint(self, ema: ModelEMA) -> dict[str, Any]:
        """What YOLOv5 keeps, and what it takes to go on exactly."""
        weights = self.model.state_dict()
        return {
            "epoch": self.epoch,
            "best_fitness": self.best_fitness,
            "model": in_half(weights),
            "ema": in_half(ema.average.weights()),
            "updates": ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "exact": {
                "model": weights,
                "average": ema.average.state_dict(),
                "scaler": self.scaler.state_dict(),
            },
        }

    def resume(self, folder: Path) -> None:
        """Take up the last checkpoint, if there is one."""
        if not (folder / "last.pt").exists():
            return
        state = torch.load(folder / "last.pt", weights_only=True)
        exact = state["exact"]
        self.model.load_state_dict(exact["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(exact["scaler"])
        if self.ema is not None:
            self.ema.average.load_state_dict(exact["average"])
        self.epoch, self.best_fitness = state["epoch"] + 1, state["best_fitness"]


def in_half(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Floating weights in half precision, but for a tensor with values beyond its range.

    Such a tensor stays as it is: infinities would make the file useless, and an error would end a
    run of days at its checkpoint. `load_state_dict` takes either dtype.
    """
    halved = {name: tensor.half() for name, tensor in weights.items() if tensor.is_floating_point()}
    fits = {n: h for n, h in halved.items() if torch.equal(h.isfinite(), weights[n].isfinite())}
    return weights | fits


def nothing(step: int) -> None:
    """What happens at each micro-batch, besides training."""


def main(
    folder: Path, epochs: int = EPOCHS, on_step: Callable[[int], None] = nothing
) -> Result | None:
    run = Run()
    run.resume(folder)
    print(f"starting at epoch {run.epoch}", flush=True)
    while run.epoch < epochs:
        run.train_epoch(on_step)
        run.validate_and_save(folder)
        run.epoch += 1
    if run.ema is None:
        return None
    live, averaged = fitness(run.model.eval()), fitness(run.ema.ema)
    print(f"overlap: live {live:.3f}, averaged {averaged:.3f}, best {run.best_fitness:.3f}")
    polyak.save(run.ema.average, folder / "averaged.safetensors")
    return Result(run.ema.average.weights(), run.ema.updates, run.best_fitness)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary), epochs=EPOCHS // 2)
            main(Path(temporary))
