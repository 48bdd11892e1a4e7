"""The average fed back into training: Switch EMA, Lookahead, hare and tortoise, a steady pull.

    python examples/feedback.py

All four are one call, model += share * (average - model), made every so many steps. They differ in
how long the average is, how often and how far the live weights go to it. The noisy quadratic
x <- (1 - rate * curvature) x + noise, 20 000 times at once, shows what each does to the noise of
the live weights; for Lookahead that is known in closed form. The clock of the average and the state
of the optimizer stay as they are.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import polyak

REPLICAS = 20_000  # a variance is then off by sqrt(2 / 20 000), one per cent
STEPS = 400  # a multiple of every interval below: all are seen just after a feedback
RATE, CURVATURE = 0.1, 1.0
A = 1.0 - RATE * CURVATURE  # what one step leaves of the distance


@dataclass(frozen=True)
class Way:
    """How an average is fed back.

    Args:
        schedule: of the average.
        look: steps from one update of the average to the next.
        every: steps from one feedback to the next.
        share: how far the live weights go to the average.
    """

    schedule: polyak.Exponential
    look: int
    every: int
    share: float


WAYS = {
    # Li et al. 2024, https://arxiv.org/abs/2402.09240
    "Switch EMA": Way(polyak.Exponential(decay=0.9), look=1, every=20, share=1.0),
    # Zhang et al. 2019, https://arxiv.org/abs/1907.08610: slow += 0.5 (fast - slow) at every fifth
    # step is a half-life of five steps, looked at every fifth step from the first weights on.
    "Lookahead": Way(polyak.Exponential(half_life=5, debias=False), look=5, every=5, share=1.0),
    # Lee et al. 2024, https://arxiv.org/abs/2406.02596: the hare runs far ahead of the tortoise,
    # and is rarely set back to it.
    "hare and tortoise": Way(polyak.Exponential(decay=0.99), look=1, every=200, share=1.0),
    "steady pull": Way(polyak.Exponential(decay=0.99), look=1, every=1, share=0.1),
}


class Quadratic(nn.Module):
    """Many replicas of curvature / 2 x^2 whose gradient is noisy."""

    def __init__(self, random: torch.Generator) -> None:
        super().__init__()
        self.random = random
        self.x = nn.Parameter(torch.zeros(REPLICAS))

    def forward(self) -> Tensor:
        """Return the loss, summed: the replicas know nothing of each other."""
        noise = torch.randn(REPLICAS, generator=self.random)
        return (0.5 * CURVATURE * self.x.square() + noise * self.x).sum()


def lookahead_ratio(alpha: float, k: int) -> float:
    """Variance of Lookahead over that of SGD: Zhang et al. 2019, on a noisy quadratic."""
    own = alpha**2 * (1.0 - A ** (2 * k))
    return own / (own + 2.0 * alpha * (1.0 - alpha) * (1.0 - A**k))


def train(way: Way | None) -> tuple[float, float]:
    """Variance of the live weights in the end, and the clock of the average (None: no feedback)."""
    model = Quadratic(torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    average = polyak.Average(model, way.schedule if way else polyak.Uniform())
    average.follow(optimizer, every=way.look if way else 1)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
        if way and step % way.every == 0:
            average.copy_to(model, share=way.share)
    return float(model.x.detach().double().var()), average.now


def what_stays() -> None:
    """Feed back in the middle of a run of Adam, and look at what else has changed: nothing."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    average = polyak.Average(model, polyak.Exponential(decay=0.9))
    average.follow(optimizer)
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.ones(1, 4)).square().sum().backward()
        optimizer.step()

    clock, moments = (average.now, average.updates), copy.deepcopy(optimizer.state_dict())
    average.copy_to(model)
    assert torch.equal(model.weight, average.tensors["weight"])
    assert (average.now, average.updates) == clock
    for before, now in zip(
        moments["state"].values(), optimizer.state_dict()["state"].values(), strict=True
    ):
        assert all(torch.equal(before[key], now[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    print(f"clock after the feedback: {average.now:.0f}, as before; Adam's moments: as before")
    print("(they were measured where the weights stood: optimizer.state.clear() forgets them)")


def main() -> dict[str, float]:
    """Return the variance of the live weights under each way over that of plain SGD."""
    plain, _ = train(None)
    ratios: dict[str, float] = {}
    for name, way in WAYS.items():
        variance, now = train(way)
        ratios[name] = variance / plain
        print(
            f"{name:18} variance of the live weights {ratios[name]:.3f} of SGD's, clock {now:.0f}"
        )
    print(f"Lookahead in closed form: {lookahead_ratio(0.5, 5):.3f}")
    what_stays()
    return ratios


if __name__ == "__main__":
    main()
