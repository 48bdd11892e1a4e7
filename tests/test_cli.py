"""The command line: exit codes, one-line errors, and a study from one command."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from polyak import cli, study
from polyak.cli import main
from polyak.study import TASKS, Task, _folder
from polyak.study._findings import Findings

REGRESSION = TASKS["regression"]()


def tiny() -> Task:
    """The article's task, cut to two epochs."""
    return replace(REGRESSION, epochs=2, control=False)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds, and test_study.py draws."""
    monkeypatch.setattr(_folder, "pictures", lambda study: {})
    monkeypatch.setattr(_folder, "page", lambda *_, **__: "<!doctype html>")


def test_an_unknown_task_gets_the_list_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    """One line that says what is wrong, then the names that exist."""
    assert main(["study", "nosuch"]) == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert lines[0] == "polyak: task must be one of regression, digits, text, got 'nosuch'."
    assert [line.split()[0] for line in lines[1:]] == ["regression", "digits", "text"]
    assert said.out == ""


@pytest.mark.parametrize(
    "words", [["study", "--seeds", "0"], ["study", "--jobs", "x"], ["nosuch"], ["study", "--what"]]
)
def test_wrong_usage_is_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Arguments that cannot be meant."""
    assert main(words) == 2
    assert "Usage:" in capsys.readouterr().err


def test_version_and_help_are_exit_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    """Both answer and end."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("polyak")
    assert main(["study", "--help"]) == 0
    assert "Does averaging help here" in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures")
def test_a_study_from_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Progress on stderr, the verdict on stdout, the files in the folder, exit code 0."""
    monkeypatch.setitem(study.TASKS, "regression", tiny)
    out = tmp_path / "out"
    words = ["study", "--seeds", "1", "--jobs", "1", "--out", str(out)]
    assert main(words) == 0
    said = capsys.readouterr()
    found = json.loads((out / "results.json").read_text())
    assert found["command"] == "polyak " + " ".join(words)
    assert found["verdict"]["title"] in said.out
    assert "Every method" in said.out
    assert str(out / "report.html") in "".join(said.out.split("\n"))
    assert "seed 0, training, epoch 2 of at most 2" in said.err

    assert main(words) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("polyak: out must be new or empty")
    assert said.err.count("\n") == 1
    assert main([*words, "--force", "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert len(said.out.splitlines()) < 8


def test_a_folder_of_somebody_else_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, one line, and no seed was trained for it."""

    def trained(*_: object, **__: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(study, "run_study", trained)
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["study", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "thesis.tex" in said
    assert said.count("\n") == 1


def test_a_folder_that_cannot_be_made_is_one_line_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 and no seed trained, where the folder lies below a file."""

    def trained(*_: object, **__: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(study, "run_study", trained)
    (tmp_path / "file").write_text("")
    assert main(["study", "--out", str(tmp_path / "file" / "out")]) == 1
    said = capsys.readouterr().err
    assert "out must lie where a folder can be made" in said
    assert said.count("\n") == 1


@pytest.mark.usefixtures("no_pictures")
def test_a_study_that_cannot_be_written_is_kept_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk fills while it trains: one line names the place where the results are now."""
    monkeypatch.setitem(study.TASKS, "regression", tiny)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    written_whole = _folder.save

    def full(findings: Findings, out: Path, *, force: bool = False) -> Path:
        if "temporary" not in Path(out).parts:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written_whole(findings, out, force=force)

    monkeypatch.setattr(_folder, "save", full)
    words = ["study", "--seeds", "1", "--jobs", "1", "--out", str(tmp_path / "out"), "--quiet"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "No space left on device" in said
    (kept,) = (tmp_path / "temporary").glob("*/out/results.json")
    assert str(kept.parent) in said
    assert json.loads(kept.read_text())["seeds"] == [0]


@pytest.mark.parametrize(
    ("words", "control"), [([], None), (["--control"], True), (["--no-control"], False)]
)
def test_control_is_the_task_s_choice_unless_it_is_named(
    words: list[str], control: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--control` is never taken for a default, nor `--short` for a refusal of it."""
    asked: dict[str, object] = {}

    def trained(task: Task, **settings: object) -> None:
        asked.update(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "run_study", trained)
    assert main(["study", "digits", "--short", "--out", str(tmp_path / "out"), *words]) == 130
    assert asked["control"] is control
    assert asked["short"] is True


def test_ctrl_c_ends_with_one_line_and_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 130 and nothing written."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "run_study", interrupted)
    assert main(["study", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.strip() == "polyak: stopped; no file is left half written."
    assert not (tmp_path / "out").exists()


def test_ctrl_c_ends_the_workers_too(tmp_path: Path) -> None:
    """A real interrupt of a real study: exit code 130, nobody left behind, nothing written."""
    # Eight seeds: of two the second may be done, too, before the signal is sent.
    words = ["study", "--seeds", "8", "--jobs", "2", "--out", str(tmp_path / "out")]
    with subprocess.Popen(
        [sys.executable, "-m", "polyak.cli", *words, "--epochs", "50"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # as in a shell, the interrupt goes to the whole group
    ) as running:
        assert running.stderr is not None
        assert running.stderr.readline().startswith("seed ")
        os.killpg(running.pid, signal.SIGINT)
        try:
            _, said = running.communicate(timeout=120)  # ends with the last process of the group
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            raise
        assert running.returncode == 130
    assert said.splitlines()[-1] == "polyak: stopped; no file is left half written."
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_without_typer_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 and the exact line."""
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "typer" else name)
    assert main(["study"]) == 1
    said = capsys.readouterr().err
    assert 'got no typer. Run: pip install "polyak[cli]"' in said
    assert said.count("\n") == 1


def test_without_scikit_learn_the_study_says_what_to_install() -> None:
    """Exit code 1 and the exact line, from a process that cannot import it."""
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "from polyak.cli import main; sys.exit(main(['study']))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1
    assert 'got no scikit-learn. Run: pip install "polyak[study]"' in ended.stderr
    assert ended.stderr.count("\n") == 1
