"""An engine's state machine: what leads where, what is logged, how restarts back off and end."""

from __future__ import annotations

import pytest

from tatar_dist.faults.health import ALLOWED, MAX_BACKOFF_S, Health, State


@pytest.fixture
def log():
    events = []
    events_log = lambda event, **fields: events.append((event, fields))  # noqa: E731
    events_log.events = events
    return events_log


def engine(log, state: State = State.RESTARTING, max_restarts: int = 3) -> Health:
    return Health(7, max_restarts, 1.0, log, state=state)


def names(log) -> list[str]:
    return [event for event, _ in log.events]


def test_only_a_push_leads_a_started_engine_to_healthy(log):
    e = engine(log)
    e.ready(pid=11, host="a", node="n")
    assert e.state is State.STALE and ALLOWED[State.RESTARTING].isdisjoint({State.HEALTHY})
    e.answered(current=True)
    assert e.state is State.STALE
    e.current()
    assert e.state is State.HEALTHY
    assert names(log) == ["engine/ready", "engine/stale", "engine/healthy"]
    assert all(fields["engine"] == 7 for _, fields in log.events)
    e.current()
    assert len(log.events) == 3  # nothing new, nothing logged


@pytest.mark.parametrize("current", [True, False])
def test_a_suspect_that_answers_serves_on_only_with_current_weights(log, current):
    e = engine(log, State.HEALTHY)
    e.late(8)
    assert e.state is State.SUSPECT and log.events[-1][1]["reason"] == "no answer for 8 s"
    e.answered(current)
    assert e.state is (State.HEALTHY if current else State.STALE)


def test_restarts_back_off_and_end(log):
    e, now = engine(log, State.HEALTHY, max_restarts=8), 100.0
    waits = []
    while e.state is not State.GONE:
        e.died("killed", now)
        if e.state is State.GONE:
            break
        waits.append(e.retry_at - now)
        assert not e.due(e.retry_at - 0.001) and e.due(e.retry_at)
        now = e.retry_at
        e.restarting()
    assert waits == [1, 2, 4, 8, 16, 32, MAX_BACKOFF_S, MAX_BACKOFF_S]
    assert "8 restarts in a row" in log.events[-1][1]["reason"] and not e.due(now + 1e6)


def test_an_answer_makes_up_for_earlier_restarts(log):
    e = engine(log, State.HEALTHY, max_restarts=1)
    for _ in range(5):
        e.died("killed", 0)
        e.restarting()
        e.ready(pid=1)
        e.current()
        e.answered(True)
    assert e.state is State.HEALTHY and e.restarts == 0
    e.died("killed", 0)
    e.restarting()
    e.died("does not start", 0)
    assert e.state is State.GONE


@pytest.mark.parametrize(
    "state, act",
    [
        (State.DEAD, lambda e: e.died("again", 0)),
        (State.DEAD, lambda e: e.ready(pid=1)),
        (State.GONE, lambda e: e.restarting()),
        (State.RESTARTING, lambda e: e.late(1)),
        (State.STALE, lambda e: e.late(1)),
        (State.HEALTHY, lambda e: e.restarting()),
    ],
)
def test_what_cannot_follow_is_refused(log, state, act):
    e = engine(log, state)
    with pytest.raises(ValueError, match=f"engine 7: {state} cannot become"):
        act(e)
    assert e.state is state
