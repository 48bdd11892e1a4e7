"""Sums of checkpoints: rounded once, in memory that does not grow, and nothing passes silently."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import save_file
from torch import Tensor

from polyak import ArgumentError, _slices
from polyak._combine import Combination, NonFinite
from polyak._files import TensorInfo, open_checkpoint
from polyak._slices import BLOCK, SLICE

# Binary digits of a number, and the exponent of the smallest one with all of them.
FORMATS = {
    torch.float32: (24, -126),
    torch.bfloat16: (8, -126),
    torch.float16: (11, -14),
}


def ulp(value: Fraction, dtype: torch.dtype) -> Fraction:
    """The distance between neighbours of `dtype` around a value."""
    digits, smallest = FORMATS[dtype]
    exponent = smallest
    while Fraction(2) ** (exponent + 1) <= abs(value):
        exponent += 1
    return Fraction(2) ** (exponent - digits + 1)


def exact_sum(inputs: Sequence[Tensor], coefficients: Sequence[Fraction], at: int) -> Fraction:
    """One element of the sum, in rational numbers."""
    terms = (c * Fraction(x[at].item()) for c, x in zip(coefficients, inputs, strict=True))
    return sum(terms, Fraction(0))


def errors_in_ulp(
    result: Tensor, inputs: Sequence[Tensor], coefficients: Sequence[Fraction]
) -> list[Fraction]:
    found = []
    for at in range(len(result)):
        exact = exact_sum(inputs, coefficients, at)
        found.append(abs(Fraction(result[at].item()) - exact) / ulp(exact, result.dtype))
    return found


@contextmanager
def combination(
    folder: Path,
    states: Sequence[dict[str, Tensor]],
    coefficients: Sequence[float],
    *,
    dtype: torch.dtype | None = None,
    nonfinite: NonFinite = "raise",
) -> Iterator[Combination]:
    """A combination of these state dicts, saved by the reference library."""
    with ExitStack() as stack:
        opened = []
        for index, state in enumerate(states):
            path = folder / f"{index}.safetensors"
            save_file(state, path)
            opened.append(stack.enter_context(open_checkpoint(path)))
        tensors = {}
        for name, info in opened[0].tensors.items():
            target = info.dtype
            for one in opened[1:]:
                target = torch.promote_types(target, one.tensors[name].dtype)
            floats = info.dtype.is_floating_point and info.dtype.itemsize > 1
            tensors[name] = TensorInfo(dtype if dtype and floats else target, info.shape)
        labels = [path.path.name for path in opened]
        yield Combination(opened, labels, coefficients, tensors, opened[0], nonfinite)


def computed(work: Combination) -> dict[str, Tensor]:
    found = {n: torch.empty(info.numel, dtype=info.dtype) for n, info in work.tensors.items()}

    def keep(name: str, start: int, values: Tensor) -> None:
        found[name][start : start + len(values)] = values

    work.compute(keep)
    return {name: found[name].view(info.shape) for name, info in work.tensors.items()}


def combined(
    folder: Path,
    inputs: Sequence[Tensor],
    coefficients: Sequence[float],
    *,
    dtype: torch.dtype | None = None,
    nonfinite: NonFinite = "raise",
) -> Tensor:
    states = [{"w": values} for values in inputs]
    with combination(folder, states, coefficients, dtype=dtype, nonfinite=nonfinite) as work:
        return computed(work)["w"]


MIXTURES = {
    "float32": [torch.float32] * 8,
    "bfloat16": [torch.bfloat16] * 8,
    "float16": [torch.float16] * 8,
    "float16 and bfloat16": [torch.float16, torch.bfloat16] * 4,
    "all three": [torch.float32, torch.float16, torch.bfloat16, torch.bfloat16] * 2,
}


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtypes", MIXTURES.values(), ids=MIXTURES.keys())
def test_mean_is_within_half_an_ulp_of_the_exact_one(
    dtypes: list[torch.dtype], out: torch.dtype, tmp_path: Path
) -> None:
    """Exact in fractions; also where the inputs cancel, as equal coefficients stay out of it."""
    # Weights of all sizes, some of which cancel: each odd input is about minus the one before.
    size = torch.exp2(torch.randint(-12, 4, (400,)))
    base = [torch.randn(400) * size for _ in range(4)]
    inputs = [
        (x * sign).to(dtypes[2 * k + (sign < 0)])
        for k, x in enumerate(base)
        for sign in (1.0, -0.999)
    ]
    result = combined(tmp_path, inputs, [1 / 8] * 8, dtype=out)
    assert result.dtype == out
    assert max(errors_in_ulp(result, inputs, [Fraction(1, 8)] * 8)) <= Fraction(5001, 10_000)


@pytest.mark.parametrize("count", [3, 7])
def test_mean_of_a_count_that_is_no_power_of_two(count: int, tmp_path: Path) -> None:
    """1 / count is not a float64; the mean still is the nearest, of what nearly cancels too."""
    inputs = [torch.randn(500) for _ in range(count - 1)]
    inputs.append(-torch.stack(inputs).double().sum(0).float())
    result = combined(tmp_path, inputs, [1 / count] * count)
    errors = errors_in_ulp(result, inputs, [Fraction(1, count)] * count)
    assert max(errors) <= Fraction(5001, 10_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weighted_sum_is_within_half_an_ulp_of_the_exact_one(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """Coefficients of all kinds, negative ones too."""
    coefficients = [0.7, 0.6, 0.1, -0.3, -0.1]
    inputs = [(1.0 + torch.rand(500)).to(dtype) for _ in coefficients]
    result = combined(tmp_path, inputs, coefficients)
    errors = errors_in_ulp(result, inputs, [Fraction(c) for c in coefficients])
    assert max(errors) <= Fraction(5001, 10_000)


def test_equal_numbers_of_any_size_are_their_own_mean(tmp_path: Path) -> None:
    """The smallest and the largest of a format, bit for bit."""
    for dtype in FORMATS:
        info = torch.finfo(dtype)
        values = torch.tensor([info.max, info.min, info.tiny, info.tiny / 4, 0.0], dtype=dtype)
        assert torch.equal(combined(tmp_path, [values] * 4, [0.25] * 4), values)


@given(
    values=arrays.arrays(
        "float32", (3, 5), elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_nan=False)
    ),
    coefficients=st.lists(st.floats(-4, 4), min_size=3, max_size=3),
)
def test_error_stays_below_the_bound_that_is_promised(
    values: object, coefficients: list[float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Half an ulp, and what float64 loses: n 2**-53 sum |c x|, whatever cancels."""
    assume(any(coefficients))
    inputs = list(torch.tensor(values))
    result = combined(tmp_path_factory.mktemp("any"), inputs, coefficients)
    for at in range(5):
        exact = exact_sum(inputs, [Fraction(c) for c in coefficients], at)
        size = sum(
            abs(Fraction(c) * Fraction(x[at].item()))
            for c, x in zip(coefficients, inputs, strict=True)
        )
        # A product and a sum for each input, and the underflow of products of tiny numbers.
        lost = 2 * len(inputs) * (size * Fraction(1, 2**53) + Fraction(2) ** -1074)
        error = abs(Fraction(result[at].item()) - exact)
        assert error <= ulp(abs(exact) + lost, torch.float32) / 2 + lost


