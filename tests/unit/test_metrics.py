"""Agreement metrics and their intervals: equal to scipy, honest about ties, constants, signs and unparsed rows."""

import json
import math
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from tatar_dist.errors import UserError
from tatar_dist.evaluate import audit, tables
from tatar_dist.evaluate.bootstrap import (
    _interval,
    intervals,
    paired_mean_difference,
    paired_srcc_difference,
    resamples,
)
from tatar_dist.evaluate.compare import compare_rows
from tatar_dist.evaluate.metrics import plcc, plcc_fitted, score_metrics, srcc


def noisy(n=400, noise=20.0, seed=0):
    rng = np.random.default_rng(seed)
    target = rng.uniform(0, 100, n)
    return target, np.clip(target + rng.normal(0, noise, n), 0, 100)


def test_metrics_equal_scipy_with_heavy_ties():
    target, prediction = noisy()
    target, prediction = target.round(-1), prediction.round(-1)
    m = score_metrics(target, prediction)
    assert m.srcc == pytest.approx(stats.spearmanr(target, prediction).statistic, abs=1e-12)
    assert m.plcc == pytest.approx(stats.pearsonr(target, prediction).statistic, abs=1e-12)
    assert m.krcc == pytest.approx(stats.kendalltau(target, prediction).statistic, abs=1e-12)
    assert m.rmse == pytest.approx(math.sqrt(np.mean((target - prediction) ** 2)))
    assert m.mae == pytest.approx(np.abs(target - prediction).mean())
    naive = np.corrcoef(target.argsort().argsort(), prediction.argsort().argsort())[0, 1]
    assert abs(m.srcc - naive) > 1e-3  # what ranks without tie averaging would say


@pytest.mark.parametrize(
    "shape", [lambda x: x, lambda x: 100 * (x / 100) ** 3, lambda x: 100 / (1 + np.exp((60 - x) / 12))]
)
def test_the_fitted_plcc_equals_an_independent_curve_fit(shape):
    target, _ = noisy()
    prediction = np.clip(shape(target) + np.random.default_rng(1).normal(0, 8, len(target)), 0, 100)

    def logistic(x, b1, b2, b3, b4):
        return (b1 - b2) / (1 + np.exp(-(x - b3) / abs(b4))) + b2

    start = [target.max(), target.min(), prediction.mean(), prediction.std() / 4]
    best, _ = optimize.curve_fit(logistic, prediction, target, p0=start, maxfev=20_000)
    expected = stats.pearsonr(logistic(prediction, *best), target).statistic
    assert plcc_fitted(target, prediction) == pytest.approx(expected, abs=1e-4)


def test_the_fitted_plcc_does_not_end_in_a_worse_optimum():
    target = [30, 54, 43, 81, 8, 37, 44, 60, 91, 30, 35, 67]
    prediction = [78, 47, 67, 100, 0, 68, 87, 53, 100, 96, 37, 67]  # two starts without a grid ended at 0.598
    assert plcc_fitted(np.array(target, float), np.array(prediction, float)) == pytest.approx(0.7498, abs=1e-4)
    target, prediction = np.array([0.0, 22, 25, 0, 2]), np.array([63.0, 37, 19, 50, 13])
    assert plcc(target, prediction) < -0.4 and plcc_fitted(target, prediction) == pytest.approx(0.3467, abs=1e-4)


@pytest.mark.parametrize("seed", range(12))
def test_the_fitted_plcc_is_never_below_the_plain_one(seed):
    rng = np.random.default_rng(seed)
    target = rng.uniform(0, 100, rng.integers(5, 40))
    prediction = np.clip(target + rng.normal(0, 10 + 5 * seed, len(target)), 0, 100)
    if (plain := plcc(target, prediction)) > 0:
        assert plcc_fitted(target, prediction) > plain - 1e-5


def test_a_wrong_way_predictor_is_shown_as_one():
    target, prediction = noisy()
    m = score_metrics(target, 100 - prediction)
    assert m.srcc < -0.7 and m.plcc < -0.7 and m.krcc < -0.5
    assert m.plcc_fitted is None and "do not rise" in m.reason["plcc_fitted"]


