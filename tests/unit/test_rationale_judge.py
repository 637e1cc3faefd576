"""What is asked before anything is sent, and what a judge's answers come to, over real HTTP."""

import json
import re

import pytest
from openai_server import FAST, OpenAIServer, Reply, completion, good_answer
from rationale_cases import ROOT, build, build_config, by_sample, endpoint_words, manifest, png, rejected, rows, written

from tatar_dist.cli import main
from tatar_dist.config.load import load_config
from tatar_dist.data.manifest import read_manifest
from tatar_dist.data.writing import write_manifest
from tatar_dist.errors import RunError, UserError

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
        summary = build(tmp_path, server, name="judge", source=source)
    assert (summary["accepted"], summary["rejected"]) == (5, 1)
    (line,) = rejected(tmp_path)
    assert line["reasons"][0]["code"] == "judge-json", "asked once: at temperature 0 it would say the same again"


def test_a_judge_with_a_temperature_is_asked_again_before_a_sample_is_given_up(tmp_path):
    source = manifest(tmp_path / "m.parquet", rationale=True)
    with OpenAIServer(by_sample(lambda call: Reply(200, completion("It is fine.")))) as server:
        build(tmp_path, server, "rationale.verdict.temperature=0.5", name="judge", source=source)
    assert [line["attempt"] for line in rejected(tmp_path)] == [0, 1, 2]


def test_the_judge_is_held_to_a_schema_and_low_marks_reject(tmp_path):
    low = Reply(200, completion(json.dumps({**JUDGED, "score_consistency": 2})))
    source = manifest(tmp_path / "m.parquet", 6, 2, rationale=True)
    with OpenAIServer(by_sample(lambda call: low)) as server:
        summary = build(tmp_path, server, name="judge", source=source)
        formats = [c.body["response_format"] for c in server.calls]
        assert len(server.log) == 8, "a low mark is no reason to ask again"
        assert all(c.body["temperature"] == 0.0 for c in server.calls)
    assert {f["type"] for f in formats} == {"json_schema"} and all(f["json_schema"]["strict"] for f in formats)
    assert (summary["accepted"], summary["rejected"]) == (7, 1)
    assert [r["reasons"][0]["code"] for r in rejected(tmp_path)] == ["low-score_consistency"]
    assert written(tmp_path)[0]["meta"]["judge"]["marks"] == {"visual_fidelity": 4, "score_consistency": 5}


@pytest.mark.parametrize(("n", "status"), [(2, 400), (40, 422), (2, 501)])
def test_an_endpoint_without_json_schema_is_asked_in_words_where_the_config_says_so(tmp_path, n, status):
    source = manifest(tmp_path / "m.parquet", n, rationale=True)
    with OpenAIServer(lambda call: Reply(status) if "response_format" in call.body else good_answer(call)) as server:
        words = "rationale.judge.structured=false"
        with pytest.raises(RunError, match=words):  # says what to do, also where too few rows end the run early
            build(tmp_path, server, name="judge", source=source)
        assert build(tmp_path, server, words, name="judge", source=source)["accepted"] == n


def test_a_judge_looks_at_the_rows_that_have_a_rationale(tmp_path):
    source = manifest(tmp_path / "m.parquet", 4, rationale=True)
    before = read_manifest(source)
    write_manifest(source, [{**before.row(i), "rationale": None if i % 2 else FAST} for i in range(4)])
    with OpenAIServer() as server:
        assert build(tmp_path, server, name="judge", source=source)["rows"] == 2
    assert [r["sample_id"] for r in written(tmp_path)] == ["iqa-000", "iqa-002"]
    write_manifest(source, [{**before.row(0), "rationale": None}])
    with pytest.raises(UserError, match="no row has a rationale to judge"):
        build(tmp_path, "http://127.0.0.1:9/v1", name="judge", source=source)


def test_the_judge_is_not_asked_about_texts_that_fail_the_hard_checks(tmp_path):
    source = manifest(tmp_path / "m.parquet", 3, rationale=True)
    before = read_manifest(source)
    rows = [before.row(i) for i in range(3)]
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
        ("rationale.verdict.reject_at=5", "must be at most 4"),
        ("rationale.fast.max_tokens=20", "cannot hold min_words"),
        ("rationale.judge.timeout_s=nan", "above 0"),
        ("rationale.splits=[trian]", "'trian': must be one of train, validation, test"),
        ("rationale.slow.api_key_env=OTHER", "belongs to rationale.slow.url"),
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


