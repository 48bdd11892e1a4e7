"""Ctrl-C finds no lock taken: it is heard, and whoever waits for a lock gets it."""

# ruff: noqa: PT012 - what must not be reached stands behind what must raise

import os
import signal
import threading
import time
from threading import Timer
from typing import Any

import pytest

from polyak._interrupts import interrupts_held
from polyak._slices import Slice, on_threads
from snags import press, pressed_at_line

POOLS = ("concurrent.futures", "threading")


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


def test_more_of_them_are_one() -> None:
    """Who presses again, also on the way out, breaks into nothing and hears of it once."""
    done = []
    with pytest.raises(KeyboardInterrupt):
        with interrupts_held(again=lambda: done.append("hurry")) as let_through:
            press()
            assert not done
            press()
            try:
                let_through()
            finally:
                press()
                done.append("ended in peace")
        done.append("never")
    assert done == ["hurry", "hurry", "ended in peace"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_user_s_own_is_called_for_each() -> None:
    """One that does not raise: the work goes on, guarded as before, and the handler stays."""
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
            assert calls == ["called"]
        assert calls == ["called"] * 2
        press()
        assert calls == ["called"] * 3
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


def test_work_on_threads_is_left_soon() -> None:
    """Not when all of it is done: here, after ten minutes."""
    jobs = [Slice("w", start, start + 1) for start in range(60_000)]
    Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    done: list[Slice] = []

    def work(job: Slice) -> None:
        time.sleep(0.01)
        done.append(job)

    with pytest.raises(KeyboardInterrupt):
        on_threads(jobs, work, total=len(jobs))
    assert len(done) < 6_000


@pytest.mark.parametrize("again", [0, 1, 7, 40], ids="and {} lines later".format)
def test_work_on_threads_ends_whichever_line_of_the_pool_ctrl_c_comes_at(again: int) -> None:
    """From the first thread's start to the last one's end; on code without it some line hangs."""
    jobs = [Slice("w", start, start + 1) for start in range(3)]
    others = threading.active_count()
    points = 0
    while True:
        points += 1
        passed = [""]
        try:
            with pressed_at_line(points, points + again, of=POOLS) as passed:
                on_threads(jobs, lambda job: None, total=3)
        except KeyboardInterrupt:
            assert threading.active_count() == others, passed[-1]
        else:
            break
    assert points > 100
