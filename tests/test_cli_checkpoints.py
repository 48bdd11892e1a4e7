"""polyak merge, soup, inspect and diff: exit codes, one-line refusals, and what they print."""

import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import polyak
from polyak import _slices
from polyak._diff import diff
from polyak.cli import _progress, main
from polyak.cli._words import run_score


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Three checkpoints of a run, each as far as its step."""
    paths = []
    for step in (100, 200, 300):
        paths.append(str(tmp_path / f"step-{step}.safetensors"))
        save_file({"w": torch.full((4,), float(step)), "n": torch.tensor(7)}, paths[-1])
    return paths


def merged(tmp_path: Path) -> list[float]:
    return load_file(tmp_path / "out.safetensors")["w"].tolist()


# ── merge ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], 200.0),
        (["--coefficients", "0.5,0.25,0.25"], 175.0),
        (["--coefficients", "2,1,1", "--normalize"], 175.0),
        (["--window", "100"], 250.0),
        (["--curve", "linear"], 200.0),
        (["--schedule", "Uniform()"], 200.0),
        (["--schedule", "After(150, Uniform())"], 800.0 / 3),
        (["--schedule", "Exponential(half_life=100, debias=False)"], 225.0),
        (["--window", "1", "--steps", "30,20,10"], 100.0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_merge_by_every_way_to_say_the_coefficients(
    options: list[str], expected: float, files: list[str], tmp_path: Path
) -> None:
    """Exit code 0, and the mean step that follows by hand."""
    assert main(["merge", *files, "-o", str(tmp_path / "out.safetensors"), *options]) == 0
    assert merged(tmp_path) == pytest.approx([expected] * 4)


def test_merge_prints_what_it_did(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoints with their coefficients, and where the result is, on stdout."""
    out = tmp_path / "out.safetensors"
    assert main(["merge", *files, "-o", str(out), "--window", "100"]) == 0
    said = capsys.readouterr()
    assert "plain mean of the last 100: 1 tensors averaged, 1 copied" in said.out
    assert f"written: {out}\n" in said.out
    assert said.err == ""
    row = next(line for line in said.out.splitlines() if "step-300" in line)
    assert "0.5" in row


