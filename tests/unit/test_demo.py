"""The demo's figures, from files as its stages leave them; and that results of two settings are never mixed."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tatar_dist.demo import figures as demo_figures
from tatar_dist.demo import pipeline as demo
from tatar_dist.errors import UserError

PHOTOS = ("alp", "bay", "cat", "dog")


def evaluation(directory, error: float, reward: float, seed: int, unparsed: int = 0) -> None:
    """60 crops a task: predictions off by `error` points, terms of about `reward`, two samples an image."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    predictions, sampled, datasets = [], [], {}
    for task, term in (("iqa", "gaussian"), ("iaa", "thurstone")):
        for i in range(60):
            target = float(np.random.default_rng(i).uniform(0, 100))
            value = None if i < unparsed else target + error * float(rng.normal())
            name = f"{task}-{i}"
            predictions.append(
                {"sample_id": name, "task": task, "source": PHOTOS[i % 4], "target": target, "prediction": value}
            )
            for k in range(2):
                parsed = k == 0 or i >= 2 * unparsed
                terms = {t: reward + 0.01 * float(rng.normal()) for t in (term, "format", "length")}
                row = {"sample_id": name, "task": task, "parsed": parsed, "gaussian": None, "thurstone": None}
                sampled.append(row | terms)
        datasets[f"demo-{task}"] = {"n": 60, "n_parsed": 60 - unparsed, "srcc": 0.5, "plcc": 0.5, "mae": error}
    pq.write_table(pa.Table.from_pylist(predictions), directory / "predictions.parquet")
    pq.write_table(pa.Table.from_pylist(sampled), directory / "sampled.parquet")
    (directory / "metrics.json").write_text(json.dumps({"datasets": datasets}))


@pytest.fixture
def seeds(tmp_path):
    for k in range(2):
        evaluation(tmp_path / f"seed_{k}" / "baseline", 40, 0.0, 10 * k, unparsed=30)
        evaluation(tmp_path / f"seed_{k}" / "sft_eval", 20, 0.4, 10 * k + 1)
        evaluation(tmp_path / f"seed_{k}" / "grpo_eval", 5, 0.5, 10 * k + 2, unparsed=1)
    return [tmp_path / f"seed_{k}" for k in range(2)]


def test_a_gain_is_found_with_an_interval_that_holds_it(seeds):
    found = demo_figures.gains(seeds[:1], "iqa")
    assert list(found) == ["reward_gaussian", "reward_format", "reward_length", "srcc"]
    for value, lo, hi in found.values():
        assert lo <= value <= hi and lo > 0
    assert found["reward_gaussian"][0] == pytest.approx(0.1, abs=0.01)


def test_seeds_are_pooled_as_the_mean_of_their_changes(seeds):
    by_seed = [demo_figures.gains([s], "iaa") for s in seeds]
    pooled = demo_figures.gains(seeds, "iaa")
    for name, (value, *_) in pooled.items():
        assert value == pytest.approx(np.mean([s[name][0] for s in by_seed]))


def test_by_photograph_ranks_among_its_own_crops_and_keeps_unparsed_ones(seeds):
    found = demo_figures.by_photograph(seeds[0], "iqa")
    assert {source: n for source, (n, *_) in found.items()} == dict.fromkeys(PHOTOS, 15)
    assert all(after > before for _, before, after in found.values() if before < 0.8)


def test_the_tables_of_the_readme_name_every_seed_and_photograph(seeds):
    head = {"iqa": 0.77, "iaa": 0.77}
    text = demo_figures.markdown(seeds, head)
    assert "0.770" in text and "seed 1" in text and "(59/60)" in text
    assert all(text.count(f"| {photo} | 15 |") == 2 for photo in PHOTOS)
    widths = {len(line.split("|")) for line in text.splitlines() if line.startswith("| iqa | dog")}
    assert widths == {7}


def test_sampled_answers_are_counted_and_their_term_averaged_among_those_that_parse(seeds):
    share, term = demo_figures.of_parsed(seeds, "grpo", "iaa")
    assert share == pytest.approx(118 / 120) and term == pytest.approx(0.5, abs=0.01)
    text = demo_figures.markdown(seeds, {"iqa": 0.77, "iaa": 0.77})
    assert "| iaa | that parse | 100.0% | 98.3% |" in text and "| iqa | gaussian among these | 0.4" in text


def test_a_demo_directory_keeps_its_settings(tmp_path):
    demo.same_settings(tmp_path / "d", {"smoke": True, "seeds": 1, "overrides": []})
    demo.same_settings(tmp_path / "d", {"smoke": True, "seeds": 1, "overrides": []})
    with pytest.raises(UserError, match="smoke=True"):
        demo.same_settings(tmp_path / "d", {"smoke": False, "seeds": 1, "overrides": []})


def test_a_demo_ends_with_the_shell_that_started_it(tmp_path):
    code = (
        "import sys, time; from tatar_dist.demo import pipeline\n"
        "pipeline.same_settings = lambda *_: (print('up', flush=True), time.sleep(300))\n"
        "pipeline.run(sys.argv[1])"
    )
    shell = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"
    command = [sys.executable, "-c", shell, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "up\n"
        killed = time.monotonic()
        parent.kill()
        parent.stdout.read()  # to the end of all that could write
        assert time.monotonic() - killed < 60
