"""Compare what GRPO learns by staleness: `tatar-dist bench staleness`.

`output=DIR` keeps the runs there and continues them. For each seed there is one SFT of the demo and, from its model,
GRPO with `VARIANTS`; of each the reward at the end, SRCC on held-out crops, how far the policy has moved from the one
that sampled (mean |log-probability difference| a token), and the KL from the start. The ratio is the reward with
staleness 1 over that with 0, seed by seed; the target is what seeds alone do to it: the worst seed of staleness 0 over
their mean. About 40 minutes on two idle cores.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from tatar_dist.bench.harness import ratio, result
from tatar_dist.errors import UserError
from tatar_dist.run.directory import read_metrics
from tatar_dist.types import SPLITS, TASKS

VARIANTS: dict[str, list[str]] = {
    "0": [],
    "1": ["grpo.staleness=1"],
    "4": ["grpo.staleness=4"],
    "4, uncorrected": ["grpo.staleness=4", "grpo.importance=none"],
}
SEEDS, STEPS, LAST = 3, 60, 15  # LAST: steps at the end whose mean reward counts
EVERY_SEED = ("0", "1")  # the others show what drift does, once
IMAGES = {"train": 2000, "validation": 300, "test": 60}


def variants(seed: int) -> dict[str, list[str]]:
    """Return what is trained with this seed."""
    return {name: words for name, words in VARIANTS.items() if seed == 0 or name in EVERY_SEED}


def train(directory: Path, words: Sequence[str] = ()) -> None:
    """Make every run that has no result yet: DIR/seed_K/sft, DIR/seed_K/VARIANT."""
    from tatar_dist import grpo as controller
    from tatar_dist import sft
    from tatar_dist.cluster.ray_cluster import Cluster
    from tatar_dist.demo.data.make import make_demo
    from tatar_dist.demo.pipeline import demo_config
    from tatar_dist.scoring.export import model_of

    data = directory / "data"
    make_demo(data, **IMAGES)
    sets = [f"data.{s}=[{','.join(f'{task}_{s}.parquet' for task in TASKS)}]" for s in SPLITS]
    console = Console(stderr=True)
    with Cluster(demo_config(directory / "base", data, [*sets, *words])):  # one Ray for all
        for seed in range(SEEDS):
            for name, more in {"sft": ["sft.eval_every=0"], **variants(seed)}.items():
                output = directory / f"seed_{seed}" / name
                if (output / "finished").exists():
                    continue
                console.print(f"[bold]seed {seed}[/bold]  {name if name == 'sft' else f'staleness {name}'}")
                own = [*sets, f"seed={seed}", *more]
                if name == "sft":
                    sft.run(demo_config(output, data, [*own, *words]))
                else:
                    own += [f"model.path={model_of(directory / f'seed_{seed}' / 'sft')}", f"grpo.max_steps={STEPS}"]
                    own += [f"grpo.eval_every={STEPS}", "grpo.logprob_gap_limit=10"]  # the gap is what is looked at
                    controller.run(demo_config(output, data, [*own, *words]))
                (output / "finished").touch()


def figures(run: Path) -> dict[str, float]:
    """Return what is compared of one run; drift is mean |log p learner - log p engine| a token."""
    lines = read_metrics(run)
    end = lines[-LAST:]
    found = {f"reward/{t}": float(np.mean([m[f"reward/total/{t}"] for m in end])) for t in TASKS}
    found["reward"] = float(np.mean(list(found.values())))
    found |= {f"srcc/{t}": lines[-1][f"eval/demo-{t}/srcc"] for t in TASKS}
    found["drift"] = float(np.mean([m["sync/logprob_gap"] for m in lines]))
    found["drift_max"] = max(m["sync/logprob_gap_max"] for m in lines)
    found |= {"kl": lines[-1]["loss/kl"], "entropy": float(np.mean([m["policy/entropy"] for m in end]))}
    found["cut"] = float(np.mean([m.get("policy/importance_cut", 0.0) for m in lines]))
    return found


def run(words: Sequence[str] = ()) -> dict[str, Any]:
    """Train and measure everything."""
    keep = next((w.removeprefix("output=") for w in words if w.startswith("output=")), None)
    if other := [w for w in words if not w.startswith("output=")]:
        raise UserError(f"bench staleness takes output=DIR only, not {other[0]!r}")
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(keep or temporary)
        directory.mkdir(parents=True, exist_ok=True)
        train(directory)
        found = {
            name: [figures(directory / f"seed_{k}" / name) for k in range(SEEDS) if name in variants(k)]
            for name in VARIANTS
        }
    by_seed = {name: {key: [f[key] for f in each] for key in each[0]} for name, each in found.items()}
    own = by_seed["0"]["reward"]
    return result(
        "staleness",
        "staleness 0, reward at the end",
        ratio(by_seed["1"]["reward"], own),
        min(own) / float(np.mean(own)),
        "1, or the worst seed over the mean of seeds, which is the target",
        steps=STEPS,
        staleness=by_seed,
    )
