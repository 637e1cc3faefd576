"""An endpoint that misbehaves, over real HTTP: what is tried again, what ends the run, what is kept and said."""

import base64
import io
import json
import threading
from urllib.parse import quote

import pytest
from openai_server import FAST, SLOW, OpenAIServer, Reply, completion, good_answer
from PIL import Image
from rationale_cases import (
    build,
    by_sample,
    endpoint_words,
    first_then_good,
    manifest,
    png,
    rejected,
    rows,
    turns,
    when,
    written,
)

from tatar_dist.cli import main
from tatar_dist.data.writing import write_manifest
from tatar_dist.errors import RunError, UserError
from tatar_dist.rationale.endpoint import Endpoint

KEY = "sk-very/secret+0123456789"


def test_what_a_teacher_is_sent(tmp_path):
    with OpenAIServer() as server:
        build(tmp_path, server, source=manifest(tmp_path / "m.parquet", 1, 1))
        fast, slow = sorted((c.body for c in server.calls), key=lambda b: b["max_tokens"])
    assert (fast["temperature"], fast["top_p"], fast["max_tokens"]) == (0.3, 0.8, 140)
    assert (slow["temperature"], slow["top_p"], slow["max_tokens"]) == (0.2, 0.9, 500)
    assert fast["model"] == "teacher-model" and isinstance(fast["seed"], int) and "response_format" not in fast
    image, text = fast["messages"][1]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert "20.2 on a scale on which 0 is" in text["text"]
    notes = slow["messages"][1]["content"][1]["text"]
    positions = [notes.index(name) for name in ("visual elements", "composition", "overall gestalt", "evaluation")]
    assert positions == sorted(positions)


def test_accepted_rows_hold_the_text_and_where_it_came_from_and_no_time(tmp_path):
    with OpenAIServer() as server:
        summary = build(tmp_path, server)
    assert (summary["accepted"], summary["rejected"], summary["failed"]) == (6, 0, 0)
    rows = written(tmp_path)
    assert [r["sample_id"] for r in rows] == [f"iqa-{i:03d}" for i in range(6)]
    assert all(r["rationale"] == FAST for r in rows)
    note = rows[0]["meta"]["rationale"]
    assert set(note) == {"teacher", "attempt", "prompt", "tokens"} and note["teacher"] == "teacher-model"


def test_a_text_only_teacher_is_sent_no_image(tmp_path):
    with OpenAIServer() as server:
        build(tmp_path, server, "rationale.slow.image=false", source=manifest(tmp_path / "m.parquet", 0, 1))
    assert isinstance(server.calls[0].body["messages"][1]["content"], str)


