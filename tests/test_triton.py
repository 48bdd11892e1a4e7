"""The kernel for NVIDIA GPUs: in Triton's interpreter, compiled without a GPU, and on one."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import polyak
from polyak import AveragingWarning
from polyak import _kernels as kernels
from polyak._kernels._blocks import BlockPlan
from polyak._kernels._foreach import ForeachPlan

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed (there is none for this system)"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

GPU = torch.device("cuda", 0)


def run_cases(**environment: str) -> None:
    """Run `triton_cases.py` in a process of its own: how Triton works is settled at import."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(Path(polyak.__file__).parents[1]), str(here)])
    without = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "triton_cases.py", "-p", "no:cacheprovider"],
        cwd=here,
        env={**without, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout), done.stdout


@needs_triton
def test_the_kernel_keeps_its_promises_in_the_interpreter() -> None:
    """Bit for bit like the plain kernels, on any machine."""
    run_cases(TRITON_INTERPRET="1")


@needs_triton
@needs_cuda
def test_the_kernel_keeps_its_promises_on_a_gpu() -> None:
    """The same tests, compiled: bit for bit like the plain kernels on CPU and on the GPU."""
    run_cases()


# ── compiled, without a GPU ──────────────────────────────────────────────────────────────────────


def assembly(capability: int, live: str, stored: str, *, averages: int, stochastic: bool) -> str:
    """PTX of the guarded kernel for tensors at multiples of 16 bytes."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from polyak._kernels import _triton, _triton_kernel

    dtypes = {tl_type: name for name, tl_type in _triton._DTYPES.items()}
    live_type, stored_type = getattr(tl, live), getattr(tl, stored)
    pointers = {
        "table": "*i64",
        "slot_of": "*i32",
        "weights": "*fp64",
        "keys": "*i32",
        "skip": "*fp32",
        "counts": "*i64",
    }
    constants = {
        "live_type": live_type,
        "stored_type": stored_type,
        "limit": _triton.LIMITS[dtypes[stored_type]],
        "averages": averages,
        "mixed": averages,
        "guard": True,
        "stochastic": stochastic,
        "skippable": True,
        "aligned": True,
        "block": _triton.BLOCK,
    }
    source = ASTSource(
        _triton_kernel.mix,
        signature=pointers | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(index,): [["tt.divisibility", 16]] for index in range(len(pointers))},
    )
    options = {"num_warps": _triton.WARPS, "enable_fp_fusion": False}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return str(built.asm["ptx"])


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("live", "stored", "stochastic"),
    [
        ("float32", "float32", False),
        ("bfloat16", "float32", True),
        ("bfloat16", "bfloat16", True),
        ("float16", "float16", True),
    ],
)
def test_it_compiles_for_a_gpu_into_wide_loads_and_no_more_fusion_than_it_asks_for(
    capability: int,
    live: str,
    stored: str,
    stochastic: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """16 bytes at a time, one read of the live weights for both averages, one fma an element."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from polyak._kernels import _triton

    ptx = assembly(capability, live, stored, averages=2, stochastic=stochastic)

    each = _triton.BLOCK // (32 * _triton.WARPS)  # elements a thread
    size = {"float32": 4, "bfloat16": 2, "float16": 2}
    reads = each * size[live] // 16 + 2 * each * size[stored] // 16
    assert len(re.findall(r"ld\.global\.v4", ptx)) == reads
    assert len(re.findall(r"st\.global\.v4", ptx)) == 2 * each * size[stored] // 16
    # Whole blocks and last ones have code of their own, so everything is there twice.
    assert len(re.findall(r"\bfma\.rn\.f(32|64)", ptx)) == 2 * 2 * each
    assert len(re.findall(r"\batom\.", ptx)) == 2


# ── the choice of a backend ──────────────────────────────────────────────────────────────────────


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a GPU that Triton supports, as far as the choice can see."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    return monkeypatch


def choice(device: torch.device) -> object:
    return kernels._backend.__wrapped__(device)


def test_the_cpu_has_its_own_backend() -> None:
    assert choice(torch.device("cpu")) is BlockPlan
    assert choice(torch.device("meta")) is ForeachPlan


@needs_triton
@pytest.mark.parametrize("works", [True, False])
def test_triton_is_chosen_where_it_works(gpu: pytest.MonkeyPatch, works: bool) -> None:
    """It was tried on the device in question."""
    from polyak._kernels import _triton

    tried: list[torch.device] = []

    def trial(device: torch.device) -> bool:
        tried.append(device)
        return works

    gpu.setattr(_triton, "works", trial)

    assert choice(GPU) is (_triton.TritonPlan if works else ForeachPlan)
    assert tried == [GPU]


def test_other_chips_and_systems_without_triton_go_through_torch(
    gpu: pytest.MonkeyPatch,
) -> None:
    """ROCm, NVIDIA before Ampere, other accelerators, no Triton."""
    assert choice(torch.device("xpu", 0)) is ForeachPlan
    with gpu.context() as patch:
        patch.setattr(torch.version, "hip", "6.4")
        assert choice(GPU) is ForeachPlan
    with gpu.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert choice(GPU) is ForeachPlan
    gpu.setitem(sys.modules, "polyak._kernels._triton", None)  # importing it fails
    assert choice(GPU) is ForeachPlan


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="then it works on CPU")
def test_a_triton_that_does_not_work_is_left_alone_and_says_so() -> None:
    """A missing compiler must not end a training run: the trial fails, torch takes over."""
    from polyak._kernels import _triton

    with pytest.warns(AveragingWarning, match=r"Triton is installed but does not work on cpu \("):
        assert not _triton.works(torch.device("cpu"))
