"""What is promised of the speed of polyak, and whether a measurement keeps it.

Unless said otherwise the guard against NaN and inf is on, as it is by default.
"""

from collections.abc import Iterator, Mapping
from typing import Any

GUARDED, BARE = "polyak", "polyak, no guard"
LARGE = ("ResNet-50-like", "GPT-2-like")

# (model, as a multiple of) -> at most, on the CPU, float32, one average.
ALONE = {("MLP", "seconds"): 20e-6}
OF_PEER = {"MLP": 0.4, "1,000 tiny": 0.2}
BARE_OF_PEER = {"ResNet-50-like": 1.0, "GPT-2-like": 1.0}
BARE_OF_LIMIT = {"ResNet-50-like": 1.4, "GPT-2-like": 1.15}
GUARD_OF_BARE = 1.6
NARROW_OF_PEER = 0.8  # bfloat16 live, float32 average
BLOCK_BYTES, BLOCK_OF_PEER = 64e6, 1.4
# On a GPU, from 25M parameters up.
SHARE_OF_BANDWIDTH, SHARE_OF_STEP = 0.85, 0.01

Promise = tuple[str, float | None, float]  # None: what it speaks of could not be measured


def judge(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each promise that the results speak of, with what was measured and whether it was kept.

    What could not be measured (a missing library, a system that does not tell) is not kept.
    """
    on_device = _on_gpu if found["device"] == "cuda" else _on_cpu
    return {
        name: {
            "measured": measured,
            "at most": most,
            "kept": measured is not None and measured <= most,
        }
        for name, measured, most in on_device(Times(found))
    }


def shown(measured: float | None) -> str:
    """For a table."""
    return "not measured" if measured is None else f"{measured:.3g}"


class Times:
    """Look-ups in the results of `updates.py`.

    Args:
        found: the results, as in the file.
    """

    def __init__(self, found: Mapping[str, Any]) -> None:
        self.found = found
        self.rows = {
            (row["model"], row["live"], row["averages"], row["who"]): row
            for row in found["updates"]
        }
        self.right = {(one["who"], one["live"]) for one in found["answers"] if one["right"]}
        self.ours = {GUARDED, BARE}
        self.peers = [who for who in found["how"] if who not in self.ours]
        self.models = list(dict.fromkeys(row["model"] for row in found["updates"]))

    def of(self, model: str, live: str, averages: int, who: str) -> dict[str, Any] | None:
        """One row, if it was measured."""
        return self.rows.get((model, live, averages, who))

    def fastest(self, model: str, live: str, averages: int = 1) -> dict[str, Any] | None:
        """The row of the fastest peer that gives the right answer."""
        rows = [
            self.rows[model, live, averages, who]
            for who in self.peers
            if (who, live) in self.right and (model, live, averages, who) in self.rows
        ]
        return min(rows, key=lambda row: float(row["seconds"]), default=None)

    def of_fastest(self, name: str, model: str, live: str, who: str, most: float) -> list[Promise]:
        """Time as a multiple of the fastest right peer's, if the model was measured at all."""
        ours, theirs = self.of(model, live, 1, who), self.fastest(model, live)
        if ours is None:
            return []
        ratio = None if theirs is None else float(ours["seconds"] / theirs["seconds"])
        return [(f"{model}: {name}, of the fastest right peer", ratio, most)]

    def use(self, what: str) -> dict[str, dict[str, Any]]:
        """The rows of one use, by contestant."""
        return {row["who"]: row for row in self.found["uses"] if row["what"] == what}


def _on_cpu(times: Times) -> Iterator[Promise]:
    for (model, _), most in ALONE.items():
        if row := times.of(model, "float32", 1, GUARDED):
            yield f"{model}: update, microseconds", 1e6 * row["seconds"], 1e6 * most
    for what, who, bounds in (
        ("update", GUARDED, OF_PEER),
        ("update without the guard", BARE, BARE_OF_PEER),
    ):
        for model, most in bounds.items():
            yield from times.of_fastest(what, model, "float32", who, most)
    for model in LARGE:
        bare, guarded = (times.of(model, "float32", 1, who) for who in (BARE, GUARDED))
        if bare and guarded:
            most = BARE_OF_LIMIT[model]
            yield f"{model}: update without the guard, of the limit", bare["of_limit"], most
            share = guarded["seconds"] / bare["seconds"]
            yield f"{model}: update, of that without the guard", share, GUARD_OF_BARE
    for model in times.models:
        name = "bfloat16 into float32"
        yield from times.of_fastest(name, model, "bfloat16", GUARDED, NARROW_OF_PEER)
    yield from _block(times)


def _block(times: Times) -> Iterator[Promise]:
    found = times.use("block")
    if (ours := found.pop(GUARDED, None)) is None:
        return
    extra = None if ours["extra"] is None else ours["extra"] / 1e6
    yield "GPT-2-like: applied(), extra MB", extra, BLOCK_BYTES / 1e6
    returning = {one["who"] for one in times.found["answers"] if one["returns"]}
    theirs = [row["seconds"] for who, row in found.items() if who in returning]
    ratio = ours["seconds"] / min(theirs) if theirs else None
    yield "GPT-2-like: applied() in and out, of the fastest right peer", ratio, BLOCK_OF_PEER


def _on_gpu(times: Times) -> Iterator[Promise]:
    most = 1 / SHARE_OF_BANDWIDTH
    for model in LARGE:
        for live in ("float32", "bfloat16"):
            for averages in (1, 4):
                if row := times.of(model, live, averages, GUARDED):
                    name = f"{model}: {averages} average(s) of {live}, of the limit"
                    yield name, row["of_limit"], most
    if row := times.use("step").get(GUARDED):
        yield "GPT-2-like: update, share of a training step", row["share"], SHARE_OF_STEP
