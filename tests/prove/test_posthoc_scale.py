"""Reconstruction of a model of 124 million parameters from 64 snapshots: memory and time."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import polyak

pytestmark = pytest.mark.prove

WIDTH, LAYERS, VOCABULARY, CONTEXT = 768, 12, 50_257, 1_024
MOMENTS, EVERY = 32, 10

CODE = """
import json, sys, time
import polyak
peak = lambda: 1024 * next(int(l.split()[1]) for l in open("/proc/self/status") if "VmHWM" in l)
before, began = peak(), time.perf_counter()
found = polyak.reconstruct(sys.argv[1], polyak.Power(sigma_rel=0.07))
fitted, headers = time.perf_counter() - began, peak()
found.save(sys.argv[2])
print(json.dumps([before, headers, peak(), fitted, time.perf_counter() - began - fitted]))
"""


def shapes() -> dict[str, list[int]]:
    """The tensors of GPT-2 small, the head tied to the embedding."""
    found = {"wte.weight": [VOCABULARY, WIDTH], "wpe.weight": [CONTEXT, WIDTH]}
    for layer in range(LAYERS):
        for name, shape in (
            ("ln_1.weight", [WIDTH]),
            ("ln_1.bias", [WIDTH]),
            ("attn.weight", [WIDTH, 3 * WIDTH]),
            ("attn.bias", [3 * WIDTH]),
            ("proj.weight", [WIDTH, WIDTH]),
            ("proj.bias", [WIDTH]),
            ("ln_2.weight", [WIDTH]),
            ("ln_2.bias", [WIDTH]),
            ("up.weight", [WIDTH, 4 * WIDTH]),
            ("up.bias", [4 * WIDTH]),
            ("down.weight", [4 * WIDTH, WIDTH]),
            ("down.bias", [WIDTH]),
        ):
            found[f"h.{layer}.{name}"] = shape
    return found | {"ln_f.weight": [WIDTH], "ln_f.bias": [WIDTH]}


def accounts(folder: Path) -> dict[str, str]:
    """What snapshots of such a run say of themselves, by file: from one with a number a tensor."""
    live = {name: torch.ones(1) for name in shapes()}
    live["lm_head.weight"] = live["wte.weight"]
    pair = {"short": polyak.Power(sigma_rel=0.05), "long": polyak.Power(sigma_rel=0.10)}
    averages = polyak.Averages(live, pair)
    with polyak.Snapshots(averages, folder, every=EVERY):
        for _ in range(EVERY * MOMENTS):
            averages.update()
    found = {}
    for path in folder.iterdir():
        with safe_open(str(path), framework="pt") as file:
            found[path.name] = file.metadata()["polyak"]
    return found


def write_sparse(path: Path, account: str, value: float) -> None:
    """A file of zeros that takes no disk, but for the last element of each tensor."""
    header: dict[str, object] = {"__metadata__": {"polyak": account}}
    ends, offset = [], 0
    for name, shape in shapes().items():
        size = 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
        ends.append(offset)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + offset)
        for end in ends:
            file.seek(8 + len(encoded) + end - 2)
            file.write(torch.tensor([value]).half().numpy().tobytes())


def test_memory_is_that_of_the_largest_tensor_not_of_the_model(tmp_path: Path) -> None:
    """At most four times the largest tensor and 300 MB, the interpreter with torch included.

    64 files of 248 MB each, 16 GB in all; the result, 498 MB, goes to disk as it comes.
    """
    folder, out = tmp_path / "run", tmp_path / "out.safetensors"
    folder.mkdir()
    # Files of the average 1 at every moment, so that any sum of them is 1 there and 0 elsewhere.
    small = tmp_path / "small"
    for name, account in accounts(small).items():
        write_sparse(folder / name, account, 1.0)
    assert len(list(folder.iterdir())) == 64
    parameters = sum(int(torch.Size(shape).numel()) for shape in shapes().values())
    assert 124e6 < parameters < 125e6

    done = subprocess.run(
        [sys.executable, "-c", CODE, str(folder), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    before, headers, peak, fitted, saved = json.loads(done.stdout)
    largest = 4 * VOCABULARY * WIDTH
    print(
        f"torch {before / 1e6:.0f} MB, after the fit {headers / 1e6:.0f} MB, "
        f"peak {peak / 1e6:.0f} MB; fit {fitted:.1f} s, save {saved:.1f} s"
    )
    assert headers - before < 100e6
    assert peak - before < 300e6  # what is read and summed, in slices
    assert peak < 4 * largest + 300e6
    weights = polyak.load_weights(out)
    assert set(weights) == {*shapes(), "lm_head.weight"}
    for name, shape in shapes().items():
        flat = weights[name].flatten()
        assert list(weights[name].shape) == shape
        assert flat.dtype == torch.float32
        assert abs(float(flat[-1]) - 1.0) < 1e-6
        assert int(flat.count_nonzero()) == 1
