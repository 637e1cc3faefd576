"""A node's copy of the weights (hpZ) and an optimizer in the node's memory change where things lie, and no number.

Four ranks, as on two nodes of two, take steps with copies and without; two ranks with and without the offload. The
learners start once for each number of ranks and make one policy after the other. SHARDS=all (`make nightly`) adds
cases, and one rank that loads what the others saved.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import corpus, tiny_words
from test_gradients import rows_of

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from tatar_dist.cluster.ray_cluster import Cluster  # noqa: E402
from tatar_dist.config.load import load_config  # noqa: E402
from tatar_dist.demo.tiny.build import TinySizes, build  # noqa: E402
from tatar_dist.learner.sharding import shard_rows  # noqa: E402

pytestmark = pytest.mark.usefixtures("shared_ray")
SIZES = TinySizes(text_hidden=64, text_layers=2, text_heads=2, text_kv_heads=1, vision_depth=2)
RANKS, NODE, BUDGET = 4, 2, 120
NORM = "optim/grad_norm"
ALL = os.environ.get("SHARDS") == "all"
WORDS = [
    *("grpo.prompts_per_step=4", "grpo.group_size=3", "grpo.optim.lr=0.003", "grpo.optim.schedule=constant"),
    *("grpo.kl_beta=1", "grpo.logprob_gap_limit=1000", "grpo.importance=token", "grpo.optim.clip_norm=1"),
]
SAVED: dict[int, dict[str, torch.Tensor]] = {}  # by ranks, which the tests below fill in their order
ADAPTERS = ("model.lora_rank=4", "grpo.optim.lr=0.01")
CLIPPED = ("grpo.optim.name=sgd", "grpo.optim.lr=0.1", "grpo.optim.clip_norm=0.01")
CASES = {
    "reference": (),
    "adapters, recomputed": (*ADAPTERS, "model.gradient_checkpointing=true"),
}
LARGER = {
    "recomputed": ("model.gradient_checkpointing=true", "grpo.kl_beta=0"),
    "bfloat16": ("model.dtype=bfloat16",),
    "frozen tower": ("model.train_vision=false",),
    "clipped": CLIPPED,
}


def make(learner: Any, config: Any, share: bool) -> None:
    """In a learner: a new policy and reference, with copies of the weights within nodes or without."""
    from deepspeed.utils import groups

    from tatar_dist.algo.schedule import needs_reference
    from tatar_dist.learner.zero3 import Zero3

    learner.node = getattr(learner, "node", groups._ZERO_PARAM_INTRA_PARALLEL_GROUP)
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = learner.node if share else None
    learner.config = config
    path = config.model.path if needs_reference(config.grpo) else None
    learner.zero3 = Zero3(config, config.grpo.optim, reference_path=path, temperature=1.0, device=learner.device)


def take(learner: Any, shards: Any, numbers: range, pushed: bool) -> list[dict[str, Any]]:
    """In a learner: take steps. Of each its metrics, this rank's gradients before every micro-batch's update, what was
    gathered in elements by ranks, and the weights as a push has them."""
    import torch.distributed as dist
    from deepspeed.runtime.zero import partition_parameters

    steps, zero3 = [], learner.zero3
    optimizer, update, gather = zero3.engine.optimizer, zero3.optimizer_step, partition_parameters._dist_allgather_fn
    for number in numbers:
        gradients, gathered = [], Counter()

        def optimizer_step() -> float:
            gradients.append(optimizer.grad_partitions_flat_buffer.clone())  # noqa: B023
            return update()

        def counted(input_tensor: Any, output_tensor: Any, group: Any = None) -> Any:
            gathered[dist.get_world_size(group)] += output_tensor.numel()  # noqa: B023
            return gather(input_tensor, output_tensor, group)

        zero3.optimizer_step, partition_parameters._dist_allgather_fn = optimizer_step, counted
        metrics = learner.grpo_step(shards[learner.rank], number).metrics
        del zero3.optimizer_step
        partition_parameters._dist_allgather_fn = gather
        weights = dict(zero3.full_parameters()) if pushed else {}
        steps.append({"metrics": metrics, "gradients": gradients, "gathered": dict(gathered), "weights": weights})
    return steps


def shards_of(ranks: int) -> Any:
    """Several micro-batches a rank; the last one of the last rank is a filler."""
    rows = rows_of(12)
    shards = shard_rows(rows, ranks, BUDGET)
    assert len(shards[0]) > 1
    filler = replace(rows[0], filler=True, weight=0.0)
    return [[*shard, [filler] if rank == ranks - 1 else rows[:1]] for rank, shard in enumerate(shards)]


class Rig:
    """Learners that were started once, as a run starts them."""

    def __init__(self, cluster: Cluster, directory: Path, words: list[str], ranks: int) -> None:
        self.words, self.ranks, self.shards, self.directory = words, ranks, shards_of(ranks), directory
        self.learners = cluster.learners(ranks)
        self.learners.setup("grpo", 10)

    def call(self, function: Any, *arguments: Any) -> list[Any]:
        return ray.get([actor.__ray_call__.remote(function, *arguments) for actor in self.learners.actors])

    def make(self, *words: str, share: bool = False) -> Rig:
        self.call(make, load_config([], [*self.words, *words]), share)
        return self

    def take(self, *numbers: int, pushed: bool = True) -> list[list[dict[str, Any]]]:
        """Steps by rank."""
        return self.call(take, self.shards, range(numbers[0], numbers[-1] + 1), pushed)

    def save(self, name: str) -> Path:
        path = self.directory / name
        path.mkdir()
        self.learners.save(path).result()
        return path


def same(a: Any, b: Any, *but: str) -> bool:
    """Whether two results are equal to the bit, apart from what was gathered and the keys in `but`."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k], *but) for k, v in a.items() if k not in ("gathered", *but))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y, *but) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def place(tmp_path_factory, manifests) -> tuple[Path, list[str]]:
    """A directory, and the words of all configurations."""
    directory = tmp_path_factory.mktemp("shards")
    model = build(directory / "model", corpus=corpus(), sizes=SIZES)
    return directory, [f"output={directory / 'run'}", *tiny_words(str(model), manifests), *WORDS]


