"""What an average costs at scale, by arithmetic: bytes held, moved, sent and written, and the time.

    python benchmarks/costs.py            writes the tables of docs/scale.md anew

The model is a handful of lines: so many elements on a rank, so many bytes moved for each, so many
bytes a second. `benchmarks/scale.py` measures the same quantities at the sizes that run here.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
RESULTS = Path(__file__).parent / "results" / "scale.json"

STORED = 4  # bytes of an averaged element: float32
TRAINING = 16  # bytes a parameter for training itself: weight, gradient, two moments of Adam
SCRATCH = 16 * 2**20  # bytes of `applied()` where live and average have one dtype

# Bytes that `applied()` moves for each element of a rank, in and out together.
SWAPPED = 2 * (6 * 4 + 4)  # three copies of 4 bytes (live, average, scratch), one fingerprint
COPIED = {2: 2 + 2 + 4 + 2 + 2 + 2, 4: 4 + 4 + 4 + 4 + 4 + 4}  # by bytes of a live element


@dataclass(frozen=True)
class Machine:
    """What is assumed of the hardware: an H100 SXM by its data sheet, and 400 Gb/s to each.

    https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet

    Args:
        memory: bytes a second that one GPU reads and writes in practice, 85 % of the 3.35e12 named.
        room: bytes of memory of one GPU.
        node: GPUs that NVLink joins.
        nvlink: bytes a second into one GPU inside a node, 80 % of 450e9.
        network: bytes a second into one GPU from other nodes, 80 % of 50e9.
        disk: bytes a second that one process writes to shared storage.
    """

    memory: float = 0.85 * 3.35e12
    room: float = 80e9
    node: int = 8
    nvlink: float = 0.8 * 450e9
    network: float = 0.8 * 50e9
    disk: float = 2e9

    def link(self, ranks: int) -> float:
        """Bytes a second into one GPU when so many take part."""
        return self.nvlink if ranks <= self.node else self.network


@dataclass(frozen=True)
class Setup:
    """A model on some ranks, and its average.

    Args:
        parameters: of the model.
        ranks: that train it.
        shards: into how many parts the average is cut; ranks / shards hold the same part.
        live: bytes of a live element, 4 (float32) or 2 (bfloat16).
        whole: every rank holds the whole model (DDP), and only the average is cut.
    """

    parameters: float
    ranks: int
    shards: int
    live: int = 4
    whole: bool = False

    @property
    def elements(self) -> float:
        """Of the average, on one rank."""
        return self.parameters / self.shards

    @property
    def held(self) -> float:
        """Bytes of the average on one rank."""
        return STORED * self.elements

    @property
    def training(self) -> float:
        """Bytes on one rank that the training needs without the average, activations apart."""
        return TRAINING * self.parameters / (1 if self.whole else self.shards)

    @property
    def update_moves(self) -> float:
        """Bytes that an update reads and writes on one rank: live, average, average."""
        return self.elements * (self.live + STORED + STORED)

    @property
    def applied_receives(self) -> float:
        """Bytes that `applied()` receives on one rank, beyond what FSDP2 gathers anyway.

        Elements are cast to the live dtype before they travel, if that is narrower.
        """
        sent = min(self.live, STORED)
        return sent * self.parameters * (1 - 1 / self.shards) if self.whole else 0.0

    @property
    def applied_moves(self) -> float:
        """Bytes that `applied()` reads and writes on one rank, in and out together."""
        if self.whole and self.shards > 1:  # every element is gathered, and the live one kept
            return self.parameters * (COPIED[self.live] + STORED)
        return self.elements * (SWAPPED if self.live == STORED else COPIED[self.live])

    @property
    def applied_holds(self) -> float:
        """Bytes that `applied()` holds on one rank while the block lasts; in it, one tensor more.

        Where live and average can trade places, scratch; elsewhere a copy of the live values.
        """
        if self.whole and self.shards > 1:
            return self.live * self.parameters
        return SCRATCH if self.live == STORED else self.live * self.elements

    @property
    def checkpoint(self) -> float:
        """Bytes of the average that one rank writes through DCP: what several hold goes once."""
        return STORED * self.parameters / self.ranks

    def update_takes(self, machine: Machine) -> float:
        """Seconds, if the memory is all that limits it."""
        return self.update_moves / machine.memory

    def applied_takes(self, machine: Machine) -> float:
        """Seconds to lend and to take back, evaluation apart."""
        sent = self.applied_receives / machine.link(self.shards)
        return sent + self.applied_moves / machine.memory

    def fits(self, machine: Machine) -> bool:
        """Whether training state and average have room in the memory of a GPU."""
        return self.training + self.held <= machine.room

    def export_receives(self, saved: int = 2) -> float:
        """Bytes that an export sends to each rank, cast to those that a saved element has."""
        return saved * self.parameters * (1 - 1 / self.shards)

    def export_takes(self, machine: Machine, saved: int = 2) -> float:
        """Seconds to gather tensor by tensor and to write one file, one after the other."""
        gather = self.export_receives(saved) / machine.link(self.ranks)
        return gather + saved * self.parameters / machine.disk


# ── words ────────────────────────────────────────────────────────────────────────────────────────


def in_bytes(number: float) -> str:
    """A number of bytes with two or three digits: 4 GB, 62.5 MB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size * 0.9995:
            return f"{_digits(number / size)} {unit}"
    return f"{_digits(number)} B"


