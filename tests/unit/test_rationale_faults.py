"""What must not spoil a run: one sample, an echoed key, an odd header or count; and what must not pass as success."""

import html
import json
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai_server import FAST, OpenAIServer, Reply, completion, good_answer
from rationale_cases import build, by_sample, first_then_good, manifest, rejected, rows, turns, when, written

from tatar_dist.data.writing import write_manifest
from tatar_dist.errors import RunError, UserError
from tatar_dist.rationale.endpoint import limiter
from tatar_dist.rationale.replies import SANE, excerpt, read_answer, redact, retry_after
from tatar_dist.run.journal import decode

KEY = "sk-very/secret+0123456789&"


def journal_lines(tmp_path):
    return [decode(raw) for raw in (tmp_path / "r.journal.jsonl").read_bytes().splitlines(keepends=True)][1:]


# ------------------------------------------------------------------ what each answer costs


def test_an_endpoint_that_counts_more_than_our_bound_uses_its_budget_up_before_the_run_ends(tmp_path):
    usage = (2600, 100)  # our bound is about 800
    source = manifest(tmp_path / "m.parquet", 48)
    with OpenAIServer(lambda call: Reply(200, completion(FAST, usage=usage)), latency=0.05) as server:
        with pytest.raises(RunError, match="budget_tokens"):
            build(tmp_path, server, source=source, concurrency=16, budget_tokens=40 * 2700)
    assert 36 <= len(server.log) <= 40


@pytest.mark.parametrize("tokens", [10**9, 2**70, -1, 1.5, True, "many", None])
def test_a_count_of_tokens_that_cannot_be_is_taken_as_missing(tmp_path, tokens):
    usage = {"prompt_tokens": tokens, "completion_tokens": tokens}
    with OpenAIServer(lambda call: Reply(200, {**completion(FAST), "usage": usage})) as server:
        summary = build(tmp_path, server, budget_tokens=50_000)
    assert summary["accepted"] == 6 and 500 < summary["prompt_tokens"] / 6 < 2000


@given(st.integers(0, 2000))
def test_counts_are_kept_up_to_a_sane_multiple_of_our_bound(tokens):
    answer = read_answer(json.dumps(completion("words", usage=(tokens, 1))).encode(), 100, 10, None)
    assert answer.prompt_tokens == (tokens if tokens <= SANE * 100 else 100)


# ------------------------------------------------------------------ the key


def test_a_text_is_never_altered_even_where_a_short_key_stands_in_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_TEACHER_KEY", "x")
    with OpenAIServer() as server:
        build(tmp_path, server, "rationale.teacher.api_key_env=TEST_TEACHER_KEY")
    assert all(r["rationale"] == FAST for r in written(tmp_path))


def test_a_text_that_holds_the_key_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_TEACHER_KEY", KEY)
    leak = Reply(200, completion(FAST.replace("slight", f"slight {KEY}")))
    with OpenAIServer(first_then_good(leak)) as server:
        build(tmp_path, server, "rationale.teacher.api_key_env=TEST_TEACHER_KEY")
        assert len(server.log) == 7
    assert rejected(tmp_path) == [] and KEY not in (tmp_path / "r.journal.jsonl").read_text()


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=4))
def test_no_form_of_the_key_is_left_in_an_error(key):
    forms = [key, html.escape(key), quote(key), quote(key, safe=""), json.dumps(key)[1:-1]]
    for form in forms:
        assert redact(f"<{form}>", key) == "<[key]>"
    assert "[key]" in excerpt(f"bad {quote(key, safe='')}".encode(), key)


def test_percent_signs_of_either_case_are_the_key_too():
    assert redact("a%2fb and a%2Fb", "a/b") == "[key] and [key]"


# ------------------------------------------------------------------ headers


@given(
    st.text(max_size=40)
    | st.from_regex(r"(Mon|Tue), \d{1,3} (Jan|Feb|Foo) \d{1,6} \d\d:\d\d:\d\d ?(GMT|[+-]\d{4,6})?", fullmatch=True)
    | st.from_regex(r"-?\d{1,400}(\.\d+)?(e\d+)?", fullmatch=True)
)
def test_any_retry_after_is_seconds_or_none(value):
    seconds = retry_after({"retry-after": value})
    assert seconds is None or 0 <= seconds < float("inf")


