"""Merge 8 and 32 checkpoints of 124M bfloat16 parameters: how long, and in how much memory?

    make bench

Asks polyak, the plain script that most people write (load all, add in float32, save), and
mergekit where it is installed. Every run is a process of its own, and all read the same files,
which are in the page cache. The times are of the work, without the imports; the memory is the peak
resident size above a process that has done its imports and nothing else.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file

RESULTS = Path(__file__).parent / "results" / "merge.json"
MANY = 32

# What the issue of this benchmark promised.
MOST_MEMORY = 350  # MB above an idle import
MOST_OF_PLAIN, MOST_OF_MERGEKIT = 0.7, 0.35  # of their wall time
MOST_GROWTH = 10  # MB from 8 checkpoints to 32

# Each gets the folder, the number of checkpoints and the result; `begin` follows the imports.
WAYS = {
    "polyak": """
import polyak
begin()
polyak.merge(files, out=out)
""",
    "plain script": """
import torch
from safetensors.torch import load_file, save_file
begin()
states = [load_file(file) for file in files]
total = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in states[0].items()}
for state in states:
    for name, value in state.items():
        total[name] += value
save_file({name: (value / len(states)).bfloat16() for name, value in total.items()}, out)
""",
    "mergekit": """
import yaml
from mergekit.scripts import merge_raw_pytorch
begin()
models = [{"model": file, "parameters": {"weight": 1.0}} for file in files]
config = {"merge_method": "linear", "models": models, "dtype": "bfloat16"}
with open(out + ".yaml", "w") as file:
    yaml.safe_dump(config, file)
merge_raw_pytorch.main.main([out + ".yaml", out], standalone_mode=False)
""",
}

# VmHWM, not ru_maxrss: that one starts at the size of the process that started this one.
FRAME = """
import sys, time
files, out = sys.argv[2:], sys.argv[1]
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
def begin():
    global started, processor, idle
    started, processor, idle = time.perf_counter(), time.process_time(), peak()
{way}
print("seconds", time.perf_counter() - started)
print("processor", time.process_time() - processor)
print("megabytes", peak() - idle)
"""


@dataclass(frozen=True)
class Run:
    """One way on one number of checkpoints."""

    way: str
    checkpoints: int
    seconds: float
    fastest: float
    processor_seconds: float
    megabytes: float
    runs: int


def make_files(folder: Path, count: int) -> list[Path]:
    """Checkpoints with the shapes of GPT-2 small; those beyond eight are links to the first."""
    shapes = {"wte.weight": (50257, 768), "wpe.weight": (1024, 768), "ln_f.weight": (768,)}
    for layer in range(12):
        for name, shape in {
            "attn.c_attn": (768, 2304),
            "attn.c_proj": (768, 768),
            "mlp.c_fc": (768, 3072),
            "mlp.c_proj": (3072, 768),
        }.items():
            shapes[f"h.{layer}.{name}.weight"] = shape
            shapes[f"h.{layer}.{name}.bias"] = (shape[1],)
        shapes |= {
            f"h.{layer}.ln_{i}.{part}": (768,) for i in (1, 2) for part in ("weight", "bias")
        }
    files = [folder / f"step-{index:04d}.safetensors" for index in range(count)]
    for index, file in enumerate(files):
        if index >= 8:
            os.link(files[index % 8], file)
            continue
        generator = torch.Generator().manual_seed(index)
        state = {
            name: (0.02 * torch.randn(shape, generator=generator)).bfloat16()
            for name, shape in shapes.items()
        }
        save_file(state, file)
    return files


def once(way: str, files: list[Path], folder: Path) -> dict[str, float]:
    """Seconds, processor seconds and megabytes of one process."""
    out = folder / ("out" if way == "mergekit" else "out.safetensors")
    code = FRAME.format(way=WAYS[way])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(out), *map(str, files)],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"{way} failed:\n{done.stderr[-2000:]}")
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    words = [line.split() for line in done.stdout.splitlines()[-3:]]
    return {name: float(number) for name, number in words}


def measure(cases: list[tuple[str, int]], files: list[Path], folder: Path, runs: int) -> list[Run]:
    """The medians of the times of some rounds, and the largest memory; all cases in each round."""
    found: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(runs):
        for way, count in cases:
            found[way, count].append(once(way, files[:count], folder))
    return [
        Run(
            way,
            count,
            seconds=statistics.median(one["seconds"] for one in ones),
            fastest=min(one["seconds"] for one in ones),
            processor_seconds=statistics.median(one["processor"] for one in ones),
            megabytes=max(one["megabytes"] for one in ones),
            runs=runs,
        )
        for (way, count), ones in found.items()
    ]


def machine() -> dict[str, str | int]:
    """What it ran on."""
    names = [line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    return {
        "processor": names[0].partition(": ")[2] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def judge(runs: list[Run]) -> dict[str, dict[str, object]]:
    """Each promise with what was measured and whether it was kept."""
    by = {(run.way, run.checkpoints): run for run in runs}
    ours = by["polyak", 8]
    checks = {
        "memory above an idle import, MB": (ours.megabytes, MOST_MEMORY),
        "more memory for 32 than for 8, MB": (
            by["polyak", MANY].megabytes - ours.megabytes,
            MOST_GROWTH,
        ),
        "time against the plain script": (
            ours.seconds / by["plain script", 8].seconds,
            MOST_OF_PLAIN,
        ),
    }
    if ("mergekit", 8) in by:
        checks["time against mergekit"] = (
            ours.seconds / by["mergekit", 8].seconds,
            MOST_OF_MERGEKIT,
        )
    return {
        name: {"measured": found, "at most": most, "kept": found <= most}
        for name, (found, most) in checks.items()
    }


def main() -> None:
    """Measure, print a table, write the results; exit code 1 when a promise was not kept."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--runs", type=int, default=5, help="of each way")
    options.add_argument("--folder", type=Path, help="for 2.5 GB of files; a temporary one if none")
    options.add_argument("--out", type=Path, default=RESULTS, help="where the results go")
    asked = options.parse_args()

    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        files = make_files(folder, MANY)
        cases = [("plain script", 8), ("polyak", 8), ("polyak", MANY)]
        if find_spec("mergekit"):
            cases.append(("mergekit", 8))
        runs = measure(cases, files, folder, asked.runs)

    print(f"{'way':14} {'checkpoints':>11} {'seconds':>8} {'fastest':>8} {'CPU s':>7} {'MB':>6}")
    for run in runs:
        print(
            f"{run.way:14} {run.checkpoints:11} {run.seconds:8.2f} {run.fastest:8.2f} "
            f"{run.processor_seconds:7.2f} {run.megabytes:6.0f}"
        )
    promises = judge(runs)
    for promise, found in promises.items():
        mark = "kept" if found["kept"] else "NOT KEPT"
        print(f"{promise}: {found['measured']:.3g}, at most {found['at most']}: {mark}")

    about = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "command": "make bench",
        "parameters": 124_439_808,
        "machine": machine(),
        "mergekit": version("mergekit") if find_spec("mergekit") else None,
        "runs": [asdict(run) for run in runs],
        "promises": promises,
    }
    asked.out.parent.mkdir(exist_ok=True)
    asked.out.write_text(json.dumps(about, indent=2) + "\n")
    print(f"written: {asked.out}")
    if not all(found["kept"] for found in promises.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