@pytest.mark.parametrize(
    "bad",
    [
        Reply(500, {"error": {"message": "boom"}}),
        Reply(503, b"<html>busy</html>", {"retry-after": "0"}),
        Reply(429, {"error": {"message": "slow down"}}),
        Reply(429, b"", {"retry-after": "0"}),
        Reply(429, b"", {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        Reply(200, b"\x00\xff garbage"),
        Reply(200, json.dumps(completion(FAST)).encode()[:80]),
        Reply(200, json.dumps(completion(FAST)).encode(), cut=50),
        Reply(200, {"choices": []}),
        Reply(200, {"choices": [{"message": {"content": [1]}, "finish_reason": "stop"}]}),
        Reply(200, {"choices": [{"message": {"content": FAST}}]}),
        Reply(200, b"[" * 100_000),
    ],
    ids=lambda r: f"{r.status}-{r.body!r:.24}",
)
def test_a_bad_reply_is_tried_again_and_costs_no_row(tmp_path, bad):
    with OpenAIServer(first_then_good(bad, bad)) as server:
        summary = build(tmp_path, server)
    assert summary["accepted"] == 6 and len(server.log) == 8


def test_retry_after_makes_every_slot_wait(tmp_path, monkeypatch):
    pausing, pause = threading.Event(), Endpoint._pause

    def noticed(*args):
        pause(*args)
        pausing.set()

    def answer(call):
        if call.number == 0:  # refused once both slots have asked; the other one is answered in the pause
            return when(lambda: len(server.log) == 2, Reply(429, b"", {"retry-after": "1"}))
        return when(pausing.is_set, good_answer(call))

    monkeypatch.setattr(Endpoint, "_pause", noticed)
    with OpenAIServer(answer) as server:
        build(tmp_path, server, concurrency=2)
    refused, _, *later = server.log
    assert refused["status"] == 429 and len(later) == 5
    assert min(e["arrived"] for e in later) - refused["sent"] >= 0.95


def test_429_alone_never_uses_up_a_rows_retries(tmp_path):
    with OpenAIServer(first_then_good(*[Reply(429)] * 12)) as server:
        summary = build(tmp_path, server, retries=1, concurrency=1)
    assert summary["accepted"] == 6


def test_a_late_answer_is_given_up_and_asked_again(tmp_path):
    asked_again = threading.Event()

    def answer(call):
        if call.number == 0:
            return when(asked_again.is_set, good_answer(call))
        if call.body["seed"] == server.log[0]["seed"]:
            assert server.log[0]["sent"] is None, "while its answer is still to come"
            asked_again.set()
        return good_answer(call)

    with OpenAIServer(answer) as server:
        summary = build(tmp_path, server, "rationale.teacher.timeout_s=1", retries=100)
    assert summary["accepted"] == 6 and asked_again.is_set()
    assert summary["lost_tokens"] > 0, "what the endpoint may have written in vain is counted"


def test_a_row_that_never_gets_an_answer_fails_alone_and_is_asked_again_by_the_next_run(tmp_path):
    with OpenAIServer(by_sample(lambda call: Reply(500))) as server:
        with pytest.raises(RunError, match="1 rows got no answer after all retries; 5 accepted rows"):
            build(tmp_path, server)
        assert len(written(tmp_path)) == 5
        assert [r["reasons"][0]["code"] for r in rejected(tmp_path)] == ["no-answer"]
        server.answer = good_answer
        asked = len(server.log)
        assert build(tmp_path, server)["accepted"] == 6
        assert len(server.log) == asked + 1


def test_a_400_for_one_sample_is_kept_with_its_reason(tmp_path):
    bad = Reply(400, {"error": {"message": "this image is not welcome"}})
    with OpenAIServer(by_sample(lambda call: bad)) as server:
        with pytest.raises(RunError, match="1 rows were refused by the endpoint; 5 accepted"):
            build(tmp_path, server)
    (line,) = rejected(tmp_path)
    assert line["sample_id"] == "iqa-002" and line["reasons"][0]["code"] == "endpoint-refused"
    assert "this image is not welcome" in line["reasons"][0]["says"]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "TEST_TEACHER_KEY"),
        (403, "TEST_TEACHER_KEY"),
        (404, "no model 'teacher-model'"),
        (307, "redirects elsewhere"),
        (402, "wants payment"),
    ],
)
def test_what_no_retry_can_cure_ends_the_run_at_once_with_one_line(tmp_path, monkeypatch, capsys, status, said):
    monkeypatch.setenv("TEST_TEACHER_KEY", KEY)
    reply = Reply(status, {"error": {"message": f"your key {KEY} is bad"}}, {"location": "http://127.0.0.1:9/"})
    source = manifest(tmp_path / "m.parquet", 40)
    with OpenAIServer(lambda call: reply) as server:
        words = [*endpoint_words(server.url), "rationale.teacher.api_key_env=TEST_TEACHER_KEY"]
        output = str(tmp_path / "r.parquet")
        assert main(["rationale", "build", str(source), "--output", output, *words]) == 2
        assert len(server.log) <= 4, "one try a slot at most"
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1] and lines[-1].startswith("tatar-dist: ") and KEY not in "\n".join(lines)


def test_without_a_key_a_401_says_which_setting_names_one(tmp_path):
    with OpenAIServer(lambda call: Reply(401)) as server:
        with pytest.raises(UserError, match=r"no key was sent.*rationale\.teacher\.api_key_env"):
            build(tmp_path, server)