@pytest.mark.parametrize(
    "value", ["Mon, 1 Jan 99999999999999999999 00:00:00 GMT", "Mon, 1 Jan 0001 00:00:00 -0000", "9" * 400]
)
def test_a_bad_retry_after_is_waited_out_as_if_there_were_none(tmp_path, value):
    with OpenAIServer(first_then_good(Reply(503, b"", {"retry-after": value}))) as server:
        assert build(tmp_path, server)["accepted"] == 6


def test_a_429_without_end_is_said_in_the_endpoints_words(tmp_path, capsys):
    slow = Reply(429, {"error": {"message": "tokens per day are used up"}})
    with OpenAIServer(first_then_good(*[slow] * 5)) as server:
        build(tmp_path, server)
    said = capsys.readouterr().err
    assert said.count("asks us to slow down") == 1 and "tokens per day are used up" in said


def test_a_quota_that_is_used_up_ends_the_run(tmp_path):
    reply = Reply(429, {"error": {"message": "you exceeded your quota", "code": "insufficient_quota"}})
    with OpenAIServer(lambda call: reply) as server:
        with pytest.raises(UserError, match="the quota is used up"):
            build(tmp_path, server)
        assert len(server.log) <= 4


# ------------------------------------------------------------------ rate limits


@given(st.floats(0.5, 1e6))
def test_no_minute_sees_more_than_the_limit(per_minute):
    limit = limiter(per_minute)
    most = limit.max_rate + limit.max_rate / limit.time_period * 60
    assert most <= per_minute * (1 + 1e-9) or limit.max_rate == 1 and limit.time_period >= 60 / per_minute


def test_a_pause_is_followed_by_no_burst(tmp_path, monkeypatch):
    source = manifest(tmp_path / "m.parquet", 24)
    refuse = Reply(429, b"", {"retry-after": "1"})
    _, gets = turns(monkeypatch)
    with OpenAIServer(first_then_good(*[refuse] * 9)) as server:  # the burst that comes first
        build(tmp_path, server, source=source, concurrency=24, requests_per_minute=300)
    paused = max(e["sent"] for e in server.log if e["status"] == 429)
    after = [t for t in gets if t > paused + 0.95]
    assert len(after) > 16
    assert sum(t < min(after) + 1.0 for t in after) <= 16, "a burst of ten, then five a second"


# ------------------------------------------------------------------ one sample


@pytest.mark.parametrize("status", [400, 403, 404, 413, 422])
@pytest.mark.parametrize("which", ["iqa-000", "iqa-004"])
def test_one_refused_sample_costs_only_itself_and_fails_the_run(tmp_path, status, which):
    bad = Reply(status, {"error": {"message": "not welcome"}})
    with OpenAIServer(by_sample(lambda call: bad, which)) as server:
        with pytest.raises(RunError, match="1 rows were refused by the endpoint; 5 accepted rows"):
            build(tmp_path, server)
        assert len(server.log) == 6
    assert [(r["sample_id"], r["reasons"][0]["code"]) for r in rejected(tmp_path)] == [(which, "endpoint-refused")]


@pytest.mark.parametrize(("status", "concurrency"), [(400, 1), (400, 4), (403, 4)])
def test_many_refused_samples_do_not_keep_the_others_from_being_asked(tmp_path, status, concurrency):
    source = manifest(tmp_path / "m.parquet", 12)
    poisoned = [f"{20 + i * 37 % 60 + 0.25:.1f} on a scale" for i in range(6)]

    def answer(call):
        text = json.dumps(call.body["messages"])
        return Reply(status) if any(p in text for p in poisoned) else good_answer(call)

    with OpenAIServer(answer) as server:
        for _ in range(4):
            with pytest.raises((RunError, UserError)):
                build(tmp_path, server, source=source, failures_in_a_row=3, concurrency=concurrency)
        assert [r["sample_id"] for r in written(tmp_path)] == [f"iqa-{i:03d}" for i in range(6, 12)]
        server.answer = good_answer
        assert build(tmp_path, server, source=source, concurrency=1)["accepted"] == 12


def test_refusals_after_an_answer_are_no_outage(tmp_path):
    source = manifest(tmp_path / "m.parquet", 12)
    with OpenAIServer(lambda call: good_answer(call) if call.number == 0 else Reply(400)) as server:
        with pytest.raises(RunError, match="11 rows were refused"):
            build(tmp_path, server, source=source, failures_in_a_row=3, concurrency=1)