@pytest.fixture(scope="module")
def rig(request, place):
    """The learners of one number of ranks; pytest ends them before those of the next."""
    directory, words = place
    node = [f"cluster.zero_hpz_partition_size={NODE}"] if request.param == RANKS else []
    with Cluster(load_config([], [*words, f"cluster.learners={request.param}", *node])) as cluster:
        yield Rig(cluster, directory, words, request.param)


two, four = (pytest.mark.parametrize("rig", [ranks], indirect=True, scope="module") for ranks in (2, RANKS))


def elements(learner: Any) -> int:
    """In a learner: what a gather of all trained parameters comes to, in elements."""
    return sum(RANKS * -(-p.ds_numel // RANKS) for p in learner.zero3.engine.module.parameters() if p.requires_grad)


@two
@pytest.mark.parametrize("words", [["grpo.optim.clip_norm=0"], CLIPPED], ids=["adamw", "clipped"])
def test_steps_with_an_offloaded_optimizer_are_those_without(rig, words):
    """DeepSpeed sums the squares of the norm in another order: with clipping weights differ in their last bit."""
    found = {}
    for offload in (False, True):
        rig.make(*words, f"cluster.offload_optimizer={offload}")
        found[offload] = rig.take(0, 1, 2)
        assert rig.call(held)[0] == (offload, 0 if not offload else 12 if words is CLIPPED else 20)
    here, there = found[False], found[True]
    norms = [[step["metrics"][NORM] for rank in ranks for step in rank] for ranks in (here, there)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-6) and min(norms[0]) > 0.01
    assert words is CLIPPED or same(here, there, NORM)
    for a, b in zip(here[0], there[0], strict=True):
        for name, weight in a["weights"].items():
            torch.testing.assert_close(b["weights"][name], weight, rtol=1e-6, atol=1e-8)


def held(learner: Any) -> tuple[bool, float]:
    """In a learner: whether the optimizer is offloaded, and then the bytes that it holds of each element."""
    optimizer = learner.zero3.engine.optimizer
    if not optimizer.offload_optimizer:
        return False, 0
    masters = optimizer.fp32_partitioned_groups_flat
    tensors = [optimizer.grad_partitions_flat_buffer, *masters, *(m.grad for m in masters)]
    tensors += [t for m in masters for t in optimizer.optimizer.state[m].values() if t is not None and t.ndim]
    return True, sum(t.nbytes for t in tensors) / sum(m.numel() for m in masters)


@two
def test_a_checkpoint_of_an_offloaded_optimizer_is_loaded_without_one(rig):
    words, offload = (*ADAPTERS, "grpo.optim.clip_norm=0"), "cluster.offload_optimizer=true"
    SAVED[2] = rig.make(*words, offload).take(0, 1)[0][-1]["weights"]
    rig.save("two")
    expected = rig.take(2)
    for more in ((), (offload,)):
        rig.make(*words, *more)
        rig.learners.load(rig.directory / "two", 2)
        assert same(rig.take(2), expected, NORM)


@four
@pytest.mark.parametrize("case", CASES | (LARGER if ALL else {}))
def test_steps_with_a_nodes_copy_are_those_without_to_the_bit(rig, case):
    """The second step follows a push, the third follows none."""
    found = {}
    for share in (False, True):
        rig.make(*(CASES | LARGER)[case], share=share)
        found[share] = [
            [*a, *b, *c] for a, b, c in zip(rig.take(0), rig.take(1, pushed=False), rig.take(2), strict=True)
        ]
    flat, shared = found[False], found[True]
    assert same(flat, shared)
    first, _, last = flat[0]
    assert first["metrics"][NORM] > 0 and not same(first["weights"], last["weights"])
    assert all(gradient.any() for rank in flat for step in rank for gradient in step["gradients"])
    assert all(set(step["gathered"]) == {RANKS} for rank in flat for step in rank)
    between = rig.call(elements)
    for rank, most in zip(shared, between, strict=True):
        assert set(rank[1]["gathered"]) == {NODE}, "what a push has gathered stays on the node"
        assert rank[2]["gathered"][RANKS] == most, "once a step, whatever its micro-batches"


@four
@pytest.mark.parametrize("saved_ranks", [2, RANKS])
def test_what_was_loaded_takes_the_place_of_a_nodes_copy(rig, saved_ranks, place, tmp_path):
    """Of frozen weights, too, which DeepSpeed leaves in the copy."""
    directory, words = place
    name = {2: "two", RANKS: "four"}[saved_ranks]
    if saved_ranks == RANKS:
        SAVED[RANKS] = rig.make(*ADAPTERS, share=True).take(0, 1)[0][-1]["weights"]
        rig.save(name)
        expected = rig.take(2)
    other = tmp_path / "other"
    build(other, corpus=corpus(), sizes=SIZES)
    for file in other.glob("*.safetensors"):
        save_file({n: 1.5 * t for n, t in load_file(file).items()}, file, {"format": "pt"})
    found = []
    for share in (True, False):
        rig.make(*ADAPTERS, f"model.path={other}", share=share).take(0)
        rig.learners.load(directory / name, saved_ranks)
        found.append(rig.take(2))
    assert same(*found)
    if saved_ranks == RANKS:
        assert same(found[0], expected)


if ALL:

    @pytest.mark.parametrize("rig", [1], indirect=True, scope="module")
    @pytest.mark.parametrize(("name", "saved_ranks"), [("two", 2), ("four", RANKS)])
    def test_one_rank_loads_what_an_offloaded_optimizer_and_ranks_with_copies_saved(rig, name, saved_ranks):
        rig.make(*ADAPTERS)
        rig.learners.load(rig.directory / name, saved_ranks)
        assert same(rig.call(lambda learner: dict(learner.zero3.full_parameters()))[0], SAVED[saved_ranks])