def test_nobody_listening_ends_the_run_after_a_few_failures_in_a_row(tmp_path):
    with OpenAIServer() as server:
        url = server.url
    with pytest.raises(RunError, match=r"3 requests in a row got no answer, the last: cannot connect"):
        build(tmp_path, url, retries=1, failures_in_a_row=3, source=manifest(tmp_path / "m.parquet", 30))


def test_an_endpoint_that_only_fails_is_not_asked_about_every_row(tmp_path):
    with OpenAIServer(lambda call: Reply(500)) as server:
        with pytest.raises(RunError, match="4 requests in a row got no answer"):
            limits = {"retries": 1, "failures_in_a_row": 4, "concurrency": 2}
            build(tmp_path, server, source=manifest(tmp_path / "m.parquet", 60), **limits)
    assert len(server.log) <= 12


def test_a_text_cut_by_max_tokens_is_rejected_and_never_completed(tmp_path):
    cut = Reply(200, completion(FAST, "length"))
    with OpenAIServer(by_sample(lambda call: cut)) as server:
        summary = build(tmp_path, server, "rationale.attempts=2")
    assert summary["accepted"] == 5
    lines = rejected(tmp_path)
    assert [line["attempt"] for line in lines] == [0, 1]
    assert all(line["reasons"][0]["code"] == "cut-off" and line["text"] == FAST for line in lines)


def test_a_leaked_number_is_rejected_and_the_next_attempt_has_another_seed(tmp_path):
    seeds = []

    def leak(call):
        seeds.append(call.body["seed"])
        return Reply(200, completion(FAST.replace("slight noise", "slight 34 noise"))) if len(seeds) == 1 else None

    with OpenAIServer(by_sample(lambda call: leak(call) or good_answer(call))) as server:
        summary = build(tmp_path, server)
    assert summary["accepted"] == 6 and len(set(seeds)) == 2
    (line,) = rejected(tmp_path)
    assert line["accepted_later"] and line["reasons"][0]["code"] == "number"
    assert written(tmp_path)[2]["meta"]["rationale"]["attempt"] == 1
    assert "| number | 1 |" in (tmp_path / "r.report.md").read_text()


def test_a_teachers_own_reasoning_is_dropped(tmp_path):
    def thinking(call):
        reply = completion(f"<think>The score is 34, so I say good things.</think>\n\n{FAST}")
        reply["choices"][0]["message"]["reasoning_content"] = "34 again"
        return Reply(200, reply)

    with OpenAIServer(thinking) as server:
        assert build(tmp_path, server)["accepted"] == 6
    assert all(r["rationale"] == FAST for r in written(tmp_path))


def test_an_image_that_does_not_decode_is_rejected_without_asking(tmp_path):
    listed = list(rows(3))
    listed[1]["image_bytes"] = b"no image"
    write_manifest(tmp_path / "m.parquet", listed)
    with OpenAIServer() as server:
        assert build(tmp_path, server, source=tmp_path / "m.parquet")["accepted"] == 2
        assert len(server.log) == 2
    assert rejected(tmp_path)[0]["reasons"][0]["code"] == "image-unreadable"


def test_large_images_are_made_smaller_before_they_are_sent(tmp_path):
    write_manifest(tmp_path / "m.parquet", [{**next(rows(1)), "image_bytes": png(0, (300, 200))}])
    with OpenAIServer() as server:
        build(tmp_path, server, "rationale.teacher.max_pixels=10000", source=tmp_path / "m.parquet")
        url = server.calls[0].body["messages"][1]["content"][0]["image_url"]["url"]
    size = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size
    assert 9000 < size[0] * size[1] <= 10000 and abs(size[0] / size[1] - 1.5) < 0.02


