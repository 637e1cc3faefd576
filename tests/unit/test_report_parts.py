"""What the page of a run keeps beside its answers: fit, calibration, configuration, faults, rewards explained."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report_pages import HOSTILE, assert_safe, evaluation, grpo_rows, lines, predictions, report, rollouts, scores
from report_run import GROUP, PROMPTS, write_run

from tatar_dist.evaluate.metrics import logistic_map, plcc, plcc_fitted
from tatar_dist.report.charts import bins, miscalibration
from tatar_dist.report.html import differing, settings
from tatar_dist.report.reading import history, read_rollouts, read_run
from tatar_dist.rewards import audit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run, made with what a run writes with."""
    return write_run(tmp_path_factory.mktemp("report") / "run", steps=15, images=40, side=(64, 48))


@pytest.fixture(scope="module")
def page(run):
    return report(run)


# Scores -------------------------------------------------------------------------------------------------------------


def test_the_logistic_that_is_drawn_is_the_one_behind_the_fitted_plcc():
    rng = np.random.default_rng(0)
    prediction = rng.uniform(0, 100, 200)
    target = 20 + 60 / (1 + np.exp(-(prediction - 40) / 9)) + rng.normal(0, 1, 200)
    fitted = logistic_map(target, prediction)
    assert fitted(np.array([40.0]))[0] == pytest.approx(50, abs=1)
    assert np.all(np.diff(fitted(np.linspace(0, 100, 50))) >= 0)
    assert plcc(target, fitted(prediction)) == pytest.approx(plcc_fitted(target, prediction))


def test_calibration_counts_every_parsed_answer_in_the_bin_of_its_score():
    found = bins(np.array([10.0, 30.0, 90.0, 50.0]), np.array([12.0, 18.0, 100.0, np.nan]))
    assert [(b.low, b.high, b.n, b.predicted, b.target) for b in found] == [(10, 20, 2, 15, 20), (90, 100, 1, 100, 90)]
    assert miscalibration(found) == pytest.approx((2 * 5 + 10) / 3)
    assert bins(np.array([1.0]), np.array([np.nan])) == []


def test_held_out_scores_are_drawn_with_their_fit_and_calibration(tmp_path):
    page = report(evaluation(tmp_path, {"set-iqa": scores()}, predictions(30, off=5.0)))
    assert len([a for a in page.of("path") if a.get("class") == "fit"]) == 1
    assert "Calibration off by" in page.text and "Calibration in numbers" in page.text


def test_answers_that_do_not_rise_with_the_target_get_no_curve(tmp_path):
    rows = [p | {"prediction": 100.0 - p["target"]} for p in predictions(10)]
    page = report(evaluation(tmp_path, {"set-iqa": scores()}, rows))
    assert page.of("svg") and not [a for a in page.of("path") if a.get("class") == "fit"]


# Rollouts -----------------------------------------------------------------------------------------------------------


def test_all_rollouts_are_read_and_a_damaged_file_is_named(run, tmp_path):
    training = read_run(run).trainings[0]
    found = read_rollouts(training, [])
    assert len(found.rows) == 15 * PROMPTS * GROUP and len(found.part(late=True)) == 3 * PROMPTS * GROUP
    assert 0 < sum(r["prediction"] is None for r in found.rows) < 0.1 * len(found.rows)
    last = pq.read_table(run / "rollouts" / "step_000014.parquet").to_pylist()[7]
    (row,) = (r for r in found.rows if (r["file"], r["row"]) == (14, 7))
    assert found.text(row) == last["completion"] and row["target"] == last["target"]
    lines(tmp_path, grpo_rows())
    rollouts(tmp_path, [{"sample_id": "s", "completion": None}, {"sample_id": "t", "completion": "x"}], step=1)
    for step in range(2, 10):
        (tmp_path / "rollouts" / f"step_{step:06d}.parquet").write_text("no")
    page = report(tmp_path)
    assert sum("could not be read" in n for n in page.notes) == 6  # five by name, and that there are more
    assert "3 more files of rollouts could not be read" in page.notes


