"""The page of a run: what it shows, and figures that are no numbers."""

from __future__ import annotations

import json
import re

import pytest
from report_pages import (
    demo,
    evaluation,
    grpo_rows,
    lines,
    one_row_manifest,
    predictions,
    report,
    rollouts,
    scores,
    sft_rows,
)

from tatar_dist.report.reading import read_run
from tatar_dist.report.verdict import checks

# What is shown ------------------------------------------------------------------------------------------------------


def test_a_supervised_run_shows_its_loss_and_its_health_and_leaves_out_the_rest(tmp_path):
    page = report(lines(tmp_path / "mine", sft_rows()))
    assert f"SFT · {tmp_path.name}/mine" in page.text and page.of("title") and "SFT, 12 steps" in page.text
    assert page.sections == ["Is it healthy?", "How it went"]
    assert "SFT loss and gradients finite: at every step" in page.text
    assert "Held-out loss (quality): 1.25 → 0.95." in page.text
    assert page.notes == [] and not page.of("img")


def test_a_grpo_run_shows_rewards_policy_times_and_what_it_said_last(tmp_path):
    lines(tmp_path, grpo_rows())
    rollouts(tmp_path, [{"sample_id": "old", "completion": "<answer>1.00</answer>"}], step=3)
    said = "<think>a dull view</think><answer>52.00</answer>"
    rollouts(tmp_path, [{"sample_id": "s1", "completion": said}, {"sample_id": "s1", "completion": "second"}], step=9)
    page = report(tmp_path)
    assert page.sections == ["Is it healthy?", "How it went", "What it says"]
    for title in ("Reward, quality", "Reward, aesthetics", "Completion length", "Policy", "Step time"):
        assert title in page.text
    assert "a dull view" in page.text and "second" not in page.text and "<dd>1.0</dd>" not in page.source
    assert "Engines and learners hold the same weights: largest gap 1e−7 nats" in page.text
    assert len(page.of("svg")) >= 6


def test_pictures_of_a_run_come_from_the_manifest_that_its_config_names(tmp_path):
    manifest = one_row_manifest(tmp_path, "s1")
    run = lines(tmp_path / "run", grpo_rows())
    (run / "config.yaml").write_text(json.dumps({"data": {"train": [str(manifest)]}, "grpo": {"group_size": 8}}))
    rollouts(run, [{"sample_id": s, "completion": "<answer>50.00</answer>"} for s in ("s1", "s2")])
    page = report(run)
    (image,) = page.of("img")
    assert image["src"].startswith("data:image/png;base64,") and image["alt"] == "held-out image s1"
    assert "no picture" in page.text  # s2 is not in the manifest
    assert "GRPO completions a prompt 8" in page.text


def test_an_evaluation_shows_scores_scatter_photographs_and_answers(tmp_path):
    rows = predictions(20) + predictions(20, "set-iaa", "iaa", "b")
    page = report(evaluation(tmp_path, {"set-iqa": scores(0.91), "set-iaa": scores(0.5)}, rows))
    assert page.sections == ["Is it healthy?", "Where it is wrong", "What it says"]
    assert "Held-out scores: quality SRCC 0.91, aesthetics SRCC 0.50" in page.text
    assert "By source photograph" in page.text and "photo 1" in page.text
    assert "view number 3 of set-iqa" in page.text


def test_an_evaluation_without_predictions_shows_its_table_alone(tmp_path):
    page = report(evaluation(tmp_path, {"set-iqa": scores(0.91)}))
    assert page.sections == ["Is it healthy?"] and "0.910" in page.text


def test_a_demo_tells_what_was_learned_changed_and_spent(tmp_path):
    page = report(demo(tmp_path / "demo"))
    assert page.sections == [
        "What GRPO changed",
        "Is it healthy?",
        "How it went",
        "Where it is wrong",
        "What it says",
        "Time",
    ]
    assert "It learned to score quality and aesthetics" in page.text
    assert "quality none → 0.90" in page.text
    assert "+0.200 rose" in page.text and "+0.010 no clear change" in page.text
    assert "70 s in all, of a budget of 90 s" in page.text and "reused" in page.text
    assert {a["alt"][:16] for a in page.of("img")} == {"held-out image q"}
    assert page.notes == []