def test_an_error_that_ends_the_run_waits_for_the_answers_in_flight(tmp_path):
    source = manifest(tmp_path / "m.parquet", 40)
    late = Reply(402, {"error": {"message": "pay"}})  # once all have asked
    slow = Reply(200, completion(FAST), delay=0.5)  # half a second after that

    def answer(call):
        if call.number == 3:
            return when(lambda: len(server.log) == 8, late)
        return when(lambda: server.log[3:] and server.log[3]["status"] == 402, slow)

    with OpenAIServer(answer) as server:
        with pytest.raises(UserError, match="wants payment"):
            build(tmp_path, server, source=source, concurrency=8)
        assert len(server.log) == 8, "nothing more is asked"
    assert sum("text" in line for line in journal_lines(tmp_path)) == 7, "what was paid is kept"


def test_what_a_killed_run_was_asking_is_counted_without_a_budget_too(tmp_path):
    with OpenAIServer() as server:
        build(tmp_path, server)
    asked = [line for line in journal_lines(tmp_path) if "asking" in line]
    assert len(asked) == 6 and all(line["asking"] > 500 for line in asked)


# ------------------------------------------------------------------ what is no success


@pytest.mark.parametrize("status", [400, 413])
def test_a_run_of_which_every_row_is_refused_fails(tmp_path, status):
    with OpenAIServer(lambda call: Reply(status, {"error": {"message": "no"}})) as server:
        with pytest.raises(RunError, match="6 rows were refused by the endpoint; 0 accepted"):
            build(tmp_path, server)


def test_a_run_that_accepts_no_row_fails_with_the_reasons(tmp_path):
    with OpenAIServer(lambda call: Reply(200, completion("Nice."))) as server:
        with pytest.raises(RunError, match=r"none of 6 rows was accepted \(iqa: .*too-short"):
            build(tmp_path, server)
    assert written(tmp_path) == []


def test_a_wrong_image_root_is_noticed_after_a_few_images(tmp_path):
    listed = [{**r, "image_bytes": None, "image": f"{r['sample_id']}.png"} for r in rows(200)]
    write_manifest(tmp_path / "m.parquet", listed)
    with OpenAIServer() as server:
        with pytest.raises(UserError, match=r"none of the first 16 images.*data\.image_root") as e:
            build(tmp_path, server, source=tmp_path / "m.parquet")
        assert str(tmp_path) in str(e.value) and not server.log


def test_a_wrong_image_root_is_noticed_behind_rows_that_are_not_asked_about(tmp_path):
    bare = [{**r, "attributes": None} for r in rows(5, "iaa")]
    listed = [{**r, "image_bytes": None, "image": f"{r['sample_id']}.png"} for r in [*bare, *rows(200)]]
    write_manifest(tmp_path / "m.parquet", listed)
    with OpenAIServer() as server, pytest.raises(UserError, match=r"none of the first 16 images"):
        build(tmp_path, server, source=tmp_path / "m.parquet")


def test_broken_images_among_good_ones_are_rejected_again_by_the_next_run_without_an_error(tmp_path):
    listed = [{**r, "image_bytes": b"broken" if i else r["image_bytes"]} for i, r in enumerate(rows(40))]
    write_manifest(tmp_path / "m.parquet", listed)
    with OpenAIServer(latency=0.3) as server:
        for _ in range(2):
            summary = build(tmp_path, server, source=tmp_path / "m.parquet")
            assert (summary["accepted"], summary["rejected"]) == (1, 39)
        assert len(server.log) == 1


def test_the_first_error_is_told_whatever_the_other_slots_meet(tmp_path):
    with OpenAIServer() as server:
        url = server.url
    source = manifest(tmp_path / "m.parquet", 30)
    for _ in range(5):
        with pytest.raises(RunError, match="3 requests in a row got no answer"):
            build(tmp_path, url, retries=0, failures_in_a_row=3, concurrency=16, source=source)


def test_a_reply_of_megabytes_is_garbage_and_asked_again(tmp_path):
    with OpenAIServer(first_then_good(Reply(200, completion("x" * (5 << 20))))) as server:
        assert build(tmp_path, server)["accepted"] == 6
        assert len(server.log) == 7
    assert rejected(tmp_path) == []
