"""Choose the default reward by a rule fixed before it was run: `tatar-dist probes --forms`.

Cells: three forms of the aesthetic ranking, each with two advantages; quality keeps its Gaussian. All train GRPO from
one SFT model with the same seeds, so that they see the same prompts, and answer the validation crops. Writes
DIR/sft, DIR/seed_K/CELL/, DIR/seed_K/CELL-eval/, DIR/forms.json and forms.md. A repeated call resumes.

A cell is eligible if at least 99 % of its greedy answers parse, and if the scoring term has at least half of the
advantage among parsed answers (`reward/share_parsed`, mean over seeds), at step 1 and over all steps, on both tasks.
The incumbent is regret with per_term (GDPO). Another eligible cell replaces it if its IAA SRCC is higher with a 95 %
interval above 0, paired, seeds and photographs resampled. If the incumbent is not eligible, the rule takes the eligible
cell with the highest IAA SRCC. The shares among all answers and the sampled answers that parse stand beside.
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
from tatar_dist.errors import UserError
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
RESOLVED = 0.05  # SRCC: smaller differences are called not resolved, whatever their interval
SEEDS = 3
LAST = 10  # steps whose sampled answers are counted
TRAINING = ["grpo.max_steps=100", "grpo.eval_every=0", "sft.eval_every=0"]
VALIDATION = [f"data.test=[{','.join(f'{task}_validation.parquet' for task in TASKS)}]", "data.eval_limit=null"]
VARIED = ("reward.preset", "reward.params", "grpo.advantage", "grpo.scale", "data.test", "data.eval_limit", "seed")
HEAD = (
    "cell", "parsed: greedy, sampled", "share, IQA: step 1, mean (all answers)", "share, IAA", "eligible",
    "SRCC, IQA", "SRCC, IAA", "IAA SRCC minus the incumbent's", "95 % interval", "resolved",
)  # fmt: skip
BRIEF = (0, 4, 5, 6, 7, 8)  # the columns on a terminal


def run(output: str | Path, seeds: int, smoke: bool = False, overrides: list[str] | None = None) -> dict[str, Any]:
    """Train and evaluate all cells without a result, write and return the table.

    Raises:
        UserError: the directory holds other settings or is not writable, or an override is invalid or varied here.
    """
    from tatar_dist.cluster.ray_cluster import Cluster

    if varied := [w for w in overrides or [] if w.startswith(VARIED)]:
        raise UserError(f"{varied[0]}: --forms sets this key itself")
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
    text = json.dumps(choose([out / f"seed_{k}" for k in range(seeds)]))
    result: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)  # JSON has no NaN
    result["by_the_rule"] = not smoke and seeds == SEEDS and all(w.startswith("cluster.") for w in overrides or [])
    write_whole(out / "forms.json", json.dumps(result, indent=1))
    rows = table(result)
    write_whole(out / "forms.md", markdown(rows, HEAD) + f"\n{sentence(result)}\n")
    shown = [[row[i] for i in BRIEF] for row in rows]
    title = f"Forms of the aesthetic reward, {seeds} seed(s), validation crops"
    print_table(console, title, ("cell", "eligible", "SRCC, IQA", "IAA", "IAA difference", "95 %"), shown)
    console.print(f"{sentence(result)} The whole table: {out / 'forms.md'}")
    return result


def run_cell(target: Path, data: Path, words: list[str], start: str) -> None:
    """Train and evaluate one cell with one seed; skips what is done."""
    run_stage("grpo", demo_config(target, data, [*words, start]))
    run_stage(
        "evaluate", demo_config(Path(f"{target}-eval"), data, [*words, *VALIDATION, f"model.path={model_of(target)}"])
    )


def choose(directories: Sequence[Path], rounds: int = 2000) -> dict[str, Any]:
    """Return {"cells": figures by cell, "chosen": the cell that the rule takes, or None}."""
    predictions = {cell: {task: _answers(directories, cell, task) for task in TASKS} for cell in CELLS}
    cells: dict[str, Any] = {}
    for cell, by_task in predictions.items():
        target, source, theirs = by_task["iaa"]
        between = paired_srcc_difference(
            target, predictions[INCUMBENT]["iaa"][2], theirs, source, rounds=rounds, seeds_too=True
        )
        shares = {task: _shares(directories, cell, task, "share_parsed") for task in TASKS}
        parsed = min(float(np.isfinite(by_task[task][2]).mean()) for task in TASKS)
        cells[cell] = {
            "parsed": parsed,  # of the worse task
            "parsed_sampled": min(_sampled(directories, cell, task) for task in TASKS),
            "share": shares,
            "share_all": {task: _shares(directories, cell, task, "share") for task in TASKS},
            "eligible": parsed >= LEAST_PARSED and all(v >= LEAST_SHARE for s in shares.values() for v in s),
            **{f"srcc_{t}": [srcc(*usable(g, p, "midpoint")) for p in ps] for t, (g, _, ps) in by_task.items()},
            "difference": [between.estimate, between.lo, between.hi],
        }
    return {"cells": cells, "chosen": chosen(cells)}


def chosen(cells: dict[str, Any]) -> str | None:
    """Apply the rule to the figures of the cells."""
    eligible = [cell for cell in cells if cells[cell]["eligible"]]
    if INCUMBENT not in eligible:
        return max(eligible, key=lambda c: float(np.mean(cells[c]["srcc_iaa"])), default=None)
    better = [cell for cell in eligible if cells[cell]["difference"][1] > 0]  # none with an undefined interval
    return max(better, key=lambda c: float(cells[c]["difference"][0]), default=INCUMBENT)


def _answers(directories: Sequence[Path], cell: str, task: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return targets (n,), photographs (n,) and predictions (S, n), NaN where unparsed."""
    seeds = [answers(d / f"{cell}-eval", task) for d in directories]
    target, source = (seeds[0][column].to_numpy() for column in ("target", "source"))
    return target, source, np.array([s["prediction"].to_numpy() for s in seeds])


