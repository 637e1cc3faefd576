"""Time a weight push beside the engine's own loading: `tatar-dist bench sync`.

For a random model of 140 million parameters, in float32 and bfloat16: own / push, where a push goes through Ray's
object store from one ZeRO-3 learner to one vLLM engine on this machine, each on its half of the cores. Own: the same
engine loads the same buckets, all stored beforehand. The two are timed in turns. Details: two copies of the bytes in
memory (one thread, torch's copy_ into memory that is there already) and a constant, a push of as many tensors with
nearly no bytes, of a very thin model. Then the parts of a push: gathering alone in the learner, gathering into the
object store without an engine, the engine's calls (load is vLLM's work for each tensor; gathering and storing the next
buckets overlap it).
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
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
# name, sizes, dtype; all are as deep as each other, and the first is the constant
CASES = (("thin", THIN, "float32"), ("140M", LARGE, "float32"), ("140M", LARGE, "bfloat16"))
ROUNDS, WARM, TARGET, PIXELS = 25, 3, 1 / 1.1, 112
WORDS = (
    "model.gradient_checkpointing=false", "cluster.object_store_mib=1536", "rollout.max_num_seqs=2",
    "rollout.max_model_len=448", "grpo.prompts_per_step=1", "grpo.group_size=2", "grpo.optim.name=sgd",
    "cluster.pin_cores=true",
)  # fmt: skip
PARTS = ("gather", "to store", "start", "load", "finish")


def _timed(part: str, method: Callable[..., Any]) -> Any:
    """Return a method of an engine that also adds its seconds to `engine.parts[part]`."""

    def call(engine: Any, *args: Any) -> Any:
        start = time.perf_counter()
        value = method(engine, *args)
        engine.parts[part] += time.perf_counter() - start
        return value

    return call


class TimedEngine(RolloutEngine):
    """Add up the seconds of a push's three kinds of calls."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__(config, index)
        self.parts = Counter[str]()

    start_update = _timed("start", RolloutEngine.start_update)
    update = _timed("load", RolloutEngine.update)
    finish_update = _timed("finish", RolloutEngine.finish_update)

    def take_parts(self) -> dict[str, float]:
        """Return the seconds of the last push by kind of call, and forget them."""
        parts, self.parts = self.parts, Counter()
        return dict(parts)


def _gather(learner: Any) -> float:
    """Run in the learner: time making all full tensors."""
    return seconds_of(lambda: deque(learner.zero3.full_parameters(), 0))


def copies(nbytes: int, rounds: int) -> list[float]:
    """Time copying that many bytes in memory, with one thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    seconds = [seconds_of(lambda: target.copy_(source)) for _ in range(rounds)]
    torch.set_num_threads(threads)
    return seconds


def measure(config: Any) -> dict[str, Any]:
    """Time pushes of one model, the engine's own loading, copies, and the parts of a push."""
    import ray

    from tatar_dist.cluster.ray_cluster import Cluster
    from tatar_dist.plan.plan import push_way
    from tatar_dist.sync import weight_push
    from tatar_dist.sync.object_store import stream

    way = weight_push(config, push_way(config))
    with Cluster(config) as cluster:
        learners, pool = cluster.learners(1), cluster.engines(1, cls=TimedEngine)
        pool.start(cluster.cores)
        facts = learners.setup("grpo", 1)
        pool.started()
        engine, learner = pool.engines[0].actor, learners.actors[0]

        def push() -> dict[str, float]:
            return pool.push(partial(way.push, learners), pool.version + 1)

        def load(stored: list[Any]) -> None:
            start = engine.start_update.remote(pool.version)
            updates = [engine.update.remote(bucket) for bucket in stored]
            ray.get([start, *updates, engine.finish_update.remote()])

        bucket_bytes = config.rollout.bucket_mib << 20
        for _ in range(WARM):  # Ray's memory is touched once, all of it
            nbytes = int(push()["sync/bytes"])
            load(list(stream(learners, bucket_bytes)))
        pushes, own, copied, parts = [], [], [], []
        for _ in range(ROUNDS):
            copied.append(min(copies(nbytes, 2)))
            gather = ray.get(learner.__ray_call__.remote(_gather))
            start, stored = time.perf_counter(), list(stream(learners, bucket_bytes))
            to_store = time.perf_counter() - start - gather
            own.append(seconds_of(lambda refs=stored: load(refs)))
            del stored
            ray.get(engine.take_parts.remote())
            pushes.append(push()["sync/seconds"])
            parts.append(ray.get(engine.take_parts.remote()) | {"gather": gather, "to store": max(0.0, to_store)})
    return {
        "dtype": config.model.dtype,
        "parameters": facts[0]["parameters"],
        "bytes": nbytes,
        "push_seconds": pushes,
        "own_seconds": own,
        "copy_seconds": copied,
        "parts_seconds": {part: median(p[part] for p in parts) for part in PARTS},
    }


def compare(case: dict[str, Any], constant: float) -> dict[str, Any]:
    """Return a case with its ratio, own / push by round, what copies would take, and rates."""
    push, copy = (median(case[k]) for k in ("push_seconds", "copy_seconds"))
    return case | {
        "ratio": ratio(case["own_seconds"], case["push_seconds"]),
        "two_copies_and_constant_seconds": 2 * copy + constant,
        "gb_per_second": case["bytes"] / push / 1e9,
        "share_of_copy": copy / push,
    }


def run() -> dict[str, Any]:
    """Measure everything."""
    from tatar_dist.cluster.ray_cluster import Cluster

    with tempfile.TemporaryDirectory() as place:
        configs = [
            subject.make(Path(place) / name, PIXELS, sizes, [*WORDS, f"model.dtype={dtype}"])
            for name, sizes, dtype in CASES
        ]
        with Cluster(configs[0]):  # one Ray for all
            cases = [{"model": case[0]} | measure(config) for case, config in zip(CASES, configs, strict=True)]
    constant = median(cases[0]["push_seconds"])
    compared = [compare(case, constant) for case in cases[1:]]
    worst = min(compared, key=lambda case: case["ratio"]["median"])
    own, copied = median(worst["own_seconds"]), worst["two_copies_and_constant_seconds"]
    return result(
        "sync",
        f"the engine's own loading, {worst['model']} {worst['dtype']}",
        worst["ratio"],
        TARGET,
        f"1: nothing but vLLM's copies and packing for the CPU, {own:.2f} s; 2 copies in memory + "
        f"{1000 * constant:.0f} ms are {copied:.2f} s",
        constant_seconds=constant,
        cases=[cases[0], *compared],
    )