def test_a_constant_predictor_has_no_correlation_and_says_why():
    m = score_metrics(np.array([10.0, 20, 30, 40, 50, 60]), np.full(6, 50.0), bootstrap=20)
    assert (m.srcc, m.plcc, m.krcc, m.plcc_fitted) == (None,) * 4
    assert m.reason["srcc"] == "constant prediction" and m.mae == pytest.approx(110 / 6)
    assert m.ci95 == {"srcc": None, "plcc": None} and m.reason["ci95.srcc"] == "constant prediction"
    assert score_metrics(np.full(3, 5.0), np.array([1.0, 2, 3])).reason["plcc"] == "constant target"


def test_few_or_no_rows_give_null_with_a_reason():
    none = score_metrics(np.array([1.0]), np.array([math.nan]))
    assert (none.n, none.n_parsed, none.mae) == (1, 0, None) and none.reason["mae"] == "no usable row"
    assert score_metrics(np.array([1.0]), np.array([2.0])).reason["srcc"] == "1 usable row"
    three = score_metrics(np.array([1.0, 2, 3]), np.array([1.0, 2, 4]))
    assert three.srcc == pytest.approx(1) and "needs 5" in three.reason["plcc_fitted"]


def test_unparsed_rows_are_counted_and_their_policy_is_named():
    target, prediction = noisy()
    prediction[:100] = math.nan
    drop = score_metrics(target, prediction)
    middle = score_metrics(target, prediction, unparsed="midpoint")
    assert (drop.n, drop.n_parsed, drop.unparsed) == (400, 300, "drop")
    assert drop.srcc == pytest.approx(stats.spearmanr(target[100:], prediction[100:]).statistic)
    assert (middle.n_parsed, middle.unparsed) == (300, "midpoint") and middle.srcc < drop.srcc
    with pytest.raises(UserError, match="drop, midpoint"):
        score_metrics(target, prediction, unparsed="mean")


def test_predictions_are_clamped_counted_and_never_rescaled():
    m = score_metrics(np.array([1.0, 2, 3]), np.array([1.0, 2, 120]))
    assert m.n_out_of_range == 1 and m.mae == pytest.approx(97 / 3)
    assert score_metrics(np.array([40.0, 60, 80]), np.array([4.0, 6, 8])).mae == pytest.approx(54)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
@settings(deadline=None)
def test_a_resample_draws_whole_clusters_as_many_as_there_are(cluster):
    cluster = np.array(cluster)
    labels, sizes = np.unique(cluster, return_counts=True)
    for rows in resamples(cluster, 5, seed=0):
        counts = np.bincount(rows, minlength=len(cluster))
        times = [counts[cluster == c] for c in labels]
        assert all(len(set(t.tolist())) == 1 for t in times)  # every row of a cluster equally often
        assert sum(t[0] for t in times) == len(labels)


def test_an_interval_is_that_of_scipys_statistics_on_the_same_resamples():
    target, prediction = noisy(50)
    target, cluster = target.round(-1), np.arange(50) % 9
    rows = list(resamples(cluster, 40, seed=3))
    found = intervals({"srcc": srcc, "plcc": plcc}, target, prediction, cluster, rounds=40, seed=3)
    for name, statistic in (("srcc", stats.spearmanr), ("plcc", stats.pearsonr)):
        values = [statistic(target[r], prediction[r]).statistic for r in rows]
        assert found[name] == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=1e-12)


def test_a_comparison_of_the_plcc_of_twelve_pictures_rejects_at_its_level():
    """Two models that answer equally well differ in 5 % of trials; a tenth of the answers are 50.

    Of 400 trials with 400 rounds, n = 12, 30, 100: 10, 14, 9 % with plain percentiles, 6, 12, 8 % with expanded ones;
    where every answer parses, 8.5, 7, 6 % and 4, 6.5, 6 %. Here 8.7 % with plain ones.
    """
    trials, rejected = 150, 0
    for seed in range(trials):
        rng = np.random.default_rng(seed)
        target = rng.uniform(0, 100, 12)
        noise = rng.normal(0, 8, (2, 12))
        answers = np.where(rng.random((2, 12)) < 0.1, 50, target + noise)
        rows = [
            [
                {"target": t, "prediction": p, "source": "", "sample_id": str(i)}
                for i, (t, p) in enumerate(zip(target, a, strict=True))
            ]
            for a in answers
        ]
        lo, hi = compare_rows(plcc, list(zip(*rows, strict=True)), rounds=200, seed=seed)["ci95"]
        rejected += lo > 0 or hi < 0
    assert rejected / trials <= 0.05