@pytest.mark.parametrize(
    "count", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, SLICE, SLICE + 1, 2 * SLICE + BLOCK + 3]
)
def test_any_length_is_put_together_from_slices(count: int, tmp_path: Path) -> None:
    """Every element once, in its place."""
    first, second = torch.arange(count).float(), torch.arange(count).float() + 2
    assert torch.equal(combined(tmp_path, [first, second], [0.5, 0.5]), first + 1)


def test_shapes_and_dtypes_of_all_kinds(tmp_path: Path) -> None:
    """Scalars, complex numbers, doubles; integers, booleans and 8-bit floats come as they are."""
    one = {
        "scalar": torch.tensor(1.0),
        "double": torch.tensor([1.0, 2.0], dtype=torch.float64),
        "complex": torch.tensor([[1 + 2j, 3 - 4j]]),
        "empty": torch.empty(0, 3),
        "count": torch.tensor(2**62 + 1),
        "mask": torch.tensor([True, False]),
        "codes": torch.tensor([1.0, 448.0]).to(torch.float8_e4m3fn),
    }
    other = {n: v + 2 if n in ("scalar", "double", "complex") else v for n, v in one.items()}
    with combination(tmp_path, [one, other], [0.5, 0.5]) as work:
        found = computed(work)
    for name in ("scalar", "double", "complex"):
        assert torch.equal(found[name], one[name] + 1)
    for name in ("empty", "count", "mask", "codes"):
        assert found[name].dtype == one[name].dtype
        assert torch.equal(found[name].double(), one[name].double())


def test_what_counts_nothing_is_not_read(tmp_path: Path) -> None:
    """A coefficient of 0 times a NaN is nothing."""
    broken = torch.full((3,), torch.nan)
    found = combined(tmp_path, [torch.ones(3), broken, torch.zeros(3)], [0.5, 0.0, 0.5])
    assert found.tolist() == [0.5] * 3


def test_a_sum_of_nothing_is_refused(tmp_path: Path) -> None:
    """Where nothing counts there is no result, and what is in fresh memory is not one."""
    with pytest.raises(ArgumentError, match="coefficients must have one that is not 0"):
        combined(tmp_path, [torch.ones(3), torch.ones(3)], [0.0, 0.0])


