"""Choose the default reward by a rule that was fixed before it was run: `tatar-dist probes --forms`.

Cells: three forms of the aesthetic ranking, each with two advantages; quality keeps its Gaussian. All train GRPO from
one SFT model with the same seeds, so that they see the same prompts, and answer the validation crops. Writes
DIR/sft, DIR/seed_K/CELL/, DIR/seed_K/CELL-eval/, DIR/forms.json and forms.md. A repeated call resumes.

A cell is eligible if at least 99 % of its greedy answers parse, and if the scoring term has at least half of the
advantage among parsed answers (`reward/share_parsed`), at step 1 and over all steps, on both tasks. The incumbent is
regret with per_term (GDPO). Another eligible cell replaces it if its IAA SRCC is higher with a 95 % interval above 0,
paired, seeds and photographs resampled. Where the incumbent is not eligible, the eligible cell of the highest IAA SRCC
is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from tatar_dist.demo.data.make import make_demo
from tatar_dist.demo.figures import answers, number, print_table
from tatar_dist.demo.pipeline import FULL, SMOKE, demo_config, run_stage, same_settings
from tatar_dist.evaluate.bootstrap import paired_srcc_difference
from tatar_dist.evaluate.metrics import srcc, usable
from tatar_dist.evaluate.tables import markdown
from tatar_dist.run.directory import read_metrics
from tatar_dist.run.files import write_whole
from tatar_dist.scoring.export import model_of
from tatar_dist.types import TASKS

FORMS = {
    "bce": ["reward.params.thurstone_measure=bce", "reward.params.thurstone_scale=tau"],
    "fidelity": ["reward.params.thurstone_measure=fidelity", "reward.params.thurstone_scale=tau"],
    "regret": ["reward.params.thurstone_measure=regret", "reward.params.thurstone_scale=shared"],
}
ADVANTAGES = {
    "std": ["grpo.advantage=std", "grpo.scale=group"],
    "per_term": ["grpo.advantage=per_term", "grpo.scale=batch"],
}
CELLS = {f"{f}-{a}": ["reward.preset=paper", *FORMS[f], *ADVANTAGES[a]] for f in FORMS for a in ADVANTAGES}
INCUMBENT = "regret-per_term"
TERMS = {"iqa": "gaussian", "iaa": "thurstone"}
LEAST_PARSED, LEAST_SHARE = 0.99, 0.5
TRAINING = ["grpo.max_steps=100", "grpo.eval_every=0", "sft.eval_every=0"]
VALIDATION = [f"data.test=[{','.join(f'{task}_validation.parquet' for task in TASKS)}]", "data.eval_limit=null"]
HEAD = (
    "cell", "answers that parse", "share, IQA: step 1, mean", "share, IAA: step 1, mean", "eligible",
    "SRCC, IQA", "SRCC, IAA", "IAA SRCC minus the incumbent's", "95 % interval",
)  # fmt: skip


def run(output: str | Path, seeds: int, smoke: bool = False, overrides: list[str] | None = None) -> dict[str, Any]:
    """Train and evaluate all cells without a result, write and return the table.

    Raises:
        UserError: the directory holds other settings or is not writable, or an override is invalid.
    """
    from tatar_dist.cluster.ray_cluster import Cluster

    out, size = Path(output), SMOKE if smoke else FULL
    console = Console(stderr=True)
    same_settings(out, {"forms": True, "smoke": smoke, "seeds": seeds, "overrides": list(overrides or [])})
    words = [*TRAINING, *size.overrides, *(overrides or [])]
    data = out / "data"
    make_demo(data, **size.data)
    with Cluster(demo_config(out / "base", data, words)):  # one Ray for all runs
        run_stage("sft", demo_config(out / "sft", data, words))
        start = f"model.path={model_of(out / 'sft')}"
        for seed in range(seeds):
            for i, (cell, changes) in enumerate(CELLS.items(), 1):
                console.print(f"[bold]seed {seed}[/bold]  {cell} ({i} of {len(CELLS)})")
                run_cell(out / f"seed_{seed}" / cell, data, [*words, f"seed={seed}", *changes], start)
    result = choose([out / f"seed_{k}" for k in range(seeds)])
    write_whole(out / "forms.json", json.dumps(result, indent=1))
    rows = table(result)
    text = markdown(rows, HEAD) + f"\n{sentence(result)}\n"
    write_whole(out / "forms.md", text)
    print_table(console, f"Forms of the aesthetic reward, {seeds} seed(s), validation crops", HEAD, rows)
    console.print(sentence(result))
    return result


def run_cell(target: Path, data: Path, words: list[str], start: str) -> None:
    """Train and evaluate one cell with one seed; skips what is done."""
    run_stage("grpo", demo_config(target, data, [*words, start]))
    run_stage(
        "evaluate", demo_config(Path(f"{target}-eval"), data, [*words, *VALIDATION, f"model.path={model_of(target)}"])
    )


def choose(directories: Sequence[Path], rounds: int = 2000) -> dict[str, Any]:
    """Return {"cells": figures by cell, "chosen": the cell that the rule makes the default, None without one}."""
    predictions = {cell: {task: _answers(directories, cell, task) for task in TASKS} for cell in CELLS}
    cells: dict[str, Any] = {}
    for cell, by_task in predictions.items():
        target, source, theirs = by_task["iaa"]
        between = paired_srcc_difference(
            target, predictions[INCUMBENT]["iaa"][2], theirs, source, rounds=rounds, seeds_too=True
        )
        shares = {task: _shares(directories, cell, task) for task in TASKS}
        parsed = float(np.mean([np.isfinite(by_task[task][2]).mean() for task in TASKS]))
        cells[cell] = {
            "parsed": parsed,
            "share": shares,
            "eligible": parsed >= LEAST_PARSED and min(v for s in shares.values() for v in s) >= LEAST_SHARE,
            **{f"srcc_{t}": [srcc(*usable(g, p, "midpoint")) for p in ps] for t, (g, _, ps) in by_task.items()},
            "difference": [between.estimate, between.lo, between.hi],
        }
    return {"cells": cells, "chosen": chosen(cells)}


def chosen(cells: dict[str, Any]) -> str | None:
    """Apply the rule to the figures of the cells."""
    eligible = [cell for cell in cells if cells[cell]["eligible"]]
    if INCUMBENT not in eligible:
        return max(eligible, key=lambda c: float(np.mean(cells[c]["srcc_iaa"])), default=None)
    better = [cell for cell in eligible if cells[cell]["difference"][1] > 0]
    return max(better, key=lambda c: float(cells[c]["difference"][0]), default=INCUMBENT)


def _answers(directories: Sequence[Path], cell: str, task: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return targets (n,), photographs (n,) and predictions (S, n), NaN where unparsed."""
    seeds = [answers(d / f"{cell}-eval", task) for d in directories]
    target, source = (seeds[0][column].to_numpy() for column in ("target", "source"))
    return target, source, np.array([s["prediction"].to_numpy() for s in seeds])


