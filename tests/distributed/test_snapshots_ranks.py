"""Snapshots of averages that are spread over ranks: written in pieces, read like any others."""

import json
from pathlib import Path

import pytest
import torch
import work_snapshots as work
from spread import LAYOUTS
from torch import Tensor

import polyak
from polyak import cli
from polyak._files import open_checkpoint
from polyak._folder import read_folder
from polyak._posthoc import open_run
from ranks import outcomes_of, run_on

MOMENTS = [10, 20, 30, 40]


def rebuilt(folder: Path) -> dict[str, Tensor]:
    """An average of another length, from all snapshots."""
    return polyak.reconstruct(folder, polyak.Power(sigma_rel=0.15), max_error=1.0).weights()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The snapshots of the run on one rank that knows of no others."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert run_on(1, work.writes, "alone", folder) == [MOMENTS]
    assert {path.suffix for path in folder.iterdir()} == {".safetensors"}
    return folder


def same_run(folder: Path, alone: Path) -> None:
    """Fail unless both folders hold the same averages, bit for bit, and say the same of them."""
    ours, theirs = read_folder(folder), read_folder(alone)
    assert [file.path.stem for file in ours] == [file.path.stem for file in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.about == other.about
        with open_checkpoint(one.path) as pieces, open_checkpoint(other.path) as file:
            assert {**pieces.tensors} == {**file.tensors}
            assert (pieces.origin, pieces.step) == (file.origin, file.step)
            for name in file.tensors:
                torch.testing.assert_close(pieces.read(name), file.read(name), rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["fsdp-2", "fsdp-3", "replicas-2", "tp-2", "hsdp-2x2"])
def test_pieces_are_the_snapshots_of_the_unsharded_run(
    layout: str, alone: Path, tmp_path: Path
) -> None:
    """Every file, every element, every word; also 5 rows on 3 ranks, and one element on 2."""
    assert run_on(LAYOUTS[layout].n, work.writes, layout, tmp_path) == [MOMENTS] * LAYOUTS[layout].n

    same_run(tmp_path, alone)
    assert all((path / ".metadata").is_file() for path in tmp_path.iterdir())
    expected = rebuilt(alone)
    assert all(torch.equal(value, expected[name]) for name, value in rebuilt(tmp_path).items())


def test_run_goes_on_with_other_numbers_of_ranks_in_one_folder(
    alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One rank, then two, then three: files and folders of pieces serve every reader together."""
    folder, state = tmp_path / "run", tmp_path / "state"

    assert run_on(1, work.goes_on, "alone", folder, state, 1, 14) == [[10]]
    assert run_on(2, work.goes_on, "fsdp-2", folder, state, 15, 25) == [[10, 20]] * 2
    assert run_on(3, work.goes_on, "fsdp-3", folder, state, 26, 40) == [MOMENTS] * 3

    same_run(folder, alone)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".dcp"}
    found = polyak.sweep(folder, lambda weights: float(weights["gain"]), max_error=1.0)
    assert len(found.points) > 1
    assert cli.main(["snapshots", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["moments"] == MOMENTS
    assert report["stored_bytes"] == sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    out = tmp_path / "average.safetensors"
    words = ["reconstruct", str(folder), "--sigma-rel", "0.15", "--max-error", "1", "-o", str(out)]
    assert cli.main(words) == 0
    expected = rebuilt(alone)
    assert all(torch.equal(t, expected[name]) for name, t in polyak.load_weights(out).items())


def test_what_training_will_take_again_moves_aside(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    answers = run_on(2, work.goes_on_after_more, folder, tmp_path / "state")

    assert answers == [(MOMENTS, [10, 20])] * 2
    assert sorted(path.name for path in (folder / "superseded").iterdir()) == [
        f"{name}-0000000000{time}.dcp" for name in ("long", "short") for time in (30, 40)
    ]


def test_thinning_removes_whole_folders(tmp_path: Path) -> None:
    """`keep` holds on every rank; of what was removed nothing stays behind."""
    moments = run_on(2, work.writes_often, tmp_path)

    assert len(moments[0]) == 4
    assert moments[0] == moments[1] == open_run(tmp_path).moments
    assert len(list(tmp_path.iterdir())) == 2 * 4


@pytest.mark.parametrize("n", [2, 3])
def test_dtype_is_that_of_the_part_that_needs_most(n: int, tmp_path: Path) -> None:
    """1e6 is beyond float16 and lies on one rank: then all write float32."""
    run_on(n, work.large_on_one_rank, tmp_path)

    (path,) = tmp_path.iterdir()
    with open_checkpoint(path) as file:
        dtypes = {name: info.dtype for name, info in file.tensors.items()}
        assert dtypes == {"large": torch.float32, "small": torch.float16}
        assert file.read("large").tolist() == [1.0] * 14 + [1e6]


def test_ranks_talk_at_snapshots_only(tmp_path: Path) -> None:
    for before, at in run_on(2, work.sends_only_at_snapshots, tmp_path):
        assert before == 0
        assert at > 0


def test_training_goes_on_while_pieces_are_written(alone: Path, tmp_path: Path) -> None:
    """The copy is of the moment, not of the time when the disk was ready."""
    run_on(2, work.copies_at_once, tmp_path)

    for path in tmp_path.iterdir():
        with (
            open_checkpoint(path) as pieces,
            open_checkpoint(alone / f"{path.stem}.safetensors") as file,
        ):
            assert all(torch.equal(pieces.read(name), file.read(name)) for name in file.tensors)


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────


def test_full_disk_of_one_rank_is_an_error_on_all_at_the_next_call(tmp_path: Path) -> None:
    """Every rank raises at the same update; the snapshots before and after are whole."""
    for message, at, moments in run_on(2, work.disk_is_full_on_one_rank, tmp_path):
        assert "on rank 1" in message
        assert at == [30]
        assert moments == [10, 30, 40]

    assert open_run(tmp_path).moments == [10, 30, 40]
    assert all(path.suffix == ".dcp" for path in tmp_path.iterdir())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("rank", [0, 2])
def test_killed_rank_leaves_nothing_that_looks_like_a_snapshot(
    rank: int, when: str, tmp_path: Path
) -> None:
    """Killed before it writes, or after all have written and before the folder has its name."""
    folder = tmp_path / "run"
    outcomes = outcomes_of(3, work.killed, rank, when, folder, grace=10.0)

    ends = {outcome.rank: outcome.end for outcome in outcomes}
    assert ends == {other: "died" if other == rank else "returned" for other in range(3)}, outcomes
    assert max(outcome.seconds for outcome in outcomes) < 20.0
    assert open_run(folder).moments == [10]
    assert not list(folder.glob("*020.dcp"))


@pytest.mark.parametrize(
    ("case", "kind", "says"),
    [
        ("other interval", "MatchError", "every must be the same on every rank, got 10 and 11"),
        ("other moment", "OrderError", r"must be taken of one moment on all ranks"),
        ("folder of another run", "OrderError", "must be empty for averages that never ran"),
        ("damaged average", "OrderError", "a test broke it"),
    ],
)
def test_what_one_rank_refuses_all_refuse(case: str, kind: str, says: str, tmp_path: Path) -> None:
    for message in run_on(2, work.refused, case, tmp_path / "run", limit=20.0):
        assert message.startswith(f"{kind}: ")
        assert says in message
