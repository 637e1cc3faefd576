"""A user's own reward term, named by a dotted path in a preset: used like the others, and its faults are one line."""

import json

import numpy as np
import pytest

from tatar_dist.errors import UserError
from tatar_dist.rewards import audit
from tatar_dist.rewards.batch import batch_of_groups, batch_of_rows, read_answers
from tatar_dist.rewards.metrics import reward_metrics
from tatar_dist.rewards.presets import load_preset
from tatar_dist.rewards.score import score_batch
from tatar_dist.types import Completion, Group, Prompt, Sample

MODULE = """
import numpy as np
def brief(batch, answers, words=40):
    return (answers.think_words <= words).astype(float)
def penalty(batch, answers, per_word=-0.1):
    return per_word * answers.think_words
def wrong_shape(batch, answers):
    return np.ones(3)
def not_finite(batch, answers):
    return np.full(len(batch), np.nan)
def fails(batch, answers):
    raise KeyError("oh")
def spent(batch, answers):
    known = [len(row["token_ids"]) == row["tokens"] == len(row["logprobs"]) for row in batch.rows]
    cut = [row["finish_reason"] == "length" for row in batch.rows]
    raters = [row["meta"]["raters"] for row in batch.rows]
    return -batch.numbers("tokens") * known - 100.0 * np.array(cut) - batch.numbers("score_std") * np.array(raters)
constant = 3
"""
PRESET = """
name: mine
terms:
  gaussian: {weight: 1, tasks: [iqa]}
  brief: {function: FUNCTION, weight: 0.5, tasks: [iqa]EXTRA}
"""


def row(group, task, words, answer="<answer>50</answer>"):
    text = f"<think>{'w ' * words}</think>{answer}"
    return {"group_id": group, "task": task, "dataset": "d", "target": 50.0, "completion": text}


ROWS = [row("a", "iqa", 3), row("a", "iqa", 60), row("a", "iqa", 3, "none"), row("b", "iaa", 3)]


@pytest.fixture
def preset(tmp_path, monkeypatch):
    (tmp_path / "my_terms_for_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)

    def make(function="my_terms_for_a_test.brief", extra="", name="brief"):
        file = tmp_path / "mine.yaml"
        text = PRESET.replace("FUNCTION", function).replace("EXTRA", extra)
        file.write_text(text.replace("brief: {", f"{name}: {{"))
        return str(file)

    return make


def test_it_counts_with_its_weight_on_its_tasks_and_is_0_where_unparsed(preset):
    batch = batch_of_rows(ROWS)
    scored = score_batch(batch, load_preset(preset(extra=", words: 50")))
    np.testing.assert_array_equal(scored.terms["brief"], [1.0, 0.0, 0.0, np.nan])
    np.testing.assert_allclose(scored.reward, [1.5, 1.0, 0.0, 0.0])
    assert reward_metrics(batch, scored)["reward/brief/iqa"] == pytest.approx(1 / 3)


def test_weights_and_constants_can_be_overridden_like_any_others(preset):
    loaded = load_preset(preset(extra=", words: 50"), {"brief": 2.0}, {"brief_words": 100})
    assert score_batch(batch_of_rows(ROWS), loaded).reward[1] == pytest.approx(3.0)
    with pytest.raises(UserError, match="did you mean 'brief_words'"):
        load_preset(preset(extra=", words: 50"), None, {"brief_word": 1})


@pytest.mark.parametrize(("per_word", "weight"), [(-0.1, 0.5), (0.1, -0.5)])
def test_a_term_that_punishes_never_makes_junk_preferable(preset, per_word, weight):
    made = preset("my_terms_for_a_test.penalty", f", per_word: {per_word}")
    loaded = load_preset(made, {"brief": weight, "gaussian": 1e-6})
    rows = [*ROWS, row("b", "iaa", 900), row("c", "iqa", 20), row("c", "iqa", 90)]  # IAA is none of its tasks
    scored = score_batch(batch_of_rows(rows), loaded)
    np.testing.assert_allclose(scored.terms["brief"], per_word * np.array([3, 60, 60, np.nan, np.nan, 20, 90]))
    assert scored.reward[2] < scored.reward[:2].min()
    assert scored.advantage[2] < scored.advantage[1] < scored.advantage[0]
    assert score_batch(batch_of_rows([ROWS[2]]), loaded).terms["brief"][0] == 0, "nothing parsed to compare with"


def test_the_audit_writes_its_column(preset, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    rows = [json.loads(line) for line in audit.run(file, preset()).lines()]
    assert [r["brief"] for r in rows] == [1.0, 0.0, 0.0, None]


@pytest.mark.parametrize(
    ("function", "extra", "said"),
    [
        ("brief", "", "expected a dotted path"),
        ("nowhere_at_all.brief", "", "No module named 'nowhere_at_all'.*PYTHONPATH"),
        ("my_terms_for_a_test.brif", "", "has no function 'brif'"),
        ("my_terms_for_a_test.constant", "", "has no function 'constant'"),
        ("my_terms_for_a_test.brief", ", word: 3", "cannot be called.*unexpected keyword argument 'word'"),
    ],
)
def test_a_preset_whose_function_cannot_be_called_is_refused_when_read(preset, function, extra, said):
    with pytest.raises(UserError, match=said):
        load_preset(preset(function, extra))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("wrong_shape", r"returned shape \(3,\), expected \(4,\)"),
        ("not_finite", "returned nan for row 1: must be a finite number"),
        ("fails", "failed: KeyError: 'oh'"),
    ],
)
def test_a_function_that_fails_is_named_in_one_line(preset, function, said):
    with pytest.raises(UserError, match=said):
        score_batch(batch_of_rows(ROWS), load_preset(preset(f"my_terms_for_a_test.{function}")))


