"""Progress off a terminal: plain lines, thinned out, the first and the last always there."""

from __future__ import annotations

import io
import math
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from tatar_dist.run.progress import Progress, clock


def written(total: int, start: int = 0, width: int = 80, metrics: dict | None = None) -> list[str]:
    """What a run of `total` steps from `start` prints into a file."""
    file = io.StringIO()
    with Progress("grpo", total, start, console=Console(file=file, force_terminal=False, width=width)) as progress:
        progress.ready()
        for done in range(start + 1, total + 1):
            progress.update(done, metrics or {})
    text = file.getvalue()
    assert "\x1b" not in text and "\r" not in text
    return text.splitlines()


def steps(lines: list[str]) -> list[int]:
    return [int(line.split()[1].split("/")[0]) for line in lines]


def test_a_short_run_prints_one_line_a_step():
    lines = written(3)
    assert [line.split()[:2] for line in lines] == [["grpo", f"{i}/3"] for i in (1, 2, 3)]


def test_a_long_run_is_thinned_to_about_25_lines_that_hold_the_first_and_the_last():
    for total in (100, 1010, 9999):
        shown = steps(written(total))
        assert shown[0] == 1 and shown[-1] == total
        assert 20 <= len(shown) <= 30


def test_units_that_finish_many_at_a_time_print_no_fewer_lines_than_they_need():
    """An evaluation finishes a batch at a time, and no batch ends on a round number."""
    file = io.StringIO()
    with Progress("evaluate", 1000, unit="image", console=Console(file=file, force_terminal=False)) as progress:
        for done in range(33, 1000, 33):
            progress.update(done, {})
        progress.update(1000, {})
    shown = steps(file.getvalue().splitlines())
    assert shown[0] == 33 and shown[-1] == 1000 and len(shown) >= 15


def test_a_resumed_run_begins_where_it_stands():
    assert steps(written(60, start=51)) == [52, 54, 56, 58, 60]


def test_a_task_without_held_out_rows_is_left_out_but_a_lost_loss_is_shown():
    (line,) = written(1, metrics={"loss/total": math.nan, "eval/loss/iqa": 0.5, "eval/loss/iaa": math.nan})
    assert "loss nan" in line and "held-out iqa 0.5" in line and "iaa nan" not in line


def test_a_line_says_the_known_metrics_by_their_short_names_and_no_others():
    metrics = {"loss/total": 1.23456, "eval/loss/iqa": 0.5, "policy/entropy": 3.0}
    (line,) = written(1, metrics=metrics)
    assert "  loss 1.23  held-out iqa 0.5  " in line and "entropy" not in line and "reward" not in line
    (line,) = written(1, metrics=metrics | {"reward/total/iaa": 2.0})
    assert "  iaa 2  " in line and " loss 1.23" not in line  # the loss of a policy step says nothing


def test_a_loss_that_is_no_number_is_printed_and_not_hidden():
    (line,) = written(1, metrics={"loss/total": float("nan")})
    assert "loss nan" in line


def test_a_line_is_not_broken_on_a_narrow_console():
    metrics = {"reward/total/iqa": 2.0, "reward/total/iaa": 3.0, "sync/logprob_gap": 1e-7}
    assert len(written(4, width=20, metrics=metrics)) == 4


def test_time_left_is_reckoned_from_the_steps_without_the_start(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr("tatar_dist.run.progress.time", SimpleNamespace(monotonic=lambda: now.seconds))
    file = io.StringIO()
    with Progress("sft", 14, 4, console=Console(file=file, force_terminal=False)) as progress:
        now.seconds = 100.0  # the actors start
        progress.ready()
        now.seconds = 106.0
        progress.update(6, {})  # two steps since the run was resumed at 4
    assert file.getvalue() == "sft  6/14  3.0 s/step  0:01:46 gone  0:00:24 left\n"


def test_work_that_takes_no_time_at_all_has_a_line(monkeypatch):
    monkeypatch.setattr("tatar_dist.run.progress.time", SimpleNamespace(monotonic=lambda: 5.0))
    (line,) = written(1)
    assert re.search(r"steps/s  0:00:00 gone  0:00:00 left$", line)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-0.7, "0:00:00"), (59.4, "0:00:59"), (59.6, "0:01:00"), (3599.7, "1:00:00"), (36061, "10:01:01")],
)
def test_seconds_read_like_a_clock(seconds, text):
    assert clock(seconds) == text
