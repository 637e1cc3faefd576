"""`make demo`: data, baseline, SFT, GRPO, evaluation, one table and one page, on a laptop's CPU.

The same stages as on a cluster, called one after the other with configs/demo.yaml over the recipes. In: a directory.
Out: DIR/{data, baseline, sft, sft_eval, grpo, grpo_eval}/, DIR/summary.json, DIR/report.html. Run again, it continues:
a stage whose result is there is not repeated.
"""

from __future__ import annotations

import ctypes
import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from tatar_dist.config import Config, load_config
from tatar_dist.data.demo import make_demo
from tatar_dist.evaluate.bootstrap import paired_mean_difference, paired_srcc_difference
from tatar_dist.export import model_of

CONFIGS = Path(__file__).parent.parent / "configs"
TERM_OF_TASK = {"iqa": "gaussian", "iaa": "thurstone"}
MODELS = {"base": "baseline", "sft": "sft_eval", "grpo": "grpo_eval"}


@dataclass(frozen=True)
class Size:
    """How much of everything. `budget`: seconds a stage may take on two cores, printed beside what it took."""

    data: dict[str, int]
    baseline_images: int  # per task; the base model rarely stops by itself, so its answers are long
    eval_images: int  # per task
    samples: int  # sampled completions per image, for the reward terms
    overrides: tuple[str, ...]
    budget: dict[str, float]


FULL = Size(
    data={"train": 2000, "validation": 300, "test": 1000},
    baseline_images=64,
    eval_images=300,
    samples=2,
    overrides=(),
    budget={"data": 60, "baseline": 40, "sft": 270, "sft_eval": 60, "grpo": 400, "grpo_eval": 60},
)
SMOKE = Size(
    data={"train": 200, "validation": 40, "test": 60},
    baseline_images=8,
    eval_images=16,
    samples=1,
    overrides=("sft.max_steps=6", "grpo.max_steps=3", "sft.eval_every=0"),
    budget={"data": 15, "baseline": 30, "sft": 45, "sft_eval": 30, "grpo": 75, "grpo_eval": 30},
)


def run(output: str | Path, smoke: bool = False, overrides: list[str] | None = None) -> dict[str, Any]:
    """Run every stage that has no result yet, print the table, write summary.json and report.html."""
    from tatar_dist import controller, sft
    from tatar_dist.cluster import Cluster
    from tatar_dist.evaluate import runner

    _end_with_parent()
    out, size, console = Path(output), SMOKE if smoke else FULL, Console()
    words = [*size.overrides, *(overrides or [])]
    base = _config(out / "base", words).model.path
    stages: list[dict[str, Any]] = []

    def stage(name: str, text: str, done: Path, work: Callable[[], object]) -> None:
        start = time.perf_counter()
        fresh = not done.exists()
        if fresh:
            console.print(f"[bold]{name}[/bold]  {text}")
            work()
        seconds = time.perf_counter() - start if fresh else 0.0
        stages.append({"name": name, "seconds": seconds, "budget_seconds": size.budget[name], "reused": not fresh})

    stage(
        "data",
        "crops of real photographs, with measured targets and rationales",
        out / "data" / "demo.json",
        lambda: make_demo(out / "data", **size.data),
    )
    with Cluster(_config(out / "base", words)):  # one Ray for all stages
        for name, text in (
            ("baseline", "the base model, before any training"),
            ("sft", "supervised fine-tuning on rationales and scores"),
            ("sft_eval", "held-out photographs after SFT"),
            ("grpo", "reinforcement learning with Gaussian and Thurstone rewards"),
            ("grpo_eval", "held-out photographs after GRPO"),
        ):
            done = out / name / ("metrics.json" if name in MODELS.values() else "finished")

            def work(name: str = name) -> None:
                model = {"sft_eval": "sft", "grpo": "sft", "grpo_eval": "grpo"}.get(name)
                more = [f"model.path={model_of(out / model)}" if model else f"model.path={base}"]
                if name in MODELS.values():
                    first = name == "baseline"
                    more += [
                        f"data.eval_limit={size.baseline_images if first else size.eval_images}",
                        f"evaluate.samples={0 if first else size.samples}",
                    ]
                    runner.run(_config(out / name, [*more, *words]))
                else:
                    (sft if name == "sft" else controller).run(_config(out / name, [*more, *words]))
                    (out / name / "finished").touch()

            stage(name, text, done, work)
    summary = {"stages": stages, **_results(out)}
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    from tatar_dist.report import html

    page = html.write(out)
    _print(console, summary, page)
    return summary


