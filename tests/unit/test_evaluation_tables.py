"""Averages, slices and the printed table of an evaluation."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

from tatar_dist.errors import UserError
from tatar_dist.evaluate import compare, tables
from tatar_dist.evaluate.metrics import score_metrics
from tatar_dist.evaluate.tables import averages, slices


def metrics(task: str, noise: float, n: int = 50, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    target = rng.uniform(0, 100, n)
    return score_metrics(target, target + rng.normal(0, noise, n)).to_dict() | {"task": task}


CONSTANT = score_metrics(np.arange(9.0), np.full(9, 5.0)).to_dict() | {"task": "iqa"}


def test_averages_are_means_over_sets_in_and_across_domains():
    found = {
        "KonIQ-10k": metrics("iqa", 5),
        "SPAQ": metrics("iqa", 20),
        "PIPAL": metrics("iqa", 40),
        "mine": metrics("iqa", 60),
        "AVA": metrics("iaa", 30),
    }
    means = averages(found, None)
    assert means["iqa"]["in_domain"]["datasets"] == ["KonIQ-10k"]
    assert means["iqa"]["cross_domain"]["datasets"] == ["SPAQ", "PIPAL"]
    assert means["iqa"]["cross_domain"]["srcc"] == pytest.approx((found["SPAQ"]["srcc"] + found["PIPAL"]["srcc"]) / 2)
    assert means["iqa"]["all"]["datasets"] == ["KonIQ-10k", "SPAQ", "PIPAL", "mine"]
    assert set(means["iaa"]) == {"cross_domain", "all"}
    listed = averages(found, ["mine"])["iqa"]
    assert listed["in_domain"]["datasets"] == ["mine"] and len(listed["cross_domain"]["datasets"]) == 3


def test_a_set_without_a_value_is_named_and_not_counted_as_nought():
    mean = averages({"KonIQ-10k": metrics("iqa", 5), "SPAQ": CONSTANT}, None)["iqa"]["all"]
    assert mean["without"] == ["SPAQ"] and mean["srcc"] > 0.9


def row(i: int, meta: dict | None, prediction: float | None = None) -> dict:
    target = float(i % 100)
    return {
        "dataset": "d",
        "task": "iqa",
        "target": target,
        "prediction": target if prediction is None else prediction,
        "truncated": False,
        "meta": json.dumps(meta) if meta else None,
    }


def test_slices_by_range_and_by_members_of_meta():
    rows = [
        row(i, {"distortions": [{"family": "blur" if i % 2 else "noise", "strength": 1}], "style": "x"})
        for i in range(100)
    ]
    found = slices(rows, ["distortions", "style", "absent"])["d"]
    assert found["target=00-20"]["n"] == 20 and found["target=80-100"]["n"] == 20
    assert found["distortions=blur"]["n"] == found["distortions=noise"]["n"] == 50
    assert found["style=x"]["srcc"] == 1.0 and len(found) == 8
    rare = slices([row(i, {"style": "rare"} if i < 9 else None) for i in range(100)], ["style"])["d"]
    assert "style=rare" not in rare  # nine rows say little


RESULT = {
    "model": "runs/a_model",
    "datasets": {"KonIQ-10k": metrics("iqa", 5), "SPAQ": metrics("iqa", 20), "AVA": metrics("iaa", 9)},
    "expected": {"AVA": metrics("iaa", 4)},
}
RESULT["averages"] = averages(RESULT["datasets"], None)


def test_the_table_has_sets_variants_and_averages_in_order():
    names = [cells[0] for cells in tables.rows_of(RESULT)]
    assert names == [
        "KonIQ-10k",
        "SPAQ",
        "IQA, average, in domain",
        "IQA, average, cross domain",
        "AVA",
        "AVA, expected score",
    ]
    assert all(len(cells) == len(tables.COLUMNS) for cells in tables.rows_of(RESULT))


def test_files_hold_the_same_figures(tmp_path):
    tables.write(tmp_path, RESULT, published=True)
    koniq = RESULT["datasets"]["KonIQ-10k"]
    text = (tmp_path / "table.md").read_text()
    assert (
        f"{koniq['plcc']:.3f} | {koniq['srcc']:.3f}" in text
        and "| Q-Insight | 0.933 / 0.916 | 0.907 / 0.905 | — |" in text
    )
    tex = (tmp_path / "table.tex").read_text()
    assert f"{koniq['plcc']:.3f}/{koniq['srcc']:.3f}".replace("0.", ".") in tex and "a\\_model" in tex
    lines = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert float(lines[0]["srcc"]) == koniq["srcc"] and lines[-1]["answers"] == "expected"


def test_few_distinct_scores_are_counted_beside_the_srcc_of_scores_without_ties(tmp_path, capsys):
    target = np.linspace(0, 100, 300)
    few = score_metrics(target, np.where(target < 30, 20.0, np.round(target, -1))).to_dict() | {"task": "iqa"}
    fine = score_metrics(target, target).to_dict() | {"task": "iqa"}
    assert (few["n_distinct"], few["n_commonest"], fine["n_distinct"]) == (9, 90, 300)
    assert score_metrics([1.0, 2.0, 3.0], [np.nan, 100.0, 120.0], unparsed="midpoint").n_distinct == 1
    result = {"model": "m", "datasets": {"set": few}, "averages": {}}
    said = "set: 9 distinct scores in 300 answers, the commonest 90 times; "
    assert tables.notes_of(result) == [f"{said}evaluate.expected=true gives scores with fewer ties"]
    assert tables.notes_of({"model": "m", "datasets": {"set": fine}}) == []
    few["srcc_expected"] = fine["srcc"]
    tables.write(tmp_path, result | {"expected": {"set": fine}}, published=False)
    assert f"{said}SRCC {few['srcc']:.3f} of them, 1.000 of the expected score" in (tmp_path / "table.md").read_text()
    greedy, expected = csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text()))
    assert (greedy["n_distinct"], greedy["srcc_expected"]) == ("9", "1.0") and expected["n_distinct"] == "300"
    tables.show({"model": "m", "datasets": {"set": few}})
    assert "distinct" in capsys.readouterr().out


def test_notes_name_what_a_figure_hides():
    unparsed = score_metrics(np.arange(20.0), np.array([np.nan, 120.0, *range(18)]), bootstrap=100).to_dict() | {
        "task": "iqa"
    }
    notes = tables.notes_of({"datasets": {"a": unparsed, "b": CONSTANT}})
    assert any(n.startswith("a: SRCC 95 % [") for n in notes) and "b: srcc: constant prediction" in notes
    assert "a: 1 answers without a score, left out" in notes and "a: 1 answers outside 0 to 100, clamped" in notes


def evaluation(directory, predictions: dict[str, float | None], targets: dict[str, float], source: str = ""):
    import pyarrow as pa
    import pyarrow.parquet as pq

    directory.mkdir()
    rows = [
        {"sample_id": i, "dataset": "d", "task": "iqa", "source": source, "target": targets[i], "prediction": p}
        for i, p in predictions.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows), directory / "predictions.parquet")
    return directory


def test_a_better_model_is_told_from_an_equal_one(tmp_path):
    rng = np.random.default_rng(0)
    targets = {str(i): float(t) for i, t in enumerate(rng.uniform(0, 100, 300))}
    noisy = lambda sd: {i: float(np.clip(t + rng.normal(0, sd), 0, 100)) for i, t in targets.items()}  # noqa: E731
    a = evaluation(tmp_path / "a", noisy(25), targets)
    b = evaluation(tmp_path / "b", noisy(10), targets)
    better = compare.run(a, b, rounds=500)["datasets"]["d"]
    assert better["n"] == 300 and better["srcc"]["ci95"][0] > 0 and better["srcc"]["p"] == pytest.approx(2 / 501)
    assert better["plcc"]["difference"] == pytest.approx(better["plcc"]["after"] - better["plcc"]["before"])
    same = compare.run(a, evaluation(tmp_path / "c", noisy(25), targets), rounds=500)["datasets"]["d"]
    assert same["srcc"]["ci95"][0] < 0 < same["srcc"]["ci95"][1] and same["srcc"]["p"] > 0.05


def test_the_answers_of_one_evaluation_are_compared_with_one_another(tmp_path, capsys):
    import pyarrow.parquet as pq

    targets = {str(i): float(i) for i in range(40)}
    place = evaluation(tmp_path / "a", dict(targets), targets)
    file = place / "predictions.parquet"
    with pytest.raises(UserError, match="no score under 'direct': evaluate with evaluate.direct=true"):
        compare.run(place, place, columns=("prediction", "direct"))
    rows = pq.read_table(file)
    for values, n in (([None] * 40, 0), ([40.0 - t for t in targets.values()], 40)):
        pq.write_table(rows.append_column("direct", [values]), file)
        if n:
            found = compare.run(place, place, columns=("prediction", "direct"), rounds=50)
            assert found["datasets"]["d"]["srcc"]["difference"] == pytest.approx(-2)
            assert found["after"] == str(place) and found["columns"] == ["prediction", "direct"]
            compare.show(found)
            assert "(direct) against A" in " ".join(capsys.readouterr().out.split())
        else:
            with pytest.raises(UserError, match="no score under 'direct'"):
                compare.run(place, place, columns=("direct", "prediction"))


def test_a_direct_answer_stands_beside_the_one_with_its_thought():
    direct = metrics("iaa", 12) | {"tokens": 8.2}
    whole = metrics("iaa", 9) | {"tokens": 140.6}
    seconds = {"greedy": 0.0421, "direct": None}
    result = {
        "model": "m",
        "datasets": {"AVA": whole},
        "direct": {"AVA": direct},
        "seconds_per_answer": seconds,
        "averages": averages({"AVA": whole}, None),
    }
    assert [row[0] for row in tables.rows_of(result)] == ["AVA", "AVA, direct answer"]
    said = "AVA: a direct answer takes 8 tokens; one with its thought 141 and 0.0421 s (wall-clock time of all sets"
    assert any(note.startswith(said) for note in tables.notes_of(result))


def test_comparing_needs_common_samples_with_one_target(tmp_path):
    targets = {str(i): float(i) for i in range(9)}
    a = evaluation(tmp_path / "a", dict(targets), targets)
    some = evaluation(
        tmp_path / "some", {i: None if i == "3" else 9 - t for i, t in list(targets.items())[2:]}, targets
    )
    found = compare.run(a, some, rounds=50)["datasets"]["d"]
    assert (found["n"], found["only_before"], found["only_after"]) == (7, 2, 0)
    other = evaluation(tmp_path / "other", dict(targets), {i: t + 1 for i, t in targets.items()})
    with pytest.raises(UserError, match="has the target 1.0, in .* it has 0.0"):
        compare.run(a, other)
    with pytest.raises(UserError, match="no predictions.parquet in it: give"):
        compare.run(a, tmp_path)
    with pytest.raises(UserError, match="gone: no predictions.parquet in it, no such directory"):
        compare.run(a, tmp_path / "gone")
    assert found["parsed_after"] == 6 and found["unparsed"] == "midpoint"
    few = evaluation(tmp_path / "few", {i: 100 - targets[i] for i in "0123"}, targets)
    tiny = compare.run(a, few, rounds=50)["datasets"]["d"]["srcc"]
    assert tiny["p"] is tiny["ci95"] is None and "4 independent pictures" in tiny["reason"]
    crops = evaluation(tmp_path / "crops", dict(targets), targets, source="one photograph")
    assert "1 independent" in compare.run(crops, a, rounds=50)["datasets"]["d"]["srcc"]["reason"]
    flat = evaluation(tmp_path / "flat", dict.fromkeys(targets, 5.0), targets)
    assert compare.run(a, flat, rounds=50)["datasets"]["d"]["srcc"]["reason"]
