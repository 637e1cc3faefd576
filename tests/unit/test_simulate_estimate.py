"""What `plan --simulate` estimates without a measurement: formulas by hand, keys that count, and the page's figures."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from simulate_cases import CONFIGS, GRPO, grpo

from tatar_dist.config.load import load_config
from tatar_dist.plan import memory
from tatar_dist.plan.plan import resolve
from tatar_dist.plan.simulate.costs import read_costs
from tatar_dist.plan.simulate.estimate import CARDS, Shares, estimate
from tatar_dist.plan.simulate.forecast import Simulator, forecast
from tatar_dist.plan.simulate.step import Setup, learn_seconds, push_seconds

H100, SHARES = CARDS["H100"], Shares()
SIZES = memory.sizes_of("Qwen2.5-VL-7B")
W = 2 * SIZES.parameters
LINK, COPY = H100.link * H100.linked, H100.hbm * SHARES.copy
LOAD = 0.1 + 729 * 0.43e-3 + 4 * W / COPY  # 729 tensors in the checkpoint of the 7B
BUCKETS = 1 + 1 / np.ceil(W / 2**28)  # the first bucket of 256 MiB is hidden by nothing


def pushed(config, learners, engines, placement="disaggregated", **other):
    colocated = placement == "colocated"
    return push_seconds(estimate(config, **other), Setup(config, learners, engines, colocated=colocated))


def test_a_push_costs_what_its_way_moves():
    gathered = W * BUCKETS * (1 / LINK + 2 / COPY)
    assert pushed(GRPO, 4, 4) == pytest.approx(LOAD + gathered)  # auto: nccl, within a node
    assert pushed(GRPO, 8, 8, "colocated") == pytest.approx(LOAD + gathered)  # cuda_ipc
    two = grpo("cluster.nodes=2")
    assert pushed(two, 8, 8) == pytest.approx(LOAD + W * BUCKETS / 46e9)  # through the one network card of rank 0
    assert pushed(two, 16, 16, "colocated") == pytest.approx(LOAD + W * BUCKETS * (1 / (8 * 46e9) + 2 / COPY))
    store = grpo("cluster.nodes=2", "rollout.push=object_store")
    assert pushed(store, 8, 8) == pytest.approx(LOAD + W * BUCKETS / 3.8e9)
    assert pushed(store, 8, 16) - pushed(store, 8, 8) == pytest.approx(W / 5e9)  # the second node with engines


def test_a_decode_step_reads_layers_and_head_and_not_the_tower():
    costs, two = estimate(GRPO), estimate(grpo("rollout.tensor_parallel=2"))
    read = 2 * (28 * (3584 * (2 * 3584 + 2 * 512) + 3 * 3584 * 18944) + 3584 * 152064)
    assert read / W == pytest.approx(0.85, abs=0.01)
    assert costs.engine.per_step == pytest.approx(read / (3.35e12 * 0.72))
    assert two.engine.per_step == pytest.approx(costs.engine.per_step / 2 + 2 * 28 * 12e-6)
    assert "nothing measured" in costs.source


def test_fp8_engines_gain_what_was_published_and_at_peak_what_bytes_allow():
    words = ["rollout.quantization=fp8", "grpo.logprob_gap_limit=0.15"]
    for peak, gain in ((False, 1.33), (True, 1.86)):
        whole, eighth = (estimate(config, peak=peak).engine.per_step for config in (GRPO, grpo(*words)))
        assert whole / eighth == pytest.approx(gain, abs=0.005)


def test_adapters_spare_the_gradients_of_the_weights():
    whole, adapted = (estimate(grpo(f"model.lora_rank={rank}", "grpo.kl_beta=0")).learner for rank in (0, 16))
    assert adapted.per_token / whole.per_token == pytest.approx(3 / 4)  # forward, again, inputs, and not weights
    assert adapted.gather / whole.gather == pytest.approx(3 / 4)  # gathered three times, reduced once
    assert adapted.per_shard < whole.per_shard / 100


def test_gathers_lie_beside_the_work_of_a_rank():
    costs, lengths = estimate(GRPO).learner, np.full((16, 8), 200)
    setup = Setup(GRPO, 4, 4)
    alone = learn_seconds(replace(costs, gather=0.0), setup, lengths)
    assert learn_seconds(costs, setup, lengths) == pytest.approx(alone)
    slow = replace(costs, gather=100.0, overlap=0.5)  # one micro-batch of 4 x 1,203 + 4 x 8 x 200 tokens a rank
    work = alone - costs.per_update - costs.per_shard / 4
    assert learn_seconds(slow, setup, lengths) == pytest.approx(alone + 100 * 3 / 4 - 0.5 * work)


def test_network_cards_carry_gathers_between_nodes_and_shards_in_a_node_spare_them():
    flat, inside = grpo("cluster.nodes=4"), grpo("cluster.nodes=4", "cluster.zero_hpz_partition_size=8")
    moved = 5 * W  # forward, again, backward, reference; gradients
    assert estimate(flat).learner.gather == pytest.approx(moved / LINK) == estimate(inside).learner.gather
    for nics in (1, 8):
        network = min(LINK, nics * 46e9)
        assert estimate(flat, nics=nics).learner.gather_across_nodes == pytest.approx(moved / network)
        found = estimate(inside, nics=nics).learner.gather_across_nodes
        assert found == pytest.approx(4 * W / LINK + W / network)
    lora = grpo("cluster.nodes=4", "cluster.zero_hpz_partition_size=8", "model.lora_rank=16")
    assert estimate(lora, nics=1).learner.gather_across_nodes == estimate(lora).learner.gather


def test_an_offloaded_optimizer_works_at_the_rate_of_the_nodes_memory():
    here, there = (estimate(grpo(f"cluster.offload_optimizer={word}")).learner.per_shard for word in ("false", "true"))
    assert here == pytest.approx(SIZES.parameters * 30 / (3.35e12 * 0.8))
    assert there == pytest.approx(SIZES.parameters * (30 / (40e9 / 8) + 14 / (64e9 * 0.77)))  # 8 ranks of a node


def test_splits_are_those_that_the_estimate_of_memory_has_room_for():
    simulator = Simulator(GRPO, estimate(GRPO))
    assert simulator.best(1, "colocated") is None
    assert simulator.best(2, "disaggregated") is None
    assert min(learners for learners, _ in simulator.splits(8, "disaggregated")) == 4
    small = grpo("model.path=Qwen/Qwen2.5-VL-3B-Instruct")
    whole, offloaded = (
        Simulator(c, estimate(c))
        for c in (small, replace(small, cluster=replace(small.cluster, offload_optimizer=True)))
    )
    assert whole.fits(2, 1, "disaggregated") and not whole.fits(1, 1, "disaggregated")
    assert offloaded.fits(1, 1, "disaggregated")
    assert not Simulator(small, estimate(small, "4090")).fits(4, 1, "disaggregated")


def test_an_engine_beside_a_learner_takes_the_memory_that_is_left():
    simulator, config = Simulator(GRPO, estimate(GRPO)), grpo("cluster.placement=colocated")
    assert not memory.estimate(config, resolve(config, "grpo"), 79.1).roles[1].fits  # 0.85 of a GPU is too much
    assert simulator.fits(4, 4, "colocated") and not simulator.fits(2, 2, "colocated")
    many = Simulator(grpo("rollout.max_num_seqs=128"), estimate(GRPO))  # one engine would have all of a step at once
    assert many.fits(4, 4, "colocated") and not many.fits(4, 1, "colocated")


@pytest.mark.parametrize("card", CARDS)
def test_the_limit_is_below_the_estimate_in_every_part(card):
    config = grpo("model.path=Qwen2.5-VL-3B", "rollout.push=object_store")
    found = forecast(config, estimate(config, card), [8])
    parts, limit = found["configured"]["parts"], found["limit"]["parts"]
    assert all(limit[name] <= seconds for name, seconds in parts.items())
    assert 0 < found["limit"]["step_seconds"] < found["configured"]["step_seconds"]
    assert limit["other"] == limit["reward"] == 0


PAGE = (CONFIGS.parent / "tatar_dist/plan/README.md").read_text()


def rows_of(heading):
    """The rows of the table below a line that begins with `heading`: words of the command, and the cells."""
    table = PAGE[PAGE.index(heading) :].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {row[0].strip("`").replace("(none)", ""): row[1:] for row in rows}


def configured(words, *more):
    """The configuration and costs of `plan --config configs/grpo.yaml --simulate WORDS`."""
    words, root = words.split(), CONFIGS.parent
    files = [str(root / b) for a, b in zip(words, words[1:], strict=False) if a == "--config"]
    times = [root / b for a, b in zip(words, words[1:], strict=False) if a == "--times"]
    config = load_config([str(CONFIGS / "grpo.yaml"), *files], [*(w for w in words if "=" in w), *more])
    nics = 1 if "--nics" in words else None
    return config, read_costs(times[0]) if times else estimate(config, nics=nics)


def step_of(words, *more):
    config, costs = configured(words, *more)
    plan = resolve(config, "grpo")
    return Simulator(config, costs).predict(plan.learners, plan.engines, config.cluster.placement)


def seconds(parts, *names):
    total = sum(parts.get(name, 0.0) for name in names)
    return f"{total:.2f}" if total else "–"


@pytest.mark.parametrize("words", rows_of("| WORDS | learners + engines"))
def test_the_page_says_what_the_command_says_of_the_papers_step(words):
    found = forecast(*configured(words), [8])
    step, limit = found["configured"], found["limit"]
    expected = [
        f"{step['learners']} + {step['engines']}",
        f"{step['step_seconds']:.2f}",
        *(seconds(step["parts"], name) for name in ("generate", "learn", "sync", "switch")),
        seconds(step["parts"], "reward", "other"),
    ]
    limits = (
        [f"{limit['step_seconds']:.2f}", *(seconds(limit["parts"], n) for n in ("generate", "learn", "sync"))]
        if limit
        else ["–"] * 4
    )
    assert rows_of("| WORDS | learners + engines")[words] == expected + limits


@pytest.mark.parametrize("words", rows_of("| WORDS | 8 GPUs"))
def test_the_page_says_what_the_command_says_of_weak_scaling(words):
    steps = []
    for nodes in (1, 2, 4, 8):
        step = step_of(words, f"cluster.nodes={nodes}", f"grpo.prompts_per_step={16 * nodes}")
        assert step.gpus == 8 * nodes
        steps.append(step.step_seconds)
    assert rows_of("| WORDS | 8 GPUs")[words] == [*(f"{s:.2f}" for s in steps), f"{steps[0] / steps[-1]:.2f}"]


def test_costs_of_an_estimate_serve_a_model_of_unknown_size_without_a_limit():
    found = forecast(grpo("model.path=someones/model"), estimate(GRPO), [8])
    assert found["limit"] is None and found["table"][0]["best"]


def test_the_page_says_what_shards_in_a_node_save_with_one_network_card():
    said = re.search(r"with `--nics 1` a step of `(\S+)` takes\s([\d.]+) s, and ([\d.]+) without them", PAGE)
    words = f"--config {said[1]} --nics 1"
    steps = [step_of(words, f"cluster.zero_hpz_partition_size={size}").step_seconds for size in (8, 1)]
    assert [f"{s:.2f}" for s in steps] == [said[2], said[3]]
