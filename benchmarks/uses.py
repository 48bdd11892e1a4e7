"""What the uses of an average cost on the GPT-2-like model: blocks, files, a training step."""

import gc
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from meters import peak_memory, quartiles, seconds_of
from models import GPT
from peers import Contestant
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import polyak

DECAY = 0.999
Make = Callable[[], nn.Module]


def _row(what: str, who: str, times: Sequence[float], **more: Any) -> dict[str, Any]:
    low, middle, high = quartiles(times)
    row = {"what": what, "who": who, "seconds": middle, "low": low, "high": high, **more}
    print(f"  {what:10} {who:22} {middle:9.4f} s ({low:.4f} to {high:.4f})", flush=True)
    return row


# ── the average in the live model, and out again ─────────────────────────────────────────────────


def blocks(
    make: Make, contestants: Sequence[Contestant], device: str, *, quick: bool
) -> list[dict[str, Any]]:
    """Time into the block and out of it, and the most memory meanwhile."""
    print("\napplied() and the like: in and out, with nothing between")
    asked = [c for c in contestants if c.name != "polyak, no guard"]
    times: dict[str, list[float]] = {}
    extra: dict[str, list[int]] = {}
    order = random.Random(1)
    for _ in range(1 if quick else 7):
        for contestant in order.sample(asked, len(asked)):
            model = make()
            running = contestant.make(model, [DECAY])
            if running.block is None:
                continue
            running.update()
            with peak_memory(device) as peak:
                passes = [_in_and_out(running.block, device)]
            passes += [_in_and_out(running.block, device) for _ in range(2)]
            times.setdefault(contestant.name, []).append(quartiles(passes)[1])
            if peak.bytes is not None:
                extra.setdefault(contestant.name, []).append(peak.bytes)
            del model, running
            gc.collect()
    return [
        _row("block", c.name, times[c.name], extra=max(extra.get(c.name, []), default=None))
        for c in asked
        if c.name in times
    ]


def _in_and_out(block: Callable[[], Any], device: str) -> float:
    entered = block()
    into = seconds_of(entered.__enter__, device)
    return into + seconds_of(lambda: entered.__exit__(None, None, None), device)


# ── files ────────────────────────────────────────────────────────────────────────────────────────


def files(
    make: Make, contestants: Sequence[Contestant], device: str, *, quick: bool
) -> list[dict[str, Any]]:
    """Weights for inference, and a checkpoint written and resumed from, beside torch's class."""
    print("\nfiles, in the page cache")
    model = make()
    ours = polyak.Average(model, polyak.Exponential(decay=DECAY, debias=False))
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    ours.update()
    theirs.update_parameters(model)
    times: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="updates-") as name:
        folder = Path(name)
        actions: dict[tuple[str, str], Callable[[], object]] = {
            ("export", "polyak"): lambda: polyak.save(ours, folder / "ours.safetensors"),
            ("export", "torch AveragedModel"): lambda: save_file(
                theirs.module.state_dict(), folder / "theirs.safetensors"
            ),
            ("save", "polyak"): lambda: torch.save(ours.state_dict(), folder / "ours.pt"),
            ("save", "torch AveragedModel"): lambda: torch.save(
                theirs.state_dict(), folder / "theirs.pt"
            ),
            ("resume", "polyak"): lambda: ours.load_state_dict(torch.load(folder / "ours.pt")),
            ("resume", "torch AveragedModel"): lambda: theirs.load_state_dict(
                torch.load(folder / "theirs.pt")
            ),
        }
        for _ in range(1 if quick else 3):
            for key, action in actions.items():
                times.setdefault(key, []).append(seconds_of(action, device))
    return [_row(what, who, found) for (what, who), found in times.items()]


# ── beside training ──────────────────────────────────────────────────────────────────────────────


def training(
    make: Make, contestants: Sequence[Contestant], device: str, *, quick: bool
) -> list[dict[str, Any]]:
    """A step of AdamW, and the guarded update that follows it."""
    model = make()
    assert isinstance(model, GPT)
    length = min(model.wpe.num_embeddings, 1024 if device == "cuda" else 256)
    texts = 8 if device == "cuda" else 1
    print(f"\na training step of {texts * length} tokens")
    average = polyak.Average(model, polyak.Exponential(decay=DECAY, debias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    shape = (texts, length)
    text = torch.randint(model.wte.num_embeddings, shape, device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(text)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    steps, updates = [], []
    began = time.perf_counter()
    for number in range(3 if quick else 21):
        taken = seconds_of(step, device), seconds_of(average.update, device)
        if number:
            steps.append(taken[0])
            updates.append(taken[1])
        if number >= 3 and time.perf_counter() - began > 15:
            break
    return [
        _row("step", "training", steps, tokens=texts * length),
        _row("step", "polyak", updates, share=quartiles(updates)[1] / quartiles(steps)[1]),
    ]
