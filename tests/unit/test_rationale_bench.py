"""The endpoint benchmark: its figure is the server's own, and its build is a real one."""

import re

import pytest

from tatar_dist.bench import rationale as benchmark
from tatar_dist.bench.table import show


def call(arrived, sent):
    return {"arrived": arrived, "sent": sent}


def test_slots_that_are_asked_again_at_once_are_busy_all_the_time_and_the_tail_does_not_count():
    log = [call(t, t + 1.0) for t in (0.0, 1.0, 2.0, 3.0) for _ in range(2)]
    assert benchmark.busy_share(log, 2) == pytest.approx(1.0)
    assert benchmark.busy_share(log, 4) == pytest.approx(0.5)


def test_a_pause_between_answers_shows():
    log = [call(t, t + 1.0) for t in (0.0, 2.0, 4.0)]
    assert benchmark.busy_share(log, 1) == pytest.approx(0.5)


def test_a_small_run_keeps_every_row_and_says_how_busy_the_server_was(capsys):
    found = benchmark.run(slots=4, latency=0.2, rounds=4)
    span = (found["requests"] - 1) / found["requests_per_second"]
    busy = found["busy"] * found["slots"] * span
    # the twelve that were answered before the last four were asked, however slowly this machine asks
    assert found["requests"] == 16 and 0.99 * 12 * 0.2 < busy <= found["slots"] * span
    show(found)
    assert re.search(r"^busy +[01]\.\d", capsys.readouterr().out, re.MULTILINE)