def test_expanded_percentiles_and_their_p_are_hesterbergs():
    draws = np.linspace(-1, 3, 4001)  # k = 1001 of them are 0 or less
    lo, hi, p = _interval(draws, expand=12)
    tail = stats.norm.cdf(-math.sqrt(12 / 11) * stats.t.ppf(0.975, 11))
    assert (lo, hi) == pytest.approx((-1 + 4 * tail, 3 - 4 * tail), abs=1e-9)
    z = stats.norm.ppf(1002 / 4002) / math.sqrt(12 / 11)
    assert p == pytest.approx(2 * stats.t.cdf(z, 11))
    assert _interval(draws)[2] == 2 * 1002 / 4002 and _interval(np.zeros(9))[2] == 1
    assert _interval(draws, expand=10**6) == pytest.approx(_interval(draws), rel=1e-4)


def test_a_correlation_with_a_constant_is_not_a_number():
    for constant in (np.full(9, 0.1), np.full(9, 1e9)):
        assert math.isnan(plcc(constant, np.arange(9.0))) and math.isnan(srcc(np.arange(9.0), constant))


def test_correlation_intervals_agree_with_theory_and_repeat():
    target, prediction = noisy(800)
    correlations = {"srcc": srcc, "plcc": plcc}
    found = intervals(correlations, target, prediction, rounds=1000)
    r = stats.pearsonr(target, prediction).statistic
    lo, hi = found["plcc"]
    low, high = np.tanh(np.arctanh(r) + np.array([-1.96, 1.96]) / math.sqrt(797))
    assert lo < r < hi and 0.6 < (hi - lo) / (high - low) < 1.4
    assert intervals(correlations, target, prediction, rounds=1000) == found
    assert intervals(correlations, target, prediction, rounds=1000, seed=1) != found


def test_cluster_resampling_widens_the_interval_when_clusters_differ():
    rng = np.random.default_rng(0)
    cluster = np.repeat(np.arange(8), 50)
    before = rng.normal(size=400)
    after = before + rng.normal(0.3, 0.4, 8)[cluster] + rng.normal(0, 0.1, 400)
    clustered = paired_mean_difference(before, after, cluster)
    rowwise = paired_mean_difference(before, after, np.arange(400))
    assert clustered.estimate == pytest.approx((after - before).mean()) == pytest.approx(rowwise.estimate)
    assert clustered.hi - clustered.lo > 3 * (rowwise.hi - rowwise.lo)
    assert clustered.lo < clustered.estimate < clustered.hi


def test_paired_differences_pool_over_seeds():
    target, worse = noisy(600, 30.0)
    better = np.stack([noisy(600, 10.0)[1], np.clip(target + np.random.default_rng(5).normal(0, 12, 600), 0, 100)])
    cluster = np.arange(600) % 12
    d = paired_srcc_difference(target, np.stack([worse, worse]), better, cluster, rounds=300)
    each = [stats.spearmanr(target, b).statistic - stats.spearmanr(target, worse).statistic for b in better]
    assert d.estimate == pytest.approx(np.mean(each), abs=1e-12)
    assert 0 < d.lo < d.estimate < d.hi
    same = paired_srcc_difference(target, worse, worse, cluster, rounds=50)
    assert (same.estimate, same.lo, same.hi) == (0, 0, 0)
    seeds = paired_mean_difference(np.zeros((2, 4)), np.array([[1.0] * 4, [3.0] * 4]), [0, 0, 1, 1], rounds=20)
    assert (seeds.estimate, seeds.lo, seeds.hi) == (2, 2, 2)


