"""A run that stopped and resumed is the run that did not stop, to the bit, in deterministic mode."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import threading
import time

import pyarrow.parquet as pq
import pytest

from tatar_dist import grpo as controller
from tatar_dist import sft
from tatar_dist.errors import Interrupted, UserError
from tatar_dist.run.directory import RunDirectory, read_metrics
from tatar_dist.run.events import read_events

pytestmark = pytest.mark.usefixtures("shared_ray")
ONE = ("rollout.engines=1", "cluster.learners=1")
WALL_CLOCK = ("time/", "perf/", "sync/seconds")


def lines(config) -> list[dict]:
    with RunDirectory(config) as directory:
        return [{k: v for k, v in m.items() if not k.startswith(WALL_CLOCK)} for m in read_metrics(directory.path)]


def test_resumed_grpo_equals_uninterrupted_grpo_to_the_bit(model_untied, make_config, tmp_path):
    config = make_config(
        model_untied,
        "rollout.deterministic=true",
        "rollout.engines=1",
        "grpo.max_steps=4",
        "grpo.optim.lr=0.003",
        "checkpoint.every=2",
        "checkpoint.keep=9",
    )
    controller.run(config)
    whole = lines(config)
    assert [m["step"] for m in whole] == [0, 1, 2, 3]
    assert any(m["optim/grad_norm"] > 0 for m in whole[:2]) and whole[3]["optim/grad_norm"] > 0
    assert all(m["sync/logprob_gap_max"] < 1e-4 and m["policy/staleness"] == 0 for m in whole)

    other = tmp_path / "resumed"
    shutil.copytree(config.output, other, symlinks=True)
    shutil.rmtree(other / "checkpoints" / "step_000004")
    (other / "checkpoints" / "step_000003").mkdir()  # as if killed while writing: no state.json, so it does not count
    resumed = dataclasses.replace(config, output=str(other))
    controller.run(resumed)

    assert lines(resumed) == whole
    final = "checkpoints/step_000004/model/model.safetensors"
    assert (other / final).read_bytes() == (tmp_path / "run" / final).read_bytes()
    start = tmp_path / "run/checkpoints/step_000002/model/model.safetensors"
    assert start.read_bytes() != (other / final).read_bytes()
    for step in (2, 3):
        name = f"rollouts/step_{step:06d}.parquet"
        assert pq.read_table(other / name).equals(pq.read_table(tmp_path / "run" / name))


@pytest.mark.nightly
def test_a_signal_while_the_engines_work_ahead_costs_nothing(model_untied, make_config, tmp_path):
    words = ("rollout.deterministic=true", "grpo.max_steps=4", "grpo.optim.lr=0.0005", "grpo.staleness=1", *ONE)
    longer = "grpo.inner_iterations=8"  # learning takes longer than generating, which can so be finished
    config = make_config(model_untied, *words, longer, "grpo.logprob_gap_limit=10", "checkpoint.every=0")
    controller.run(config)
    stopped = dataclasses.replace(config, output=str(tmp_path / "stopped"))

    def stop() -> None:
        while not any(e["event"] == "phase" and (e["phase"], e["step"]) == ("learn", 1) for e in read_events(run)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    run = tmp_path / "stopped"
    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    with pytest.raises(Interrupted, match="stopped after step 2 of 4"):
        controller.run(stopped)
    thread.join()
    state = json.loads((run / "checkpoints/latest/state.json").read_text())
    assert {name[:7] for name in state["ahead"]} == {"000002/"}, "what was under way was finished and kept"
    controller.run(stopped)
    assert lines(stopped) == lines(config)
    assert [m["policy/staleness"] for m in lines(stopped)] == [0, 1, 1, 1]


def test_resumed_sft_equals_uninterrupted_sft_to_the_bit(model_tied, make_config, tmp_path):
    words = ("sft.max_steps=4", "sft.global_batch=8", "sft.optim.lr=0.003", "checkpoint.every=2", "checkpoint.keep=9")
    config = make_config(model_tied, *words)
    sft.run(config)
    whole = lines(config)
    other = tmp_path / "resumed"
    shutil.copytree(config.output, other, symlinks=True)
    shutil.rmtree(other / "checkpoints" / "step_000004")
    resumed = dataclasses.replace(config, output=str(other))
    sft.run(resumed)
    assert lines(resumed) == whole and len(whole) == 4
    final = "checkpoints/step_000004/model/model.safetensors"
    assert (other / final).read_bytes() == (tmp_path / "run" / final).read_bytes()

    record = {name: (other / name).read_bytes() for name in ("config.yaml", "prompts.yaml", "metrics.jsonl")}
    with pytest.raises(UserError, match=r"a run with stage=sft \(now grpo\)"):
        controller.run(resumed)
    faster = dataclasses.replace(config.sft, optim=dataclasses.replace(config.sft.optim, lr=0.1))
    with pytest.raises(UserError, match=r"sft.optim.lr=0.003 \(now 0.1\): .*checkpoint.accept=\[sft.optim.lr\]"):
        sft.run(dataclasses.replace(resumed, sft=faster))  # finished: nothing is left to train with it
    assert all((other / name).read_bytes() == content for name, content in record.items())

    shutil.rmtree(other / "checkpoints" / "step_000004")
    large = dataclasses.replace(config.cluster, learner_cpus=99)
    with pytest.raises(UserError, match="need 198 CPUs"):
        sft.run(dataclasses.replace(resumed, cluster=large))  # it would begin at step 2
    assert all((other / name).read_bytes() == content for name, content in record.items())