def test_equal_checkpoints_come_back_bit_for_bit(tmp_path: Path) -> None:
    """Also the sign of a zero: the sum starts from the first of them, not from 0."""
    values = torch.tensor([-0.0, 0.0, 1.0, -3.0]).bfloat16()
    found = combined(tmp_path, [values] * 8, [1 / 8] * 8)
    assert torch.equal(found.view(torch.int16), values.view(torch.int16))


def test_nan_is_refused_by_checkpoint_and_tensor(tmp_path: Path) -> None:
    """An average of files with NaN does not pass silently."""
    broken = torch.ones(SLICE + 5)
    broken[-1] = torch.nan
    with pytest.raises(ArgumentError, match=r"1\.safetensors must hold finite values.*'w'"):
        combined(tmp_path, [torch.ones(SLICE + 5), broken], [0.5, 0.5])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_an_infinity_that_only_one_holds_is_refused(value: float, tmp_path: Path) -> None:
    """Its sum would be an infinity that looks like a mask."""
    with pytest.raises(ArgumentError, match=r"0\.safetensors must hold finite values"):
        combined(tmp_path, [torch.tensor([1.0, value]), torch.ones(2)], [0.5, 0.5])


def test_an_infinity_that_all_share_is_kept(tmp_path: Path) -> None:
    """A causal mask stays one, also where a coefficient is negative."""
    mask = torch.tensor([0.0, -torch.inf, 3.0])
    assert torch.equal(combined(tmp_path, [mask, mask], [1.5, -0.5]), mask)


def test_ignore_lets_nonfinite_values_in_where_they_are(tmp_path: Path) -> None:
    """And nowhere else."""
    broken = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf])
    mask = torch.tensor([2.0, 2.0, 2.0, -torch.inf])
    found = combined(tmp_path, [broken, mask], [0.5, 0.5], nonfinite="ignore")
    assert torch.equal(found.nan_to_num(7.0, 8.0, 9.0), torch.tensor([1.5, 7.0, 8.0, 9.0]))


def test_what_does_not_fit_the_dtype_is_refused(tmp_path: Path) -> None:
    """70000 in float16 would be an infinity; 65519 rounds down to the largest number."""
    big = torch.tensor([65519.0, 70000.0])
    with pytest.raises(ArgumentError, match=r"dtype must hold every result, got 70000 in 'w'"):
        combined(tmp_path, [big, big], [0.5, 0.5], dtype=torch.float16)
    fits = combined(tmp_path, [big[:1], big[:1]], [0.5, 0.5], dtype=torch.float16)
    assert fits.item() == 65504.0


def test_memory_does_not_depend_on_the_number_of_checkpoints(tmp_path: Path) -> None:
    """The estimate says so; benchmarks/merge.py measures it."""
    states = [{"w": torch.zeros(3 * SLICE)}] * 6
    with combination(tmp_path, states, [1 / 6] * 6) as work:
        six = work.peak_bytes
    with combination(tmp_path, states[:2], [0.5, 0.5]) as work:
        assert work.peak_bytes == six < 32 * 2**20


def test_the_first_error_of_a_sink_stops_all_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is reported at once, and nothing goes on in the background."""
    monkeypatch.setattr(_slices, "SLICE", 1)  # thousands of slices
    calls: list[int] = []

    def full(name: str, start: int, values: Tensor) -> None:
        calls.append(start)
        if start == 0:
            raise OSError("no space left")

    before = threading.active_count()
    states = [{"w": torch.zeros(20_000)}] * 2
    with combination(tmp_path, states, [0.5, 0.5]) as work, pytest.raises(OSError, match="space"):
        work.compute(full)
    assert threading.active_count() == before
    assert len(calls) < 10_000


def test_an_interrupt_stops_all_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C arrives on the main thread, which is the one that tells the progress."""
    monkeypatch.setattr(_slices, "SLICE", 1)
    seen: list[int] = []

    def interrupt(done: int, total: int) -> None:
        seen.append(done)
        raise KeyboardInterrupt

    before = threading.active_count()
    states = [{"w": torch.zeros(50_000)}] * 2
    with combination(tmp_path, states, [0.5, 0.5]) as work, pytest.raises(KeyboardInterrupt):
        work.compute(lambda name, start, values: seen.append(start), progress=interrupt)
    assert threading.active_count() == before
    assert len(seen) < 40_000


def test_progress_ends_with_everything(tmp_path: Path) -> None:
    """The last call says that all is done, and it only grows."""
    seen: list[tuple[int, int]] = []
    states = [{"w": torch.zeros(3 * SLICE), "n": torch.tensor(3)}] * 2
    with combination(tmp_path, states, [0.5, 0.5]) as work:
        work.compute(lambda name, start, values: None, progress=lambda *at: seen.append(at))
    assert seen[-1] == (3 * SLICE + 1, 3 * SLICE + 1)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
