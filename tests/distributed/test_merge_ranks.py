"""Merging and reconstructing on several ranks: the work is shared out, the bytes are the same."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import work_merge as work
import work_snapshots
from safetensors.torch import save_file

import polyak
from polyak._slices import SLICE
from ranks import outcomes_of, run_on


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three checkpoints, the last one in a folder with a config."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = [folder / "1.safetensors", folder / "2.safetensors", folder / "3"]
    paths[2].mkdir()
    (paths[2] / "config.json").write_text("{}")
    for step, path in enumerate([*paths[:2], paths[2] / "model.safetensors"]):
        save_file(work.tensors(step), path)
    return paths


def contents(path: Path) -> dict[str, bytes]:
    """A file, or all of a folder."""
    found = [path] if path.is_file() else sorted(path.iterdir())
    return {"" if file is path else file.name: file.read_bytes() for file in found}


@pytest.mark.parametrize(
    ("out", "options"),
    [
        ("merged.safetensors", {"coefficients": [0.5, 0.3, 0.2]}),
        ("merged", {"max_shard_size": 3_000_000, "dtype": torch.bfloat16}),
    ],
)
@pytest.mark.parametrize("n", [2, 3])
def test_bytes_are_those_of_one_process_and_work_is_shared(
    n: int, out: str, options: dict[str, Any], files: list[Path], tmp_path: Path
) -> None:
    """Each rank reads and writes its share, evenly but for a slice; the result is the same."""
    expected = tmp_path / f"alone-{out}"
    plan = polyak.merge(files, out=expected, **options)

    shares = run_on(n, work.merges, files, tmp_path / out, options)

    assert contents(tmp_path / out) == contents(expected)
    assert {path.name for path in tmp_path.iterdir()} == {out, expected.name}
    assert sum(wrote for _, wrote in shares) == plan.elements
    floating = sum(t.numel() for t in work.tensors(0).values() if t.is_floating_point())
    assert sum(read for read, _ in shares) == 3 * floating
    assert max(read for read, _ in shares) <= 3 * (floating / n * 1.3 + SLICE)
    assert min(wrote for _, wrote in shares) > 0


def test_what_one_rank_finds_all_refuse(files: list[Path], tmp_path: Path) -> None:
    """A NaN at the very end, which only the last rank reads; the ranks before are done by then."""
    bad = work.tensors(5)
    bad["z"][-1, -1] = float("nan")
    save_file(bad, tmp_path / "bad.safetensors")
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"what was there")

    told = run_on(3, work.refuses, [*files, tmp_path / "bad.safetensors"], out)

    assert len(set(told)) == 1
    assert told[0].startswith("ArgumentError: bad.safetensors must hold finite values")
    assert out.read_bytes() == b"what was there"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.safetensors", out.name]


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
@pytest.mark.parametrize(
    ("function", "says"),
    [
        (work.lacks_an_input, "FileNotFoundError"),
        (work.disk_is_full_on_one_rank, "No space left"),
        (work.forgets_a_slice, "every element must be written, got 1 tensors with some missing"),
    ],
)
def test_failure_of_one_rank_is_one_error_on_all(
    function: Any, says: str, out: str, files: list[Path], tmp_path: Path
) -> None:
    told = run_on(2, function, files, tmp_path / out, limit=20.0)

    assert len(set(told)) == 1
    assert says in told[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_ends_the_others_and_leaves_no_result(
    rank: int, files: list[Path], tmp_path: Path
) -> None:
    """In bounded time; what the killed one left is swept away by the next merge."""
    out = tmp_path / "out.safetensors"

    outcomes = outcomes_of(3, work.killed, rank, files, out, grace=10.0)

    assert [o.end for o in outcomes] == [
        "died" if other == rank else "returned" for other in range(3)
    ]
    assert all("one that is gone" in o.value for o in outcomes if o.end == "returned")
    assert max(outcome.seconds for outcome in outcomes) < 20.0
    assert not out.exists()
    polyak.merge(files, out=out)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_one_rank_may_merge_alone(files: list[Path], tmp_path: Path) -> None:
    """A group of its own keeps the other ranks out of it."""
    assert run_on(2, work.on_one_rank, files, tmp_path / "out.safetensors")[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Snapshots in folders of pieces."""
    folder = tmp_path_factory.mktemp("run")
    run_on(2, work_snapshots.writes, "fsdp-2", folder)
    return folder


@pytest.mark.parametrize("n", [2, 3])
def test_reconstruction_is_the_same_file(n: int, run: Path, tmp_path: Path) -> None:
    """From folders of pieces, by every way to save one; a sweep of one rank waits for nobody."""
    alone = tmp_path / "alone.safetensors"
    polyak.reconstruct(run, polyak.Power(sigma_rel=0.15), max_error=1.0, out=alone)

    run_on(n, work.reconstructs, run, tmp_path / "out.safetensors")

    for name in ("out.safetensors", "second-out.safetensors"):
        assert (tmp_path / name).read_bytes() == alone.read_bytes()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_commands_join_the_ranks_of_torchrun(files: list[Path], tmp_path: Path) -> None:
    """The bytes of one process, one answer, one error; for `merge` and `reconstruct`."""
    out, alone = tmp_path / "out.safetensors", tmp_path / "alone.safetensors"
    words = ["merge", *map(str, files), "-q"]
    code, answer, _ = work.said([*words, "-o", str(alone)])
    assert code == 0

    told = run_on(2, work.command, [*words, "-o", str(out)], free_port())

    assert out.read_bytes() == alone.read_bytes()
    assert told == [(0, answer.replace(str(alone), str(out)), ""), (0, "", "")]
    words = ["reconstruct", str(tmp_path), "--sigma-rel", "0.1", "-o", str(tmp_path / "r")]
    first, second = run_on(2, work.command, words, free_port())
    assert first[0] == second[0] == 1
    assert first[2].startswith("polyak: directory must hold snapshots")
    assert second[1:] == ("", "")
