"""Which of the field's failures does an averaging class have?"""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TextIO

import torch

from .._errors import ArgumentError
from ._adapter import Factory
from ._case import Answer, Case, NotOfferedError
from ._cases import CASES

_MARKS = {True: "✓", False: "✗", None: "—"}
_COLORS = {True: "\033[32m", False: "\033[31m", None: "\033[2m"}  # green, red, dim
_PLAIN = "\033[0m"
_WIDEST = 64  # of an answer: the start of a message says enough


@dataclass(frozen=True)
class Conformance:
    """What an averaging class answered; `print` it, or `show` it in red and green.

    Attributes:
        name: of the class.
        answers: each case with its answer, in the order asked.
    """

    name: str
    answers: tuple[tuple[Case, Answer], ...]

    @property
    def wrong(self) -> tuple[str, ...]:
        """Keys of the cases answered wrong: `assert not conformance(Mine).wrong` is a test."""
        return tuple(case.key for case, answer in self.answers if answer.right is False)

    @property
    def right(self) -> tuple[str, ...]:
        """Keys of the cases answered right."""
        return tuple(case.key for case, answer in self.answers if answer.right is True)

    @property
    def not_offered(self) -> tuple[str, ...]:
        """Keys of the cases that need what the class does not offer."""
        return tuple(case.key for case, answer in self.answers if answer.right is None)

    def show(self, file: TextIO | None = None) -> None:
        """Print the table, in colour where `file` (None: stdout) is a terminal."""
        stream = sys.stdout if file is None else file
        colored = stream.isatty() and "NO_COLOR" not in os.environ
        print("\n".join(self._lines(colored=colored)), file=stream)

    def __str__(self) -> str:
        """The table without colours."""
        return "\n".join(self._lines(colored=False))

    def _lines(self, *, colored: bool) -> list[str]:
        rows = [(case.key, case.question, case.expected) for case, _ in self.answers]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        lines = [
            f"{self.name}: {len(self.right)} right, {len(self.wrong)} wrong, "
            f"{len(self.not_offered)} not offered"
        ]
        for row, (_, answer) in zip(rows, self.answers, strict=True):
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            verdict = f"{_MARKS[answer.right]} {answer.text}"
            if colored:
                verdict = f"{_COLORS[answer.right]}{verdict}{_PLAIN}"
            lines.append("  ".join([*cells, verdict]))
        return lines


def conformance(
    factory: Factory, *, cases: Iterable[Case] | None = None, name: str | None = None
) -> Conformance:
    """Ask any averaging class the questions that cost other people their runs.

    Every case has an answer known from algebra. What the class raises is its answer, and so is an
    attempt to end the process (`SystemExit`); only Ctrl-C ends the round. What it prints and warns
    of is not shown. Takes seconds on a CPU; nothing is written, and the state of the random
    numbers is given back.

    Args:
        factory: `(model, decay) -> Averager`, most easily a class (see `Averager`).
        cases: `CASES` when left out; yours may be among them.
        name: for the heading, when the factory's own does not do.

    Returns:
        The answers; `wrong` is empty when all is well.

    Raises:
        ArgumentError: two cases with one key.

    Examples:
        >>> from polyak.testing import CASES, PolyakAdapter
        >>> found = conformance(PolyakAdapter, cases=[c for c in CASES if c.key == "A7"])
        >>> print(found)
        PolyakAdapter: 1 right, 0 wrong, 0 not offered
        A7  decay 0.9, weights jump from 0 to 1, 5 updates  0.4095  ✓ 0.4095
    """
    asked = CASES if cases is None else tuple(cases)
    keys = [case.key for case in asked]
    if len(set(keys)) < len(keys):
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ArgumentError(f"cases must have keys of their own, got {twice} more than once.")
    title = name or str(getattr(factory, "__name__", type(factory).__name__))
    return Conformance(title, tuple((case, _answer(case, factory)) for case in asked))


def _answer(case: Case, factory: Factory) -> Answer:
    """Ask one case, with everything an answer might disturb put back."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with (
        torch.random.fork_rng(devices=devices),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")  # where a warning is the answer, the case looks for it
        torch.manual_seed(0)
        try:
            return case.ask(factory)
        except NotOfferedError:
            return Answer("", None)
        except SystemExit:
            return Answer("ends the process", False)
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            text = f"raises {type(error).__name__}: {first}".removesuffix(": ")
            return Answer(text if len(text) <= _WIDEST else text[: _WIDEST - 1] + "…", False)
