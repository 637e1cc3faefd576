"""Parts with engines and Ray: an engine alone, pushes, sleep, GRPO; with the tiny model.

On GPUs in bfloat16, the dtype of training, where vLLM takes flash attention.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

from tatar_dist.errors import RunError
from tatar_dist.gpu_check.learner_parts import Found
from tatar_dist.gpu_check.parts import CheckSetting
from tatar_dist.run.gpus import GIB

PIXELS, PROMPTS, TOKENS, STEPS = 112, 8, 32, 3
CHECK_S, BIT = 120, 4  # limit of a check of a push; the bit of each weight that the control flips


def configured(setting: CheckSetting, *words: str) -> Any:
    """Return configs/demo.yaml for a learner and an engine, which share the only GPU."""
    from tatar_dist.assets import CONFIGS
    from tatar_dist.config.load import load_config

    on_gpus = (
        "model.dtype=bfloat16", "grpo.logprob_gap_limit=0.05", "rollout.gpu_memory_utilization=0.3",
        f"cluster.gpus_per_node={setting.gpus}", "cluster.learner_cpus=1", "cluster.engine_cpus=1",
        f"cluster.placement={'colocated' if setting.gpus == 1 else 'disaggregated'}",
    )  # fmt: skip
    settings = (
        f"output={Path(setting.place) / 'run'}", "cluster.learners=1", "rollout.engines=1", "rollout.max_num_seqs=32",
        f"rollout.max_new_tokens={TOKENS}", "reward.params.length_iaa_min=2", f"grpo.prompts_per_step={PROMPTS}",
        "grpo.group_size=4", "grpo.eval_every=0", "track.tensorboard=false", "watch.prometheus=false",
        f"rollout.push_check_s={CHECK_S * setting.slack}",
    )  # fmt: skip
    return load_config([str(CONFIGS / "demo.yaml")], [*settings, *(() if setting.pretend else on_gpus), *words])


def engine_here(setting: CheckSetting, *words: str) -> tuple[Any, Any]:
    """Start an engine in this process; return it and its configuration."""
    from tatar_dist.rollout.options import COMMON_ENV, engine_environment, set_environment

    config, threads = replace(configured(setting, *words), output=""), len(os.sched_getaffinity(0))
    set_environment(COMMON_ENV | engine_environment(config, not setting.pretend, threads))
    from tatar_dist.rollout.engine import RolloutEngine

    engine = RolloutEngine(config, 0)
    engine.setup(threads, 0)
    return engine, config


def prompts_of(config: Any) -> list[Any]:
    """Return prompts of both tasks with made-up images."""
    from tatar_dist.bench.subject import image
    from tatar_dist.prompts.render import PromptTexts
    from tatar_dist.types import TASKS, Prompt, Sample

    texts = PromptTexts(config).text
    samples = [Sample(f"{i}", "gpu-check", TASKS[i % 2], image(i, PIXELS), 10.0 * i) for i in range(PROMPTS)]
    return [Prompt(sample, texts[sample.task], sample.sample_id) for sample in samples]


def engine(setting: CheckSetting, variant: str) -> Found:
    """Compare log-probabilities of an engine and the learner. variant: v2, tp2 or none."""
    import torch

    from tatar_dist.learner.batch import Collator
    from tatar_dist.learner.policy import PolicyModel
    from tatar_dist.models import family
    from tatar_dist.rollout.engine import Sampling
    from tatar_dist.types import LearnerRow

    if variant == "v2":
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    start = time.perf_counter()
    here, config = engine_here(setting, *(["rollout.tensor_parallel=2"] if variant == "tp2" else []))
    started = time.perf_counter() - start
    if (variant == "v2") != bool(here.llm.llm_engine.vllm_config.use_v2_model_runner):
        raise RunError("vLLM took another model runner than it was asked to")
    groups = here.generate(prompts_of(config), Sampling(4, 1.0, TOKENS, seed=1), 0)
    backbone, device = family(config.model.family)(config.model), torch.device(setting.device)
    policy = PolicyModel(backbone.load_model().to(device), backbone, backbone.forbidden_ids()).to(device)
    rows = [
        LearnerRow(
            g.prompt.group_id, g.prompt.sample.image, g.prompt.text, c.token_ids, g.prompt.sample.task,
            sampled_logprobs=c.logprobs, prompt_token_ids=g.prompt_token_ids,
        )
        for g in groups
        for c in g.completions
    ]  # fmt: skip
    batch = Collator(backbone)(rows).to(device)
    with torch.no_grad():
        gaps = (policy(batch).logp - batch.sampled_logprobs)[batch.mask].abs()
    mean, worst, limit = float(gaps.mean()), float(gaps.max()), config.grpo.logprob_gap_limit
    if not mean <= limit:
        raise RunError(f"log-probabilities are {mean:.2g} nats from the learner's on average, the limit is {limit:g}")
    figures = {"gap": mean, "gap_max": worst, "tokens": len(gaps), "start_seconds": started}
    return f"{mean:.1g} nats from the learner on {len(gaps)} tokens, {worst:.1g} at most", figures


def push(setting: CheckSetting, way: str) -> Found:
    """Push twice by one way, checked; notice weights that were moved and not pushed."""
    from tatar_dist.cluster import selfcheck
    from tatar_dist.cluster.ray_cluster import Cluster
    from tatar_dist.faults.waiting import Waits
    from tatar_dist.learner.actor import WeightsOutOfSync
    from tatar_dist.sync.checked import CheckedPush

    shared = ["cluster.placement=colocated"] if way == "cuda_ipc" else []
    config = configured(setting, f"rollout.push={way}", *shared)
    Path(config.output).mkdir()
    events: dict[str, Any] = {}
    checked = CheckedPush(config, way, Waits(), lambda event, **fields: events.update({event: fields}))
    with Cluster(config) as cluster:
        learners, pool, prompts = cluster.learners(1), cluster.engines(1), prompts_of(config)
        pool.start(cluster.threads(1))
        if cluster.colocated:  # not at once: both measure how much GPU memory is free
            pool.started()
            pool.sleep()
        learners.setup("grpo", STEPS)
        pool.started()
        for version in (1, 2):
            selfcheck.check(checked, pool, learners, prompts, version, lambda: None)
            if fallen := events.get("push/fallback"):
                raise RunError(fallen["reason"])
        sent = pool.push(partial(checked.push, learners), 3)  # wakes an engine that shares the GPU
        learners.wait([a.flip.remote(BIT) for a in learners.actors])
        try:
            selfcheck.verify(pool, learners, prompts, config)
        except WeightsOutOfSync:
            seconds, facts = sent["sync/seconds"], events["push/checked"]
            return f"checked twice; a push of {sent['sync/bytes'] / 1e6:.0f} MB in {seconds:.2g} s", {**sent, **facts}
    raise RunError("weights that were moved and not pushed went unnoticed")


def sleep(setting: CheckSetting, _: str) -> Found:
    """Let an engine sleep: its memory is free, and after a push it answers as before."""
    import torch

    from tatar_dist.models import family
    from tatar_dist.rollout.engine import Sampling
    from tatar_dist.sync.object_store import buckets

    def free() -> int:
        return 0 if setting.pretend else torch.cuda.mem_get_info()[0]

    at_first = free()
    here, config = engine_here(setting, *([] if setting.pretend else ["cluster.placement=colocated"]))
    prompts, greedy = prompts_of(config), Sampling(1, 0.0, TOKENS)
    before, awake = [g.completions[0].token_ids for g in here.generate(prompts, greedy, 0)], free()
    here.sleep()
    freed, taken = free() - awake, at_first - awake
    if freed < taken / 2:
        raise RunError(f"an engine holds {taken / GIB:.1f} GiB, and asleep gives back only {freed / GIB:.1f}")
    here.start_update(1)
    weights = family(config.model.family)(config.model).load_model().named_parameters()
    for bucket in buckets(weights, repeat(1 << 20), True):
        here.update({"bucket": bucket})
    here.finish_update()
    if [g.completions[0].token_ids for g in here.generate(prompts, greedy, 1)] != before:
        raise RunError("after sleep and a push of the same weights, greedy answers are others")
    return f"gives back {freed / GIB:.1f} of {taken / GIB:.1f} GiB, then answers as before", {"freed_gib": freed / GIB}


def grpo(setting: CheckSetting, _: str) -> Found:
    """Train three steps of GRPO with all GPUs, learners and engines as many as fit."""
    from tatar_dist import grpo as controller
    from tatar_dist.bench.subject import image
    from tatar_dist.data.writing import write_manifest
    from tatar_dist.run.events import read_events
    from tatar_dist.types import TASKS

    manifest = Path(setting.place) / "train.parquet"
    rows = [
        {"sample_id": f"{task}-{i}", "dataset": f"made-up-{task}", "task": task, "score": 8.0 * i, "split": "train"}
        | {"image_bytes": image(i, PIXELS)}
        for task in TASKS
        for i in range(12)
    ]
    write_manifest(manifest, rows)
    counts = ["cluster.learners=0", "rollout.engines=0"] if setting.gpus > 1 else []
    config = configured(setting, f"data.train=[{manifest}]", f"grpo.max_steps={STEPS}", *counts)
    controller.run(config)
    metrics = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    if len(metrics) != STEPS or not all(math.isfinite(m["loss/total"]) for m in metrics):
        raise RunError(f"{len(metrics)} steps of {STEPS}, losses {[m['loss/total'] for m in metrics]}")
    fell = [e["reason"] for e in read_events(Path(config.output)) if e["event"] == "push/fallback"]
    if fell:
        raise RunError(f"the steps ran, but the weight push fell back to the object store: {fell[0]}")
    gap, seconds = max(m["sync/logprob_gap"] for m in metrics), metrics[-1]["time/step"]
    text = f"{STEPS} steps, the last in {seconds:.2g} s, engine and learner {gap:.1g} nats apart at most"
    return text, {"gap": gap, "step_seconds": [m["time/step"] for m in metrics]}