@pytest.mark.parametrize(
    ("name", "said"),
    [("pairwise", "is taken"), ("reward", "is taken"), ("task", "is taken"), ('"a/b"', "letters, digits and _")],
)
def test_it_may_not_hide_a_column_or_break_a_metrics_name(preset, name, said):
    with pytest.raises(UserError, match=said):
        load_preset(preset(name=name))


def test_a_term_sees_tokens_log_probabilities_the_finish_reason_and_the_manifests_columns(preset):
    sample = Sample("s", "d", "iqa", b"", 50.0, meta={"raters": 3}, score_std=2.0)
    answers = [
        Completion("<answer>50</answer>", tuple(range(n)), (-1.0,) * n, reason)
        for n, reason in ((4, "stop"), (9, "length"))
    ]
    batch = batch_of_groups([Group(Prompt(sample, "", "g"), (1,), tuple(answers), 0)])
    term = load_preset(preset("my_terms_for_a_test.spent")).custom["brief"]
    values = term.values(batch, read_answers(batch.completions), np.arange(2))
    assert values.tolist() == [-4.0 - 6.0, -9.0 - 100.0 - 6.0]


def test_the_raters_spread_widens_the_bell_and_the_opinion_where_it_is_known():
    rows = [row(g, t, 3, f"<answer>{a}</answer>") for g, t, a in (("a", "iqa", 60), ("b", "iaa", 40), ("c", "iaa", 70))]
    known = [r | {"score_std": 10.0, "target": x} for r, x in zip(rows, (50.0, 45.0, 55.0), strict=True)]
    unknown = [r | {"score_std": None} for r in known]
    plain, wide = load_preset("tatar"), load_preset("tatar", params={"rater_sd": True})
    assert wide.gaussian.rater_sd and wide.thurstone.rater_sd and not plain.gaussian.rater_sd
    sigma0 = 8.75 / np.sqrt(2 * np.log(2))
    found = score_batch(batch_of_rows(known), wide).terms["gaussian"][0]
    assert found == pytest.approx(np.exp(-0.5 * (10 / (np.hypot(sigma0, 10) * 1.08)) ** 2), rel=1e-12)
    for term in ("gaussian", "thurstone"):
        values = [score_batch(batch_of_rows(r), p).terms[term] for r, p in ((known, plain), (unknown, wide))]
        np.testing.assert_array_equal(*values)
        assert not np.array_equal(score_batch(batch_of_rows(known), wide).terms[term], values[0], equal_nan=True)


def test_tokens_cost_and_thought_is_optional_where_the_preset_says_so():
    rows = [row("a", "iqa", 3), row("b", "iaa", 3), row("b", "iaa", 3, "none"), row("b", "iaa", 0)]
    rows = [r | {"tokens": 64} for r in rows]
    rows[3]["completion"] = "<answer>50</answer>"
    preset = load_preset("tatar", {"cost": 1.0}, {"cost_iaa_budget": 128, "length_optional": True})
    scored = score_batch(batch_of_rows(rows), preset)
    assert scored.terms["cost"].tolist() == [1 - 64 / 256, 1 - 64 / 128, 0.0, 0.5]
    assert scored.terms["length"].tolist() == [1.0, 0.0, 0.0, 1.0]
    assert score_batch(batch_of_rows(rows), load_preset("tatar")).terms["length"][3] == 0
    with pytest.raises(UserError, match="the reward term cost counts tokens, and a row has no such key"):
        score_batch(batch_of_rows([row("a", "iqa", 3)]), preset)


def test_the_scale_of_the_batch_and_a_negative_weight_reach_the_score():
    rows = [row("a", "iqa", 3, f"<answer>{x}</answer>") for x in (50, 55, 70)]
    preset = load_preset("tatar", {"gaussian": 3.0})
    scored = score_batch(batch_of_rows(rows), preset, advantage="per_term", scale="batch")
    assert scored.advantage.std(ddof=1) == pytest.approx(1, rel=1e-3)
    with pytest.raises(UserError, match="weight -1.5 of length: must be at least 0, or unreadable answers earn more"):
        load_preset("tatar", {"length": -1.5})


def test_what_an_evaluation_does_not_keep_of_tokens_is_null():
    sample = Sample("s", "d", "iqa", b"", 50.0)
    restored = Completion("<answer>50</answer>", (0, 0, 0), (-4.0,), "stop")
    (only,) = batch_of_groups([Group(Prompt(sample, "", "g"), (), (restored,), 0)]).rows
    assert (only["tokens"], only["token_ids"], only["logprobs"]) == (3, None, None)