def test_rollouts_without_a_column_or_with_another_type_cost_only_themselves(tmp_path):
    run = lines(tmp_path, grpo_rows())
    rollouts(run, [{"sample_id": "s", "completion": 5}], step=1)
    pq.write_table(pa.table({"dataset": ["d"], "task": ["iqa"]}), run / "rollouts" / "step_000002.parquet")
    page = report(run)
    assert page.notes == [
        "rollouts/step_000001.parquet could not be read: column completion holds no text",
        "rollouts/step_000002.parquet could not be read: no column sample_id",
    ]
    assert "How it went" in page.sections


def test_a_grpo_run_shows_its_answers_early_and_late_and_what_changed(page):
    assert page.sections == [
        "Is it healthy?",
        "How it went",
        "Where it is wrong",
        "What it says",
        "Why it was rewarded",
    ]
    assert "early SRCC" in page.text and "late SRCC" in page.text
    assert "Most improved" in page.text and "asked first" in page.text and "asked last" in page.text
    assert page.notes == [] and page.of("img")


# Rewards ------------------------------------------------------------------------------------------------------------


def test_every_completion_of_a_group_is_shown_with_the_terms_that_the_run_wrote(run, page):
    rows = pq.read_table(run / "rollouts" / "step_000014.parquet").to_pylist()
    groups: dict[str, list[dict]] = {}
    for r in rows:
        groups.setdefault(r["group_id"], []).append(r)
    iqa = [g for g in groups.values() if g[0]["task"] == "iqa"]
    widest = max(iqa, key=lambda g: np.std([r["reward"] for r in g]))
    shown = page.source[page.source.index("Rewards furthest apart: this group teaches most</p>") :]
    table = shown[: shown.index("</table>")]
    assert [f"<b>{r['reward']:.3f}</b>" for r in sorted(widest, key=lambda r: -r["reward"])] == re.findall(
        r"<b>[\d.]+</b>", table
    )
    assert re.findall(r'scope="col">(\w+)', table)[2:5] == ["gaussian", "format", "length"]


def test_the_comparisons_are_those_of_rewards_explain(run, page):
    file = run / "rollouts" / "step_000014.parquet"
    found = audit.run(file)
    tables = [audit.explain_table(found, row) for row, r in enumerate(found.rows, 1) if r["task"] == "iaa"]
    means = {f"{float(m):.4f}" for table in tables for m in re.findall(r"weighted mean ([\d.]+)", table)}
    shown = re.findall(r"weighted, is (\d\.\d{4})", page.text)
    assert len(shown) >= 2 and set(shown) <= means
    assert "the run wrote down" not in page.text


def test_a_regret_is_shown_in_nats_with_what_it_pays(run, tmp_path):
    copy, params = lines(tmp_path / "copy", grpo_rows()), {"thurstone_measure": "regret", "thurstone_scale": "shared"}
    rows = pq.read_table(run / "rollouts" / "step_000014.parquet").to_pylist()
    terms = audit.run(run / "rollouts" / "step_000014.parquet", params=params).scored.terms["thurstone"]
    paid = [r | {"thurstone": None if np.isnan(t) else float(t)} for r, t in zip(rows, terms, strict=True)]
    (copy / "rollouts").mkdir()
    pq.write_table(pa.Table.from_pylist(paid), copy / "rollouts" / "step_000014.parquet")
    (copy / "config.yaml").write_text(json.dumps({"reward": {"preset": "tatar", "params": params}}))
    page = report(copy).text
    assert "the run wrote down" not in page
    shown = re.findall(r"weighted, is (\d\.\d{4}), which pays (\d\.\d{4})", page)
    assert len(shown) >= 2 and all(abs(np.exp(-float(a) / 0.2) - float(b)) < 5e-4 for a, b in shown)


def test_a_term_that_comes_out_otherwise_than_the_run_wrote_is_said(run, tmp_path):
    copy = lines(tmp_path / "copy", [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()])
    (copy / "config.yaml").write_text(json.dumps({"reward": {"preset": "paper", "params": {"thurstone_tau": 2.0}}}))
    (copy / "rollouts").mkdir()
    (copy / "rollouts" / "step_000014.parquet").write_bytes((run / "rollouts" / "step_000014.parquet").read_bytes())
    assert "the run wrote down 0." in report(copy).text


