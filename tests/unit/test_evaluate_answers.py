"""The journal of an evaluation: nothing is asked twice, nothing of another model or picture counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tatar_dist.errors import UserError
from tatar_dist.evaluate.answers import Answers, batch_size, batches, model_fingerprint
from tatar_dist.records import Completion, Expected, Group, Prompt, Sample

SETTINGS = {"model": "m", "max_new_tokens": 8}


def sample(i: int, task: str = "iqa") -> Sample:
    return Sample(f"s{i}", "set", task, b"picture %d" % i, 50.0)


def group(s: Sample, text: str = "<answer>5</answer>", expected: Expected | None = None) -> Group:
    completion = Completion(text, (1, 2), (-0.5, -0.25), "stop", expected)
    return Group(Prompt(s, "", s.sample_id), (), (completion,), 0)


def test_answers_outlive_the_process_and_a_torn_last_line(tmp_path):
    file = tmp_path / "answers.jsonl"
    with Answers(file, SETTINGS) as answers:
        answers.keep("greedy", [group(sample(0), expected=Expected(5.5, 1.0, 0.9)), group(sample(1))])
        answers.keep("sampled", [group(sample(0), "drawn")])
    file.write_bytes(file.read_bytes() + b'{"sum":"0')
    with Answers(file, SETTINGS) as answers:
        assert answers.notice and (answers.count("greedy"), answers.count("sampled")) == (2, 1)
        assert answers.get("greedy", sample(0)) == group(sample(0), expected=Expected(5.5, 1.0, 0.9)).completions
        assert answers.has("greedy", sample(1)) and not answers.has("sampled", sample(1))
        assert not answers.has("greedy", sample(0, "iaa"))


def test_a_picture_that_was_replaced_since_is_asked_again(tmp_path):
    with Answers(tmp_path / "a.jsonl", SETTINGS) as answers:
        answers.keep("greedy", [group(sample(0), "old")])
        other = replace(sample(0), image=b"another")
        assert not answers.has("greedy", other)
        answers.keep("greedy", [group(other, "new")])
        assert answers.get("greedy", other)[0].text == "new"


def test_answers_of_another_model_are_refused(tmp_path):
    with Answers(tmp_path / "a.jsonl", SETTINGS) as answers:
        answers.keep("greedy", [group(sample(0))])
    with (
        pytest.raises(UserError, match=r"model was 'm', is 'n'"),
        Answers(tmp_path / "a.jsonl", {**SETTINGS, "model": "n"}),
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
    assert asked() == [["s0", "s2", "s3"], ["s9"]]
    done = {s.sample_id for s in samples}
    assert asked() == []


def test_a_call_is_neither_more_than_a_fair_share_nor_than_a_few_times_the_room():
    assert batch_size(100_000, 2, 64, 1) == 256 and batch_size(100_000, 2, 64, 8) == 32
    assert batch_size(100, 2, 64, 1) == 25 and batch_size(1, 8, 64, 1) == 1


def test_a_fingerprint_changes_with_weights_and_settings_and_not_with_the_place(tmp_path):
    def model(name: str, weights: bytes, config: str = "{}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        return model_fingerprint(str(tmp_path / name))

    assert model("a", b"1" * 9) == model("b", b"1" * 9)
    assert len({model("c", b"2" * 9), model("d", b"1" * 9, "{} "), model("e", b"1" * 8), model("f", b"1" * 9)}) == 4
    assert model_fingerprint("owner/name") == "owner/name"