def _shares(directories: Sequence[Path], cell: str, task: str) -> tuple[float, float]:
    """Return the scoring term's share among parsed answers at step 1 and over all steps, mean over seeds."""
    key = f"reward/share_parsed/{TERMS[task]}/{task}"
    by_seed = [np.array([line.get(key) for line in read_metrics(d / cell)], np.float64) for d in directories]
    return float(np.nanmean([s[0] for s in by_seed])), float(np.nanmean(np.concatenate(by_seed)))


def table(result: dict[str, Any]) -> list[list[str]]:
    """Return the table as text cells, the chosen cell first."""
    order = sorted(CELLS, key=lambda cell: cell != result["chosen"])
    rows = []
    for cell in order:
        c = result["cells"][cell]
        shares = [", ".join(number(v, ".2f") for v in c["share"][task]) for task in TASKS]
        value, lo, hi = (number(v, "+.3f") for v in c["difference"])
        between = ("", "") if cell == INCUMBENT else (value, f"{lo} to {hi}")
        means = [number(float(np.mean(c[f"srcc_{task}"]))) for task in TASKS]
        rows.append([cell, f"{c['parsed']:.1%}", *shares, "yes" if c["eligible"] else "no", *means, *between])
    return rows


def sentence(result: dict[str, Any]) -> str:
    """Say what the rule chooses."""
    return f"The rule chooses {result['chosen']}." if result["chosen"] else "No cell is eligible: the default stays."
