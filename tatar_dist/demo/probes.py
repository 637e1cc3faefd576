"""`tatar-dist probes`: the paper's controlled comparisons on the demo set, one change at a time, over several seeds.

Writes DIR/seed_K/RUN/ (run directories) and DIR/seed_K/RUN-eval/, then the figures of demo/probe_figures.py. The method
itself (fast IQA, slow IAA; Gaussian IQA, Thurstone IAA) is one side of every comparison; configs/probes holds the
changes. Rationales are compared after SFT, rewards after GRPO from the method's own SFT model. A repeated call resumes:
runs with a result are skipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tatar_dist.assets import CONFIGS
from tatar_dist.demo import probe_figures
from tatar_dist.demo.data.make import make_demo, restyle
from tatar_dist.demo.pipeline import FULL, SMOKE, demo_config, same_settings
from tatar_dist.scoring.export import model_of


@dataclass(frozen=True)
class ProbeRun:
    """One training. change: a file of configs/probes; start: the run whose model it starts from."""

    name: str
    stage: str
    change: str | None = None
    start: str | None = None


RUNS = (
    ProbeRun("sft-tatar", "sft"),
    ProbeRun("sft-slow-iqa", "sft", "slow-iqa"),
    ProbeRun("sft-fast-iaa", "sft", "fast-iaa"),
    ProbeRun("grpo-tatar", "grpo", None, "sft-tatar"),
    ProbeRun("grpo-thurstone-iqa", "grpo", "thurstone-iqa", "sft-tatar"),
    ProbeRun("grpo-gaussian-iaa", "grpo", "gaussian-iaa", "sft-tatar"),
)


def run(output: str | Path, seeds: int, smoke: bool = False, overrides: list[str] | None = None) -> dict:
    """Make the data, run all trainings and evaluations without a result, write the figures and return them.

    Raises:
        UserError: the directory holds probes with other settings or is not writable, or an override is invalid.
    """
    from tatar_dist.cluster.ray_cluster import Cluster

    out, size, words = Path(output), SMOKE if smoke else FULL, list(overrides or [])
    console = Console(stderr=True)
    same_settings(out, {"smoke": smoke, "seeds": seeds, "overrides": words})
    if smoke:
        words = [*size.overrides, "data.eval_limit=16", *words]
    make_demo(out / "data", **size.data)
    restyle(out / "data")
    base = demo_config(out / "base", out / "data", words, [CONFIGS / "probes" / "probe.yaml"])
    with Cluster(base):  # one Ray for all runs
        for seed in range(seeds):
            for number, probe_run in enumerate(RUNS, 1):
                console.print(f"[bold]seed {seed}[/bold]  {probe_run.name} ({number} of {len(RUNS)})")
                _run_one(out / f"seed_{seed}", out / "data", probe_run, [f"seed={seed}", *words])
    return probe_figures.write(out, seeds, console)


def _run_one(directory: Path, data: Path, probe_run: ProbeRun, words: list[str]) -> None:
    """Train and evaluate one run; skips what is done."""
    from tatar_dist import grpo, sft
    from tatar_dist.evaluate import runner

    files = [CONFIGS / "probes" / f"{name}.yaml" for name in ("probe", probe_run.change) if name]
    target = directory / probe_run.name
    done = target / "finished"
    if not done.exists():
        start = [f"model.path={model_of(directory / probe_run.start)}"] if probe_run.start else []
        config = demo_config(target, data, [*start, *words], files)
        (sft if probe_run.stage == "sft" else grpo).run(config)
        done.touch()
    evaluation = directory / f"{probe_run.name}-eval"
    if not (evaluation / "metrics.json").exists():
        runner.run(demo_config(evaluation, data, [f"model.path={model_of(target)}", *words], files))