def test_merge_as_json(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing but the result on stdout, for other programs."""
    out = tmp_path / "out.safetensors"
    words = ["merge", *files, "-o", str(out), "--coefficients", "0.5,0.3,0.2", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["coefficient"] for one in found["ingredients"]] == [0.5, 0.3, 0.2]
    assert (found["out"], found["written"]) == (str(out), True)


def test_dry_run_prints_the_plan_and_writes_nothing(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What, how many bytes, how much memory."""
    assert main(["merge", *files, "-o", str(tmp_path / "out.safetensors"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "72 B to read, 24 B to write" in said
    assert "MB of memory" in said
    assert "nothing was written" in said
    assert not (tmp_path / "out.safetensors").exists()


def test_merge_to_shards_of_another_dtype(files: list[str], tmp_path: Path) -> None:
    """A folder with an index, in the dtype asked for."""
    words = ["merge", *files, "-o", str(tmp_path / "out"), "--dtype", "bfloat16"]
    assert main([*words, "--max-shard-size", "0.008kB"]) == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 2
    shard = load_file(tmp_path / "out" / index["weight_map"]["w"])
    assert shard["w"].dtype == torch.bfloat16


def test_integers_come_from_a_named_checkpoint(files: list[str], tmp_path: Path) -> None:
    """By its name, without the folder."""
    save_file({"w": torch.full((4,), 400.0), "n": torch.tensor(8)}, files[2])
    words = ["merge", *files, "-o", str(tmp_path / "out.safetensors")]
    assert main(words) == 1
    assert main([*words, "--integers", "step-300.safetensors"]) == 0
    assert load_file(tmp_path / "out.safetensors")["n"].item() == 8


def test_integers_come_from_a_numbered_checkpoint(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 0, or from the end; a file of that name comes first."""
    for number, file in enumerate(files):
        save_file({"w": torch.zeros(4), "n": torch.tensor(number)}, file)
    words = ["merge", *files, "-o", str(tmp_path / "out.safetensors"), "--integers"]
    for text, expected in (("0", 0), ("1", 1), ("-1", 2)):
        assert main([*words, text]) == 0
        assert load_file(tmp_path / "out.safetensors")["n"].item() == expected
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0").write_bytes(Path(files[0]).read_bytes())
    assert main([*words[:1], files[1], "0", *words[4:], "0"]) == 0
    assert load_file(tmp_path / "out.safetensors")["n"].item() == 0
    assert main([*words, "7"]) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--coefficients", "0.5,0.3,0.1"], "polyak: coefficients must sum to 1, got 0.9"),
        (["--window", "-1"], "polyak: window must be above 0"),
        (["--curve", "steep"], "polyak: curve must be one of linear, cosine, 1-sqrt"),
        (["--schedule", "Exponential(half_life=-3)"], "polyak: half_life must be"),
        (["--schedule", "Uniform()", "--window", "3"], "polyak: window must go with"),
        (["--integers", "nosuch"], "polyak: integers must be the path"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused_is_one_line_and_exit_code_1(
    options: list[str],
    said: str,
    files: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On stderr, nothing on stdout, nothing on disk."""
    assert main(["merge", *files, "-o", str(tmp_path / "out.safetensors"), *options]) == 1
    found = capsys.readouterr()
    assert found.err.startswith(said)
    assert (found.err.count("\n"), found.out) == (1, "")
    assert not (tmp_path / "out.safetensors").exists()


def test_files_that_are_not_there_or_no_checkpoints_are_one_line(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The name of the file is in it."""
    (tmp_path / "notes.txt").write_text("no weights")
    for bad in ("nosuch.safetensors", "notes.txt"):
        words = ["merge", files[0], str(tmp_path / bad), "-o", str(tmp_path / "out.safetensors")]
        assert main(words) == 1
        said = capsys.readouterr().err
        assert bad in said
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [
        ["--coefficients", "half,half"],
        ["--steps", "1;2"],
        ["--dtype", "int8"],
        ["--max-shard-size", "big"],
        ["--schedule", "Unknown()"],
        ["--schedule", "Power(sigma_rel=0.05"],
        ["--schedule", "__import__('os').getcwd()"],
        ["--schedule", "Power(sigma_rel=open('x'))"],
        ["--schedule", "Power(half_life=3)"],
        ["--schedule", "After(3, Power(sigma=1))"],
        ["--window", "long"],
        ["--nosuch"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(
    options: list[str], files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Words that cannot be meant; no word is ever evaluated."""
    assert main(["merge", *files, "-o", str(tmp_path / "out.safetensors"), *options]) == 2
    assert "Usage:" in capsys.readouterr().err
    assert main(["merge", *files]) == 2


def test_a_wrong_setting_of_a_schedule_is_told_from_a_wrong_schedule(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """With the settings that it has."""
    assert main(["merge", *files, "-o", "x", "--schedule", "Power(sigma=0.1)"]) == 2
    assert "Power takes sigma_rel, gamma" in capsys.readouterr().err


def test_progress_tells_what_takes_longer_than_a_second(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a log: a line after a second, then every ten; nothing before."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with _progress.bar("merging", quiet=False) as tell:
        assert tell is not None
        for seconds in range(25):
            now = float(seconds)
            tell(seconds, 100)
    said = capsys.readouterr()
    assert said.err.splitlines() == ["merging: 1%", "merging: 11%", "merging: 21%"]
    assert said.out == ""
    with _progress.bar("merging", quiet=True) as nothing:
        assert nothing is None


# ── soup ─────────────────────────────────────────────────────────────────────────────────────────

# Prints how near the weights are to 160, as the last of several words; without torch, to be quick.
SCORE = """
import json, struct, sys
data = open(sys.argv[1], "rb").read()
begin = 8 + struct.unpack("<Q", data[:8])[0]
place = begin + json.loads(data[8:begin])["w"]["data_offsets"][0]
print("the score is", -abs(struct.unpack("<f", data[place : place + 4])[0] - 160.0))
"""


def test_soup_asks_a_command(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last number it prints; every call is a line on stderr, the result on stdout."""
    script = tmp_path / "score.py"
    script.write_text(SCORE)
    out = tmp_path / "out.safetensors"
    command = f"{sys.executable} {script} {{}}"
    assert main(["soup", *files[:2], "-o", str(out), "--score", command]) == 0
    # Alone: 60 and 40 away; their mean, 150, is 10 away.
    assert merged(tmp_path) == [150.0] * 4
    said = capsys.readouterr()
    assert said.err.splitlines()[0] == "-60: step-100.safetensors"
    assert said.err.splitlines()[2] == "-10: step-100.safetensors + step-200.safetensors (kept)"
    assert "greedy soup: -10 with 2 of 2 checkpoints, the best alone -40" in said.out

    words = ["soup", *files[:2], "-o", str(out), "--score", command, "--json", "--quiet"]
    assert main([*words, "--method", "uniform"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert json.loads(said.out)["score"] == -10.0


def test_soup_refuses_a_score_that_fails(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 with the last line it said, and no result; without {} wrong usage."""
    words = ["soup", *files, "-o", str(tmp_path / "out.safetensors"), "--score"]
    for code, expected in (
        ("raise SystemExit('no data here')", "got 1 from"),
        ("print('fine')", "score must print a number last, got 'fine'"),
    ):
        assert main([*words, f'{sys.executable} -c "{code}" {{}}']) == 1
        said = capsys.readouterr().err
        assert expected in said
        assert said.count("\n") == 1
    assert main([*words, "/nosuch/program {}"]) == 1
    assert main([*words, "python eval.py"]) == 2
    assert not (tmp_path / "out.safetensors").exists()


# ── inspect and diff ─────────────────────────────────────────────────────────────────────────────


def test_inspect_says_what_a_file_is(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plain weights, or an average and whose; tensors, sizes, metadata."""
    assert main(["inspect", files[0]]) == 0
    said = capsys.readouterr().out
    assert "weights: plain, no known average" in said
    assert "2 tensors: 1 int64 in 8 B, 4 float32 in 16 B" in said

    out = tmp_path / "out.safetensors"
    assert main(["merge", *files, "-o", str(out), "--window", "100", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["origin"] == "polyak merged weights"
    assert found["step"] == 300.0
    assert found["tensors"]["w"] == {"dtype": "float32", "shape": [4]}
    assert main(["inspect", str(out)]) == 0
    said = capsys.readouterr().out
    assert "made by: plain mean of the last 100" in said
    assert "  0.5  step-300.safetensors, step 300" in said


@pytest.mark.parametrize(
    "about", ['{"checkpoints"', '{"checkpoints": 3}', '{"checkpoints": [{"name": 1}], "how": 2}']
)
def test_inspect_believes_no_metadata(
    about: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What only looks like ours is shown as it is."""
    path = tmp_path / "odd.safetensors"
    save_file({"w": torch.ones(1)}, path, metadata={"polyak": about})
    assert main(["inspect", str(path)]) == 0
    assert f"metadata: polyak = {about}" in capsys.readouterr().out


def test_inspect_cuts_long_metadata_unless_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After 400 letters; --all and --json show every one."""
    path = str(tmp_path / "long.safetensors")
    save_file({"w": torch.ones(1)}, path, metadata={"long": "x" * 401, "short": "y" * 400})
    for words, x, cut in (([], 400, True), (["--all"], 401, False), (["--json"], 401, False)):
        assert main(["inspect", path, *words]) == 0
        said = capsys.readouterr().out
        assert max(map(len, re.findall("x+", said.replace("\n", "")))) == x
        assert "y" * 400 in said.replace("\n", "")
        assert ("…" in said) == cut


def test_inspect_shows_forty_tensors_unless_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says how many there are."""
    path = str(tmp_path / "many.safetensors")
    save_file({f"layer.{k}": torch.zeros(1) for k in range(50)}, path)
    assert main(["inspect", path]) == 0
    said = capsys.readouterr().out
    assert said.count("layer.") == 40
    assert "and 10 more: --all shows every one" in said
    assert main(["inspect", path, "--all"]) == 0
    assert capsys.readouterr().out.count("layer.") == 50


def test_diff_of_masks_and_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared infinity is no length, and one NaN anywhere leaves the largest unknown."""
    monkeypatch.setattr(_slices, "SLICE", 2)
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    mask, nan = torch.full((2,), -torch.inf), torch.nan
    w = torch.tensor([3.0, 4.0, 0.0, 0.0])
    save_file({"mask": mask, "w": w, "nan": torch.tensor([nan, 2.0, 1.0, 0.0])}, first)
    save_file({"mask": mask, "w": w + 3.0, "nan": torch.tensor([nan, 3.0, 1.0, 0.0])}, second)
    found = diff(first, second)
    assert found.relative == pytest.approx(math.sqrt(37 / 30))  # 4 * 9 + 1 over 25 + 5
    assert {one.name: one.relative for one in found.distances} == {
        "mask": 0.0,
        "w": pytest.approx(math.sqrt(36 / 25)),
        "nan": pytest.approx(math.sqrt(1 / 5)),
    }
    for place in (0, -1):
        worse = w + 3.0
        worse[place] = nan
        save_file({"w": worse}, second)
        [one] = [one for one in diff(first, second).distances if one.name == "w"]
        assert math.isnan(one.largest)


def test_diff_tells_names_shapes_and_distances(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """||second - first|| / ||first||, by hand: 5 / 5 for one, equal otherwise."""
    first, second = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    big = 2**53  # float64 cannot tell the next integer from it
    save_file(
        {
            "w": torch.tensor([3.0, 4.0]),
            "v": torch.ones(2),
            "nan": torch.tensor([torch.nan, torch.inf]),
            "n": torch.tensor([big]),
            "head": torch.ones(2, 3),
            "old": torch.ones(1),
        },
        first,
    )
    save_file(
        {
            "w": torch.tensor([3.0, 9.0]),
            "v": torch.ones(2).bfloat16(),
            "nan": torch.tensor([torch.nan, torch.inf]),
            "n": torch.tensor([big + 1]),
            "head": torch.ones(3, 2),
            "new": torch.ones(1),
        },
        second,
    )
    assert main(["diff", first, second, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["only_first"], found["only_second"]) == (["old"], ["new"])
    assert found["reshaped"] == {"head": [[2, 3], [3, 2]]}
    distances = {one["name"]: one for one in found["distances"]}
    assert distances["w"]["relative"] == 1.0
    assert distances["w"]["largest"] == 5.0
    assert {name: one["changed"] for name, one in distances.items()} == {
        "w": 1,
        "v": 0,
        "nan": 0,
        "n": 1,
    }
    assert main(["diff", first, second]) == 0
    said = capsys.readouterr().out
    for line in ("only in the first: old", "shapes: head [2, 3] and [3, 2]"):
        assert line in said
    assert "2 tensors equal, 2 changed" in said
    assert "1 tensors have another dtype" in said
    assert main(["diff", first, first]) == 0
    assert "the same values everywhere" in capsys.readouterr().out


def test_diff_and_inspect_refuse_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1."""
    for words in (["inspect", "nosuch"], ["diff", "nosuch", "nosuch"]):
        assert main(words) == 1
        said = capsys.readouterr().err
        assert said.startswith("polyak: ")
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("printed", "score"),
    [
        ("epoch 5 loss=0.17", 0.17),
        ("accuracy: 91.2%", 91.2),
        ("step 3\n-1e-3\n", -1e-3),
        ("0.17, done 2 of 2: .5", 0.5),
    ],
)
def test_the_score_is_the_number_at_the_very_end(printed: str, score: float) -> None:
    """A step or a date before it is not taken for the score."""
    assert run_score(f"printf %s {shlex.quote(printed)}", "unused") == score


@pytest.mark.parametrize("command", ["printf 'score 3 done'", "true", "sh -c 'unbalanced"])
def test_a_command_without_a_number_at_the_end_is_refused(command: str) -> None:
    """In one of our errors, whatever is wrong with it."""
    with pytest.raises(polyak.ArgumentError, match="score must"):
        run_score(command, "unused")
