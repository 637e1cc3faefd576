"""What ends a wait: stalls always, signals where they may, and what decides that may wait itself."""

from __future__ import annotations

import os
import signal

import pytest

from tatar_dist.config.schema import WatchConfig
from tatar_dist.errors import LearnersFailed, StopRequested
from tatar_dist.faults.interrupts import StopSignals
from tatar_dist.faults.stall import StallDetector, Stalled
from tatar_dist.faults.waiting import Waits
from tatar_dist.run.events import Events


@pytest.fixture
def asked():
    """Signals of a run that was asked to stop."""
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        yield stop


def test_a_signal_ends_a_wait_inside_interruptible_only(asked):
    waits = Waits(asked)
    waits.check()
    with waits.interruptible(), pytest.raises(StopRequested):
        waits.check()
    waits.check()


def test_the_inner_of_two_decides_and_the_outer_holds_again_after_it(asked):
    waits = Waits(asked)
    with waits.interruptible():
        with waits.interruptible(lambda: False):
            waits.check()
        with pytest.raises(StopRequested):
            waits.check()


def test_what_decides_may_wait_itself_and_what_it_raises_ends_the_wait(asked):
    """A step that the learners work on is asked whether it is over; when a rank has died, that waits for the others."""
    waits, asked_again = Waits(asked), []

    def over() -> bool:
        asked_again.append(True)
        waits.check()
        raise LearnersFailed("rank 1 died")

    with waits.interruptible(over):
        for _ in range(2):
            with pytest.raises(LearnersFailed, match="rank 1 died"):
                waits.check()
    assert len(asked_again) == 2


def test_a_stall_ends_a_wait_unless_its_own_deadline_is_longer(tmp_path):
    now = [0.0]
    config = WatchConfig(stall_min_s=10, stall_action="restart")
    watch = StallDetector(tmp_path, config, 10, Events(tmp_path), lambda: [], lambda: now[0])
    waits = Waits(watch=watch)
    waits.check()
    now[0] = 11
    watch._stall(watch._last)
    with waits.interruptible(stalls=False):
        waits.check()
    with pytest.raises(Stalled):
        waits.check()
    waits.check()  # once a stall