def _config(directory: Path, words: list[str]) -> Config:
    data = directory.parent / "data"
    manifests = [
        f"data.{split}=[{','.join(str(data / f'{task}_{split}.parquet') for task in ('iqa', 'iaa'))}]"
        for split in ("train", "validation", "test")
    ]
    files = [str(CONFIGS / name) for name in ("sft.yaml", "grpo.yaml", "demo.yaml")]
    return load_config(files, [f"output={directory}", *manifests, *words])


def _end_with_parent() -> None:
    """If make or the shell that started us is killed, stop as on SIGTERM instead of running on unseen."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _results(out: Path) -> dict[str, Any]:
    """Metrics of the three models, and what GRPO changed against SFT, with 95 % intervals over photographs."""
    table = []
    for model, directory in MODELS.items():
        metrics = json.loads((out / directory / "metrics.json").read_text())
        for name, values in metrics["datasets"].items():
            table.append({"model": model, "task": "iqa" if "iqa" in name else "iaa", **values})
    gains = {}
    for task, term in TERM_OF_TASK.items():
        before, after = (_term_by_image(out / d / "sampled.parquet", task, term) for d in ("sft_eval", "grpo_eval"))
        p_before, p_after = (_predictions(out / d / "predictions.parquet", task) for d in ("sft_eval", "grpo_eval"))
        ids = sorted(before.keys() & after.keys() & p_before.keys() & p_after.keys())
        cluster = np.array([p_before[i]["source"] for i in ids])
        reward = paired_mean_difference(
            np.array([before[i] for i in ids]), np.array([after[i] for i in ids]), cluster
        )
        srcc = paired_srcc_difference(
            np.array([p_before[i]["target"] for i in ids]),
            *(np.array([_number(p[i]["prediction"]) for i in ids]) for p in (p_before, p_after)),
            cluster,
        )
        gains[task] = {
            f"reward_{term}": [reward.estimate, reward.lo, reward.hi],
            "srcc": [srcc.estimate, srcc.lo, srcc.hi],
        }
    return {"table": table, "gains": gains}


def _term_by_image(file: Path, task: str, term: str) -> dict[str, float]:
    """Mean of a reward term over each image's sampled completions."""
    rows = pq.read_table(file, columns=["sample_id", "task", term]).to_pylist()
    values: dict[str, list[float]] = {}
    for row in rows:
        if row["task"] == task:
            values.setdefault(row["sample_id"], []).append(row[term])
    return {k: float(np.mean(v)) for k, v in values.items()}


def _predictions(file: Path, task: str) -> dict[str, dict[str, Any]]:
    rows = pq.read_table(file, columns=["sample_id", "task", "source", "target", "prediction"]).to_pylist()
    return {r["sample_id"]: r for r in rows if r["task"] == task}


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _print(console: Console, summary: dict[str, Any], page: Path) -> None:
    table = Table(title="Held-out photographs", title_justify="left")
    for column in ("task", "model", "images", "parsed", "SRCC", "PLCC", "MAE"):
        table.add_column(column, justify="left" if column in ("task", "model") else "right")
    for task in ("iqa", "iaa"):
        for row in summary["table"]:
            if row["task"] == task:
                numbers = ["—" if row[k] is None else f"{row[k]:.3f}" for k in ("srcc", "plcc")]
                mae = "—" if row["mae"] is None else f"{row['mae']:.1f}"
                table.add_row(task, row["model"], str(row["n"]), f"{row['n_parsed'] / row['n']:.1%}", *numbers, mae)
    console.print(table)
    gains = Table(title="What GRPO changed, with 95 % intervals over photographs", title_justify="left")
    for column in ("task", "measure", "change", "interval"):
        gains.add_column(column, justify="left" if column in ("task", "measure") else "right")
    for task, found in summary["gains"].items():
        for name, (value, low, high) in found.items():
            gains.add_row(task, name, f"{value:+.3f}", f"[{low:+.3f}, {high:+.3f}]".replace("[", r"\["))
    console.print(gains)
    times = Table(title="Time", title_justify="left")
    for column in ("stage", "took", "budget"):
        times.add_column(column, justify="left" if column == "stage" else "right")
    for s in summary["stages"]:
        took = "reused" if s["reused"] else f"{s['seconds']:.0f} s"
        times.add_row(s["name"], took, f"{s['budget_seconds']:.0f} s")
    total = sum(s["seconds"] for s in summary["stages"])
    times.add_row("all", f"{total:.0f} s", f"{sum(s['budget_seconds'] for s in summary['stages']):.0f} s")
    console.print(times)
    console.print(f"The page with curves and a gallery: {page}")