def test_a_preset_of_ones_own_is_not_loaded_and_the_page_says_so(run, tmp_path):
    copy = lines(tmp_path / "copy", grpo_rows())
    (copy / "rollouts").mkdir()
    (copy / "rollouts" / "step_000014.parquet").write_bytes((run / "rollouts" / "step_000014.parquet").read_bytes())
    (copy / "config.yaml").write_text(json.dumps({"reward": {"preset": "mine.yaml"}}))
    page = report(copy)
    assert page.notes == ["the comparisons behind its reward: preset mine.yaml is not one of ours"]
    assert "Why it was rewarded" in page.sections and "What the Thurstone term" not in page.text


# Configuration ------------------------------------------------------------------------------------------------------


def test_what_differs_from_the_recipe_is_marked_and_other_stages_are_left_out(page):
    config = {
        "seed": 0,
        "grpo": {"group_size": 16, "kl_beta": 0.001, "optim": {"betas": [0.9, 0.999]}},
        "sft": {"epochs": 9},
    }
    found = {s.key: s for s in settings(config, "grpo")}
    assert list(found) == ["seed", "grpo.group_size", "grpo.kl_beta", "grpo.optim.betas"]
    assert [k for k, s in found.items() if s.differs] == ["grpo.group_size"] and found["grpo.group_size"].default == "8"
    assert re.search(r"GRPO: configuration \d+ of \d+ values differ from the recipe, configs/grpo.yaml", page.text)


def test_only_differing_keys_of_runs_are_compared():
    a, b = {"grpo": {"kl_beta": 0.1, "group_size": 8}}, {"grpo": {"kl_beta": 0.2, "group_size": 8}, "seed": 1}
    assert differing([a, b], "grpo") == [("grpo.kl_beta", ["0.1", "0.2"]), ("seed", ["—", "1"])]


# Faults -------------------------------------------------------------------------------------------------------------


def event(name: str, time: float = 0.0, **fields) -> dict:
    return {"time": 1000.0 + time, "event": name, "step": 3, "phase": "learn", **fields}


def test_the_log_of_faults_is_by_time_and_counted():
    found = history(
        [
            event("run/start", total=60),
            event("phase", 1),
            event("engine/dead", 5.5, engine=1, reason="it\ndied"),
            event("engine/restarting", 6, engine=1, attempt=1),
            event("engine/ready", 9, engine=1),
            event("learners/failed", 10, reason="rank 1"),
            event("stall", 20, seconds=50.0),
        ],
        13,
    )
    assert found.summary == "1 engine failure, 1 learner failure, 1 stall"
    assert [(e.seconds, e.what, e.bad) for e in found.entries[1:3]] == [
        (5.5, "engine 1 dead", True),
        (6.0, "engine 1 restarting", False),
    ]
    assert found.entries[1].detail == "it died" and found.progress.endswith("after 13 of 60 steps.")
    ((engine, state, counts),) = found.engines
    assert (engine, counts["dead"], counts["ready"], state) == (1, 1, 1, "healthy")


def test_a_run_that_ended_has_no_word_about_its_progress_and_one_without_events_no_history():
    assert history([event("run/start", total=2), event("run/end", 1)], 2).progress == ""
    assert history([event("run/start", total=2), event("run/interrupted", 1)], 1).progress.startswith("It was interr")
    assert history([], 5) is None and history([{"event": 3}, {"time": "x", "event": "stall"}], 5) is None


def test_a_page_says_what_befell_the_processes(page):
    assert "GRPO processes: 1 engine failure" in page.text and "engine 1 dead" in page.text
    assert "Sync gap" in page.text and "Groups that teach nothing" in page.text
    assert re.search(r"generate 3\.0 s, 70%", page.text)


def test_hostile_events_keys_terms_and_groups_are_text(run, tmp_path):
    copy = lines(tmp_path / "copy", grpo_rows())
    lines(
        copy,
        [event("engine/dead", engine=HOSTILE, reason=HOSTILE), event("stall", **{HOSTILE: HOSTILE})],
        "events.jsonl",
    )
    (copy / "config.yaml").write_text(json.dumps({HOSTILE: {HOSTILE: HOSTILE}, "grpo": {"logprob_gap_limit": HOSTILE}}))
    rows = pq.read_table(run / "rollouts" / "step_000014.parquet").to_pylist()
    rollouts(copy, [r | {"group_id": HOSTILE + r["group_id"], HOSTILE: 0.5, "thurstone": None} for r in rows])
    page = report(copy)
    assert "<script" not in page.source and "<img src=x" not in page.source
    assert page.source.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 6
    assert_safe(page)
