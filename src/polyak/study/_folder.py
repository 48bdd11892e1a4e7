"""Where a study is kept: a folder that is written whole or not at all."""

import json
import tempfile
from pathlib import Path

from polyak._errors import ArgumentError
from polyak._files import check_place, folder_written_whole

from ._findings import Findings
from ._json import FORMAT, document, text
from ._load import loaded
from ._plots import LIGHT, pictures, png
from ._report import page
from ._task import Task

RESULTS, REPORT = "results.json", "report.html"
_PICTURES = ("loss", "metric", "methods", "weights", "differences", "lengths")
_NAMES = {RESULTS, REPORT, *(f"{name}.png" for name in _PICTURES)}


def check_folder(out: str | Path, *, force: bool = False) -> Path:
    """Raise `ArgumentError` unless a study may be written to `out`; call it before training.

    A new or an empty folder is fine; one that holds a study only with `force`; one that holds
    anything else never, so that no file of somebody else's is lost.
    """
    path = Path(out)
    if not path.exists():
        _check_parent(path)
        return path
    if not path.is_dir():
        raise ArgumentError(f"out must be a folder, got the file {str(path)!r}. Name another.")
    held = {entry.name for entry in path.iterdir()}
    others = sorted(held - _NAMES)
    if held and (others or not _is_study(path / RESULTS)):
        raise ArgumentError(
            f"out must be new, empty or an earlier study, got {str(path)!r} with "
            f"{(others or sorted(held))[:3]}. Name another folder."
        )
    if held and not force:
        raise ArgumentError(
            f"out must be new or empty, got {str(path)!r}, which holds an earlier study. "
            "Name another folder, or pass --force (force=True) to replace it."
        )
    _check_parent(path)
    return path


def _check_parent(path: Path) -> None:
    """Raise `ArgumentError` unless a folder can be made beside `path`, by making one.

    Asked before training: a refusal after it would cost the whole run. Permission bits do not
    know of read-only disks, quotas and root, so that the question is put to the system itself.
    """
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:
        Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=parent)).rmdir()
    except OSError as error:
        raise ArgumentError(
            f"out must lie where a folder can be made, got {str(path)!r}, and {str(parent)!r} "
            f"refuses: {error.strerror}. Name another folder."
        ) from error
    check_place(parent / path.name)  # the name may be too long for others beside it


def load(folder: str | Path, *, task: Task | None = None) -> Findings:
    """Rebuild a study from the `results.json` of its folder; nothing is trained."""
    path = Path(folder) / RESULTS
    if not _is_study(path):
        raise ArgumentError(f"folder must hold the {RESULTS} of a study, got {str(folder)!r}.")
    return loaded(json.loads(path.read_text(encoding="utf-8")), task=task)


def save(study: Findings, out: str | Path, *, force: bool = False) -> Path:
    """Write report, results and pictures to `out`: all of them, or nothing."""
    path = check_folder(out, force=force).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with folder_written_whole(path, replace=True) as fresh:
        light = {name: png(picture, study, LIGHT) for name, (picture, _) in pictures(study).items()}
        for name, image in light.items():
            (fresh / f"{name}.png").write_bytes(image)
        html = page(study, light=light)
        (fresh / REPORT).write_text(html, encoding="utf-8")
        results = text(document(study))
        (fresh / RESULTS).write_text(results, encoding="utf-8")
    return path


def _is_study(results: Path) -> bool:
    try:
        found = json.loads(results.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT
