"""Two ZeRO-3 learners compute the gradient of one on the whole batch, for SFT and for GRPO, uneven rows included."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import ray
from conftest import png, tiny_words
from safetensors.torch import load_file

from tatar_dist.algo.aggregation import token_weights
from tatar_dist.cluster.ray_cluster import Cluster
from tatar_dist.config.load import load_config
from tatar_dist.learner import transfer
from tatar_dist.learner.sharding import shard_rows
from tatar_dist.sync.object_store import from_wire, stream
from tatar_dist.types import LearnerRow

# Huge on purpose: the update swamps the weight it is subtracted from, so that (after - before) / lr is the gradient
# to full float32 precision.
LR = 1e4
WARMUP = 10**8  # steps; what the learning rate of an early step is follows from it
MOVING = 10**3  # at this step it is 0.1: enough to take the policy away from its reference
BUDGET = 120  # tokens: two rows of an image at most, several micro-batches a step, and not as many on each rank
PROMPT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"

WORDS = [
    "grpo.prompts_per_step=4",
    "grpo.group_size=3",
    "grpo.optim.name=sgd",
    f"grpo.optim.lr={LR}",
    f"grpo.optim.warmup_steps={WARMUP}",
    "grpo.optim.schedule=constant",
    "grpo.kl_beta=1",
    "grpo.optim.clip_norm=0",
    "grpo.logprob_gap_limit=1000",  # the rows' sampled log-probabilities are made up
]
FORMS = {
    "grpo": [],
    "corrected": ["grpo.aggregation=token-mean", "grpo.importance=token", "grpo.importance_mode=mask"],
    "gspo": ["grpo.aggregation=constant", "grpo.ratio=sequence", "grpo.importance=sequence", "grpo.kl_schedule=linear"],
}


def rows_of(n: int, aggregation: str = "sequence-mean") -> list[LearnerRow]:
    rng = np.random.default_rng(3)
    rows = []
    for i in range(n):
        length = int(rng.integers(3, 45))
        rows.append(
            LearnerRow(
                image_id=f"image-{i // 2}",
                image=png(i // 2),
                prompt_text=PROMPT.format("TASK: IQA" if i % 4 < 2 else "TASK: IAA, at length"),
                completion_ids=tuple(int(x) for x in rng.integers(40, 200, length)),
                task="iqa" if i % 4 < 2 else "iaa",
                prompt_tokens=40,
                advantage=float(rng.normal()),
                sampled_logprobs=tuple(rng.uniform(-7.2, -6.6, length) - 9 * (i % 2)),  # both sides of the cap
            )
        )
    lengths = np.array([len(r.completion_ids) for r in rows])
    trained = np.arange(n) % 5 != 4  # as with dropped groups or masked truncated completions
    weights = token_weights(lengths, trained, aggregation, 64)
    return [replace(row, weight=float(w)) for row, w in zip(rows, weights, strict=True)]


def weights(learners) -> dict[str, np.ndarray]:
    found = {}
    for ref in stream(learners, 1 << 24):
        found |= {n: from_wire(w).double().numpy() for n, w in ray.get(ref)["bucket"].items()}
    return found


def use(learner, grpo) -> None:
    """In a learner: the loss takes this form from the next step on."""
    learner.config = replace(learner.config, grpo=grpo)


def gradients(learners, form, ranks: int, start) -> dict[str, dict[str, np.ndarray]]:
    """By stage and parameter, from the state saved in `start`, which comes back at the end."""
    rows = rows_of(12, form.aggregation)
    shards, before = shard_rows(rows, ranks, BUDGET), weights(learners)
    ray.get([actor.__ray_call__.remote(use, form) for actor in learners.actors])

    def gradient(report) -> dict[str, np.ndarray]:
        after = weights(learners)
        learners.load(start, ranks)
        assert all(np.array_equal(v, before[n]) for n, v in weights(learners).items())
        return {n: (before[n] - v) / LR for n, v in after.items()}

    found = {"sft": gradient(learners.sft_step(shards, WARMUP, sum(len(r.completion_ids) for r in rows)))}
    report = learners.grpo_step(shards, WARMUP).result()
    assert report.metrics["loss/kl"] > 1e-5  # or the reference would have no part in the gradient
    if form.importance in ("token", "sequence"):
        assert 0 < report.metrics["policy/importance_cut"] < 1
    found["grpo"] = gradient(report)
    one_row = shard_rows(rows[1:2], ranks, BUDGET)  # a second learner has a filler only
    return found | {"one row": gradient(learners.grpo_step(one_row, WARMUP).result())}


@pytest.fixture(scope="module")
def found(
    model_untied, manifests, tmp_path_factory, shared_ray
) -> dict[int, dict[str, dict[str, dict[str, np.ndarray]]]]:
    """Gradients by ranks, form and stage. One start of the learners for each number of ranks."""
    directory, found = tmp_path_factory.mktemp("gradients"), {}
    for ranks in (1, 2):
        words = [f"output={directory / str(ranks)}", *tiny_words(model_untied, manifests), *WORDS]
        config = load_config([], [*words, f"cluster.learners={ranks}"])
        with Cluster(config) as cluster:
            learners = cluster.learners(ranks)
            learners.setup("grpo", WARMUP)
            rows = rows_of(12)
            learners.sft_step(shard_rows(rows, ranks, BUDGET), MOVING, sum(len(r.completion_ids) for r in rows))
            start = directory / f"start-{ranks}"
            start.mkdir()
            ray.get([actor.save.remote() for actor in learners.actors])
            before = weights(learners)
            learners.sft_step(shard_rows(rows, ranks, BUDGET), MOVING, sum(len(r.completion_ids) for r in rows))
            assert any(not np.array_equal(v, before[n]) for n, v in weights(learners).items())
            transfer.write(learners.actors, start, False, 60, threading.Event())  # the snapshot, whatever came after it
            written = load_file(start / "model" / "model.safetensors").values()  # under names of its own
            assert sorted(t.double().numpy().tobytes() for t in written) == sorted(v.tobytes() for v in before.values())
            learners.load(start, ranks)
            found[ranks] = {
                name: gradients(learners, load_config([], [*words, *form]).grpo, ranks, start)
                for name, form in FORMS.items()
            }
    return found


@pytest.mark.parametrize("form", FORMS)
def test_two_learners_have_the_gradients_of_one(form, found):
    for stage, one in found[1][form].items():
        total = np.sqrt(sum((g**2).sum() for g in one.values()))
        assert total > 1e-3, stage
        compared = 0
        for name, g in one.items():
            norm = np.linalg.norm(g)
            if norm < 1e-6 * total:
                continue
            compared += 1
            difference = np.linalg.norm(found[2][form][stage][name] - g) / norm
            assert difference <= 1e-5, f"{stage}: {name} differs by {difference:.2e}"
        assert compared > 60
