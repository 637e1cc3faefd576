"""Time a weight push beside copies of its bytes in memory: `tatar-dist bench sync`.

For a random model of 140 million parameters, in float32 and bfloat16: (2 x copy + constant) / push, where a push goes
through Ray's object store from one ZeRO-3 learner to one vLLM engine on this machine. Copy: one thread, torch's copy_
into memory that is there already. Constant: a push of as many tensors with nearly no bytes, of a model as deep and very
thin: calls, Ray, and vLLM's work for every tensor and layer of a reload. Then where the time goes: gathering alone in
the learner, gathering into the object store without an engine, the engine's calls. Load is vLLM's work for each tensor,
a copy, packing for the CPU; gathering the next bucket overlaps it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tatar_dist.bench import subject
from tatar_dist.bench.harness import ratio, result, seconds_of
from tatar_dist.demo.tiny.build import TinySizes
from tatar_dist.rollout.engine import RolloutEngine

THIN = TinySizes(
    vocab=1024, text_hidden=64, text_layers=6, text_heads=2, text_kv_heads=1, text_intermediate=64,
    vision_hidden=64, vision_depth=8, vision_heads=2, vision_intermediate=64,
)  # fmt: skip
LARGE = TinySizes(
    vocab=4096, text_hidden=1024, text_layers=6, text_heads=32, text_kv_heads=8, text_intermediate=4096,
    vision_hidden=512, vision_depth=8, vision_heads=16, vision_intermediate=2048,
)  # fmt: skip
ROUNDS, TARGET, PIXELS = 5, 1.0, 112
PARTS = ("gather", "to store", "start", "load", "finish")


@dataclass(frozen=True)
class Case:
    """A model and its dtype. All are as deep as each other."""

    name: str
    sizes: TinySizes
    dtype: str = "float32"


CASES = (Case("thin", THIN), *(Case("140M", LARGE, dtype) for dtype in ("float32", "bfloat16")))


class TimedEngine(RolloutEngine):
    """Add up the seconds of a push's three kinds of calls."""

    def _timed(self, part: str, call: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        found = call(*args)
        self.__dict__.setdefault("parts", {}).setdefault(part, []).append(time.perf_counter() - start)
        return found

    def start_update(self, version: int) -> None:
        self._timed("start", super().start_update, version)

    def update(self, part: Any) -> int:
        loaded: int = self._timed("load", super().update, part)
        return loaded

    def finish_update(self) -> int:
        version: int = self._timed("finish", super().finish_update)
        return version

    def take_parts(self) -> dict[str, float]:
        """Return the seconds of the last push by kind of call, and forget them."""
        return {part: sum(seconds) for part, seconds in self.__dict__.pop("parts", {}).items()}


def _gather(learner: Any) -> float:
    """Run in the learner: time making all full tensors."""
    return seconds_of(lambda: deque(learner.zero3.full_parameters(), 0))


def copies(nbytes: int, rounds: int = ROUNDS) -> list[float]:
    """Time copying that many bytes in memory, with one thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    found = [seconds_of(lambda: target.copy_(source)) for _ in range(rounds)]
    torch.set_num_threads(threads)
    return found


def _config(case: Case, directory: Path) -> Any:
    words = [
        f"model.dtype={case.dtype}", "model.gradient_checkpointing=false", "cluster.gpus_per_node=0",
        "cluster.learners=1", "rollout.engines=1", "cluster.learner_cpus=0.5", "cluster.engine_cpus=0.5",
        "cluster.object_store_mib=1536", "rollout.max_num_seqs=2", "rollout.max_model_len=448", "grpo.kl_beta=0",
        "grpo.prompts_per_step=1", "grpo.group_size=2", "data.iqa_fraction=1", "grpo.optim.name=sgd",
        "watch.prometheus=false",
    ]  # fmt: skip
    return subject.make(directory / case.name, PIXELS, case.sizes, words)


def measure(case: Case, directory: Path) -> dict[str, Any]:
    """Time pushes of one model, copies of its bytes, and the parts of a push, each alone."""
    import ray

    from tatar_dist.cluster.ray_cluster import Cluster
    from tatar_dist.sync import weight_push
    from tatar_dist.sync.object_store import stream

    config = _config(case, directory)
    way = weight_push(config)
    bucket = config.rollout.bucket_mib << 20
    with Cluster(config) as cluster:
        learners, pool = cluster.learners(1), cluster.engines(1, cls=TimedEngine)
        pool.start(cluster.cores)
        facts = learners.setup("grpo", 1)
        pool.started()
        engine, learner = pool.engines[0].actor, learners.actors[0]

        def push() -> dict[str, float]:
            return pool.push(partial(way.push, learners), pool.version + 1)

        nbytes = int(push()["sync/bytes"])
        ray.get(engine.take_parts.remote())
        pushes, parts, copied = [], dict[str, list[float]](), []
        for _ in range(ROUNDS):
            copied.append(min(copies(nbytes, 2)))
            pushes.append(push()["sync/seconds"])
            gather = ray.get(learner.__ray_call__.remote(_gather))
            found = ray.get(engine.take_parts.remote()) | {"gather": gather}
            found["to store"] = max(0.0, seconds_of(lambda: deque(stream(learners, bucket), 0)) - gather)
            for part, seconds in found.items():
                parts.setdefault(part, []).append(seconds)
    return {
        "model": case.name,
        "dtype": case.dtype,
        "parameters": facts[0]["parameters"],
        "bytes": nbytes,
        "push_seconds": pushes,
        "copy_seconds": copied,
        "parts_seconds": {part: statistics.median(parts[part]) for part in PARTS},
    }


def ratios(found: dict[str, Any], constant: float) -> dict[str, float]:
    """Return (2 x copy + constant) / push, round by round."""
    return ratio([2 * c + constant for c in found["copy_seconds"]], found["push_seconds"])


def compare(cases: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield all cases but the first with what they are compared with; the first is the constant."""
    constant = statistics.median(cases[0]["push_seconds"])
    for found in cases[1:]:
        push, copy = (statistics.median(found[k]) for k in ("push_seconds", "copy_seconds"))
        rates = {"gb_per_second": found["bytes"] / push / 1e9, "share_of_copy": copy / push}
        yield found | {"constant_seconds": constant, "ratio": ratios(found, constant), **rates}


def run() -> dict[str, Any]:
    """Measure everything."""
    from tatar_dist.cluster.ray_cluster import Cluster

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with Cluster(_config(CASES[0], directory)):  # one Ray for all
            cases = [measure(case, directory) for case in CASES]
    compared = list(compare(cases))
    worst = min(compared, key=lambda found: found["ratio"]["median"])
    constant, load = worst["constant_seconds"], worst["parts_seconds"]["load"]
    least = (2 * statistics.median(worst["copy_seconds"]) + constant) / load
    return result(
        "sync",
        f"2 copies in memory + {1000 * constant:.0f} ms, {worst['model']} {worst['dtype']}",
        worst["ratio"],
        TARGET,
        f"{least:.2f}: the engine's loading alone, vLLM's copies and packing for the CPU, takes {load:.2f} s",
        constant_seconds=constant,
        cases=[cases[0], *compared],
    )