def test_the_key_is_sent_and_stands_nowhere_else_even_when_the_endpoint_echoes_it(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TEST_TEACHER_KEY", KEY)
    echoes = [Reply(500, f"<p>{KEY}</p>".encode())]
    echoes += [Reply(200, completion(f"I saw {KEY} in the header.", f"odd {KEY}"))]
    refused = by_sample(lambda call: Reply(400, {"error": {"message": f"bad {quote(KEY, safe='')} {KEY}"}}))
    with OpenAIServer(lambda call: echoes.pop() if echoes else refused(call)) as server:
        with pytest.raises(RunError, match="1 rows were refused"):
            build(tmp_path, server, "rationale.teacher.api_key_env=TEST_TEACHER_KEY")
        assert all(c.headers["authorization"] == f"Bearer {KEY}" for c in server.calls)
    out = capfd.readouterr()
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert len(files) >= 5
    assert (
        not any(key.encode() in f.read_bytes() for f in files for key in (KEY, quote(KEY, safe="")))
        and KEY not in out.out + out.err
    )
    assert "bad [key] [key]" in (tmp_path / "r.rejected.jsonl").read_text()


def test_variables_of_the_openai_library_have_no_effect(tmp_path, monkeypatch):
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv(f"OPENAI_{name}", "sk-of-somebody-else")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv(
        "OPENAI_CUSTOM_HEADERS",
        "\n".join(
            ("authorization: sk-of-somebody-else", "x-other: 1", "host: other.example", "content-type: text/plain")
        ),
    )
    with OpenAIServer() as server:
        assert build(tmp_path, server)["accepted"] == 6
    for call in server.calls:
        assert not {"authorization", "x-other"} & set(call.headers)
        assert "sk-of-somebody-else" not in str(call.headers)
        assert call.headers["host"].startswith("127.0.0.1:") and call.headers["content-type"] == "application/json"


def test_a_missing_key_variable_is_named_before_anything_is_sent(tmp_path, monkeypatch):
    monkeypatch.delenv("TEST_TEACHER_KEY", raising=False)
    with OpenAIServer() as server:
        with pytest.raises(UserError, match="TEST_TEACHER_KEY: this environment variable is not set"):
            build(tmp_path, server, "rationale.teacher.api_key_env=TEST_TEACHER_KEY")
        assert not server.log


def test_another_address_for_slow_texts_never_gets_the_teachers_key(tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_TEACHER_KEY", KEY)
    with OpenAIServer() as fast, OpenAIServer() as slow:
        words = ["rationale.teacher.api_key_env=TEST_TEACHER_KEY", f"rationale.slow.url={slow.url}"]
        build(tmp_path, fast, *words, source=manifest(tmp_path / "m.parquet", 2, 2))
        assert len(fast.calls) == len(slow.calls) == 2
        assert all("authorization" in c.headers for c in fast.calls)
        assert not any("authorization" in c.headers for c in slow.calls)


def test_requests_a_minute_are_held_below_the_limit(tmp_path, monkeypatch):
    waits, gets = turns(monkeypatch)
    with OpenAIServer() as server:
        build(tmp_path, server, source=manifest(tmp_path / "m.parquet", 40), requests_per_minute=600)
    assert len(server.log) == len(gets) == 40
    assert gets[-1] - waits[0] >= 1.9, "nineteen at once, two seconds' worth, then nearly ten a second"


def test_tokens_a_minute_are_held_below_the_limit(tmp_path, monkeypatch):
    waits, gets = turns(monkeypatch)
    with OpenAIServer() as server:
        build(tmp_path, server, source=manifest(tmp_path / "m.parquet", 6), tokens_per_minute=60000)
    assert len(server.log) == len(gets) == 6
    assert gets[-1] - waits[0] >= 2.0, "about 900 tokens a request, 1,900 at once, then nearly 1,000 a second"


def test_iaa_rows_without_attribute_texts_are_rejected_without_asking(tmp_path):
    write_manifest(tmp_path / "m.parquet", [{**r, "attributes": None} for r in rows(2, "iaa")])
    with OpenAIServer() as server:
        with pytest.raises(RunError, match=r"none of 2 rows was accepted \(iaa: no-attributes 2\)"):
            build(tmp_path, server, source=tmp_path / "m.parquet")
        assert not server.log
    assert rejected(tmp_path)[0]["reasons"][0]["code"] == "no-attributes"


def test_slow_texts_go_through_the_attributes_and_are_accepted(tmp_path):
    with OpenAIServer() as server:
        assert build(tmp_path, server, source=manifest(tmp_path / "m.parquet", 0, 3))["accepted"] == 3
    assert all(r["rationale"] == SLOW for r in written(tmp_path))
