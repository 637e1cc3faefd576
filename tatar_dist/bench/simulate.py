"""Compare predictions of `plan --simulate` with runs: `tatar-dist bench simulate`.

It takes config words (`tatar-dist bench simulate cluster.address=... output=DIR`); RAY_ADDRESS is honoured, then DIR
must lie on a file system that all nodes share. The steps of `FORETOLD` are predicted from the runs of `CALIBRATION`
and printed beside those measured; the ratio is 1 - the relative error of a step, and the target is about the worst.
Real runs of the demo's model (fine-tuned for 50 steps, so that its answers end; not if `model.path=` is given), each
made twice, in turns, so that what else the machine does meets all of them. About fifteen minutes on two idle cores.
"""

from __future__ import annotations

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


def measure(directory: Path, words: Sequence[str] = ()) -> dict[Run, list[Path]]:
    """Make every run ROUNDS times, in turns; return their directories."""
    from tatar_dist import grpo as controller
    from tatar_dist import sft
    from tatar_dist.cluster.ray_cluster import Cluster
    from tatar_dist.demo.data.make import make_demo
    from tatar_dist.scoring.export import model_of

    data = directory / "data"
    make_demo(data, **IMAGES)
    sets = f"data.train=[{data}/iqa_train.parquet,{data}/iaa_train.parquet]"
    words = [*words, sets, "data.validation=[]", "data.test=[]"]
    runs: dict[Run, list[Path]] = {run: [] for run in (*CALIBRATION, *FORETOLD)}
    largest = [f"cluster.learners={max(r[0] for r in runs)}", f"rollout.engines={max(r[1] for r in runs)}"]
    with Cluster(_config([*words, f"output={directory}", *largest])):  # one Ray for all
        if not any(w.startswith("model.path=") for w in words):
            sft.run(_config([*words, "sft.max_steps=50", "sft.eval_every=0", f"output={directory / 'sft'}"]))
            words = [*words, f"model.path={model_of(directory / 'sft')}"]
        for round_ in range(ROUNDS):
            for run, outputs in runs.items():
                learners, engines, prompts, group = run
                outputs.append(directory / f"{learners}-{engines}-{prompts}-{group}-{round_}")
                sizes = [f"cluster.learners={learners}", f"rollout.engines={engines}", f"output={outputs[-1]}"]
                sizes += [f"grpo.prompts_per_step={prompts}", f"grpo.group_size={group}", "grpo.eval_every=0"]
                controller.run(_config([*words, f"grpo.max_steps={STEPS}", *sizes]))
    return runs


def compare(runs: dict[Run, list[Path]]) -> dict[str, Any]:
    """Set predictions from the calibration's runs beside what all runs measured."""
    from tatar_dist.plan.simulate.forecast import Simulator
    from tatar_dist.plan.simulate.measured import costs_of_runs, read_run

    costs = costs_of_runs([path for run in CALIBRATION for path in runs[run]])
    rows = []
    for run, paths in runs.items():
        learners, engines, prompts, group = run
        measured_runs = [read_run(p) for p in paths]
        measured = float(np.median([sum(step.seconds.values()) for r in measured_runs for step in r.steps]))
        simulator = Simulator(measured_runs[0].setup.config, costs, shared_cores=True)
        predicted = simulator.predict(learners, engines, "disaggregated").step_seconds
        rows.append(
            {
                "split": f"{learners} + {engines}",
                "batch": f"{prompts} x {group}",
                "calibration": run in CALIBRATION,
                "measured_seconds": measured,
                "predicted_seconds": predicted,
                "ratio": predicted / measured,
            }
        )
    errors = [abs(r["ratio"] - 1) for r in rows if not r["calibration"]]
    return result(
        "simulate",
        "steps of runs not seen before, as measured",
        {"min": 1 - max(errors), "median": 1 - float(np.median(errors)), "max": 1 - min(errors)},
        1 - LIMIT,
        "1: no error; met is about the worst",
        max(errors) <= LIMIT,
        runs=rows,
        worst_error=max(errors),
        notes=list(costs.notes),
    )


def run(words: Sequence[str] = ()) -> dict[str, Any]:
    """Measure everything. `output=DIR` among the words keeps the runs."""
    kept = [w.removeprefix("output=") for w in words if w.startswith("output=")]
    others = [w for w in words if not w.startswith("output=")]
    with tempfile.TemporaryDirectory() as temporary:
        return compare(measure(Path(kept[0] if kept else temporary).absolute(), others))