def in_time(seconds: float) -> str:
    """A time with two or three digits: 4.2 ms, 8 min."""
    large = (("h", 3600.0), ("min", 60.0), ("s", 1.0))
    for unit, size in (*large, ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)):
        if seconds >= size * 0.9995:
            return f"{_digits(seconds / size)} {unit}"
    return "0"


def _digits(number: float) -> str:
    places = max(0, 2 - max(0, math.floor(math.log10(number)))) if number > 0 else 0
    text = f"{number:,.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown: first two columns to the left, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ── tables ───────────────────────────────────────────────────────────────────────────────────────

SIZES = {"1B": 1e9, "70B": 70e9, "1T": 1e12}
GPUS = (1, 8, 64, 256, 1024)


def sharded(machine: Machine) -> str:
    """FSDP2 over all ranks, float32 shards."""
    head = [
        "parameters",
        "GPUs",
        "training state",
        "average",
        "update moves",
        "update takes",
        "`applied()` in and out",
        "checkpoint",
    ]
    rows = []
    for name, parameters in SIZES.items():
        for gpus in GPUS:
            setup = Setup(parameters, gpus, gpus)
            fits = setup.fits(machine)
            cells = [
                in_bytes(setup.update_moves),
                in_time(setup.update_takes(machine)),
                in_time(setup.applied_takes(machine)),
                in_bytes(setup.checkpoint),
            ]
            rows.append(
                [
                    name,
                    f"{gpus:,}",
                    in_bytes(setup.training) + ("" if fits else ", no room"),
                    in_bytes(setup.held),
                    *(cells if fits else ["-"] * len(cells)),
                ]
            )
    return table(head, rows)


def replicated(machine: Machine) -> str:
    """DDP: the average whole on every rank, and cut."""
    head = [
        "1B parameters on",
        "average",
        "update moves",
        "update takes",
        "`applied()` receives",
        "in and out",
        "holds meanwhile",
        "checkpoint",
    ]
    rows = []
    for gpus in (8, 64, 1024):
        for shards, what in ((1, ""), (gpus, ", `shard=`")):
            setup = Setup(1e9, gpus, shards, whole=True)
            rows.append(
                [
                    f"{gpus:,} GPUs{what}",
                    in_bytes(setup.held),
                    in_bytes(setup.update_moves),
                    in_time(setup.update_takes(machine)),
                    in_bytes(setup.applied_receives),
                    in_time(setup.applied_takes(machine)),
                    in_bytes(setup.applied_holds),
                    in_bytes(setup.checkpoint),
                ]
            )
    return table(head, rows)


