"""The page that compares runs: who learned more and how sure that is, what was set differently, what is not there."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from report_pages import HOSTILE, Page, assert_safe, demo, evaluation, grpo_rows, lines, scores, sft_rows

from tatar_dist.cli import main
from tatar_dist.errors import UserError
from tatar_dist.report.compare import short_names, write


def compare(tmp_path, *runs) -> Page:
    page = Page(write(list(runs), tmp_path / "both.html"))
    assert_safe(page)
    return page


def answers(n: int, noise: float, seed: int = 0, dataset: str = "set-iqa") -> list[dict]:
    """n answers, the same targets whatever the seed, from six photographs."""
    target = np.random.default_rng(99).uniform(5, 95, n)
    prediction = np.clip(target + np.random.default_rng(seed).normal(0, noise, n), 0, 100)
    base = {"dataset": dataset, "task": dataset[-3:], "completion": "", "truncated": False}
    return [
        base | {"sample_id": str(i), "source": f"p{i % 6}", "target": float(t), "prediction": float(p)}
        for i, (t, p) in enumerate(zip(target, prediction, strict=True))
    ]


def test_a_run_that_scores_held_out_images_better_than_chance_explains_is_named_first(tmp_path):
    a = evaluation(tmp_path / "a", {"set-iqa": scores(0.70, n=300, n_parsed=290)}, answers(300, 25.0))
    b = evaluation(tmp_path / "b", {"set-iqa": scores(0.97, n=300, n_parsed=300)}, answers(300, 5.0))
    page = compare(tmp_path, a, b)
    assert "<h1>B scores quality best</h1>" in page.source
    assert "B 0.970 (n = 300, 100% parsed), A 0.700 (n = 300, 96.7% parsed)" in page.text
    assert re.search(
        r"B − A: \+0\.\d+ \(95 % \+0\.\d+ to \+0\.\d+\), the same 300 images resampled by source", page.text
    )
    assert '<td class="top">0.970</td>' in page.source and '<td class="top">0.700</td>' not in page.source


def test_two_runs_that_chance_could_tell_apart_are_not_ranked(tmp_path):
    a = evaluation(tmp_path / "a", {"set-iqa": scores(0.90)}, answers(60, 12.0, 1))
    b = evaluation(tmp_path / "b", {"set-iqa": scores(0.91)}, answers(60, 12.0, 2))
    assert "<h1>No clear difference on quality</h1>" in compare(tmp_path, a, b).source


def test_without_predictions_the_images_count_as_unpaired_and_with_too_few_nothing_is_claimed(tmp_path):
    a = evaluation(tmp_path / "a", {"set-iqa": scores(0.5, n=500, n_parsed=500)})
    b = evaluation(tmp_path / "b", {"set-iqa": scores(0.9, n=500, n_parsed=500)})
    page = compare(tmp_path, a, b)
    assert "<h1>B scores quality best</h1>" in page.source and "images taken as not paired" in page.text
    c = lines(tmp_path / "c", [{"step": i, "reward/total/iqa": 1.0, "eval/set-iqa/srcc": 0.1 * i} for i in range(5)])
    page = compare(tmp_path, c, a)
    assert "A is ahead" not in page.text and "<h1>B is ahead on quality, not tested for chance</h1>" in page.source
    assert "0.000 → 0.400 (n not logged)" in page.text


def test_without_held_out_scores_the_rise_of_the_reward_answers(tmp_path):
    a, b = (
        lines(tmp_path / "a", grpo_rows(20)),
        lines(tmp_path / "b", [r | {"reward/total/iqa": 1.0} for r in grpo_rows(20)]),
    )
    page = compare(tmp_path, a, b)
    assert "A gained most reward on quality" in page.text and "no clear difference on aesthetics" in page.text
    assert "A 1.15 → 2.75, +1.60 (last 4 of 20 steps, 100% parsed)" in page.text


def test_rewards_that_were_configured_differently_are_said_to_be_so(tmp_path):
    a, b = lines(tmp_path / "a", grpo_rows(20)), lines(tmp_path / "b", grpo_rows(20)[::-1])
    for run, preset in ((a, "tatar"), (b, "binary")):
        (run / "config.yaml").write_text(json.dumps({"reward": {"preset": preset}, "seed": 0, "output": str(run)}))
    page = compare(tmp_path, a, b)
    assert "but the rewards differ" in page.text
    assert "reward.preset tatar binary" in page.text and "seed" not in page.text and "output" not in page.text


def test_curves_lie_over_each_other_one_line_a_run(tmp_path):
    runs = [lines(tmp_path / str(i), grpo_rows(5 + i)) for i in range(3)]
    page = compare(tmp_path, *runs)
    assert page.sections == ["Side by side", "What was set differently", "How they went", "Are they healthy?"]
    chart = page.source[page.source.index('aria-label="KL of each run"') :]
    chart = chart[: chart.index("</svg>")]
    assert [f"--r{i})" in chart for i in range(4)] == [True, True, True, False]
    assert len(re.findall(r"all \d+ checks pass", page.text)) == 3


def test_runs_of_other_kinds_stand_beside_each_other_with_dashes(tmp_path):
    runs = [lines(tmp_path / "s", sft_rows()), lines(tmp_path / "g", grpo_rows()), demo(tmp_path / "d")]
    runs.append(evaluation(tmp_path / "e", {"demo-iqa": scores(0.95)}, answers(20, 5.0, dataset="demo-iqa")))
    page = compare(tmp_path, *runs)
    for kind in ("SFT, 12 SFT steps", "GRPO, 10 GRPO steps", "demo, 12 SFT steps, 10 GRPO steps", "evaluation"):
        assert kind in page.text
    assert "C none" not in page.text and "C 0.900" in page.text and ">—<" in page.source


def test_damage_is_noted_by_run_and_figures_that_are_no_numbers_are_left_out(tmp_path):
    a, b = lines(tmp_path / "a", grpo_rows()), lines(tmp_path / "b", [r | {"loss/kl": None} for r in grpo_rows()])
    text = (b / "metrics.jsonl").read_text().splitlines()
    text[2] = text[2][:9]
    (b / "metrics.jsonl").write_text("\n".join(text) + "\n")
    page = compare(tmp_path, a, b)
    assert page.notes == ["B: b/metrics.jsonl: line 3 is not JSON and was left out"]
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page.source, flags=re.DOTALL).lower()


def test_runs_without_anything_in_common_are_said_to_be_so(tmp_path):
    page = compare(tmp_path, lines(tmp_path / "a", sft_rows()), lines(tmp_path / "b", grpo_rows()))
    assert "<h1>Nothing that these runs share says which learned more</h1>" in page.source


def test_hostile_names_and_values_are_text(tmp_path):
    run = lines(tmp_path / '"><img src=x onerror=alert(1)> {{ 7 * 7 }}', grpo_rows())
    other = lines(tmp_path / "b", [r | {f"reward/{HOSTILE.replace('/', '')}/iqa": 0.5} for r in grpo_rows()])
    for r, value in ((run, HOSTILE), (other, "x")):
        (r / "config.yaml").write_text(json.dumps({"grpo": {"mine": value}}))
    page = compare(tmp_path, run, other)
    assert "<img" not in page.source and "<script" not in page.source and "&lt;img src=x" in page.source


def test_names_are_as_short_as_they_can_be(tmp_path):
    assert short_names([tmp_path / "a" / "grpo", tmp_path / "b" / "grpo"]) == ["a/grpo", "b/grpo"]
    assert short_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]


def test_bad_input_is_one_line_and_leaves_no_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = lines(tmp_path / "a", grpo_rows())
    with pytest.raises(UserError, match="given twice"):
        write([a, a / ".." / "a"], tmp_path / "x.html")
    with pytest.raises(UserError, match="no such directory"):
        write([a, tmp_path / "b"], tmp_path / "x.html")
    with pytest.raises(UserError, match="cannot be written"):
        write([a, lines(tmp_path / "c", grpo_rows())], tmp_path / "nowhere" / "x.html")
    with pytest.raises(UserError, match="17 runs: compare 2 to 16"):
        write([a] * 17, tmp_path / "x.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "c"]


def test_the_command_writes_where_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        lines(tmp_path / name, sft_rows())
    assert main(["report", "a", "b"]) == 0 and capsys.readouterr().out == "compare.html\n"
    assert main(["report", "a", "b", "--output", "both.html"]) == 0 and (tmp_path / "both.html").is_file()
    assert main(["report", "a"]) == 0 and capsys.readouterr().out.endswith("a/report.html\n")
    assert main(["report", "a", "--output", "one.html"]) == 0
    assert (tmp_path / "one.html").read_text() == (tmp_path / "a" / "report.html").read_text()
