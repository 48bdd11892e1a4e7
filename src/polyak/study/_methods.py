"""Which averages does a study follow? Each is a small value that says how to build it."""

from collections.abc import Sequence
from dataclasses import dataclass

from polyak._errors import ArgumentError
from polyak._schedules import After, Exponential, InverseGamma, Power, Schedule, Uniform

LIVE = "live"
ENSEMBLE = "ensemble of seeds"
DECAYED = "decayed LR"
ARTICLE = "EMA of the article"


@dataclass(frozen=True)
class Averaged:
    """An average of the run: a schedule with a name.

    Args:
        name: what the tables call it.
        schedule: the rule of the average, in optimizer steps.
        family: averages that differ in length only share one; the study then also says which
            of them the validation data would choose.
        shown_from: first step at which it is worth looking at; before it equals the live weights.
        refresh: also look at it with its normalisation statistics computed anew.
    """

    name: str
    schedule: Schedule
    family: str = ""
    shown_from: int = 0
    refresh: bool = False


@dataclass(frozen=True)
class Windowed:
    """The mean of the last `k` captures, one every `every` steps; holds them all in memory."""

    name: str
    k: int
    every: int
    family: str = ""


@dataclass(frozen=True)
class Tail:
    """SWA: the plain mean of what comes after the first `start` (a share) of the run.

    Where the length of the run is known this is `After(start * steps, Uniform())`, step by
    step. Under early stopping it is known only afterwards: the study then keeps the weights of
    every epoch and, once the run has stopped, feeds them to the same average, one capture an
    epoch (Izmailov et al. 2018, https://arxiv.org/abs/1803.05407, capture once an epoch too).
    """

    name: str = "SWA from 75 %"
    start: float = 0.75

    def __post_init__(self) -> None:
        if not 0.0 <= self.start < 1.0:
            raise ArgumentError(f"start must be a share in [0, 1), got {self.start!r}.")

    def within(self, length: int) -> Averaged:
        """The same as an average of a run of known length, in steps or in epochs."""
        start = min(round(self.start * length), length - 1)  # the last moment always counts
        return Averaged(self.name, After(start, Uniform()), shown_from=start + 1)


Method = Averaged | Windowed | Tail


def has_length(method: Method) -> bool:
    """Whether it is an average of which only the length was to be chosen: EMA or power function."""
    schedule = method.schedule if isinstance(method, Averaged) else None
    if isinstance(schedule, Exponential):
        return schedule.debias  # the plain one keeps a share of the first weights as well
    return isinstance(schedule, Power)


def ema(decay: float, *, debias: bool = True, refresh: bool = False) -> Averaged:
    """An EMA with its decay in the name; the debiased ones form the family "EMA"."""
    name = f"EMA {decay:g}" if debias else f"EMA {decay:g}, plain"
    schedule = Exponential(decay=decay, debias=debias)
    return Averaged(name, schedule, family="EMA" if debias else "", refresh=refresh)


def article_ema() -> Averaged:
    """The EMA of the article, `EMA(beta=0.999, update_after_step=100, power=2/3)` of ema-pytorch.

    It copies the live weights at its first 101 calls, then mixes with 1 - (1 + e) ** (-2/3),
    e = 1 at call 102: `InverseGamma` started after step 100, whose own first update copies.
    """
    return Averaged(ARTICLE, After(100, InverseGamma(power=2 / 3, max_decay=0.999)))


def power(sigma_rel: float) -> Averaged:
    """A power-function average with its relative length in the name."""
    return Averaged(f"power {sigma_rel:g}", Power(sigma_rel=sigma_rel), family="power")


def window(share: float, *, steps: int, k: int = 20) -> Windowed:
    """A window over the last `share` of a run of `steps`, held as `k` captures."""
    every = max(1, round(share * steps / k))
    return Windowed(f"window {share:.0%}", k=max(2, k), every=every)


def usual_methods(*, steps: int) -> tuple[Method, ...]:
    """What a study follows when the task names nothing: lengths as shares of the planned run.

    EMAs whose mean age is 1, 3 and 10 % of the run, the middle one without bias correction too,
    power functions of 5 and 10 %, SWA from 75 %, a window of the last 10 %.
    """
    if steps < 20:
        raise ArgumentError(
            f"steps must be 20 or more to compare lengths of averages, got {steps}. "
            "Raise the epochs, or name the methods of the task yourself."
        )
    decays = [round(1.0 - 1.0 / (1.0 + share * steps), 5) for share in (0.01, 0.03, 0.1)]
    return (
        *(ema(decay) for decay in decays),
        ema(decays[1], debias=False),
        power(0.05),
        power(0.10),
        Tail(),
        window(0.10, steps=steps),
    )


def check_methods(methods: Sequence[Method]) -> None:
    """Raise `ArgumentError` unless every method has a name of its own."""
    names = [method.name for method in methods]
    taken = sorted({name for name in names if names.count(name) > 1})
    reserved = sorted(set(names) & {LIVE, ENSEMBLE, DECAYED})
    if taken or reserved or not names:
        raise ArgumentError(
            "methods must be one or more with names of their own, got "
            + (f"{taken} twice." if taken else f"reserved {reserved}." if reserved else "none.")
        )