def exported(machine: Machine) -> str:
    """One safetensors file in bfloat16, from as many GPUs as the model needs."""
    head = ["parameters", "GPUs", "file", "sent to each rank", "time"]
    rows = []
    for (name, parameters), gpus in zip(SIZES.items(), (8, 64, 1024), strict=True):
        setup = Setup(parameters, gpus, gpus)
        rows.append(
            [
                name,
                f"{gpus:,}",
                in_bytes(2 * parameters),
                in_bytes(setup.export_receives()),
                in_time(setup.export_takes(machine)),
            ]
        )
    return table(head, rows)


def measured(found: dict[str, Any]) -> str:
    """What the model says of the runs of `benchmarks/scale.py`, and what they took."""
    head = ["on each rank", "1 rank: model", "measured", "2 ranks: model", "measured"]
    cells: dict[str, list[str]] = {}
    for one in found["comparisons"]:
        show = in_bytes if one["unit"] == "bytes" else in_time
        ratio = one["measured"] / one["model"]
        row = cells.setdefault(one["what"], [])
        row += [show(one["model"]), f"{show(one['measured'])} ({ratio:.2f})"]
    rows = [[what, *row] for what, row in cells.items()]
    about = found["machine"]
    return (
        f"{found['date']}, {about['processor']}, {about['cores']} cores, torch {about['torch']}, "
        f"{found['parameters'] / 1e6:.0f}M parameters; medians of {found['rounds']} rounds.\n\n"
        + table(head, rows)
    )


def promises(found: dict[str, Any]) -> str:
    """What was promised of the time on one of two ranks, and what came out, round by round."""
    head = ["an update on one of 2 ranks, against 1", "promised", "measured", "rounds"]
    rows = [
        [
            name,
            f"{said['at least']:.3f} to {said['at most']:.3f}" if said["counts"] else "-",
            f"{said['measured']:.2f}",
            f"{min(said['rounds']):.2f} to {max(said['rounds']):.2f}",
        ]
        for name, said in found["promises"].items()
    ]
    return table(head, rows)


def paths(found: dict[str, Any]) -> str:
    """What each kernel does for a parameter and for a tensor, counted at the dispatcher."""
    head = ["kernel", "float32 live", "bfloat16 live", "operations a tensor"]
    once = [live + 2 * STORED for live in (4, 2)]
    rows = [["one pass, as in the tables", *(f"{bytes_} bytes" for bytes_ in once), ""]]
    for one in found["paths"]:
        cells = [
            f"{bytes_} bytes, {bytes_ / least:.1f} times"
            for bytes_, least in zip(one["bytes"], once, strict=True)
        ]
        rows.append([one["what"], *cells, str(one["operations"])])
    return table(head, rows)


def a_tensor(found: dict[str, Any]) -> str:
    """A sentence about what does not depend on the size."""
    return (
        "Beside the bytes comes what does not depend on the size, Python and calls. Small tensors "
        "are kept side by side on the CPU and updated together: of a thousand with one element, "
        f"{in_time(found['seconds a tensor'])} each."
    )


def written(page: str, machine: Machine, found: dict[str, Any]) -> str:
    """The page with its tables made anew, between their marks."""
    tables = {
        "sharded": sharded(machine),
        "replicated": replicated(machine),
        "exported": exported(machine),
        "measured": measured(found),
        "promises": promises(found),
        "paths": paths(found),
        "a tensor": a_tensor(found),
    }
    for name, text in tables.items():
        begin, end = f"<!-- {name}: benchmarks/costs.py -->\n", f"<!-- end of {name} -->"
        head, found_begin, rest = page.partition(begin)
        _, found_end, tail = rest.partition(end)
        if not (found_begin and found_end):
            raise SystemExit(f"{PAGE} must have the marks {begin.strip()} and {end}.")
        page = f"{head}{begin}\n{text}\n\n{end}{tail}"
    return page


def main() -> None:
    """Write the tables into the page."""
    page = written(PAGE.read_text(), Machine(), json.loads(RESULTS.read_text()))
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
