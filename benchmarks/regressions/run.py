"""Ask polyak and six other averages the same questions, and write the table into the docs.

    make regressions

Needs the environment of requirements.txt beside this file, which no other part of the project
uses. A library that cannot be imported keeps its column, with the reason.
"""

import argparse
import datetime
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from adapters import PEERS, Peer

import polyak
from polyak.testing import CASES, Conformance, conformance

PAGE = Path(__file__).parents[2] / "docs" / "regressions.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
MARKS = {True: "✅", False: "❌", None: "—"}
COMMAND = "make regressions"


@dataclass(frozen=True)
class Column:
    """One peer with its version and what it answered, or why it could not be asked."""

    peer: Peer
    version: str
    found: Conformance | None
    trouble: str = ""


def ask(peer: Peer) -> Column:
    """Ask one library everything that makes sense for it."""
    try:
        known = version(peer.package)
    except PackageNotFoundError:
        known = polyak_version() if peer.package == "polyak" else "not installed"
    try:
        factory = peer.load()
    except Exception as error:  # whatever a foreign package raises on import is the reason
        first = (str(error).splitlines() or [""])[0]
        return Column(peer, known, None, f"not run: {type(error).__name__}: {first}")
    cases = [case for case in CASES if case.key not in peer.without]
    return Column(peer, known, conformance(factory, cases=cases, name=peer.name))


def polyak_version() -> str:
    """Read polyak's version from this checkout, which is run without being installed."""
    text = (PAGE.parents[1] / "pyproject.toml").read_text()
    return text.split('\nversion = "', 1)[1].split('"', 1)[0]


def markdown(columns: list[Column]) -> str:
    """The table, its date, versions and command, and how each class was driven."""
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    lines = [
        f"Made on {today} by `{COMMAND}`: Python {platform.python_version()}, "
        f"torch {torch.__version__}, CPU. ✅ right, ❌ wrong, — not offered by the class, or no "
        "question for it (see below).",
        "",
        "| case | question | right | "
        + " | ".join(f"{column.peer.name} {column.version}" for column in columns)
        + " |",
        "|" + "---|" * (3 + len(columns)),
        "| | | right, wrong, not asked | " + " | ".join(_total(c) for c in columns) + " |",
    ]
    for case in CASES:
        cells = [case.key, case.question, case.expected, *(_cell(c, case.key) for c in columns)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", "How each class is driven:", ""]
    for column in columns:
        left_out = "".join(f" Not asked: {key}, {why}." for key, why in column.peer.without.items())
        lines.append(f"- **{column.peer.name}**: {column.peer.how}{left_out}")
    return "\n".join(lines)


def _total(column: Column) -> str:
    if column.found is None:
        return column.trouble.replace("|", "\\|")
    right, wrong = len(column.found.right), len(column.found.wrong)
    return f"**{right}**, **{wrong}**, {len(CASES) - right - wrong}"


def _cell(column: Column, key: str) -> str:
    if column.found is not None:
        for case, answer in column.found.answers:
            if case.key == key:
                return f"{MARKS[answer.right]} {answer.text}".strip()
    return MARKS[None]


def main() -> None:
    """Print every class in red and green, then write the page."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--dry", action="store_true", help="print, and leave the page alone")
    dry = options.parse_args().dry
    torch.set_num_threads(1)
    columns = [ask(peer) for peer in PEERS]
    for column in columns:
        if column.found is None:
            print(f"{column.peer.name} {column.version}: {column.trouble}")
        else:
            column.found.show()
        print()
    if dry:
        return
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{markdown(columns)}\n\n{END}{after}")
    print(f"polyak from {Path(polyak.__file__).parent}; the table is in {PAGE}")


if __name__ == "__main__":
    main()
