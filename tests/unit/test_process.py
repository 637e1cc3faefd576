"""Pinning: engines and learners never share a core, each process has its share, some share one where cores are few."""

from __future__ import annotations

import os

import pytest

from tatar_dist.run.process import pin


@pytest.mark.parametrize(
    ("cores", "side", "count", "expected"),
    [
        (8, 0, 2, [{0, 1}, {2, 3}]),
        (8, 1, 4, [{4}, {5}, {6}, {7}]),
        (2, 1, 1, [{1}]),
        (4, 0, 3, [{0}, {0}, {1}]),  # two cores for three processes
        (1, 1, 1, [{0}]),
    ],
)
def test_each_process_has_its_share_of_its_half(monkeypatch, cores, side, count, expected):
    found: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, own: found.append(set(own)))
    monkeypatch.setattr(os, "listdir", lambda _: ["1"])
    for index in range(count):
        pin(None, side, index, count)
    assert found == expected