def test_a_demo_that_was_stopped_halfway_shows_the_stages_that_ran(tmp_path):
    evaluation(tmp_path / "baseline", {"demo-iqa": scores(0.1)}, predictions(10, "demo-iqa"))
    lines(tmp_path / "sft", sft_rows(3))
    (tmp_path / "settings.json").write_text("{}")
    page = report(tmp_path)
    assert "Demo ·" in page.text and "Time" not in page.sections and "What GRPO changed" not in page.sections
    assert "Held-out scores: quality SRCC 0.10" in page.text


def my_runs(where):
    """What the two stages and `evaluate` leave, as configs/README.md runs them; the last is of another run."""
    manifest = one_row_manifest(where, "3")
    for stage, rows, start in (
        ("sft", sft_rows(), "models/base"),
        ("grpo", grpo_rows(), "runs/my/sft/checkpoints/a/model"),
    ):
        run = lines(where / "my" / stage, rows)
        (run / "config.yaml").write_text(json.dumps({"model": {"path": start}}))
    for name, srcc, model in (
        ("sft-eval", 0.7, "runs/my/sft/checkpoints/a/model"),
        ("eval", 0.8, "runs/my/grpo/checkpoints/latest/model"),
        ("other-eval", 0.1, "runs/other/grpo/checkpoints/latest/model"),
    ):
        place = evaluation(where / "my" / name, {"set-iqa": scores(srcc)}, predictions(20))
        (place / "config.yaml").write_text(json.dumps({"data": {"test": [str(manifest)]}}))
        (place / "metrics.json").write_text(json.dumps({"model": model, "datasets": {"set-iqa": scores(srcc)}}))
    return where / "my"


@pytest.mark.parametrize(
    ("run", "kicker", "figure", "models"),
    [
        ("grpo", "GRPO · my/grpo", "0.80", ["start", "GRPO"]),
        ("sft", "SFT · my/sft", "0.70", ["SFT"]),
        (".", "SFT and GRPO · runs/my", "0.80", ["SFT", "GRPO"]),
    ],
)
def test_a_run_is_shown_with_the_evaluation_beside_it_under_its_own_name(tmp_path, run, kicker, figure, models):
    page = report(my_runs(tmp_path / "runs") / run)
    assert kicker in page.text and "Demo" not in page.text
    assert f"Held-out scores: quality SRCC {figure}" in page.text and "Where it is wrong" in page.sections
    assert re.findall(r'<td class="left">(.*?)</td><td>10</td>', page.source) == models
    (image,) = page.of("img")  # of the manifest that the evaluation read
    assert image["alt"] == "held-out image 3" and page.notes == []


def test_runs_that_were_evaluated_before_training_say_whether_they_learned(tmp_path):
    my = my_runs(tmp_path / "runs")
    (my / "other-eval/metrics.json").write_text(
        json.dumps({"model": "models/base", "datasets": {"set-iqa": scores(0.1)}})
    )
    page = report(my)
    assert "It learned to score quality" in page.text and "before and after: quality 0.10 → 0.80" in page.text


def test_a_run_of_one_step_has_a_page(tmp_path):
    assert "SFT, 1 step" in report(lines(tmp_path / "a", [{"step": 0, "loss/total": 2.0}])).text
    assert "GRPO, 1 step" in report(lines(tmp_path / "b", grpo_rows(1))).text


def test_writing_again_replaces_the_page_and_leaves_nothing_beside_it(tmp_path):
    lines(tmp_path, sft_rows(2))
    report(tmp_path)
    lines(tmp_path, sft_rows(3))
    assert "SFT, 3 steps" in report(tmp_path).text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]


def test_a_page_of_a_harmless_run_names_no_address_on_the_web(tmp_path):
    source = report(demo(tmp_path / "demo")).source
    assert "//" not in re.sub('"data:image/[^"]*"', "", source)


# Figures that are no numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [float("nan"), None])
def test_a_rank_correlation_that_is_no_number_is_a_dash_with_its_reason(tmp_path, absent):
    bad = scores(absent, reason={"srcc": "all predictions are equal"})
    page = report(evaluation(tmp_path, {"set-iqa": bad, "set-iaa": scores(0.5)}))
    (dash,) = [a for a in page.of("span") if a.get("class") == "na"]
    assert dash["title"] == "all predictions are equal"
    assert page.source.count(">—</span>") == 1 and "0.500" in page.text
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page.source, flags=re.DOTALL).lower()


