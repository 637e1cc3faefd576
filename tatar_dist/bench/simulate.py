"""Compare predictions of `plan --simulate` with runs: `tatar-dist bench simulate`.

It takes config words (`tatar-dist bench simulate cluster.address=... output=DIR`); RAY_ADDRESS is honoured, then DIR
must lie on a file system that all nodes share. For each split and batch of `FORETOLD`, the step and the idle shares
that were predicted from the runs of `CALIBRATION` stand beside those measured; the ratio printed is 1 - the relative
error of the step. Real runs of the demo's model (fine-tuned for 50 steps, so that its answers end; not if `model.path=`
is given), each made twice, in turns, so that what else the machine does meets all of them. About fifteen minutes on two
idle cores. Exit status is 1 if the worst step is off by more than LIMIT. `load` is the machine's load when each run
began, its own last run included.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tatar_dist.assets import CONFIGS
from tatar_dist.bench.harness import result
from tatar_dist.config.load import load_config
from tatar_dist.config.schema import Config

Run = tuple[int, int, int, int]  # learners, engines, prompts a step, group size
# Two sizes were not enough to tell kinds of work apart (errors up to 28 %): other batches and groups are in it, too.
CALIBRATION: tuple[Run, ...] = ((1, 1, 8, 8), (2, 2, 8, 8), (2, 1, 4, 8), (2, 2, 16, 4))
FORETOLD: tuple[Run, ...] = ((1, 2, 12, 8), (4, 2, 8, 8), (2, 1, 16, 8), (1, 1, 16, 4))
ROUNDS, STEPS = 2, 8
LIMIT = 0.15  # relative error of a predicted step
IMAGES = {"train": 200, "validation": 40, "test": 60}


def _config(words: Sequence[str]) -> Config:
    return load_config([str(CONFIGS / "grpo.yaml"), str(CONFIGS / "demo.yaml")], list(words))


def _words(data: Path, model: str, words: Sequence[str]) -> list[str]:
    sets = f"[{data}/iqa_train.parquet,{data}/iaa_train.parquet]"
    return [f"data.train={sets}", "data.validation=[]", "data.test=[]", f"model.path={model}", *words]


def _fine_tuned(directory: Path, data: Path, words: Sequence[str]) -> str:
    from tatar_dist import sft
    from tatar_dist.scoring.export import model_of

    here = next((w.removeprefix("model.path=") for w in words if w.startswith("model.path=")), None)
    if here:
        return here
    base = _config([f"output={directory}", *words]).model.path
    more = ["sft.max_steps=50", "sft.eval_every=0", f"output={directory / 'sft'}"]
    sft.run(_config([*_words(data, base, words), *more]))
    return str(model_of(directory / "sft"))


def measure(directory: Path, words: Sequence[str] = ()) -> dict[Run, list[Path]]:
    """Make every run ROUNDS times, in turns. Return their directories; beside each is FILE.load."""
    from tatar_dist import grpo as controller
    from tatar_dist.cluster.ray_cluster import Cluster
    from tatar_dist.demo.data.make import make_demo

    data = directory / "data"
    make_demo(data, **IMAGES)
    found: dict[Run, list[Path]] = {run: [] for run in (*CALIBRATION, *FORETOLD)}
    largest = [f"cluster.learners={max(r[0] for r in found)}", f"rollout.engines={max(r[1] for r in found)}"]
    with Cluster(_config([*words, f"output={directory}", *largest])):  # one Ray for all
        model = _fine_tuned(directory, data, words)
        for round_ in range(ROUNDS):
            for run in found:
                learners, engines, prompts, group = run
                output = directory / f"{learners}-{engines}-{prompts}-{group}-{round_}"
                sizes = [f"cluster.learners={learners}", f"rollout.engines={engines}", f"output={output}"]
                sizes += [f"grpo.prompts_per_step={prompts}", f"grpo.group_size={group}", "grpo.eval_every=0"]
                load = os.getloadavg()[0]
                controller.run(_config([*_words(data, model, words), f"grpo.max_steps={STEPS}", *sizes]))
                output.with_suffix(".load").write_text(f"{load:.2f}")
                found[run].append(output)
    return found


def compare(runs: dict[Run, list[Path]]) -> dict[str, Any]:
    """Set predictions from the calibration's runs beside what all runs measured."""
    from tatar_dist.plan.simulate.measured import costs_of_runs, read_run
    from tatar_dist.plan.simulate.search import Simulator

    costs = costs_of_runs([path for run in CALIBRATION for path in runs[run]])
    rows = []
    for run, paths in runs.items():
        read = [read_run(p) for p in paths]
        steps = [s.seconds for r in read for s in r.steps]
        whole = np.array([sum(s.values()) for s in steps])
        predicted = Simulator(read[0].config, costs, shared_cores=True).predict(run[0], run[1], "disaggregated")
        measured = {
            "step_seconds": float(np.median(whole)),
            "rollout_idle": float(np.median(1 - np.array([s["generate"] for s in steps]) / whole)),
            "learner_idle": float(np.median(1 - np.array([s["learn"] for s in steps]) / whole)),
        }
        rows.append(
            {
                "split": f"{run[0]} + {run[1]}",
                "batch": f"{run[2]} x {run[3]}",
                "calibration": run in CALIBRATION,
                "load": [float(p.with_suffix(".load").read_text()) for p in paths],
                "measured": measured,
                "predicted": {key: getattr(predicted, key) for key in measured},
                "ratio": predicted.step_seconds / measured["step_seconds"],
            }
        )
    errors = [abs(r["ratio"] - 1) for r in rows if not r["calibration"]]
    kept = {"min": 1 - max(errors), "median": 1 - float(np.median(errors)), "max": 1 - min(errors)}
    ok = max(errors) <= LIMIT
    return result(
        "simulate",
        "steps of runs not seen before, as measured",
        kept,
        1 - LIMIT,
        "1: no error; met is about the worst",
        ok=ok,
        met=ok,
        runs=rows,
        worst_error=max(errors),
        notes=list(costs.notes),
    )


def run(words: Sequence[str] = ()) -> dict[str, Any]:
    """Measure everything. `output=DIR` among the words keeps the runs."""
    kept = next((Path(w.removeprefix("output=")) for w in words if w.startswith("output=")), None)
    others = [w for w in words if not w.startswith("output=")]
    if kept:
        return compare(measure(kept.absolute(), others))
    with tempfile.TemporaryDirectory() as directory:
        return compare(measure(Path(directory), others))
