"""What each signal asks of a run, and what the run then exits with."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tatar_dist.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, Interrupted, StopRequested
from tatar_dist.faults.interrupts import MARGIN_S, StopSignals

pytestmark = pytest.mark.timeout(60, method="thread")  # the other method needs the clock that is tested here


@pytest.mark.parametrize(
    "number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)], ids=lambda v: str(v)
)
def test_a_signal_asks_for_a_stop_and_decides_the_exit_status(number, status):
    assert (EXIT_INTERRUPTED, EXIT_PREEMPTED) == (130, 75)
    with StopSignals(60) as stop:
        stop.raise_if_stopping()
        os.kill(os.getpid(), number)
        assert stop.requested and stop.status == status and stop.name == signal.Signals(number).name
        with pytest.raises(StopRequested):
            stop.raise_if_stopping()
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def test_preemption_ends_the_run_within_its_grace_even_without_a_safe_point():
    with pytest.raises(Interrupted, match="no safe point within checkpoint.grace_seconds=6") as e:
        with StopSignals(MARGIN_S + 1) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested
            time.sleep(30)
    assert e.value.status == EXIT_PREEMPTED


def test_ctrl_c_sets_no_clock():
    with StopSignals(MARGIN_S + 1):
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_handlers_are_put_back():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)}
    with StopSignals(60):
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    assert {n: signal.getsignal(n) for n in before} == before
