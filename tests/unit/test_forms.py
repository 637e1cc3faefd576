"""The rule for the default reward, from run directories: who is eligible, who replaces the incumbent."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tatar_dist.demo import forms
from tatar_dist.demo.pipeline import demo_config
from tatar_dist.errors import UserError

N = 200
HEALTHY = {"noise": 12.0, "unparsed": 0, "share": 0.8, "first": 0.8, "task": "both"}


def fill(out, **cells):
    """Three seeds of every cell; `cells`: what differs from HEALTHY, on `task` only."""
    rng = np.random.default_rng(0)
    target = rng.uniform(0, 100, N)
    for seed, cell in itertools.product(range(3), forms.CELLS):
        directory, rows, lines = out / f"seed_{seed}", [], [{} for _ in range(20)]
        for task, term in forms.TERMS.items():
            asked = HEALTHY | cells.get(cell.replace("-", "_"), {})
            asked = asked if asked["task"] in ("both", task) else HEALTHY
            answers = (target + rng.normal(0, asked["noise"], N)).tolist()
            for i, t in enumerate(target.tolist()):
                row = {"sample_id": f"{task}-{i}", "task": task, "source": f"photo-{i % 2}", "target": t}
                rows.append(row | {"prediction": None if i < asked["unparsed"] else answers[i]})
            for step, line in enumerate(lines):
                share = asked["share"] if step else asked["first"]
                line |= {f"reward/share_parsed/{term}/{task}": share, f"reward/share/{term}/{task}": 0.25}
                line[f"reward/format/{task}"] = 0.9 if step < 10 else 0.97
        (directory / f"{cell}-eval").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), directory / f"{cell}-eval" / "predictions.parquet")
        (directory / cell).mkdir()
        (directory / cell / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return forms.choose([out / f"seed_{k}" for k in range(3)], rounds=100)


@pytest.mark.parametrize(
    ("cells", "chosen"),
    [
        ({}, "regret-per_term"),
        ({"bce_std": {"noise": 2.0}}, "bce-std"),
        ({"bce_std": {"noise": 2.0, "task": "iqa"}}, "regret-per_term"),  # IAA alone decides
        ({"bce_std": {"noise": 2.0, "unparsed": 2}}, "bce-std"),  # 99 % parse
        ({"bce_std": {"noise": 2.0, "unparsed": 3}}, "regret-per_term"),
        ({"bce_std": {"noise": 2.0, "share": 0.51, "first": 0.5}}, "bce-std"),
        ({"bce_std": {"noise": 2.0, "share": 0.48}}, "regret-per_term"),
        ({"bce_std": {"noise": 2.0, "first": 0.49}}, "regret-per_term"),
        ({"bce_std": {"noise": 2.0, "first": None}}, "regret-per_term"),  # a step without a share
        ({"bce_std": {"noise": 5.0}, "fidelity_std": {"noise": 1.0}}, "fidelity-std"),
        ({"regret_per_term": {"unparsed": 9, "task": "iqa"}, "regret_std": {"noise": 5.0}}, "regret-std"),
        (dict.fromkeys((c.replace("-", "_") for c in forms.CELLS), {"share": 0.1}), None),
    ],
)
def test_the_rule(tmp_path, cells, chosen):
    found = fill(tmp_path, **cells)
    assert found["chosen"] == chosen
    assert (chosen or "the default stays") in forms.sentence(found)
    assert "not the rule's" in forms.sentence(found | {"by_the_rule": False})
    rows = forms.table(json.loads(json.dumps(found), parse_constant=lambda _: None))
    assert len(rows) == 6 and all(len(row) == len(forms.HEAD) for row in rows)
    assert rows[0][0] == (chosen or "bce-std")


def test_figures_of_a_cell_are_those_of_its_files(tmp_path):
    found = fill(tmp_path, bce_std={"unparsed": 4, "share": 0.6, "first": 0.2})["cells"]
    cell = found["bce-std"]
    assert cell["parsed"] == pytest.approx(1 - 4 / N) and not cell["eligible"]
    assert cell["parsed_sampled"] == pytest.approx(0.97) and cell["share_all"]["iqa"] == pytest.approx((0.25, 0.25))
    assert cell["share"]["iaa"] == pytest.approx((0.2, (0.2 + 19 * 0.6) / 20))
    assert len(cell["srcc_iaa"]) == 3 and all(0.9 < s < 1 for s in cell["srcc_iaa"])
    assert found[forms.INCUMBENT]["difference"] == [0, 0, 0]


def test_what_is_called_resolved():
    differences = ((0.06, 0.01, 0.1), (0.04, 0.01, 0.1), (0.06, -0.01, 0.1), (-0.06, -0.1, -0.01))
    assert [forms._resolved(*d) for d in differences] == ["yes", "no", "no", "yes"]
    assert forms._resolved(0.1, None, None) == "undefined"


def test_keys_that_the_rule_varies_are_refused(tmp_path):
    with pytest.raises(UserError, match="grpo.advantage=std: --forms sets this key itself"):
        forms.run(tmp_path / "out", 3, overrides=["grpo.advantage=std"])
    assert not (tmp_path / "out").exists()


def test_a_cell_states_every_key_that_the_rule_varies(tmp_path):
    for cell, words in forms.CELLS.items():
        config = demo_config(tmp_path, tmp_path, words)
        form, advantage = cell.split("-")
        assert config.reward.params["thurstone_measure"] == form and config.grpo.advantage == advantage
        assert config.reward.preset == "paper"  # which never changes, whatever the default is
