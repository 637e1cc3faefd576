"""The probes' table, from run directories: who was better, by how much, how surely; rationales in the other style."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from tatar_dist.assets import CONFIGS
from tatar_dist.demo import probes
from tatar_dist.demo.data.make import make_demo, restyle
from tatar_dist.demo.pipeline import demo_config
from tatar_dist.demo.probes import METHOD, RUNS

N = 120


def fill(out, noise, reward_sd, constant=False):
    """Two seeds of every run; `noise`: run -> the spread of its answers around the truth."""
    rng = np.random.default_rng(0)
    target = rng.uniform(0, 100, N)
    for seed in range(2):
        for stage, change in RUNS:
            directory, name = out / f"seed_{seed}", f"{stage}-{change}"
            sd = noise.get(name, 5.0)
            answers = np.full(N, 50.0) if constant else np.clip(target + rng.normal(0, sd, N), 0, 100)
            rows = [
                {"sample_id": f"{task}-{i}", "task": task, "source": f"photo-{i % 6}", "target": t, "prediction": a}
                for task in ("iqa", "iaa")
                for i, (t, a) in enumerate(zip(target.tolist(), answers.tolist(), strict=True))
            ]
            (directory / f"{name}-eval").mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist(rows), directory / f"{name}-eval" / "predictions.parquet")
            (directory / name).mkdir()
            lines = [
                {
                    f"reward/{term}/iaa": (0.0 if constant else 0.5 + 0.01 * step + rng.normal(0, reward_sd[term]))
                    for term in ("thurstone", "gaussian", "total")
                }
                for step in range(30)
            ]
            (directory / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_better_choice_is_said_to_be_better_and_a_worse_one_worse(tmp_path):
    noise = {"sft-tatar": 5.0, "sft-slow-iqa": 40.0, "sft-fast-iaa": 5.0, "grpo-tatar": 40.0}
    fill(tmp_path, noise, {"thurstone": 0.01, "gaussian": 0.04, "total": 0.02})
    found = probes.write_figures(tmp_path, 2, Console(quiet=True))
    iqa_style, iaa_style, iqa_reward, iaa_reward = found["probes"]
    assert [probes.verdict(r) for r in (iqa_style, iqa_reward, iaa_reward)] == [
        "yes",
        "no, the reverse",
        "no, the reverse",
    ]
    assert probes.verdict(iaa_style) == "no difference seen" and abs(iaa_style["difference"][0]) < 0.01
    value, lo, hi = iqa_style["difference"]
    each = np.subtract(iqa_style["srcc_choice"], iqa_style["srcc_other"])
    assert lo < value < hi and value == pytest.approx(each.mean(), abs=1e-9)
    ratio, lo, hi = found["iaa_reward"]["cv_ratio_gaussian_over_thurstone"]
    assert 1 < lo < ratio < hi and 2 < ratio < 7  # four times the spread, about the same mean
    table = (tmp_path / "probes.md").read_text()
    assert table.count("no, the reverse") == 2 and "IQA | fast rationale" in table
    assert "<svg" in (tmp_path / "probes.svg").read_text()
    assert json.loads((tmp_path / "probes.json").read_text()) == found


def test_a_rising_reward_is_not_an_unsteady_one():
    rising = np.linspace(0.2, 0.9, 50)
    np.testing.assert_allclose(probes.residuals(rising), 0, atol=1e-12)


def test_what_is_undefined_is_a_dash_and_valid_json(tmp_path):
    fill(tmp_path, {}, {"thurstone": 0.0, "gaussian": 0.0, "total": 0.0}, constant=True)
    found = probes.write_figures(tmp_path, 2, Console(quiet=True))
    assert found["probes"][0]["srcc_choice"] == [None, None]
    assert {probes.verdict(r) for r in found["probes"]} == {"undefined"}
    assert "—" in (tmp_path / "probes.md").read_text() and "nan" not in (tmp_path / "probes.md").read_text()


def test_rationales_in_the_other_style_keep_everything_else_and_say_no_number(tmp_path):
    make_demo(tmp_path, train=12, validation=2, test=2, workers=1)
    restyle(tmp_path)
    for task, style, shortest, longest in (("iqa", "slow", 125, 160), ("iaa", "fast", 30, 50)):
        before = pq.read_table(tmp_path / f"{task}_train.parquet").to_pylist()
        after = pq.read_table(tmp_path / f"{task}_train_{style}.parquet").to_pylist()
        for old, new in zip(before, after, strict=True):
            assert {**old, "rationale": None} == {**new, "rationale": None}
            assert shortest <= len(new["rationale"].split()) <= longest
            assert not any(c.isdigit() for c in new["rationale"])
        if task == "iqa":  # what was applied is named with its strength, what was not is said to be absent
            for row in after:
                families = {d["family"] for d in json.loads(row["meta"])["distortions"]}
                assert ("no clear colour banding" in row["rationale"]) == ("banding" not in families)
                assert ("no clear random noise" in row["rationale"]) == ("noise" not in families)


def test_every_change_is_a_config_that_loads_over_the_demos(tmp_path):
    files = [CONFIGS / "probes" / "probe.yaml"]
    base = demo_config(tmp_path / "run", tmp_path, [], files)
    changes = {change for _, change in RUNS} - {METHOD}
    assert changes | {"probe"} == {f.stem for f in (CONFIGS / "probes").glob("*.yaml")}
    for change in changes:
        config = demo_config(tmp_path / "run", tmp_path, [], [*files, CONFIGS / "probes" / f"{change}.yaml"])
        differing = [
            key for key in ("data", "reward", "grpo", "sft", "rollout") if getattr(config, key) != getattr(base, key)
        ]
        assert differing == (["reward"] if config.reward != base.reward else ["data"])
