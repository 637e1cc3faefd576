"""The rule for the default reward, from run directories: who is eligible, who replaces the incumbent."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tatar_dist.demo import forms
from tatar_dist.demo.pipeline import demo_config

N = 160
HEALTHY = {"noise": 12.0, "unparsed": 0, "share": 0.8, "first": 0.8}


def fill(out, **cells):
    """Three seeds of every cell; `cells`: what differs from HEALTHY."""
    rng = np.random.default_rng(0)
    target = rng.uniform(0, 100, N)
    for seed in range(3):
        for cell in forms.CELLS:
            asked = HEALTHY | cells.get(cell.replace("-", "_"), {})
            directory = out / f"seed_{seed}"
            answers = (target + rng.normal(0, asked["noise"], N)).tolist()
            rows = [
                {
                    "sample_id": f"{task}-{i}",
                    "task": task,
                    "source": f"photo-{i % 2}",
                    "target": t,
                    "prediction": None if i < asked["unparsed"] else answers[i],
                }
                for task in ("iqa", "iaa")
                for i, t in enumerate(target.tolist())
            ]
            (directory / f"{cell}-eval").mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist(rows), directory / f"{cell}-eval" / "predictions.parquet")
            (directory / cell).mkdir()
            shares = [asked["first"], *[asked["share"]] * 19]
            keys = [f"reward/share_parsed/{term}/{task}" for task, term in forms.TERMS.items()]
            lines = [json.dumps(dict.fromkeys(keys, share)) for share in shares]
            (directory / cell / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return forms.choose([out / f"seed_{k}" for k in range(3)], rounds=100)


@pytest.mark.parametrize(
    ("cells", "chosen"),
    [
        ({}, "regret-per_term"),
        ({"bce_std": {"noise": 2.0}}, "bce-std"),
        ({"bce_std": {"noise": 2.0, "unparsed": 4}}, "regret-per_term"),
        ({"bce_std": {"noise": 2.0, "share": 0.4}}, "regret-per_term"),
        ({"bce_std": {"noise": 2.0, "first": 0.3}}, "regret-per_term"),
        ({"bce_std": {"noise": 5.0}, "fidelity_std": {"noise": 1.0}}, "fidelity-std"),
        ({"regret_per_term": {"unparsed": 9}, "bce_std": {"noise": 11.0}, "regret_std": {"noise": 5.0}}, "regret-std"),
        (dict.fromkeys((c.replace("-", "_") for c in forms.CELLS), {"share": 0.1}), None),
    ],
)
def test_the_rule(tmp_path, cells, chosen):
    found = fill(tmp_path, **cells)
    assert found["chosen"] == chosen
    assert (chosen or "the default stays") in forms.sentence(found)
    rows = forms.table(found)
    assert len(rows) == 6 and all(len(row) == len(forms.HEAD) for row in rows)
    assert rows[0][0] == (chosen or "bce-std")


def test_figures_of_a_cell_are_those_of_its_files(tmp_path):
    found = fill(tmp_path, bce_std={"unparsed": 4, "share": 0.6, "first": 0.2})["cells"]
    cell = found["bce-std"]
    assert cell["parsed"] == pytest.approx(1 - 4 / N) and not cell["eligible"]
    assert cell["share"]["iaa"] == pytest.approx((0.2, (0.2 + 19 * 0.6) / 20))
    assert len(cell["srcc_iaa"]) == 3 and all(0.9 < s < 1 for s in cell["srcc_iaa"])
    assert found[forms.INCUMBENT]["difference"] == [0, 0, 0]


def test_a_cell_states_every_key_that_the_rule_varies(tmp_path):
    for cell, words in forms.CELLS.items():
        config = demo_config(tmp_path, tmp_path, words)
        form, advantage = cell.split("-")
        assert config.reward.params["thurstone_measure"] == form and config.grpo.advantage == advantage
        assert config.reward.preset == "paper"  # which never changes, whatever the default is
