"""Ctrl-C finds no lock taken: it is heard, and whoever waits for a lock gets it."""

# ruff: noqa: PT012 - what must not be reached stands behind what must raise

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

from polyak._interrupts import interrupts_held
from polyak._slices import Slice, on_threads


def press() -> None:
    """Press Ctrl-C."""
    signal.raise_signal(signal.SIGINT)


def test_it_is_held_until_it_is_let_through() -> None:
    """What stands between is done; afterwards Ctrl-C is what it was."""
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_held() as let_through:
        let_through()  # nothing has come
        press()
        done.append("after it came")
        let_through()
        done.append("never")
    assert done == ["after it came"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_end_lets_it_through() -> None:
    """Nobody loses an interrupt for not having asked."""
    done = []
    with pytest.raises(KeyboardInterrupt):
        with interrupts_held():
            press()
            done.append("inside")
        done.append("never")
    assert done == ["inside"]


def test_an_error_on_the_way_is_the_cause_that_is_shown() -> None:
    """The interrupt wins, with the error behind it."""
    with pytest.raises(KeyboardInterrupt) as caught, interrupts_held():
        press()
        raise ValueError("disk full")
    assert isinstance(caught.value.__context__, ValueError)


def test_the_second_one_means_now() -> None:
    """Who presses twice does not wait."""
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        press()
        done.append("held")
        press()
        done.append("never")
    assert done == ["held"]


def test_a_handler_of_the_user_s_own_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not raise: the work goes on, and the handler stays."""
    calls = []
    before = signal.signal(signal.SIGINT, lambda *_: calls.append("called"))
    try:
        with interrupts_held() as let_through:
            press()
            assert not calls
            let_through()
            let_through()
        assert calls == ["called"]
        press()
        assert calls == ["called"] * 2
    finally:
        signal.signal(signal.SIGINT, before)


def test_ignored_interrupts_stay_ignored() -> None:
    """As under `nohup`."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_held() as let_through:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            press()
            let_through()
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_may_use_it() -> None:
    """Only the main thread may set a handler, and only there do interrupts come."""
    found: list[Any] = []

    def elsewhere() -> None:
        with interrupts_held() as let_through:
            let_through()
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


@contextmanager
def pressed_at_line(line: int) -> Iterator[list[str]]:
    """Press Ctrl-C before the n-th line that is run here in the pools and locks of Python."""
    passed: list[str] = []

    def in_lines(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            passed.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
            if len(passed) == line:
                press()
        return in_lines

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        module = frame.f_globals.get("__name__", "")
        return in_lines if module.startswith(("concurrent.futures", "threading")) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield passed
    finally:
        sys.settrace(before)


def test_work_on_threads_ends_whichever_line_of_the_pool_ctrl_c_comes_at() -> None:
    """From the first thread's start to the last one's end; on code without it some line hangs."""
    jobs = [Slice("w", start, start + 1) for start in range(3)]
    others = threading.active_count()
    points = 0
    while True:
        points += 1
        passed = [""]
        try:
            with pressed_at_line(points) as passed:
                on_threads(jobs, lambda job: None, total=3)
        except KeyboardInterrupt:
            assert threading.active_count() == others, passed[-1]
        else:
            break
    assert points > 100
