"""The journal of an evaluation: nothing is asked twice, nothing of another model or picture counts."""

from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from tatar_dist.errors import UserError
from tatar_dist.evaluate import answers as calls
from tatar_dist.evaluate.answers import AnswerJournal, batch_size, batches, distinct, model_fingerprint
from tatar_dist.prompts.answer import parse
from tatar_dist.types import Completion, Expected, Group, Prompt, Sample

SETTINGS = {"model": "m", "max_new_tokens": 8}


def picture(i: int, size: tuple[int, int] = (4, 3)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (i, 0, 0)).save(out, "PNG")
    return out.getvalue()


def sample(i: int, task: str = "iqa", size: tuple[int, int] = (4, 3)) -> Sample:
    return Sample(f"s{i}", "set", task, picture(i, size), 50.0)


def group(s: Sample, text: str = "<answer>5</answer>", expected: Expected | None = None) -> Group:
    completion = Completion(text, (1, 2), (-0.5, -0.25), "stop", expected)
    return Group(Prompt(s, "", s.sample_id), (), (completion,), 0)


def test_answers_outlive_the_process_and_a_torn_last_line(tmp_path):
    file = tmp_path / "answers.jsonl"
    with AnswerJournal(file, SETTINGS) as answers:
        answers.keep("greedy", [group(sample(0), expected=Expected(5.5, 1.0, 0.9)), group(sample(1))])
        answers.keep("sampled", [group(sample(0), "drawn")])
    file.write_bytes(file.read_bytes() + b'{"sum":"0')
    with AnswerJournal(file, SETTINGS) as answers:
        assert answers.cut and (answers.count("greedy"), answers.count("sampled")) == (2, 1)
        (kept,) = answers.get("greedy", sample(0))
        assert (kept.text, kept.finish_reason, kept.expected) == ("<answer>5</answer>", "stop", Expected(5.5, 1.0, 0.9))
        assert (len(kept.token_ids), sum(kept.logprobs)) == (2, -0.75)  # the ids themselves are not kept
        assert answers.has("greedy", sample(1)) and not answers.has("sampled", sample(1))
        assert not answers.has("greedy", sample(0, "iaa"))


def test_a_picture_that_was_replaced_since_is_asked_again(tmp_path):
    with AnswerJournal(tmp_path / "a.jsonl", SETTINGS) as answers:
        answers.keep("greedy", [group(sample(0), "old")])
        other = replace(sample(0), image=b"another")
        assert not answers.has("greedy", other)
        answers.keep("greedy", [group(other, "new")])
        assert answers.get("greedy", other)[0].text == "new"


def test_answers_of_another_model_are_refused(tmp_path):
    with AnswerJournal(tmp_path / "a.jsonl", SETTINGS) as answers:
        answers.keep("greedy", [group(sample(0))])
    with (
        pytest.raises(UserError, match=r"model was 'm', is 'n'"),
        AnswerJournal(tmp_path / "a.jsonl", {**SETTINGS, "model": "n"}),
    ):
        pass


def test_a_resumed_evaluation_asks_in_the_same_batches():
    samples = [sample(i) for i in range(10)]
    done: set[str] = set()

    def asked() -> list[list[str]]:
        parts = batches(samples, 4, lambda s: Prompt(s, "", s.sample_id), lambda s: s.sample_id in done)
        return [[p.group_id for p in part] for part in parts]

    assert asked() == [["s0", "s1", "s2", "s3"], ["s4", "s5", "s6", "s7"], ["s8", "s9"]]
    done = {"s1", "s4", "s5", "s6", "s7", "s8"}
    assert asked() == [["s0", "s1", "s2", "s3"], ["s8", "s9"]]  # a call that a kill tore is asked whole
    done = {s.sample_id for s in samples}
    assert asked() == []


def test_a_call_is_neither_more_than_a_fair_share_nor_than_a_few_times_the_room():
    assert batch_size(100_000, 2, 64, 1) == 128 and batch_size(100_000, 2, 64, 8) == 16
    assert batch_size(100, 2, 64, 1) == 25 and batch_size(1, 8, 64, 1) == 1


def test_large_pictures_make_small_calls(monkeypatch):
    monkeypatch.setattr(calls.batches_by_pixels, "__defaults__", (1000,))  # pixels of a call
    sizes = [(10, 10), (30, 30), (20, 40), (100, 100), (10, 10)]
    samples = [sample(i, size=size) for i, size in enumerate(sizes)]
    parts = batches(samples, 4, lambda s: Prompt(s, "", s.sample_id), lambda s: False)
    assert [[p.group_id for p in part] for part in parts] == [["s0", "s1"], ["s2"], ["s3"], ["s4"]]


def test_two_samples_of_one_name_are_refused():
    assert len(list(distinct([sample(0), sample(0, "iaa"), sample(1)]))) == 3
    with pytest.raises(UserError, match="iqa set/s0 comes twice"):
        list(distinct([sample(0), sample(1), sample(0)]))


def test_a_fingerprint_changes_with_weights_and_settings_and_not_with_the_place(tmp_path):
    def model(name: str, weights: bytes, config: str = "{}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        return model_fingerprint(str(tmp_path / name))

    assert model("a", b"1" * 9) == model("b", b"1" * 9)
    assert len({model("c", b"2" * 9), model("d", b"1" * 9, "{} "), model("e", b"1" * 8), model("f", b"1" * 9)}) == 4
    whole = bytearray(1 << 23)
    early, late = bytearray(whole), bytearray(whole)
    early[:100_000], late[-100_000:] = b"x" * 100_000, b"x" * 100_000  # a frozen tower stays, the rest has learned
    assert len({model("g", bytes(whole)), model("h", bytes(early)), model("i", bytes(late))}) == 3
    assert model_fingerprint("owner/name") == "owner/name"


def test_a_completion_holds_what_its_prompt_has_begun_and_counts_only_its_own_tokens():
    from tatar_dist.rollout.engine import RolloutEngine

    said = SimpleNamespace(
        index=0, text="57</answer>", token_ids=[5, 7], finish_reason="stop",
        logprobs=[{5: SimpleNamespace(logprob=-0.5)}, {7: SimpleNamespace(logprob=-0.25)}],
    )  # fmt: skip
    prompt = Prompt(Sample("a", "d", "iqa", b"", 50.0), "asked: ", "g", begun="<answer>")
    group = RolloutEngine._group(prompt, SimpleNamespace(outputs=[said], prompt_token_ids=[1, 2, 3]), 4)
    (completion,) = group.completions
    assert completion.text == "<answer>57</answer>" and parse(completion.text).value == 57
    assert completion.token_ids == (5, 7) and completion.logprobs == (-0.5, -0.25)
    assert group.prompt_token_ids == (1, 2, 3)
