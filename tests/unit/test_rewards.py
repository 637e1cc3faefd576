"""From texts to rewards: each term, each preset, the advantage, the counts, the metrics, and the file audit."""

import io
import json
import math
import warnings
from datetime import date

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from tatar_dist.errors import UserError
from tatar_dist.prompts.answer import answer_text
from tatar_dist.rewards import audit
from tatar_dist.rewards import metrics as reward_files
from tatar_dist.rewards.batch import batch_of_groups, batch_of_rows
from tatar_dist.rewards.metrics import reward_metrics
from tatar_dist.rewards.presets import load_preset, preset_names
from tatar_dist.rewards.score import score_batch, scored_groups
from tatar_dist.rewards.terms import GaussianParams, LengthParams, check_token_budget, gaussian, length
from tatar_dist.types import Completion, Group, Prompt, Sample

WORDS = {"iqa": 40, "iaa": 130}


def row(group, task, target, answer, dataset="d", words=None):
    text = "w " * (WORDS[task] if words is None else words)
    completion = answer if isinstance(answer, str) else answer_text(text.strip(), answer)
    return {"group_id": group, "task": task, "dataset": dataset, "target": target, "completion": completion}


def score_rows(rows, preset, **choices):
    return score_batch(batch_of_rows(rows), preset, **choices)


def small_batch():
    return [
        row("q1", "iqa", 70.0, 68.0),
        row("a1", "iaa", 80.0, 75.0),
        row("q1", "iqa", 70.0, 30.0),
        row("a2", "iaa", 40.0, 42.0),
        row("a1", "iaa", 80.0, 85.0),
        row("a2", "iaa", 40.0, "no answer"),
    ]


@given(d=st.floats(0, 99), more=st.floats(0.01, 1), iaa=st.booleans())
def test_gaussian_decreases_with_the_distance(d, more, iaa):
    q = np.array([0.0, 0.0])
    near, far = gaussian(q, np.array([d, d + more]), np.array([iaa, iaa]), np.zeros(2), GaussianParams())
    assert near >= far and (near > far or far < 1e-12)


def test_gaussian_has_the_published_width():
    # At d = T a bell of fixed width pays 1/2; alpha widens it: exp(-ln 2 / (1 + 0.8 * 0.0875)^2).
    r = gaussian(
        np.array([50.0, 50.0]), np.array([58.75, 58.75]), np.array([False, True]), np.zeros(2), GaussianParams()
    )
    expected = [math.exp(-math.log(2) / (1 + alpha * 0.0875) ** 2) for alpha in (0.8, 2.0)]
    np.testing.assert_allclose(r, expected, rtol=1e-14)


def test_length_ramps_over_the_margin_and_is_0_when_unparsed():
    words = np.array([0, 65, 70, 80, 200, 200, 125, 120, 110, 0])
    iaa = np.array([False] * 5 + [True] * 5)
    r = length(words, iaa, np.ones(10, bool), LengthParams())
    np.testing.assert_allclose(r, [1, 1, 2 / 3, 0, 0, 1, 1, 2 / 3, 0, 0])
    assert (length(words, iaa, np.zeros(10, bool), LengthParams()) == 0).all()


def test_a_token_limit_that_forbids_the_required_words_is_refused():
    check_token_budget(125, 384)
    with pytest.raises(UserError, match="max_new_tokens=128"):
        check_token_budget(125, 128)


def test_tatar_pays_iqa_for_distance_and_iaa_for_order():
    scored = score_rows(small_batch(), load_preset("tatar"))
    assert np.isnan(scored.terms["thurstone"]).tolist() == [True, False, True, False, False, False]
    assert np.isnan(scored.terms["gaussian"]).tolist() == [False, True, False, True, True, True]
    assert scored.terms["gaussian"][0] > scored.terms["gaussian"][2]
    assert all(scored.terms[t][5] == 0 for t in ("thurstone", "format", "length")) and scored.reward[5] == 0
    expected = np.nansum([scored.terms[t] for t in ("gaussian", "thurstone", "format", "length")], axis=0)
    np.testing.assert_allclose(scored.reward, expected)
    assert scored.answers.parsed.tolist() == [True] * 5 + [False] and not scored.answers.out_of_range.any()
    assert scored.unrankable.tolist() == [False] * 3


def test_the_advantage_is_the_unbiased_group_score_with_unparsed_rows_counted():
    scored = score_rows(small_batch(), load_preset("tatar"))
    for rows in ([0, 2], [1, 4], [3, 5]):
        r = scored.reward[rows]
        np.testing.assert_allclose(scored.advantage[rows], (r - r.mean()) / (r.std(ddof=1) + 1e-4), atol=1e-12)


