"""A run that is killed, stopped, out of budget or started twice: what is on disk is never asked again."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from openai_server import FAST, OpenAIServer, Reply, completion, good_answer
from rationale_cases import ROOT, build_config, endpoint_words, manifest, rows, when

from tatar_dist.data.writing import write_manifest
from tatar_dist.errors import RunError, UserError
from tatar_dist.rationale import run as running
from tatar_dist.rationale.ledger import Ledger
from tatar_dist.rationale.questions import Build
from tatar_dist.rationale.wording import load_wording
from tatar_dist.rollout.engine import group_seed
from tatar_dist.run.journal import decode


def moody(call):
    """An answer that depends on the seed alone: one in four is rejected, so that attempts and verdicts differ."""
    if "response_format" in call.body:
        marks = json.loads(good_answer(call).body["choices"][0]["message"]["content"])
        return Reply(200, completion(json.dumps(dict.fromkeys(marks, 1 + call.body["seed"] % 4))))
    if call.body["seed"] % 4 == 0:
        return Reply(200, completion(FAST.replace("slight", "slight 7")))
    if "narrative" in json.dumps(call.body["messages"]):
        return good_answer(call)
    ending = ("eye", "viewer", "lens")[call.body["seed"] % 3]
    return Reply(200, completion(FAST.replace("the eye", f"the {ending}")))


DIES = """
import os, signal, sys
from tatar_dist.cli import main

moves, replace = int(sys.argv.pop(1)), os.replace

def counted(*paths, **options):
    global moves
    moves -= 1
    if moves == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths, **options)

