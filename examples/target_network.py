"""A target network for Q-learning, soft and hard, on a world whose true values are known.

    python examples/target_network.py

A network learns what each action is worth from the steps of a blind walk through a small grid. What
it learns from is r + gamma max Q(next), and that Q must hold still: it comes from a second network,
the target. The soft one is an average that moves by TAU at every step
(Lillicrap et al. 2016, https://arxiv.org/abs/1509.02971), shown by `average.module()`. The hard one
is overwritten every so many steps with `copy_to` (Mnih et al. 2015,
https://doi.org/10.1038/nature14236). Value iteration on the same grid gives the true values, and
both must find them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import polyak

GRID = (
    "...G",
    ".#.P",
    "....",
)  # G: +1 and the end, P: -1 and the end, #: a wall
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
DISCOUNT = 0.9
TAU, EVERY = 0.03, 40  # soft: share of the online network a step; hard: steps between two copies
STEPS, BATCH = 800, 64

Kind = Literal["soft", "hard"]
KINDS: tuple[Kind, ...] = ("soft", "hard")
# A network to learn from, and what is to be done about it after each step.
Target = tuple[nn.Module, Callable[[], None]]

HEIGHT, WIDTH = len(GRID), len(GRID[0])
STATES, ACTIONS = HEIGHT * WIDTH, len(MOVES)
FREE = [s for s in range(STATES) if GRID[s // WIDTH][s % WIDTH] == "."]


def move(state: int, action: int) -> tuple[int, float, bool]:
    """Next state, reward and whether it was the end; walls and borders hold one back."""
    row, column = state // WIDTH + MOVES[action][0], state % WIDTH + MOVES[action][1]
    inside = 0 <= row < HEIGHT and 0 <= column < WIDTH
    if not inside or GRID[row][column] == "#":
        return state, 0.0, False
    reward = {"G": 1.0, "P": -1.0}.get(GRID[row][column], 0.0)
    return row * WIDTH + column, reward, reward != 0.0


def true_values() -> Tensor:
    """Value iteration in float64 until nothing moves any more [states, actions]."""
    values = torch.zeros(STATES, ACTIONS, dtype=torch.float64)
    while True:
        before = values.clone()
        for state in FREE:
            for action in range(ACTIONS):
                there, reward, end = move(state, action)
                values[state, action] = reward + (0 if end else DISCOUNT * before[there].max())
        if torch.equal(values, before):
            return values


@dataclass(frozen=True)
class Replay:
    """The steps of a blind walk, each a row: where, what, what for, where to, and the end."""

    state: Tensor
    action: Tensor
    reward: Tensor
    there: Tensor
    end: Tensor

    def sample(self, random: torch.Generator) -> "Replay":
        """Return some of the rows, drawn with replacement."""
        rows = torch.randint(len(self.state), (BATCH,), generator=random)
        picked = (self.state, self.action, self.reward, self.there, self.end)
        return Replay(*(column[rows] for column in picked))


def walk(random: torch.Generator, steps: int = 4_000) -> Replay:
    """Walk blindly, and begin again somewhere after each end."""

    def somewhere() -> int:
        return FREE[int(torch.randint(len(FREE), (), generator=random))]

    rows: list[tuple[int, int, float, int, bool]] = []
    state = somewhere()
    for _ in range(steps):
        action = int(torch.randint(ACTIONS, (), generator=random))
        there, reward, end = move(state, action)
        rows.append((state, action, reward, there, end))
        state = somewhere() if end else there
    return Replay(*(torch.tensor(column) for column in zip(*rows, strict=True)))


def network() -> nn.Module:
    return nn.Sequential(nn.Embedding(STATES, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))


def soft(online: nn.Module, optimizer: torch.optim.Optimizer) -> Target:
    """A target that follows by itself: target += TAU (online - target) after every step."""
    # Without debias: the target begins as a copy, and forgets that copy at the same pace.
    average = polyak.Average(online, polyak.Exponential(decay=1.0 - TAU, debias=False))
    average.follow(optimizer)
    return average.module(), lambda: None


def hard(online: nn.Module, optimizer: torch.optim.Optimizer) -> Target:
    """A target that is overwritten now and then."""
    latest = polyak.Average(online, polyak.Exponential(decay=0.0))  # no memory: the last weights
    latest.follow(optimizer)
    target = network().eval().requires_grad_(False)
    latest.copy_to(target)

    def copy_now_and_then() -> None:
        if latest.updates % EVERY == 0:
            latest.copy_to(target)  # refused if a part of the target had no partner

    return target, copy_now_and_then


def learn(kind: Kind) -> Tensor:
    """Return the values that the target ends with [states, actions]."""
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(1)
    replay = walk(random)
    online = network()
    optimizer = torch.optim.Adam(online.parameters(), lr=5e-3)
    target, after_step = (soft if kind == "soft" else hard)(online, optimizer)

    for _ in range(STEPS):
        batch = replay.sample(random)
        with torch.no_grad():
            best = target(batch.there).amax(dim=1)
        wanted = batch.reward + DISCOUNT * torch.where(batch.end, 0.0, best)
        said = online(batch.state).gather(1, batch.action[:, None])[:, 0]
        optimizer.zero_grad()
        (said - wanted).square().mean().backward()
        optimizer.step()
        after_step()

    with torch.no_grad():
        values: Tensor = target(torch.arange(STATES))
    return values


def main() -> dict[str, float]:
    """Return the largest error of each kind of target, over all free places and actions."""
    true = true_values()[FREE]
    errors: dict[str, float] = {}
    for kind in KINDS:
        learned = learn(kind)[FREE].double()
        errors[kind] = float((learned - true).abs().max())
        worth = true.gather(1, learned.argmax(dim=1, keepdim=True))[:, 0]
        optimal = torch.equal(worth, true.amax(dim=1))
        print(f"{kind}: largest error {errors[kind]:.4f}, every action it takes is best: {optimal}")
        assert errors[kind] < 0.02, f"the {kind} target is {errors[kind]} from the true values"
        assert optimal, f"the {kind} target does not know the way"
    return errors


if __name__ == "__main__":
    main()
