"""An evaluation that is killed, twice, and whose engine dies, ends with the table of one that was left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import manifest_rows, tiny_words

from tatar_dist import cli
from tatar_dist.config.load import load_config
from tatar_dist.data.writing import write_manifest
from tatar_dist.evaluate import runner
from tatar_dist.run.events import read_events

pytestmark = pytest.mark.usefixtures("shared_ray")
KILLED = -9


@pytest.fixture(scope="module")
def words(model_parsing, tmp_path_factory) -> list[str]:
    """Overrides but for `output`: 24 pictures, one of them broken, in calls of four."""
    file = tmp_path_factory.mktemp("held_out") / "m.parquet"
    rows = [{**r, "split": "test"} for task in ("iqa", "iaa") for r in manifest_rows(task, 12, seed=5)]
    rows[3]["image_bytes"] = b"not an image"
    write_manifest(file, rows)
    own = ["rollout.engines=1", "rollout.max_num_seqs=2", "rollout.max_new_tokens=48", "rollout.restart_backoff_s=0.1"]
    asked = ["evaluate.samples=1", "evaluate.expected=true", "evaluate.direct=true", "evaluate.bootstrap=20"]
    return [*tiny_words(model_parsing, []), f"data.test=[{file}]", *own, *asked]


def evaluate(output: Path, words: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tatar_dist", "evaluate", "--config", "configs/eval.yaml", "--json"]
    return subprocess.run([*command, f"output={output}", *words, *more], capture_output=True, text=True, timeout=900)


def test_an_engine_that_vllm_refuses_to_start_is_one_line(words, tmp_path, capfd):
    run = ["evaluate", "--config", "configs/eval.yaml", f"output={tmp_path / 'run'}", *words]
    assert cli.main([*run, "rollout.max_model_len=900000"]) == 1
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith(f"tatar-dist: engine 0 on {os.uname().nodename} did not start: ")
    assert "max_model_len (900000)" in line, "vLLM's reason"


def figures(output: Path) -> dict:
    """What does not depend on the time it took."""
    found = json.loads((output / "metrics.json").read_text())
    return {k: v for k, v in found.items() if k not in ("seconds", "tokens_per_second", "seconds_per_answer")}


def test_killed_and_with_a_dead_engine_the_table_is_the_same(words, tmp_path, capsys):
    quiet, troubled = tmp_path / "quiet", tmp_path / "troubled"
    expected = runner.run(load_config([], [f"output={quiet}", *words]))
    assert expected["datasets"]["set-iqa"]["n"] == 11 and expected["datasets"]["set-iqa"]["n_missing"] == 1
    assert set(expected["expected"]) == set(expected["sample_mean"]) == {"set-iqa", "set-iaa"}
    for variant in ("expected", "sample_mean", "direct"):
        assert expected["datasets"]["set-iqa"][f"srcc_{variant}"] == expected[variant]["set-iqa"]["srcc"]

    direct, thought = expected["direct"]["set-iaa"], expected["datasets"]["set-iaa"]
    assert 0 < direct["tokens"] and 0 < thought["tokens"] and direct["n"] == 12
    assert all(expected["seconds_per_answer"][kind] > 0 for kind in ("greedy", "direct"))

    killed = "controller.evaluate:kill:step=8"
    dies = "engine.generate:kill:step=0"  # the engine, in its first call
    done = evaluate(troubled, words, f"failpoints=['{dies}','{killed}']")
    assert done.returncode == KILLED, done.stderr
    assert not (troubled / "metrics.json").exists()
    done = evaluate(troubled, words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["datasets"] == expected["datasets"]
    assert figures(troubled) == figures(quiet)
    said = [(run / "table.md").read_text().splitlines() for run in (troubled, quiet)]
    assert [x for x in said[0] if " direct answer takes " not in x] == [
        x for x in said[1] if " direct answer takes " not in x
    ]
    tables = [pq.read_table(run / "predictions.parquet") for run in (quiet, troubled)]
    assert tables[0].equals(tables[1])

    events = read_events(troubled)
    assert [e["point"] for e in events if e["event"] == "fault"].count("controller.evaluate") == 1
    assert any(e["event"] == "engine/dead" for e in events)
    asked = [json.loads(x)["line"] for x in (troubled / "answers.jsonl").read_text().splitlines()[1:]]
    assert len(asked) == len({(line["kind"], line["key"]) for line in asked}) == 69  # no answer came twice
    for line in asked:
        assert all(c["text"].startswith("<answer>") for c in line["said"]) == (line["kind"] == "direct")

    command = ["evaluate", "--config", "configs/eval.yaml", "--json", f"output={troubled}", *words]
    assert cli.main(command) == 0  # everything is answered: no engine is started
    assert figures(troubled) == figures(quiet)
    assert sum(e["event"] == "engine/ready" for e in read_events(troubled)) == sum(
        e["event"] == "engine/ready" for e in events
    )

    before = (troubled / "config.yaml").read_text()
    capsys.readouterr()
    status, said = cli.main([*command, "rollout.max_new_tokens=47"]), capsys.readouterr().err
    assert (troubled / "config.yaml").read_text() == before  # it says what was evaluated
    assert status == 2 and "was written under other settings (max_new_tokens was 48, is 47)" in said
