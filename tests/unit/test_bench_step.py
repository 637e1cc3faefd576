"""The comparison with TRL, as far as it goes without TRL: what it reads, what it refuses, what it says."""

from __future__ import annotations

import json

import pytest

from tatar_dist.bench import step
from tatar_dist.bench.harness import ratio, result
from tatar_dist.bench.table import cells
from tatar_dist.errors import RunError, UserError


def test_the_first_step_of_the_peer_is_left_out_and_so_is_what_else_it_prints():
    one = {"tokens": 64, "prompt": 1050.0, "trl": "1"}
    lines = ["Loading", *(json.dumps({"seconds": s, **one}) for s in (9.0, 4.0)), '{"loss": 0}']
    side = step.warm(step.read_steps("\n".join(lines), 2))
    assert side == {"seconds": [4.0], "tokens": [64], "prompt": [1050.0], "trl": ["1"]}


def test_a_peer_without_all_its_steps_is_refused():
    with pytest.raises(RunError, match="TRL printed 1 steps, 2 were asked for"):
        step.read_steps('{"seconds": 9.0, "tokens": 64}\n', 2)


def test_sides_that_did_not_do_the_same_work_are_not_compared():
    peer = {"seconds": [8.0, 9.0], "tokens": [64.0], "prompt": [1050.0]}
    mine = {"seconds": [2.0, 3.0], "tokens": [63.0], "prompt": [1060]}
    assert step.compare(peer, mine) == {"min": 3.0, "median": 3.5, "max": 4.0}
    with pytest.raises(RunError, match=r"not the same work: TRL had 64.0 tokens a completion, the pipeline 40.0"):
        step.compare(peer, {**mine, "tokens": [40.0]})
    with pytest.raises(RunError, match=r"not the same work: TRL had 1050.0 tokens a prompt, the pipeline 34.0"):
        step.compare(peer, {**mine, "prompt": [34]})


def test_the_fastest_variant_that_runs_is_the_tuned_one(monkeypatch, tmp_path):
    def theirs(model, directory, variant, steps):
        assert steps == 1
        if variant == "static cache":
            raise RunError("TRL ended with 1: Traceback\nValueError: no such cache")
        return {"seconds": [{"kept activations": 5.0}.get(variant, 4.0)]}

    monkeypatch.setattr(step, "theirs", theirs)
    best, tried = step.tune(tmp_path, tmp_path)
    assert best == "a group a forward" and tried["static cache"] == "ValueError: no such cache"


def test_without_its_environment_one_line_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "PEER", tmp_path / "python")
    with pytest.raises(UserError, match=r"\.venv-trl is not there: run make bench-trl"):
        step.run()


def test_a_result_has_all_its_fields_and_says_whether_the_target_is_reached():
    found = result("x", "a peer", ratio([4.0, 6.0, 9.0], [2.0, 2.0, 2.0]), 3.5, "none", more=1)
    assert set(found) == {"name", "baseline", "ratio", "target", "met", "limit", "more", "versions", "machine"}
    assert found["ratio"] == {"min": 2.0, "median": 3.0, "max": 4.5}
    assert found["met"] is False and found["versions"]["torch"] and found["machine"]["cores"] >= 1
    assert cells(found) == ("x", "a peer", "3.00 (2.00–4.50)", "3.5", "no", "none")