os.replace = counted
sys.exit(main(sys.argv[1:]))
"""


def start(source, output, url, *words, name="build", dies_at=None, **limits):
    """`rationale build` (or judge) as a process of its own. `dies_at`: killed as it would move its n-th file."""
    program = ["-c", DIES, str(dies_at)] if dies_at else ["-m", "tatar_dist"]
    command = [sys.executable, *program, "rationale", name, str(source), "--output", str(output)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [*endpoint_words(url, **limits), *words]
    return subprocess.Popen([*command, *words], cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE)


def durable_seeds(journal):
    """Seeds of the answers that are whole on disk."""
    lines = [decode(raw) for raw in journal.read_bytes().splitlines(keepends=True)] if journal.exists() else []
    return {group_seed(0, e["attempt"], e["sample_id"]) for e in lines if e and "text" in e}


def results(directory, stem):
    return {end: (directory / f"{stem}.{end}").read_bytes() for end in ("parquet", "rejected.jsonl", "report.md")}


KILLED = [("build", None), ("judge", 0)]  # None: other points in every run
if "FUZZ_EXAMPLES" in os.environ:
    KILLED = [(name, seed) for name in ("build", "judge") for seed in (0, *[None] * 4)]


@pytest.mark.parametrize(("name", "seed"), KILLED)
def test_killed_twice_at_random_points_the_result_is_that_of_an_undisturbed_run_and_nothing_durable_is_asked_again(
    tmp_path, name, seed
):
    seed = random.randrange(1 << 32) if seed is None else seed
    print(f"seed {seed}")
    rng = random.Random(seed)
    source = manifest(tmp_path / "m.parquet", 50, 30, rationale=name == "judge")
    with OpenAIServer(moody) as undisturbed:
        config = build_config(*endpoint_words(undisturbed.url), output=tmp_path / "whole.parquet")
        running.run(name, source, config)
    journal = tmp_path / "killed.journal.jsonl"
    with OpenAIServer(moody, latency=0.1) as server:
        for _ in range(2):
            done, asked = durable_seeds(journal), len(server.log)
            process = start(source, tmp_path / "killed.parquet", server.url, name=name)
            goal = asked + rng.randint(1, 30)
            while len(server.log) < goal:
                assert process.poll() is None, process.stderr.read().decode()
                time.sleep(0.003)
            time.sleep(rng.random() * 0.2)  # anywhere between two answers
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert not done & {e["seed"] for e in server.log[asked:]}
        done, asked = durable_seeds(journal), len(server.log)
        process = start(source, tmp_path / "killed.parquet", server.url, name=name)
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said.decode()
        assert not done & {e["seed"] for e in server.log[asked:]}
    assert results(tmp_path, "killed") == results(tmp_path, "whole")
    assert (b'"number"' if name == "build" else b'"low-') in results(tmp_path, "whole")["rejected.jsonl"]


@pytest.mark.parametrize("name", ["build", "judge"])
@pytest.mark.parametrize("move", [1, 2, 3])
def test_killed_while_its_files_are_put_in_place_a_run_ends_the_same_and_leaves_nothing_behind(tmp_path, name, move):
    source = manifest(tmp_path / "m.parquet", 6, 3, rationale=name == "judge")
    with OpenAIServer(moody) as server:
        config = build_config(*endpoint_words(server.url), output=tmp_path / "whole.parquet")
        running.run(name, source, config)
        process = start(source, tmp_path / "killed.parquet", server.url, name=name, dies_at=move)
        _, said = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, said.decode()
        assert move != 1 or not (tmp_path / "killed.parquet").exists()
        asked = len(server.log)
        running.run(name, source, build_config(*endpoint_words(server.url), output=tmp_path / "killed.parquet"))
        assert len(server.log) == asked, "everything was durable"
    assert results(tmp_path, "killed") == results(tmp_path, "whole")
    assert not [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


@pytest.mark.parametrize(("signal_number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_stopping_keeps_what_is_in_flight_and_the_same_command_goes_on(tmp_path, signal_number, status):
    source = manifest(tmp_path / "m.parquet", 40)
    with OpenAIServer(latency=0.4) as server:
        process = start(source, tmp_path / "r.parquet", server.url)
        while len(server.log) < 10:
            time.sleep(0.01)
        process.send_signal(signal_number)
        _, said = process.communicate(timeout=300)
        asked = len(server.log)
        assert process.returncode == status
        assert len(durable_seeds(tmp_path / "r.journal.jsonl")) == asked, "answers in flight were waited for"
        assert f"{asked} accepted rows are in" in said.decode() and "the same command" in said.decode()
        config = build_config(*endpoint_words(server.url), output=tmp_path / "r.parquet")
        assert running.run("build", source, config)["accepted"] == 40
        assert len(server.log) == 40


def test_stopping_does_not_wait_out_a_long_retry_pause(tmp_path):
    source = manifest(tmp_path / "m.parquet", 10)
    with OpenAIServer(lambda call: Reply(429, b"", {"retry-after": "300"})) as server:
        process = start(source, tmp_path / "r.parquet", server.url, stop_wait_s=300)
        while len(server.log) < 4:
            time.sleep(0.01)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)  # far less than the pause, or than the wait for answers in flight
        assert process.returncode == 130
    ledger = Ledger(Build(config := build_config(*endpoint_words(server.url)), load_wording(config.rationale.prompts)))
    for raw in (tmp_path / "r.journal.jsonl").read_bytes().splitlines(keepends=True)[1:]:
        ledger.remember(decode(raw))
    assert ledger.unanswered() == [], "what waited for its turn was not spent"


@pytest.mark.parametrize("usage", [(300, 30), (900, 139)])
def test_a_token_budget_is_never_exceeded_and_a_larger_one_goes_on(tmp_path, usage):
    source = manifest(tmp_path / "m.parquet", 30)
    budget = 8_000
    with OpenAIServer(lambda call: Reply(200, completion(FAST, usage=usage)), latency=0.02) as server:
        config = build_config(*endpoint_words(server.url, budget_tokens=budget), output=tmp_path / "r.parquet")
        with pytest.raises(RunError, match=r"budget_tokens=8000.*rows were not asked.*larger budget"):
            running.run("build", source, config)
        spent = len(server.log) * sum(usage)
        assert budget - 2000 <= spent <= budget, "not exceeded, and nearly all of it used"
        config = build_config(*endpoint_words(server.url, budget_tokens=100_000), output=tmp_path / "r.parquet")
        assert running.run("build", source, config)["accepted"] == 30
        assert len(server.log) == 30


def test_the_budget_counts_lost_answers_and_those_a_killed_run_was_waiting_for(tmp_path):
    source = manifest(tmp_path / "m.parquet", 30)
    usage = (760, 139)  # nearly what the client reserves for such a request
    broken = Reply(200, json.dumps(completion(FAST, usage=usage)).encode()[:60])
    with OpenAIServer(lambda call: broken if call.number % 2 else good_answer(call), latency=0.1) as server:
        process = start(source, tmp_path / "r.parquet", server.url, budget_tokens=20_000)
        while len(server.log) < 6:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        config = build_config(*endpoint_words(server.url, budget_tokens=20_000), output=tmp_path / "r.parquet")
        for _ in range(3):  # again and again: what was lost once stays spent
            with pytest.raises(RunError, match="budget_tokens=20000"):
                running.run("build", source, config)
        good, lost = (len(server.log) + 1) // 2, len(server.log) // 2
        assert good * 200 + lost * sum(usage) <= 20_000


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("rationale.fast.temperature=0.5", "fast.temperature was 0.3, is 0.5"),
        ("rationale.teacher.model=other", "fast.model was 'teacher-model', is 'other'"),
        ("seed=1", "seed was 0, is 1"),
    ],
)
def test_a_resume_that_would_ask_otherwise_is_refused_and_names_the_difference(tmp_path, word, said):
    source = manifest(tmp_path / "m.parquet", 3)
    with OpenAIServer() as server:
        words = endpoint_words(server.url)
        running.run("build", source, build_config(*words, output=tmp_path / "r.parquet"))
        with pytest.raises(UserError, match="written under other settings") as e:
            running.run("build", source, build_config(*words, word, output=tmp_path / "r.parquet"))
        assert said in str(e.value) and len(server.log) == 3


def test_other_words_of_the_prompt_are_another_run(tmp_path):
    with OpenAIServer() as server:
        words = endpoint_words(server.url)
        running.run("build", manifest(tmp_path / "m.parquet", 3), build_config(*words, output=tmp_path / "r.parquet"))
        changed = tmp_path / "prompts.yaml"
        changed.write_text((ROOT / "configs/rationale_prompts.yaml").read_text().replace("expert", "master"))
        config = build_config(*words, f"rationale.prompts={changed}", output=tmp_path / "r.parquet")
        with pytest.raises(UserError, match="fast.system was"):
            running.run("build", tmp_path / "m.parquet", config)


@pytest.mark.parametrize("name", ["build", "judge"])
def test_a_manifest_may_grow_and_only_rows_that_are_new_or_changed_are_asked(tmp_path, name):
    source = manifest(tmp_path / "m.parquet", 4, rationale=True)
    with OpenAIServer() as server:
        config = build_config(*endpoint_words(server.url), output=tmp_path / "r.parquet")
        assert running.run(name, source, config)["accepted"] == 4
        grown = list(rows(6, rationale=True))
        grown[1]["score"] += 10.0
        grown[2]["rationale"] = FAST.replace("the eye", "the viewer")
        write_manifest(source, grown)
        assert running.run(name, source, config)["accepted"] == 6
        assert len(server.log) == 4 + (3 if name == "build" else 4), "a build does not look at the text that is there"
        assert running.run(name, source, config)["accepted"] == 6
        assert len(server.log) == 4 + (3 if name == "build" else 4)


def test_a_judge_follows_a_build_into_its_other_task(tmp_path):
    with OpenAIServer() as server:
        config = build_config(*endpoint_words(server.url), output=tmp_path / "r.parquet")
        running.run("judge", manifest(tmp_path / "m.parquet", 4, rationale=True), config)
        assert running.run("judge", manifest(tmp_path / "m.parquet", 4, 2, rationale=True), config)["accepted"] == 6
        assert len(server.log) == 6


def test_checks_may_be_changed_without_asking_again(tmp_path):
    source = manifest(tmp_path / "m.parquet", 3)
    with OpenAIServer() as server:
        words = endpoint_words(server.url)
        running.run("build", source, build_config(*words, output=tmp_path / "r.parquet"))
        strict = build_config(
            *words, "rationale.fast.max_words=31", "rationale.attempts=1", output=tmp_path / "r.parquet"
        )
        with pytest.raises(RunError, match=r"none of 3 rows was accepted \(iqa: too-long 3\)"):
            running.run("build", source, strict)
        assert len(server.log) == 3


@pytest.mark.parametrize("ending", ["parquet", "journal.jsonl", "rejected.jsonl", "report.md"])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_asked(tmp_path, ending):
    (tmp_path / f"r.{ending}").mkdir()
    with OpenAIServer() as server:
        config = build_config(*endpoint_words(server.url), output=tmp_path / "r.parquet")
        with pytest.raises(UserError, match=f"r.{ending}: is a directory"):
            running.run("build", manifest(tmp_path / "m.parquet", 3), config)
        assert not server.log


def test_two_runs_of_one_output_at_once_are_refused(tmp_path):
    source = manifest(tmp_path / "m.parquet", 20)
    refused = threading.Event()
    with OpenAIServer(lambda call: when(refused.is_set, good_answer(call))) as server:
        process = start(source, tmp_path / "r.parquet", server.url)
        while not server.log:
            time.sleep(0.01)
        config = build_config(*endpoint_words(server.url), output=tmp_path / "r.parquet")
        with pytest.raises(UserError, match="another process is writing this output"):
            running.run("build", source, config)
        refused.set()
        process.communicate(timeout=300)
        assert process.returncode == 0


def test_an_answer_is_on_disk_before_its_slot_asks_the_next(tmp_path):
    source = manifest(tmp_path / "m.parquet", 12)
    journal, seen = tmp_path / "r.journal.jsonl", []

    def answer(call):
        seen.append((len(durable_seeds(journal)), call.number))
        return good_answer(call)

    with OpenAIServer(answer) as server:
        config = build_config(*endpoint_words(server.url, concurrency=1), output=tmp_path / "r.parquet")
        running.run("build", source, config)
    assert seen == [(n, n) for n in range(12)]


def test_progress_begins_with_what_earlier_runs_settled(tmp_path, capsys):
    with OpenAIServer() as server:
        config = build_config(*endpoint_words(server.url), output=tmp_path / "r.parquet")
        running.run("build", manifest(tmp_path / "m.parquet", 3), config)
        assert "rationale build  3/3  3 accepted  0 rejected" in capsys.readouterr().err
        running.run("build", manifest(tmp_path / "m.parquet", 5), config)
        shown = capsys.readouterr().err
        assert "rationale build  5/5  5 accepted" in shown and "build  3/5" not in shown
        running.run("build", tmp_path / "m.parquet", config)
        assert "rationale build" not in capsys.readouterr().err, "nothing is asked"