def test_without_any_rank_correlation_the_page_says_why(tmp_path):
    bad = scores(None, n_parsed=0, plcc=None, mae=None, reason={"srcc": "no usable row"})
    page = report(evaluation(tmp_path, {"set-iqa": bad}))
    assert "No rank correlation could be computed: no usable row." in page.text
    assert "Held-out answers without a score (this model): 10 of 10" in page.text


def test_a_loss_that_is_no_number_fails_a_check_and_draws_no_point(tmp_path):
    rows = sft_rows()
    rows[4]["loss/total"] = float("nan")
    rows[5]["loss/total"] = float("inf")
    rows[6]["loss/total"] = None  # how a run writes the two above
    page = report(lines(tmp_path, rows))
    assert "SFT loss and gradients finite: not at 3 steps" in page.text
    assert all("nan" not in a["d"].lower() and "inf" not in a["d"].lower() for a in page.of("path"))


@pytest.mark.parametrize("rows", [sft_rows, grpo_rows])
def test_a_run_whose_metrics_are_all_null_has_a_page(tmp_path, rows):
    names = {k for r in rows() for k in r if k != "step"} | {"eval/set-iqa/srcc"}
    page = report(lines(tmp_path, [{"step": i, **dict.fromkeys(names)} for i in range(6)]))
    assert "loss and gradients finite: not at 6 steps" in page.text and not page.notes
    assert "None" not in page.text


def test_an_answer_without_a_score_is_counted_among_the_worst(tmp_path):
    rows = predictions(10)
    rows[7] |= {"prediction": None, "completion": "I would rather not say"}
    page = report(evaluation(tmp_path, {"set-iqa": scores(n_parsed=9)}, rows))
    worst = page.text[page.text.index("Furthest from the target") :]
    assert "I would rather not say" in worst and "this model none" in worst


@pytest.mark.parametrize(("lost", "mark"), [(0.01, "good"), (0.03, "watch"), (0.24, "watch"), (0.89, "bad")])
def test_the_mark_of_lost_answers_grows_with_their_share(tmp_path, lost, mark):
    n_parsed = round(100 * (1 - lost))
    held_out = evaluation(tmp_path / "eval", {"set-iqa": scores(n=100, n_parsed=n_parsed)})
    sampled = lines(tmp_path / "run", [r | {"completion/parse_failures/iqa": lost} for r in grpo_rows()])
    for run, name in ((held_out, "Held-out answers without a score"), (sampled, "Sampled answers without a score")):
        (check,) = [c for c in checks(read_run(run)) if c.name.startswith(name)]
        assert check.state == mark and check.expected.endswith("red from 25%")


def test_an_answer_above_the_scale_is_shown_as_it_is_scored(tmp_path):
    rows = predictions(10)
    rows[9] |= {"prediction": 217.8, "target": 99.0}
    text = report(evaluation(tmp_path, {"set-iqa": scores()}, rows)).text
    assert "target 99.0 this model 100.0 from 217.8" in text


def verdict_of(page):
    """Question -> (answer, the section that its link names, or None)."""
    found = re.findall(r"<a(?: href=\"#(\w+)\")?><small>(.*?)</small> (.*?)</a>", page.source)
    return {question: (answer, id or None) for id, question, answer in found}


def test_the_verdict_answers_four_questions_with_links_that_lead_somewhere(tmp_path):
    page = report(demo(tmp_path / "demo"))
    assert verdict_of(page) == {
        "Did it learn?": ("yes: quality and aesthetics", "scores"),
        "Is it healthy?": ("all 10 checks pass", "health"),
        "How good is it?": ("SRCC quality 0.90 (SFT 0.70), aesthetics 0.90 (SFT 0.70)", "scores"),
        "Look first at": ("the answers furthest from the target", "says"),
    }
    assert {id for _, id in verdict_of(page).values()} <= {s.get("id") for s in page.of("section")}


def test_the_verdict_of_a_training_alone_is_its_curves_and_its_worst_check(tmp_path):
    rows = [r | {"completion/parse_failures/iqa": 0.89, "completion/clipped_ratio/iqa": 0.1} for r in grpo_rows()]
    found = verdict_of(report(lines(tmp_path / "run", rows)))
    assert found["Did it learn?"] == ("reward rose for quality, not for aesthetics", "went")
    assert found["How good is it?"] == ("not evaluated", None)
    assert found["Is it healthy?"][0].endswith("checks pass, 1 red")
    assert found["Look first at"] == ("Sampled answers without a score: quality 89.0%", "health")
