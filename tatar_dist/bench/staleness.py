"""Compare what GRPO learns by staleness: `tatar-dist bench staleness`.

`output=DIR` keeps the runs there and continues them. For each seed there is one SFT of the demo and, from its model,
GRPO with `VARIANTS`; of each the reward at the end, SRCC on held-out crops, how far the policy has moved from the one
that sampled (mean |log-probability difference| a token), and the KL from the start. The ratio is the reward with
staleness 1 over that with 0, seed by seed; the target is what seeds alone do to it: the worst seed of staleness 0 over
their mean. About 40 minutes on two idle cores.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tatar_dist.bench.harness import ratio, result
from tatar_dist.errors import UserError
from tatar_dist.run.directory import read_metrics
from tatar_dist.types import SPLITS, TASKS

STEPS, LAST = 60, 15  # LAST: steps at the end whose mean reward counts
SEEDS = 3
VARIANTS: dict[str, tuple[list[str], int]] = {  # config words, and with how many seeds
    "0": ([], SEEDS),
    "1": (["grpo.staleness=1"], SEEDS),
    "4": (["grpo.staleness=4"], 1),  # these show what drift does, once
    "4, uncorrected": (["grpo.staleness=4", "grpo.importance=none"], 1),
}
IMAGES = {"train": 2000, "validation": 300, "test": 60}


def train(directory: Path) -> None:
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
    # of the steps of GRPO; drift is what is looked at, and must not end a run
    steps = [f"grpo.max_steps={STEPS}", f"grpo.eval_every={STEPS}", "grpo.logprob_gap_limit=10"]
    with Cluster(demo_config(directory / "base", data, sets)):  # one Ray for all
        for seed in range(SEEDS):
            stages = {"sft": ["sft.eval_every=0"]} | {v: words for v, (words, n) in VARIANTS.items() if seed < n}
            for name, more in stages.items():
                output = directory / f"seed_{seed}" / name
                if (output / "finished").exists():
                    continue
                print(f"seed {seed}: {name if name == 'sft' else f'staleness {name}'}", file=sys.stderr)
                words = [*sets, f"seed={seed}", *more]
                if name == "sft":
                    sft.run(demo_config(output, data, words))
                else:
                    model = model_of(directory / f"seed_{seed}" / "sft")
                    controller.run(demo_config(output, data, [*words, f"model.path={model}", *steps]))
                (output / "finished").touch()


def figures(run: Path) -> dict[str, float]:
    """Return what is compared of one run; drift is mean |log p learner - log p engine| a token."""
    rows = read_metrics(run)
    rewards = {f"reward/{task}": float(np.mean([r[f"reward/total/{task}"] for r in rows[-LAST:]])) for task in TASKS}
    return {
        **rewards,
        "reward": float(np.mean(list(rewards.values()))),
        **{f"srcc/{task}": rows[-1][f"eval/demo-{task}/srcc"] for task in TASKS},
        "drift": float(np.mean([row["sync/logprob_gap"] for row in rows])),
        "drift_max": max(row["sync/logprob_gap_max"] for row in rows),
        "kl": rows[-1]["loss/kl"],
    }


def run(words: Sequence[str] = ()) -> dict[str, Any]:
    """Train and measure everything. Raises UserError for a word other than output=DIR."""
    if other := [w for w in words if not w.startswith("output=")]:
        raise UserError(f"bench staleness takes output=DIR only, not {other[0]!r}")
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(words[0].removeprefix("output=") if words else temporary)
        directory.mkdir(parents=True, exist_ok=True)
        train(directory)
        runs = {
            name: [figures(directory / f"seed_{seed}" / name) for seed in range(n)] for name, (_, n) in VARIANTS.items()
        }
    by_seed = {name: {key: [f[key] for f in seeds] for key in seeds[0]} for name, seeds in runs.items()}
    synchronous = by_seed["0"]["reward"]
    return result(
        "staleness",
        "staleness 0, reward at the end",
        ratio(by_seed["1"]["reward"], synchronous),
        min(synchronous) / float(np.mean(synchronous)),
        "1, or the worst seed over the mean of seeds, which is the target",
        steps=STEPS,
        staleness=by_seed,
    )
