"""The preset `released` reproduces the public research code's formulas, from numbers that our code did not compute."""

import json
from pathlib import Path

import numpy as np
import pytest

from tatar_dist.cli import main

GOLDEN = json.loads((Path(__file__).parent / "golden" / "released_rewards.json").read_text())
TASK = {"iqa_score": "iqa", "iaa_score": "iaa"}


def completion(answer: str, words: int) -> str:
    """The text rule of the golden file: `words` whitespace tokens, tags included."""
    text = "<think> " + "w " * (words - 3) + f"</think> <answer>{answer}</answer>"
    return text


def audited(tmp_path, capsys, items, groups):
    file = tmp_path / "batch.jsonl"
    rows = [
        {
            "group_id": group,
            "task": TASK[item["task"]],
            "dataset": "d",
            "target": item["gt"],
            "completion": completion(item["answer"], item["words"]),
        }
        for item, group in zip(items, groups, strict=True)
    ]
    file.write_text("\n".join(json.dumps(r) for r in rows))
    assert main(["rewards", str(file), "--preset", "released"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("case", GOLDEN["scalar_gaussian"], ids=lambda c: c["name"])
def test_released_reproduces_the_scalar_cases(case, tmp_path, capsys):
    (row,) = audited(tmp_path, capsys, [case], ["g"])
    assert row["parsed"] == case["parsed"]
    assert row["gaussian"] == pytest.approx(case["gaussian"], abs=1e-9)
    assert row["format"] == case["format"]


@pytest.mark.parametrize("case", GOLDEN["group_cases"], ids=lambda c: c["name"])
def test_released_reproduces_the_group_cases(case, tmp_path, capsys):
    rows = audited(tmp_path, capsys, case["items"], [item["image"] for item in case["items"]])
    for term in ("gaussian", "pairwise", "format", "thurstone"):
        for row, expected in zip(rows, case[term], strict=True):
            if term in ("pairwise", "thurstone") and row["task"] == "iqa":
                assert row[term] is None  # the golden 0 of another task's term
            else:
                assert row[term] == pytest.approx(expected, abs=1e-9)
    if "active_total" in case:
        assert np.allclose([r["reward"] for r in rows], case["active_total"], rtol=0, atol=1e-9)
        assert np.allclose([r["advantage"] for r in rows], case["active_advantage"], rtol=0, atol=1e-9)


def test_released_is_finite_and_right_where_the_released_code_overflows(tmp_path, capsys):
    # 99 points apart with collapsed groups: z = -990, exp(990) overflows; the answer order is reversed, so nearly 0.
    items = [
        {"task": "iaa_score", "gt": 90.0, "answer": "0.50", "words": 140},
        {"task": "iaa_score", "gt": 10.0, "answer": "99.50", "words": 140},
    ]
    rows = audited(tmp_path, capsys, items, ["a", "b"])
    p = 1 / (1 + np.exp(-80 / 8))
    expected = 1 - (p * -np.log(1e-6) + (1 - p) * -np.log1p(-1e-6)) / -np.log(1e-6)
    assert [r["thurstone"] for r in rows] == pytest.approx([expected, expected], abs=1e-12)
