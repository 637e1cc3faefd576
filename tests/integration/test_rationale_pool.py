"""Rationale construction on our own engines: killed it ends as if undisturbed; the judge keeps to JSON."""

import json
from pathlib import Path

import pytest
from conftest import model_words
from rationale_model import SMALLER, manifest, taught_model, wording_file
from rationale_process import answers, build_and_kill, results

from tatar_dist.config.load import load_config
from tatar_dist.data.manifest import read_manifest
from tatar_dist.rationale import run as running
from tatar_dist.rationale.questions import read_marks

pytestmark = pytest.mark.usefixtures("shared_ray")
ROWS = 12  # a task


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pool")


@pytest.fixture(scope="module")
def words(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        *model_words(taught_model(tmp_path_factory)),
        *SMALLER,
        f"rationale.prompts={wording_file(directory)}",
        "rationale.teacher.local=true",
        "rationale.judge.local=true",
        "rationale.slow.image=false",
        "cluster.gpus_per_node=0",
        "cluster.learners=1",
        "cluster.learner_cpus=0.5",
        "cluster.engine_cpus=0.5",
        "cluster.object_store_mib=128",
        "rollout.engines=1",
        "rollout.max_model_len=448",
        "rollout.max_num_seqs=16",
        "rollout.deterministic=true",
    ]


def run(name: str, source: Path, output: Path, words: list[str]) -> dict:
    return running.run(name, source, load_config([], [*words, f"output={output}"]))


def test_a_killed_build_ends_in_the_file_of_an_undisturbed_one_and_asks_no_durable_answer_again(directory, words):
    source = manifest(directory / "rows.parquet", ROWS)
    killed = directory / "killed.parquet"
    build_and_kill(source, killed, words, after=6)  # twice, at random points: test_rationale_server.py
    before = answers(directory / "killed.journal.jsonl")
    assert 6 <= len(before) < 2 * ROWS
    found = run("build", source, killed, words)
    after = answers(directory / "killed.journal.jsonl")
    assert after[: len(before)] == before and len(set(after)) == len(after), "no attempt was asked twice"
    run("build", source, directory / "whole.parquet", words)
    assert results(killed) == results(directory / "whole.parquet")
    assert found["accepted"] >= ROWS and found["tasks"]["iqa"]["accepted"] and found["tasks"]["iaa"]["accepted"]
    codes = {**found["tasks"]["iqa"]["reasons"], **found["tasks"]["iaa"]["reasons"]}
    assert "number" in codes, "some answers were rejected and asked again"


def test_a_judge_without_any_schooling_gives_marks_because_the_engine_holds_it_to_the_schema(directory, words):
    built = directory / "whole.parquet"
    if not built.exists():
        run("build", manifest(directory / "rows.parquet", ROWS), built, words)
    found = run("judge", built, directory / "kept.parquet", words)
    kept, asked = read_manifest(directory / "kept.parquet"), read_manifest(built)
    assert len(kept) == found["accepted"] == len(asked)
    for i in range(len(kept)):
        row = kept.row(i)
        marks = row["meta"]["judge"]["marks"]
        assert read_marks(json.dumps(marks), row["task"]) == marks