def test_another_images_completions_move_an_iaa_reward_and_no_iqa_reward():
    rows = small_batch()
    before = score_rows(rows, load_preset("tatar"))
    rows[3] = row("a2", "iaa", 40.0, 95.0)
    after = score_rows(rows, load_preset("tatar"))
    assert (after.reward[[0, 2]] == before.reward[[0, 2]]).all()
    assert (after.reward[[1, 4]] < before.reward[[1, 4]]).all()


def test_rows_of_other_tasks_and_data_sets_do_not_matter():
    rows = [r for r in small_batch() if r["task"] == "iaa"]
    alone = score_rows(rows, load_preset("thurstone-both"))
    others = [row("z1", "iqa", 10.0, 90.0), row("z2", "iaa", 10.0, 90.0, "other"), row("z3", "iaa", 5.0, 95.0, "other")]
    mixed = score_rows(others + rows, load_preset("thurstone-both"))
    np.testing.assert_array_equal(mixed.reward[3:], alone.reward)


@pytest.mark.parametrize("name", ["tatar", "released", "gaussian-both", "thurstone-both", "binary"])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_no_preset_ever_gives_nan_or_inf_and_row_order_does_not_matter(name, data):
    kinds = st.tuples(st.sampled_from(["q1", "q2", "a1", "a2", "a3"]), st.floats(-1e6, 1e6) | st.just(None))
    drawn = data.draw(st.lists(kinds, min_size=1, max_size=12))
    targets = {"q1": 0.0, "q2": 100.0, "a1": 100.0, "a2": 0.0, "a3": 50.0}
    rows = [
        row(g, "iqa" if g[0] == "q" else "iaa", targets[g], "?" if a is None else f"<answer>{a:f}</answer>")
        for g, a in drawn
    ]
    preset = load_preset(name)
    scored = score_rows(rows, preset, terms=audit.COLUMNS)
    assert np.isfinite(scored.reward).all() and np.isfinite(scored.advantage).all()
    assert all((np.isnan(v) | ((v >= 0) & (v <= 1))).all() for v in scored.terms.values())
    order = data.draw(st.permutations(range(len(rows))))
    again = score_rows([rows[i] for i in order], preset, terms=audit.COLUMNS)
    np.testing.assert_allclose(again.reward, scored.reward[order], rtol=0, atol=1e-12)


def test_an_answer_out_of_range_is_clamped_kept_raw_and_counted():
    scored = score_rows([row("q", "iqa", 100.0, "<answer>120</answer>")], load_preset("tatar"))
    assert (
        scored.answers.value[0] == 120
        and scored.terms["gaussian"][0] == 1
        and scored.answers.out_of_range.tolist() == [True]
    )


def test_binary_pays_strictly_inside_the_threshold_on_both_tasks():
    rows = [row("q", "iqa", 50.0, 58.74), row("a", "iaa", 50.0, 41.0), row("b", "iaa", 50.0, 41.25)]
    assert score_rows(rows, load_preset("binary")).terms["binary"].tolist() == [1.0, 0.0, 0.0]


def test_groups_are_named_by_id_not_by_neighbours():
    rows = small_batch()
    sorted_rows = sorted(rows, key=lambda r: r["group_id"])
    a, b = score_rows(rows, load_preset("tatar")), score_rows(sorted_rows, load_preset("tatar"))
    assert sorted(a.advantage.round(12)) == sorted(b.advantage.round(12))
    assert len(a.unrankable) == len(b.unrankable) == 3


def test_rows_of_a_group_that_disagree_are_refused():
    with pytest.raises(UserError, match="row 2: group 'g' has rows that disagree: target 50.0 and 60.0"):
        batch_of_rows([row("g", "iqa", 50.0, 1.0), row("g", "iqa", 60.0, 1.0)])


def test_rollout_groups_are_scored_and_split_back():
    def group(name, task, target, texts):
        sample = Sample(name, "d", task, b"", target)
        answers = tuple(Completion(t, (1,), (0.0,), "stop") for t in texts)
        return Group(Prompt(sample, "", name), (1,), answers, 0)

    groups = [
        group("a", "iaa", 80.0, [answer_text("w", 70.0), "x"]),
        group("b", "iaa", 20.0, [answer_text("w", 20.0)] * 3),
    ]
    batch = batch_of_groups(groups)
    scored = score_batch(batch, load_preset("tatar"))
    parts = scored_groups(groups, scored)
    assert [len(p.reward) for p in parts] == [2, 3] and parts[0].parsed.tolist() == [True, False]
    np.testing.assert_array_equal(np.concatenate([p.advantage for p in parts]), scored.advantage)
    with pytest.raises(UserError, match="same group_id"):
        batch_of_groups([groups[0], groups[0]])


