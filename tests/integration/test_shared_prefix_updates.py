"""GRPO updates of real learners on packed rows are those of the padded per-row forward in plain torch.

One and two ZeRO-3 ranks take two steps of SGD; the plain side has neither Ray, DeepSpeed nor anything that packs, all
rows in one batch, and the loss by its formula. The first step leaves the reference behind and compares what the losses
are; the second compares the updates.
"""

from __future__ import annotations

import io
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from conftest import corpus
from PIL import Image

torch = pytest.importorskip("torch")

from tatar_dist.bench import per_row  # noqa: E402
from tatar_dist.cluster.ray_cluster import Cluster  # noqa: E402
from tatar_dist.data.images import decode_image  # noqa: E402
from tatar_dist.demo.tiny.build import TinySizes, build  # noqa: E402
from tatar_dist.learner.batch import Collator  # noqa: E402
from tatar_dist.learner.sharding import global_weights, group_rows, shard_groups  # noqa: E402
from tatar_dist.models import family  # noqa: E402
from tatar_dist.sync.object_store import from_wire, stream  # noqa: E402
from tatar_dist.types import Completion, Group, Prompt, Sample, ScoredGroup  # noqa: E402

pytestmark = pytest.mark.usefixtures("shared_ray")
SIZES = TinySizes(text_hidden=64, text_layers=2, text_heads=2, text_kv_heads=1, vision_depth=2)
IMAGES = ((112, 112), (224, 112), (96, 160), (168, 140))
LENGTHS = ((1, 40, 7, 40), (3, 18, 18, 29), (1, 1, 2, 35), (12, 26, 1, 5))
TEMPERATURE, BETA = 0.7, 1.0
# Huge on purpose: the second update swamps the weight that it is added to, so it is known to full float32 precision.
RATE = 1e4
WARMUP = 10**8  # steps; the learning rate of step s is RATE s / WARMUP
STEPS = (10**3, WARMUP)
LIMIT = 1e-5
BUDGET = 200  # tokens: several micro-batches a rank


def scored_groups(backbone) -> list[ScoredGroup]:
    """A prompt of its own length for every image; the third group is not trained on."""
    rng = np.random.default_rng(5)
    groups = []
    for i, (size, lengths) in enumerate(zip(IMAGES, LENGTHS, strict=True)):
        content = [{"type": "image"}, {"type": "text", "text": "a plain view of it " * (i + 1)}]
        messages = [{"role": "user", "content": content}]
        text = backbone.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        sample = Sample(f"s{i}", "set", "iaa" if i % 2 else "iqa", picture(rng, size), 50.0)
        ids = tuple(backbone.encode_prompt(text, decode_image(sample.image, "a picture")).ids.tolist())
        completions = tuple(
            Completion("", tuple(int(t) for t in rng.integers(40, 200, n)), (0.0,) * n, "stop") for n in lengths
        )
        none = np.zeros(len(lengths))
        groups.append(
            ScoredGroup(
                Group(Prompt(sample, text, f"p{i}"), ids, completions, 0),
                none > 0, {}, none, rng.normal(size=len(lengths)), trained=i != 2,
            )
        )  # fmt: skip
    return groups


def picture(rng, size: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    small.resize(size, Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def plain_steps(backbone, rows) -> SimpleNamespace:
    """What every step's loss was, and the last step's update by parameter."""
    model = backbone.load_model().train()
    reference = deepcopy(model).requires_grad_(False)
    collate, forbidden = Collator(backbone), backbone.forbidden_ids()
    mask = torch.zeros(len(rows), max(len(r.completion_ids) for r in rows))
    for r, row in enumerate(rows):
        mask[r, : len(row.completion_ids)] = 1
    advantage, weight = (torch.tensor([[getattr(r, n)] for r in rows]) for n in ("advantage", "weight"))
    found = SimpleNamespace(policy=[], kl=[], norm=[])
    for step in STEPS:
        model.zero_grad()
        logp = per_row.token_logprobs(model, collate, rows, forbidden, TEMPERATURE)
        with torch.no_grad():
            ref = per_row.token_logprobs(reference, collate, rows, forbidden, TEMPERATURE)
        policy = -((logp - logp.detach()).exp() * advantage * weight * mask).sum()
        kl = (((ref - logp).exp() - (ref - logp) - 1) * weight * mask).sum()
        (policy + BETA * kl).backward()
        found.policy.append(float(policy.detach()))
        found.kl.append(float(kl.detach()))
        found.norm.append(float(torch.stack([p.grad.norm() for p in model.parameters()]).norm()))
        found.gap = ((logp.detach() * mask).abs().sum() / mask.sum()).item()  # the rows' sampled ones are 0
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        torch.optim.SGD(model.parameters(), lr=RATE * step / WARMUP).step()
    found.update = {n: (p.detach() - before[n]).double().numpy() for n, p in model.named_parameters()}
    return found


def weights(learners) -> dict[str, np.ndarray]:
    found = {}
    for ref in stream(learners, 1 << 24):
        found |= {n: from_wire(w).double().numpy() for n, w in ray.get(ref)["bucket"].items()}
    return found


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_updates_of_one_and_two_ranks_are_those_of_padded_rows_in_plain_torch(tie, make_config, tmp_path):
    path = str(build(tmp_path / "model", tie=tie, corpus=corpus(), sizes=SIZES))
    config = make_config(
        path,
        "model.max_pixels=50176",
        "grpo.prompts_per_step=4",
        "grpo.group_size=4",
        "grpo.optim.name=sgd",
        f"grpo.optim.lr={RATE}",
        f"grpo.optim.warmup_steps={WARMUP}",
        "grpo.optim.schedule=constant",
        "grpo.optim.clip_norm=0",
        f"grpo.kl_beta={BETA}",
        "grpo.logprob_gap_limit=1000",
        f"rollout.temperature={TEMPERATURE}",
    )
    backbone = family("qwen2_5_vl")(config.model)
    groups = scored_groups(backbone)
    shares = global_weights(groups, "sequence-mean", 64)
    rows = [row for g, w in zip(groups, shares, strict=True) for row in group_rows(g, w)]
    plain = plain_steps(backbone, rows)
    assert ("lm_head.weight" in plain.update) != tie
    assert min(abs(x) for x in (*plain.policy, plain.kl[1])) > 1e-2  # or there would be nothing to compare
    for ranks in (1, 2):
        with Cluster(replace(config, cluster=replace(config.cluster, learners=ranks))) as cluster:
            learners = cluster.learners(ranks)
            learners.setup("grpo", WARMUP)
            shards = shard_groups(groups, ranks, shares, BUDGET, backbone.costs())
            for i, step in enumerate(STEPS):
                before = weights(learners) if i else {}
                metrics = learners.grpo_step(shards, step).result().metrics
                assert metrics["loss/policy"] == pytest.approx(plain.policy[i], rel=LIMIT)
                assert metrics["loss/kl"] == pytest.approx(plain.kl[i], rel=LIMIT, abs=1e-9)
                assert metrics["optim/grad_norm"] == pytest.approx(plain.norm[i], rel=LIMIT)
            assert metrics["sync/logprob_gap"] == pytest.approx(plain.gap, rel=LIMIT)
            after = weights(learners)
        assert after.keys() == plain.update.keys()
        for name, right in plain.update.items():
            error = np.linalg.norm(after[name] - before[name] - right) / np.linalg.norm(right)
            assert error <= LIMIT, f"{ranks} ranks: {name} differs by {error:.2e}"