def test_seeds_that_disagree_widen_the_interval_where_they_are_resampled_too():
    rng = np.random.default_rng(4)
    target = rng.uniform(0, 100, 90)
    noisy = lambda sd: target + rng.normal(0, sd, 90)  # noqa: E731
    before, after, cluster = np.stack([noisy(20)] * 3), np.stack([noisy(5), noisy(60), noisy(20)]), np.arange(90) % 9
    kept = paired_srcc_difference(target, before, after, cluster, rounds=400)
    crossed = paired_srcc_difference(target, before, after, cluster, rounds=400, seeds_too=True)
    assert crossed.estimate == kept.estimate and crossed.hi - crossed.lo > 2 * (kept.hi - kept.lo)
    by_seed = [paired_srcc_difference(target, b, a, cluster, rounds=400) for b, a in zip(before, after, strict=True)]
    assert crossed.lo < min(i.estimate for i in by_seed) + 0.2 and crossed.hi <= max(i.hi for i in by_seed)
    one = paired_srcc_difference(target, before[0], after[0], cluster, rounds=400)
    assert one == paired_srcc_difference(target, before[:1], after[:1], cluster, rounds=400, seeds_too=True)


def test_an_unparsed_prediction_counts_as_the_midpoint_in_a_paired_difference():
    target, prediction = noisy(100)
    holes, filled = prediction.copy(), prediction.copy()
    holes[::5], filled[::5] = math.nan, 50.0
    cluster = np.arange(100) % 5
    a = paired_srcc_difference(target, prediction, holes, cluster, rounds=50)
    assert a == paired_srcc_difference(target, prediction, filled, cluster, rounds=50)


def test_paired_values_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="do not match"):
        paired_mean_difference(np.zeros(3), np.zeros(4), np.zeros(3))
    with pytest.raises(ValueError, match="NaN"):
        paired_mean_difference(np.zeros(2), np.array([0, math.nan]), np.zeros(2))


def test_two_thousand_rows_and_a_thousand_rounds_take_a_few_seconds():
    target, prediction = noisy(2000)
    start = time.process_time()  # not of the clock on the wall, which goes on while other processes run
    score_metrics(target, prediction, bootstrap=1000)
    paired_srcc_difference(target, prediction, prediction[::-1], np.arange(2000) % 7, rounds=1000)
    assert time.process_time() - start < 8


