"""Engines with fp8 weights, on a CPU: a push rounds as loading does, and the learner in bfloat16 is not far away."""

from __future__ import annotations

import functools
import os
import shutil
import sys
from itertools import repeat
from pathlib import Path

import pytest
import ray
from conftest import png, tiny_words

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from tatar_dist.config.load import load_config  # noqa: E402
from tatar_dist.learner.batch import Collator  # noqa: E402
from tatar_dist.learner.policy import PolicyModel  # noqa: E402
from tatar_dist.models import family  # noqa: E402
from tatar_dist.prompts.answer import Prompts  # noqa: E402
from tatar_dist.rollout.engine import RolloutEngine, Sampling  # noqa: E402
from tatar_dist.rollout.options import COMMON_ENV, engine_environment  # noqa: E402
from tatar_dist.sync.object_store import buckets  # noqa: E402
from tatar_dist.types import LearnerRow, Prompt, Sample  # noqa: E402

pytestmark = pytest.mark.usefixtures("shared_ray")
WORDS = ("model.dtype=bfloat16", "rollout.quantization=fp8", "grpo.logprob_gap_limit=0.15")
SAMPLING = Sampling(4, 1.0, 32, seed=3)


def dtypes(engine) -> dict[str, set[str]]:
    """In an engine: dtypes of the weights of linear layers by part, and of the head and the embedding."""
    model = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    found: dict[str, set[str]] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind.endswith(("ParallelLinear", "ParallelLMHead", "ParallelEmbedding")):
            part = name.split(".")[0] if kind.endswith("Linear") else "words"
            found.setdefault(part, set()).add(str(module.weight.dtype).removeprefix("torch."))
    return found


def push(engine, weights) -> None:
    """In an engine: what a push through the object store does there."""
    engine.start_update(1)
    for bucket in buckets(weights, repeat(1 << 20), True):
        engine.update({"bucket": bucket})
    engine.finish_update()


def moved(model: str, to: Path) -> list:
    """Make a model of other weights in `to`. Returns its names and bfloat16 tensors in a push's order."""
    shutil.copytree(model, to)
    random = torch.Generator().manual_seed(0)
    (file,) = to.glob("*.safetensors")
    weights = {
        n: (t.float() + 0.02 * t.float().std() * torch.randn(t.shape, generator=random)).bfloat16()
        for n, t in load_file(file).items()
    }
    save_file(weights, file, {"format": "pt"})
    return list(weights.items())


@pytest.mark.nightly
def test_weights_pushed_into_an_fp8_engine_are_those_that_another_loads(model_untied, manifests, tmp_path):
    weights = moved(model_untied, tmp_path / "moved")
    words = [f"output={tmp_path}", *tiny_words(model_untied, manifests), *WORDS]
    before, after = (load_config([], [*words, *more]) for more in ([], [f"model.path={tmp_path / 'moved'}"]))
    here = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment = COMMON_ENV | engine_environment(before, False, 1) | here
    actor = ray.remote(num_cpus=0, runtime_env={"env_vars": environment})(RolloutEngine)
    engines = [actor.remote(config, i) for i, config in enumerate((before, after))]
    ray.get([e.setup.remote(1, 0) for e in engines], timeout=600)
    linear = {"visual": {"bfloat16"}, "language_model": {"float8_e4m3fn"}, "words": {"bfloat16"}}
    assert ray.get([e.__ray_call__.remote(dtypes) for e in engines]) == [linear] * 2

    policy = family(after.model.family)(after.model)
    chat = functools.partial(policy.tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
    text = Prompts.load(after.data.prompts).render("iqa", chat)
    prompts = [Prompt(Sample(f"{i}", "", "iqa", png(i), 50.0), text, f"{i}") for i in range(4)]
    first = ray.get(engines[0].generate.remote(prompts, SAMPLING, 0))
    ray.get(engines[0].__ray_call__.remote(push, weights))
    assert ray.get(engines[0].__ray_call__.remote(dtypes)) == linear
    pushed = ray.get(engines[0].generate.remote(prompts, SAMPLING, 1))
    loaded = ray.get(engines[1].generate.remote(prompts, SAMPLING, 0))
    assert [g.completions for g in pushed] == [g.completions for g in loaded] != [g.completions for g in first]

    rows = [
        LearnerRow(p.group_id, p.sample.image, text, c.token_ids, "iqa", sampled_logprobs=c.logprobs)
        for p, g in zip(prompts, pushed, strict=True)
        for c in g.completions
    ]
    learner = PolicyModel(policy.load_model(), policy, policy.forbidden_ids())
    batch = Collator(policy)(rows)
    with torch.no_grad():
        gap = (learner(batch).logp - batch.sampled_logprobs)[batch.mask].abs()
    print(f"gap of an fp8 engine: {gap.mean():.4f} nats on average, at most {gap.max():.3f}")
    assert 0.001 < gap.mean() < 0.15
