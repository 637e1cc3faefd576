"""Progress off a terminal: plain lines, thinned out, the first and the last always there."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tatar_dist.progress import Progress, clock


def written(total: int, start: int = 0, width: int = 80, metrics: dict | None = None, extra: tuple = ()) -> list[str]:
    """What a run of `total` steps from `start` prints into a file."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=False, width=width)
    with Progress("grpo", total, start, console) as progress:
        for done in range(start + 1, total + 1):
            progress.update(done, metrics or {}, extra)
    text = file.getvalue()
    assert "\x1b" not in text and "\r" not in text
    return text.splitlines()


def steps(lines: list[str]) -> list[int]:
    return [int(line.split()[1].split("/")[0]) for line in lines]


def test_a_short_run_prints_one_line_a_step():
    lines = written(3)
    assert [line.split()[:2] for line in lines] == [["grpo", f"{i}/3"] for i in (1, 2, 3)]


def test_a_long_run_is_thinned_to_about_25_lines_that_hold_the_first_and_the_last():
    shown = steps(written(1010))
    assert shown[0] == 1 and shown[-1] == 1010
    assert 20 <= len(shown) <= 30
    assert steps(written(100)) == [1, *range(4, 101, 4)]


def test_a_resumed_run_begins_where_it_stands():
    assert steps(written(60, start=51)) == [52, 54, 56, 58, 60]


def test_a_line_says_the_known_metrics_by_their_short_names_and_no_others():
    metrics = {"loss/total": 1.23456, "reward/total/iaa": 0.5, "policy/entropy": 3.0, "time/step": 12.34}
    (line,) = written(1, metrics=metrics, extra=("held-out 0.91",))
    assert "loss 1.23  reward iaa 0.5  held-out 0.91" in line
    assert "12.3 s/step" in line and "0:00 left" in line
    assert "entropy" not in line and "reward iqa" not in line


def test_a_loss_that_is_no_number_is_printed_and_not_hidden():
    (line,) = written(1, metrics={"loss/total": float("nan")})
    assert "loss nan" in line


def test_a_line_is_not_broken_on_a_narrow_console():
    metrics = {"loss/total": 1.0, "reward/total/iqa": 2.0, "reward/total/iaa": 3.0, "sync/logprob_gap": 1e-7}
    assert len(written(4, width=20, metrics=metrics)) == 4


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (61, "1:01"), (3599.7, "1:00:00"), (36061, "10:01:01")]
)
def test_seconds_read_like_a_clock(seconds, text):
    assert clock(seconds) == text