def _shares(directories: Sequence[Path], cell: str, task: str, share: str) -> tuple[float, float]:
    """Return the scoring term's share at step 1 and over all steps, mean over seeds."""
    key = f"reward/{share}/{TERMS[task]}/{task}"
    by_seed = [np.array([line.get(key) for line in read_metrics(d / cell)], np.float64) for d in directories]
    return float(np.mean([s[0] for s in by_seed])), float(np.nanmean(np.concatenate(by_seed)))


def _sampled(directories: Sequence[Path], cell: str, task: str) -> float:
    """Return the share of sampled answers that parse, over the last steps."""
    return float(np.mean([x[f"reward/format/{task}"] for d in directories for x in read_metrics(d / cell)[-LAST:]]))


def table(result: dict[str, Any]) -> list[list[str]]:
    """Return the table as text cells, the chosen cell first."""
    order = sorted(CELLS, key=lambda cell: cell != result["chosen"])
    rows = []
    for cell in order:
        c = result["cells"][cell]
        inside, among_all = (
            {task: ", ".join(number(v, ".2f") for v in c[key][task]) for task in TASKS}
            for key in ("share", "share_all")
        )
        value, lo, hi = c["difference"]
        shown = (number(value, "+.3f"), f"{number(lo, '+.3f')} to {number(hi, '+.3f')}", _resolved(value, lo, hi))
        rows.append(
            [
                cell,
                f"{c['parsed']:.1%}, {c['parsed_sampled']:.1%}",
                *(f"{inside[task]} ({among_all[task]})" for task in TASKS),
                "yes" if c["eligible"] else "no",
                *(number(None if None in c[f"srcc_{t}"] else float(np.mean(c[f"srcc_{t}"]))) for t in TASKS),
                *(("", "", "") if cell == INCUMBENT else shown),
            ]
        )
    return rows


def _resolved(value: float | None, lo: float | None, hi: float | None) -> str:
    if value is None or lo is None or hi is None:
        return "undefined"
    return "yes" if abs(value) >= RESOLVED and (lo > 0 or hi < 0) else "no"


def sentence(result: dict[str, Any]) -> str:
    """Say what the rule chooses, or would choose with settings that are not its own."""
    chosen, by_the_rule = result["chosen"], result.get("by_the_rule", True)
    if not by_the_rule:
        return f"With these settings, which are not the rule's, it would choose {chosen or 'no cell'}."
    return f"The rule chooses {chosen}." if chosen else "No cell is eligible: the default stays as it is."