def test_other_engines_than_our_own_are_refused_where_our_own_are_asked_for():
    with pytest.raises(UserError, match=r"rationale\.slow\.url.*local=true"):
        build_config("rationale.teacher.local=true", "rationale.slow.url=http://127.0.0.1:1/v1")


def test_a_dry_run_wants_no_address_and_runs_in_any_directory(tmp_path, monkeypatch, capsys):
    source = manifest(tmp_path / "m.parquet", 2, 2)
    monkeypatch.chdir(tmp_path)
    assert main(["rationale", "build", str(source), "--output", "r.parquet", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "no model yet at no address yet" in said and "4 rows of train" in said


def test_the_examples_in_the_shipped_config_run_as_they_stand(tmp_path, monkeypatch):
    text = (ROOT / "configs/rationale.yaml").read_text().replace(" \\\n#    ", "")
    examples = [line.removeprefix("#   tatar-dist ").split() for line in text.splitlines() if "#   tatar-dist" in line]
    assert len(examples) == 3
    (tmp_path / "data").mkdir()
    manifest(tmp_path / "data" / "koniq_train.parquet", 3)
    monkeypatch.chdir(tmp_path)
    with OpenAIServer() as server:
        for words in examples:
            assert main([re.sub(r"http://[\d.:]+/v1", server.url, word) for word in words]) == 0
    assert len(read_manifest(tmp_path / "data" / "koniq_kept.parquet")) == 3


def test_json_output_is_the_summary(tmp_path, capsys):
    source = manifest(tmp_path / "m.parquet", 2)
    with OpenAIServer() as server:
        words = ["rationale", "build", str(source), "--output", f"{tmp_path}/r.parquet", *endpoint_words(server.url)]
        prices = ["rationale.teacher.prompt_price=2", "rationale.teacher.completion_price=10"]
        assert main([*words, *prices, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["accepted"] == 2 and summary["tasks"]["iqa"]["rejection_rate"] == 0
    assert summary["cost"] == pytest.approx((summary["prompt_tokens"] * 2 + summary["completion_tokens"] * 10) / 1e6)


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


def with_splits(path):
    splits = ("train", "test", "validation", "train", "test", "train")
    write_manifest(path, [{**r, "split": split} for r, split in zip(rows(6), splits, strict=True)])
    return path


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        ([], [0, 3, 5]),
        (["rationale.splits=[test]"], [1, 4]),
        (["rationale.splits=[]"], [0, 1, 2, 3, 4, 5]),
        (["rationale.splits=null"], [0, 1, 2, 3, 4, 5]),
        (["rationale.limit=2"], [0, 3]),
    ],
)
def test_rows_of_the_train_split_are_asked_about_unless_others_are_named(tmp_path, words, numbers):
    source = with_splits(tmp_path / "m.parquet")
    with OpenAIServer() as server:
        summary = build(tmp_path, server, *words, source=source)
        assert len(server.log) == len(numbers) == summary["rows"]
    assert sorted(r["sample_id"] for r in written(tmp_path)) == [f"iqa-{n:03d}" for n in numbers]


def test_a_split_without_rows_is_named_with_those_that_have_some(tmp_path):
    source = manifest(tmp_path / "m.parquet", 2)
    with pytest.raises(UserError, match=r"no rows of split test, only of train: see rationale\.splits"):
        build(tmp_path, "http://127.0.0.1:9/v1", "rationale.splits=[test]", source=source)


def test_image_paths_start_where_the_config_says_and_the_output_says_so_too(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(png(i))
    listed = [{**r, "image_bytes": None, "image": f"{i}.png"} for i, r in enumerate(rows(3))]
    write_manifest(tmp_path / "m.parquet", listed)
    with OpenAIServer() as server:
        build(tmp_path, server, f"data.image_root={tmp_path}/pictures", source=tmp_path / "m.parquet")
    assert read_manifest(tmp_path / "r.parquet").get(2).image == png(2)
