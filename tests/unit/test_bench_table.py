"""The table over all benches, and what their commands refuse: one line, status 2."""

from __future__ import annotations

import json
from importlib import import_module

import pytest

from tatar_dist.bench import reward
from tatar_dist.bench.table import markdown, read, show
from tatar_dist.cli import main
from tatar_dist.commands.checks import BENCHES
from tatar_dist.errors import UserError

RESULT = {
    "name": "sync",
    "baseline": "2 copies",
    "ratio": {"min": 0.5, "median": 0.75, "max": 1.25},
    "target": 1.0,
    "met": False,
    "limit": "bytes",
    "versions": {},
    "machine": {},
}


def test_a_row_a_bench_in_the_order_given():
    lines = markdown([RESULT, RESULT | {"name": "data", "met": True, "target": 0.8}]).splitlines()
    assert lines[0] == "| bench | baseline | ratio, median (min–max) | target | met | limit |"
    assert lines[2] == "| sync | 2 copies | 0.75 (0.50–1.25) | 1 | no | bytes |"
    assert lines[3] == "| data | 2 copies | 0.75 (0.50–1.25) | 0.8 | yes | bytes |"


def test_a_result_is_printed_with_its_figures_and_a_table_for_records(capsys):
    case = {"seconds": [0.25, 0.5, 0.75], "mib": {"ours": 12.0}, "ratio": RESULT["ratio"], "fits": True, "mfu": None}
    found = RESULT | {"push_seconds": 0.0042, "share": 0.01, "cases": {"thin": case, "wide": case | {"fits": False}}}
    show(found | {"sizes": [{"rows": 1000, "bytes": 2_500_000}, {"rows": 30_000, "x": 0.5}]})
    said = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    for line in (
        "baseline 2 copies", "ratio, median (min–max) 0.75 (0.50–1.25)", "target 1", "met no", "limit bytes",
        "push 4.20 ms", "share 0.01", "seconds 500 ms (250–750) 500 ms (250–750)", "fits yes no",
        "mib ours 12.0 MiB 12.0 MiB", "mfu — —", "rows 1,000 30,000", "bytes 2.50 MB —", "x — 0.50",
    ):  # fmt: skip
        assert line.split() in said


def test_the_command_prints_it(tmp_path, capsys):
    file = tmp_path / "sync.json"
    file.write_text(json.dumps(RESULT))
    assert main(["bench", "table", str(file)]) == 0
    assert capsys.readouterr().out == markdown([RESULT]) + "\n"


def test_json_is_all_that_stands_on_standard_output(monkeypatch, capsys):
    def run():
        print("a library's warning")
        return RESULT

    monkeypatch.setattr(reward, "run", run)
    assert main(["bench", "reward", "--json"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out) == RESULT and "warning" in said.err


@pytest.mark.parametrize(("met", "status"), [(True, 0), (False, 1)])
def test_a_missed_target_is_status_1_in_every_bench(met, status, monkeypatch, capsys):
    for name in BENCHES:
        monkeypatch.setattr(import_module(f"tatar_dist.bench.{name}"), "run", lambda: RESULT | {"met": met})
        assert main(["bench", name]) == status


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "no such file"), ("", "not what .* cut short"), ("[1]", "not what"), ('{"name": "sync"}', "not what")],
)
def test_what_is_no_result_of_a_bench_is_refused(text, said, tmp_path):
    file = tmp_path / "x.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=rf"x\.json: {said}"):
        read(file)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rewards"], "must be one of learner, rollout, sync, reward, data, scaling"),
        (["table"], "give it files"),
        (["reward", "seed=1"], "takes no 'seed=1'"),
        (["reward", "--plot", "x.svg"], "only bench learner"),
    ],
)
def test_bad_input_is_one_line_and_status_2(words, said, capsys):
    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