def write(path, rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def test_the_file_audit_reads_predictions_and_completions(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    rows = [{"dataset": "a", "task": "iqa", "target": t, "prediction": t + 1} for t in (10, 20, 30, 40, 50)]
    rows += [{"dataset": "a", "task": "iqa", "target": 60, "prediction": None}]
    rows += [
        {"dataset": "b", "task": "iaa", "target": 10.0 * i, "completion": f"<answer>{i}</answer>"} for i in range(1, 6)
    ]
    rows += [{"dataset": "b", "task": "iaa", "target": 9, "completion": "cut", "finish_reason": "length"}]
    result = audit.run(write(tmp_path / "p.jsonl", rows), bootstrap=50)
    out = json.loads(json.dumps(audit.as_json(result), allow_nan=False))["datasets"]
    keys = {"n", "n_parsed", "srcc", "plcc", "krcc", "plcc_fitted", "rmse", "mae", "ci95", "reason"}
    assert set(out) == {"a", "b"} and all(keys <= set(v) for v in out.values())
    assert (out["a"]["n"], out["a"]["n_parsed"], out["a"]["mae"]) == (6, 5, 1.0)
    assert (out["b"]["n"], out["b"]["n_parsed"], out["b"]["n_truncated"]) == (6, 5, 1)
    assert out["b"]["srcc"] == pytest.approx(1) and out["b"]["ci95"]["srcc"] is not None
    tables.show({"model": "p.jsonl"} | audit.as_json(result))
    table = capsys.readouterr().out
    assert "a: 1 answers without a score, left out" in table
    assert all(name in table for name in ("SRCC", "PLCC", "MAE")) and "KRCC" not in table, "90 wide"
    monkeypatch.setenv("COLUMNS", "95")
    tables.show({"model": "p.jsonl", "datasets": {"a": audit.as_json(result)["datasets"]["a"]}})
    narrower = capsys.readouterr().out
    assert all(name in narrower for name in ("KRCC", "PLCC, fitted", "RMSE"))
    rows = [line.split()[1:8:2] for line in table.splitlines() if line.startswith("│")]
    assert rows == [["a", "6", "5", "0"], ["b", "6", "5", "1"]]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_nan_prediction_counts_as_unparsed(tmp_path, suffix):
    rows = [
        {"dataset": "a", "task": "iqa", "target": 10.0 * i, "prediction": 10.0 * i, "truncated": i == 3}
        for i in range(7)
    ]
    rows[2]["prediction"] = math.nan
    file = tmp_path / f"p.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    m = audit.run(file)["a"]
    assert (m.n, m.n_parsed, m.n_truncated, m.srcc) == (7, 6, 1, pytest.approx(1.0))


def test_one_name_for_both_tasks_is_split(tmp_path):
    rows = [{"dataset": "x", "task": t, "target": 1, "prediction": 1} for t in ("iqa", "iaa")]
    assert list(audit.run(write(tmp_path / "p.jsonl", rows))) == ["x/iqa", "x/iaa"]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"dataset": "a", "task": "iqa", "target": 5}, "prediction or completion is missing"),
        ({"dataset": "a", "task": "iqa", "target": 5, "prediction": "5"}, "prediction='5': must be a number"),
        ({"dataset": "a", "task": "iqa", "target": 5, "prediction": True}, "prediction=True: must be a number"),
        ({"dataset": "a", "task": "iqa", "prediction": 5}, "missing key 'target'"),
        ({"dataset": "a", "task": "iqa", "target": 500, "prediction": 5}, "target=500: must be at most 100"),
        ({"dataset": "a", "task": "quality", "target": 5, "prediction": 5}, "must be one of iqa, iaa"),
        ({"dataset": 3, "task": "iqa", "target": 5, "prediction": 5}, "dataset=3: must be text"),
        ('{"dataset": "a", "task": "iqa", "target": 5, "prediction": 1e999}', "finite"),
        ('{"dataset": "a", "task": "iqa", "target": 5, "prediction": 1' + "0" * 400 + "}", "must be a number"),
        ('{"dataset": "a", "task": "iqa", "target": NaN, "prediction": 5}', "target=nan: must be a finite number"),
        (
            '{"dataset": "a", "task": "iqa", "target": 5, "prediction": Infinity}',
            "prediction=inf: must be a finite number",
        ),
        ('{"dataset"', "not valid JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, bad, said):
    good = {"dataset": "a", "task": "iqa", "target": 5, "prediction": 5}
    file = write(tmp_path / "p.jsonl", [good, bad])
    with pytest.raises(UserError) as e:
        audit.run(file)
    assert str(e.value).startswith(f"{file}:2: ") and said in str(e.value)


def test_missing_and_empty_files_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        audit.run(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="no rows"):
        audit.run(write(tmp_path / "empty.jsonl", []))


def test_intervals_of_every_metric_on_request():
    target, prediction = noisy(120)
    m = score_metrics(target, prediction, bootstrap=200, ci_all=True)
    assert set(m.ci95) == {"srcc", "plcc", "krcc", "plcc_fitted", "rmse", "mae"}
    for name, (lo, hi) in m.ci95.items():
        assert lo < getattr(m, name) < hi, name
    error = (prediction - target) ** 2
    lo, hi = m.ci95["rmse"]
    assert (hi**2 - lo**2) == pytest.approx(2 * 1.96 * error.std() / math.sqrt(len(error)), rel=0.3)
    flat = score_metrics(target, np.full(120, 5.0), bootstrap=50, ci_all=True)
    assert flat.ci95["krcc"] is None and flat.reason["ci95.krcc"] == "constant prediction" and flat.ci95["mae"]


def test_intervals_by_cluster_are_wider_where_clusters_agree():
    rng = np.random.default_rng(0)
    cluster = np.repeat(np.arange(12), 40)
    target = rng.uniform(0, 100, len(cluster))
    prediction = np.clip(target + np.repeat(rng.normal(0, 25, 12), 40) + rng.normal(0, 5, len(cluster)), 0, 100)
    rows = score_metrics(target, prediction, bootstrap=400).ci95["srcc"]
    whole = score_metrics(target, prediction, bootstrap=400, cluster=cluster).ci95["srcc"]
    assert whole[1] - whole[0] > 1.5 * (rows[1] - rows[0])
    assert score_metrics(target, prediction, bootstrap=50, cluster=np.zeros(len(cluster))).ci95["srcc"] is None
