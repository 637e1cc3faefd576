"""What is asked before anything is sent, and what a judge's answers come to, over real HTTP."""

import json
import re

import pytest
from rationale_cases import build, build_config, by_sample, endpoint_words, manifest, rejected, written

from tatar_dist.bench.openai_server import OpenAIServer, Reply, completion, good_answer
from tatar_dist.cli import main
from tatar_dist.config import load_config
from tatar_dist.data.manifest import read_manifest
from tatar_dist.data.writing import write_manifest
from tatar_dist.errors import UserError

JUDGED = {"visual_fidelity": 4, "score_consistency": 4}


@pytest.mark.parametrize(
    "text",
    [
        f"Here are the marks: {json.dumps(JUDGED)}",
        f"```json\n{json.dumps(JUDGED)}\n```",
        '{"visual_fidelity": NaN, "score_consistency": 4}',
        '{"visual_fidelity": 4.0, "score_consistency": 4}',
        '{"visual_fidelity": true, "score_consistency": 4}',
        '{"visual_fidelity": "4", "score_consistency": 4}',
        '{"visual_fidelity": 6, "score_consistency": 4}',
        '{"visual_fidelity": 4, "visual_fidelity": 4, "score_consistency": 4}',
        '{"visual_fidelity": 4, "score_consistency": 4, "why": 1}',
        '{"visual_fidelity": 4, "score_con',
    ],
)
def test_marks_that_are_not_the_schema_reject_the_sample_as_unjudged(tmp_path, text):
    source = manifest(tmp_path / "m.parquet", rationale=True)
    with OpenAIServer(by_sample(lambda call: Reply(200, completion(text)))) as server:
        found = build(tmp_path, server, name="judge", source=source)
    assert (found["accepted"], found["rejected"]) == (5, 1)
    lines = rejected(tmp_path)
    assert [line["attempt"] for line in lines] == [0, 1, 2], "asked again before it is given up"
    assert {line["reasons"][0]["code"] for line in lines} == {"judge-json"}


def test_the_judge_is_held_to_a_schema_and_low_marks_reject(tmp_path):
    low = Reply(200, completion(json.dumps({**JUDGED, "score_consistency": 2})))
    source = manifest(tmp_path / "m.parquet", 6, 2, rationale=True)
    with OpenAIServer(by_sample(lambda call: low)) as server:
        found = build(tmp_path, server, name="judge", source=source)
        formats = [c.body["response_format"] for c in server.calls]
        assert len(server.log) == 8, "a low mark is no reason to ask again"
        assert all(c.body["temperature"] == 0.0 for c in server.calls)
    assert {f["type"] for f in formats} == {"json_schema"} and all(f["json_schema"]["strict"] for f in formats)
    assert (found["accepted"], found["rejected"]) == (7, 1)
    assert [r["reasons"][0]["code"] for r in rejected(tmp_path)] == ["low-score_consistency"]
    assert written(tmp_path)[0]["meta"]["judge"]["marks"] == {"visual_fidelity": 4, "score_consistency": 5}


def test_an_endpoint_without_json_schema_is_asked_in_words_and_that_is_said_once(tmp_path, capsys):
    def old(call):
        if "response_format" in call.body:
            return Reply(400, {"error": {"message": "unknown parameter: response_format"}})
        return good_answer(call)

    source = manifest(tmp_path / "m.parquet", rationale=True)
    with OpenAIServer(old) as server:
        assert build(tmp_path, server, name="judge", source=source, concurrency=1)["accepted"] == 6
        assert len(server.log) == 7
    assert capsys.readouterr().err.count("takes no JSON schema") == 1


def test_the_judge_is_not_asked_about_texts_that_fail_the_hard_checks(tmp_path):
    source = manifest(tmp_path / "m.parquet", 3, rationale=True)
    found = read_manifest(source)
    rows = [found.row(i) for i in range(3)]
    rows[1]["rationale"] = "It is bad."
    write_manifest(source, rows)
    with OpenAIServer() as server:
        assert build(tmp_path, server, name="judge", source=source)["accepted"] == 2
        assert len(server.log) == 2
    assert "too-short" in {r["code"] for r in rejected(tmp_path)[0]["reasons"]}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("rationale.teacher.url=http://me:pass@127.0.0.1:1/v1", "user name or password"),
        ("rationale.teacher.url=http://127.0.0.1:1/v1?api_key=abcdef", "holds a query"),
        ("rationale.teacher.url=ftp://127.0.0.1/v1", "http:// or https://"),
        ("rationale.teacher.api_key_env=sk-abc/def", "never the key itself"),
        ("rationale.techer.url=x", "did you mean 'rationale.teacher'"),
        ("rationale.fast.top_p=0", "top_p"),
        ("rationale.limits.concurrency=0", "at least 1"),
        ("rationale.limits.budget_tokens=0", "at least 1"),
        ("rationale.verdict.reject_at=5", "0 to 4"),
        ("rationale.fast.max_tokens=20", "cannot hold min_words"),
        ("rationale.judge.timeout_s=nan", "above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name_and_secrets_in_them_are_not_repeated(word, said):
    with pytest.raises(UserError, match=re.escape(said)) as e:
        build_config(word)
    assert not any(secret in str(e.value) for secret in ("pass@", "abcdef", "sk-abc"))


def test_a_dry_run_shows_a_prompt_of_each_task_and_sends_and_writes_nothing(tmp_path, capsys):
    source = manifest(tmp_path / "m.parquet", 2, 2)
    with OpenAIServer() as server:
        words = ["rationale", "build", str(source), "--output", f"{tmp_path}/r.parquet", *endpoint_words(server.url)]
        assert main([*words, "--dry-run", "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert main([*words, "--dry-run"]) == 0
        assert not server.log
    assert {t: p["asked"] for t, p in plan["tasks"].items()} == {"iqa": 2, "iaa": 2}
    assert "0 is ugly" in plan["tasks"]["iaa"]["prompt"]["user"] and plan["tasks"]["iqa"]["endpoint"] == server.url
    assert "nothing is sent" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["m.parquet"]


def test_json_output_is_the_summary(tmp_path, capsys):
    source = manifest(tmp_path / "m.parquet", 2)
    with OpenAIServer() as server:
        words = ["rationale", "build", str(source), "--output", f"{tmp_path}/r.parquet", *endpoint_words(server.url)]
        prices = ["rationale.teacher.prompt_price=2", "rationale.teacher.completion_price=10"]
        assert main([*words, *prices, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accepted"] == 2 and found["tasks"]["iqa"]["rejection_rate"] == 0
    assert found["cost"] == pytest.approx((found["prompt_tokens"] * 2 + found["completion_tokens"] * 10) / 1e6)


def test_the_shipped_config_holds_the_methods_figures():
    c = load_config(["configs/rationale.yaml"], ["output=unused"], unused=("model.path",)).rationale
    assert (c.fast.temperature, c.fast.top_p, c.fast.max_tokens) == (0.3, 0.8, 140)
    assert (c.slow.temperature, c.slow.top_p, c.slow.max_tokens, c.slow.min_words) == (0.2, 0.9, 500, 125)
    assert (c.verdict.temperature, c.verdict.reject_at, c.min_attributes) == (0.0, 2, 5)


def test_a_limit_looks_at_the_first_rows_and_a_larger_one_goes_on(tmp_path):
    source = manifest(tmp_path / "m.parquet", 4, 3)
    with OpenAIServer() as server:
        assert build(tmp_path, server, "rationale.limit=2", source=source)["accepted"] == 2
        assert build(tmp_path, server, source=source)["accepted"] == 7
        assert len(server.log) == 7
