"""Checkpoints and exports of averages over ranks: saved on some, loaded on as many as there are."""

import shutil
from pathlib import Path

import pytest
import torch
import work_saved as work
from safetensors import safe_open
from safetensors.torch import load_file
from spread import LAYOUTS, Net, Values, same, wholes

import polyak
from ranks import run_on

MESHES = ["alone", "fsdp-2", "fsdp-3", "fsdp-4", "hsdp-2x2", "tp-2 x fsdp-2", "replicas-3"]


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[int, Values]]:
    """The averages of an unsharded run, which every other must have."""
    return work.expected()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint from each of `MESHES`."""
    folder = tmp_path_factory.mktemp("saved")
    for layout in MESHES:
        run_on(LAYOUTS[layout].n, work.save, layout, folder)
    return folder


@pytest.mark.parametrize("layout", MESHES)
def test_h4_saved_on_any_mesh_loaded_on_any_other(
    layout: str, saved: Path, expected: dict[str, dict[int, Values]]
) -> None:
    """H4: all pairs of 1, 2, 3, 4 ranks and of meshes: equal tensors, and 10 updates more."""
    folders = [saved / other for other in MESHES]

    run_on(LAYOUTS[layout].n, work.load, layout, folders, expected, "load_checkpoint")


@pytest.mark.parametrize("layout", ["alone", "fsdp-2", "fsdp-3", "tp-2 x fsdp-2", "replicas-2"])
def test_h4_plain_load_of_torch_reads_an_average_too(
    layout: str, saved: Path, expected: dict[str, dict[int, Values]]
) -> None:
    """`dcp.load({"average": average})`, as a training script loads model and optimizer."""
    folders = [saved / other for other in ("alone", "fsdp-2", "fsdp-4", "tp-2 x fsdp-2")]

    run_on(LAYOUTS[layout].n, work.load, layout, folders, expected, "dcp.load")


@pytest.mark.parametrize("layout", ["alone", "fsdp-2", "tp-2 x fsdp-2", "replicas-2"])
def test_asynchronous_save_holds_the_moment_of_the_call(
    layout: str, tmp_path: Path, expected: dict[str, dict[int, Values]]
) -> None:
    run_on(LAYOUTS[layout].n, work.save_asynchronously, layout, tmp_path, expected)


@pytest.mark.parametrize("layout", ["fsdp-2", "fsdp-4", "tp-2", "replicas-2"])
def test_f5_checkpoint_while_applied_has_the_trained_weights(layout: str, tmp_path: Path) -> None:
    run_on(LAYOUTS[layout].n, work.save_while_applied, layout, tmp_path)


@pytest.mark.parametrize("case", work.REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_written(case: str, saved: Path) -> None:
    """The metadata tells names, shapes and settings: no tensor need be read to see the misfit."""
    run_on(2, work.load_is_refused, case, saved / "fsdp-3")


def test_folder_that_is_no_whole_checkpoint_is_refused(saved: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes((saved / "fsdp-2" / "__0_0.distcp").read_bytes())

    for folder in (half, tmp_path / "nowhere"):
        for message in run_on(2, work.folder_is_refused, "fsdp-2", folder):
            assert folder.name in message


@pytest.mark.parametrize("broken", ["missing", "short", "scrambled"])
def test_folder_with_a_broken_file_is_refused_by_a_rank_that_needs_it(
    broken: str, saved: Path, tmp_path: Path
) -> None:
    """Nothing was written into the average, which goes on. One rank needs every file."""
    folder = tmp_path / "broken"
    shutil.copytree(saved / "fsdp-2", folder)
    file = folder / "__1_0.distcp"
    written = file.read_bytes()
    file.unlink()
    if broken == "short":
        file.write_bytes(written[:-1500])
    elif broken == "scrambled":
        file.write_bytes(bytes(len(written)))

    [message] = run_on(1, work.folder_is_refused, "fsdp-1", folder)

    assert "__1_0.distcp" in message


@pytest.mark.parametrize("layout", ["fsdp-1", "fsdp-3", "tp-2 x fsdp-2", "replicas-2"])
def test_state_of_one_rank_loads_on_several(
    layout: str, tmp_path: Path, expected: dict[str, dict[int, Values]]
) -> None:
    """A run that began on one device goes on sharded: from a file of torch.save, or in memory."""
    _, alone = work.trained("alone", "wide", work.SAVED)
    torch.save({"average": alone.state_dict()}, tmp_path / "last.pt")

    run_on(LAYOUTS[layout].n, work.load_file, layout, tmp_path / "last.pt", expected)
    run_on(LAYOUTS[layout].n, work.load_state, layout, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_is_whole_and_written_by_one(layout: str, tmp_path: Path) -> None:
    """The file of a sharded average is the one that an unsharded average would write."""
    run_on(LAYOUTS[layout].n, work.export, layout, tmp_path)

    written = {path.name for path in tmp_path.iterdir()}
    assert written == {f"0.{name}.safetensors" for name in work.EXPORTS}
    _, alone = work.trained("alone", "wide", work.SAVED)
    for name, dtype in work.EXPORTS.items():
        file, other = tmp_path / f"0.{name}.safetensors", tmp_path / "alone.safetensors"
        polyak.save(alone, other, dtype=dtype)
        same(load_file(file), load_file(other), name)
        with safe_open(file, "pt") as ours, safe_open(other, "pt") as theirs:
            assert ours.metadata() == theirs.metadata()
    model = Net()
    polyak.load_weights(tmp_path / "0.live.safetensors", model)
    same(model.state_dict(), wholes(alone.weights()), "loaded")


@pytest.mark.parametrize("layout", ["fsdp-2", "fsdp-3", "tp-2", "replicas-2"])
def test_export_that_fails_fails_on_every_rank(layout: str, tmp_path: Path) -> None:
    """A missing folder is seen by the rank that writes, 1e30 in float16 by one that holds it."""
    answers = run_on(LAYOUTS[layout].n, work.export_fails_everywhere, layout, tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["wide.safetensors"]
    for errors in zip(*answers, strict=True):  # one says what it is, the others that there is one
        assert "ArgumentError" in errors
        assert set(errors) <= {"ArgumentError", "OrderError"}


@pytest.mark.parametrize("layout", ["fsdp-2", "fsdp-3", "replicas-2"])
def test_part_of_another_rank_is_refused(layout: str, tmp_path: Path) -> None:
    """Of even and uneven parts: the meshes are equal, the rank that wrote them is another."""
    run_on(LAYOUTS[layout].n, work.part_of_another_rank, layout, tmp_path, limit=30.0)

    state = torch.load(tmp_path / "first.pt", weights_only=True)["average"]
    alone = polyak.Average(Net(), polyak.Power(sigma_rel=0.1))
    with pytest.raises(polyak.MatchError, match="part of the state"):
        alone.load_state_dict(state)
    alone.update()


@pytest.mark.parametrize("layout", ["fsdp-2", "replicas-3"])
def test_incidents_of_one_rank_do_not_become_those_of_all(layout: str, tmp_path: Path) -> None:
    *others, last = run_on(LAYOUTS[layout].n, work.incidents, layout, tmp_path)

    assert others == [[0, 0]] * len(others)
    assert last[0] > 0
    assert last[1] == 0  # counted from here on


def test_export_of_two_meshes_fails_on_all_ranks_together(tmp_path: Path) -> None:
    *others, last = run_on(4, work.two_meshes, tmp_path, limit=30.0)

    assert last == "ArgumentError"
    assert others == ["OrderError"] * 3
    assert {path.name for path in tmp_path.iterdir()} == {"whole.safetensors", "again.safetensors"}


def test_rank_without_part_in_a_mesh_takes_part_in_everything(tmp_path: Path) -> None:
    run_on(3, work.outside_of_the_mesh, tmp_path, limit=30.0)

    file = load_file(tmp_path / "averaged.safetensors")
    assert file["part"].tolist() == [0.0, 1.0, 2.0, 3.0]