def test_metrics_have_their_contract_names_and_say_which_groups_teach_nothing():
    rows = [*small_batch(), row("q2", "iqa", 10.0, 12.0), row("q2", "iqa", 10.0, 12.0)]
    batch = batch_of_rows(rows)
    metrics = reward_metrics(batch, score_batch(batch, load_preset("tatar")))
    for name in ("total", "format", "length"):
        assert {f"reward/{name}/iqa", f"reward/{name}/iaa", f"reward/frac_zero_std/{name}/iqa"} <= set(metrics)
    assert "reward/gaussian/iqa" in metrics and "reward/gaussian/iaa" not in metrics
    assert "reward/thurstone/iaa" in metrics and "reward/thurstone/iqa" not in metrics
    assert metrics["reward/frac_zero_std/total/iqa"] == 0.5 and metrics["reward/frac_zero_std/format/iqa"] == 1.0
    assert metrics["completion/parse_failures/iaa"] == 0.25 and metrics["completion/think_words/iqa"] == 40
    assert all(math.isfinite(v) for name, v in metrics.items() if "agreement" not in name)


def test_agreement_is_kendalls_tau_of_rewards_with_nearness_over_parsed_completions():
    rows = [row("a", "iqa", 50.0, answer) for answer in (50, 53, 60, 41)]  # Gaussian: nearer is better, always
    rows += [row("b", "iqa", 50.0, answer) for answer in (50, 50, 50, 50)]  # undefined: left out
    rows[3]["completion"] = "no answer"
    batch = batch_of_rows(rows)
    assert reward_metrics(batch, score_batch(batch, load_preset("tatar")))["reward/agreement/iqa"] == 1.0
    alone = batch_of_rows(rows[4:])
    assert math.isnan(reward_metrics(alone, score_batch(alone, load_preset("tatar")))["reward/agreement/iqa"])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_group_kendall_equals_scipys_in_every_group(rows):
    group, x, y = (np.array(column) for column in zip(*rows, strict=True))
    for large in (64, 1):  # in blocks, and one by one
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reward_files, "LARGE", large)
            found = reward_files.group_kendall(x.astype(float), y.astype(float), group)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = [kendalltau(x[group == j], y[group == j]).statistic for j in np.unique(group)]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_every_shipped_preset_loads_and_names_itself():
    assert preset_names() == ["binary", "gaussian-both", "paper", "released", "tatar", "thurstone-both"]
    assert all(load_preset(name).name == name for name in preset_names())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: load_preset("tater"), "did you mean 'tatar'"),
        (lambda: load_preset("tatar", {"gausian": 1.0}), "did you mean 'gaussian'"),
        (lambda: load_preset("tatar", None, {"thurstone_flor": 9}), "did you mean 'thurstone_floor'"),
        (lambda: load_preset("tatar", None, {"length_margin": 0}), "margin=0"),
        (lambda: load_preset("tatar", None, {"thurstone_link": "probot"}), "must be one of logistic, probit"),
        (lambda: load_preset("tatar", dict.fromkeys(("gaussian", "thurstone", "format", "length"), 0)), "every weight"),
        (lambda: load_preset("nowhere.yaml"), "cannot read the reward preset"),
    ],
)
def test_a_wrong_preset_is_refused_with_the_nearest_name(call, said):
    with pytest.raises(UserError, match=said):
        call()


