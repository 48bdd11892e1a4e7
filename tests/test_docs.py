"""What the documentation shows runs, and every public name is in it."""

import re
from pathlib import Path

import pytest

import polyak
import polyak.study

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks(page: Path) -> str:
    return "\n".join(
        re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    )


@pytest.mark.parametrize("page", [p for p in PAGES if python_blocks(p)], ids=lambda page: page.name)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page, read from top to bottom, are a program that works."""
    monkeypatch.chdir(tmp_path)
    exec(compile(python_blocks(page), str(page), "exec"), {"__name__": "__docs__"})


def test_every_public_name_is_documented() -> None:
    """The reference lists exactly the names of the front door."""
    text = (ROOT / "docs/reference.md").read_text()
    assert sorted(re.findall(r"^::: polyak\.(\w+)$", text, re.M)) == polyak.__all__
    study = re.findall(r"^::: polyak\.study\.(\w+)$", text, re.M)
    assert sorted(study) == sorted(polyak.study.__all__)


@pytest.mark.parametrize("name", polyak.__all__)
def test_every_public_name_says_what_it_is(name: str) -> None:
    """No public name, and no public method of one, goes without a docstring."""
    thing = getattr(polyak, name)
    members = (
        [v for k, v in vars(thing).items() if not k.startswith("_")]
        if isinstance(thing, type)
        else []
    )
    for member in (thing, *(m for m in members if callable(m) or isinstance(m, property))):
        assert (member.__doc__ or "").strip(), f"{member} has no docstring"
