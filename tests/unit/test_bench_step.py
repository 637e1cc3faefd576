"""The comparison with TRL, as far as it goes without TRL: what it reads, what it refuses, what it says."""

from __future__ import annotations

import pytest

from tatar_dist.bench import step
from tatar_dist.bench.result import ratio, result, summary
from tatar_dist.errors import RunError, UserError


def test_the_first_step_of_the_peer_is_left_out_and_so_is_what_else_it_prints():
    lines = ["Loading", '{"seconds": 9.0, "tokens": 64, "trl": "1"}', '{"loss": 0}']
    lines += ['{"seconds": 4.0, "tokens": 63, "trl": "1"}', '{"seconds": 5.0, "tokens": 62, "trl": "1"}']
    assert step.read_steps("\n".join(lines)) == {"seconds": [4.0, 5.0], "tokens": [63, 62], "trl": ["1", "1"]}


def test_a_peer_without_a_counted_step_is_refused():
    with pytest.raises(RunError, match="TRL printed 1 steps"):
        step.read_steps('{"seconds": 9.0, "tokens": 64}\n')


def test_sides_that_did_not_do_the_same_work_are_not_compared():
    peer, mine = {"seconds": [8.0, 9.0], "tokens": [64.0]}, {"seconds": [2.0, 3.0], "tokens": [63.0]}
    assert step.compare(peer, mine) == {"min": 3.0, "median": 3.5, "max": 4.0}
    with pytest.raises(RunError, match=r"not the same work: TRL made 64.0 tokens a completion, the pipeline 40.0"):
        step.compare(peer, {**mine, "tokens": [40.0]})


def test_without_its_environment_one_line_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "PEER", tmp_path / "python")
    with pytest.raises(UserError, match=r"\.venv-trl is not there: run make bench-trl"):
        step.run()


def test_a_result_has_all_its_fields_and_says_whether_the_target_is_reached():
    found = result("x", "a peer", ratio([4.0, 6.0, 9.0], [2.0, 2.0, 2.0]), 3.5, "none", more=1)
    assert set(found) == {"name", "baseline", "ratio", "target", "met", "limit", "more", "versions", "machine"}
    assert found["ratio"] == {"min": 2.0, "median": 3.0, "max": 4.5}
    assert found["met"] is False and found["versions"]["torch"] and found["machine"]["cores"] >= 1
    assert summary(found) == "x: 3.00 times better than a peer (2.00 to 4.50); target 3.5 missed; limit: none"