def test_a_copied_preset_file_can_be_changed(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nterms:\n  gaussian: {weight: 2, threshold: 1e1}\n  format: {weight: 1e-1}\n")
    preset = load_preset(str(path), params={"gaussian_alpha_iqa": 0})
    assert (preset.name, preset.gaussian.threshold, preset.gaussian.alpha_iqa) == ("mine", 10.0, 0.0)
    scored = score_rows([row("q", "iqa", 50.0, 50.0)], preset)
    assert scored.reward[0] == pytest.approx(2.1)


def write_rows(path, rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def test_the_audit_writes_every_row_with_every_term(tmp_path):
    rows = [{**r, "note": "kept"} for r in small_batch()]
    result = audit.run(write_rows(tmp_path / "in.jsonl", rows), "tatar")
    audit.write([result], tmp_path / "out.jsonl", io.StringIO())
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{k: o[k] for k in r} for o, r in zip(out, rows, strict=True)] == rows
    assert all(set(o) - set(rows[0]) == {"parsed", *audit.COLUMNS, "reward", "advantage"} for o in out)
    assert out[5]["parsed"] is None and out[5]["pairwise"] == 0 and out[0]["pairwise"] is None
    stdout = io.StringIO()
    audit.write([result], None, stdout)
    assert stdout.getvalue() == (tmp_path / "out.jsonl").read_text()


def test_above_the_limit_only_the_presets_own_terms_are_computed_and_it_says_so(tmp_path, monkeypatch):
    file = write_rows(tmp_path / "in.jsonl", small_batch())
    monkeypatch.setattr(audit, "ALL_TERMS_LIMIT", 5)
    few = audit.run(file, "tatar")
    assert np.isnan(few.columns()["pairwise"]).all() and "pairwise not computed" in few.warnings[0]
    assert audit.run(file, "tatar", all_terms=True).columns()["pairwise"][1] > 0


def test_an_unrankable_data_set_is_warned_of_once_and_gets_0(tmp_path):
    rows = [row("a", "iaa", 50.0, 50.0, "lonely"), row("a", "iaa", 50.0, 60.0, "lonely"), *small_batch()[1:]]
    rows[2:] = [{**r, "group_id": r["group_id"] + "x"} for r in rows[2:]]
    result = audit.run(write_rows(tmp_path / "in.jsonl", rows), "tatar")
    assert len(result.warnings) == 1 and "'lonely': 1 group" in result.warnings[0]
    assert result.columns()["thurstone"][:2].tolist() == [0.0, 0.0]


GOOD = row("g", "iqa", 50.0, 50.0)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({**GOOD, "task": "ica"}, "task='ica': must be one of iqa, iaa"),
        ({k: v for k, v in GOOD.items() if k != "task"}, "missing key 'task'"),
        ({**GOOD, "target": 101}, "target=101: must be at most 100"),
        ({**GOOD, "target": None}, "target=None: must be a number"),
        ({**GOOD, "target": "50"}, "target='50': must be a number"),
        ({**GOOD, "target": 51.0}, "group 'g' has rows that disagree"),
        ({**GOOD, "completion": 5}, "completion=5: must be text"),
        ('{"task": NaN}', "not valid JSON: Out of range float values are not JSON compliant"),
        ('{"group_id": "h", "task": "iqa", "dataset": "d", "target": 1e999, "completion": ""}', "not valid JSON"),
        ("[1]", "expected a JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line_or_dropped_when_lenient(tmp_path, bad, said):
    file = write_rows(tmp_path / "in.jsonl", [GOOD, "", bad])
    with pytest.raises(UserError) as e:
        audit.run(file)
    assert str(e.value).startswith(f"{file}:3: ") and said in str(e.value) and "\n" not in str(e.value)
    assert audit.run(file, lenient=True).warnings[0] == f"{file}: 1 bad rows dropped"


def test_explain_shows_the_comparisons_behind_a_thurstone_reward(tmp_path):
    file = write_rows(tmp_path / "in.jsonl", small_batch())
    result = audit.run(file, "paper")
    table = audit.explain_table(result, 2)
    assert "a2" in table and f"weighted mean {result.scored.terms['thurstone'][1]:.6f}" in table
    default = audit.run(file, "tatar")
    assert f"nats, which pay {default.scored.terms['thurstone'][1]:.6f}" in audit.explain_table(default, 2)
    assert "no Thurstone comparison" in audit.explain_table(result, 1)
    with pytest.raises(UserError, match="rows 1 to 6"):
        audit.explain_table(result, 7)


def test_a_rollouts_parquet_is_read_like_lines(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(small_batch()), tmp_path / "step.parquet")
    from_parquet = audit.run(tmp_path / "step.parquet")
    from_lines = audit.run(write_rows(tmp_path / "in.jsonl", small_batch()))
    np.testing.assert_array_equal(from_parquet.scored.reward, from_lines.scored.reward)


def test_values_of_a_parquet_file_that_json_does_not_know_are_written_as_text_or_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table, file = pa.Table.from_pylist([{**r, "day": date(2024, 5, 1)} for r in small_batch()]), tmp_path / "s.parquet"
    pq.write_table(table, file)
    assert {json.loads(line)["day"] for line in audit.run(file).lines()} == {"2024-05-01"}
    targets = table["target"].cast(pa.decimal128(5, 2))
    pq.write_table(table.set_column(table.column_names.index("target"), "target", targets), file)
    with pytest.raises(UserError, match=r"s\.parquet:1: target=Decimal\('70.00'\): must be a number"):
        audit.run(file)
