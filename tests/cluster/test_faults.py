"""The fault matrix on two hosts: what dies is replaced, nothing is lost, and the weights are the undisturbed run's.

One reference run; the faults of one kind share a run, at different steps. That a fault landed in the phase it was meant
for is read from the run's event log, where the dying process wrote it down itself and the controller what it saw.
"""

from __future__ import annotations

import sys

import pytest
from hosts import Hosts
from ray_hosts import ROOT, RayCluster
from runs import STEPS, Run, assert_same

ENGINE_FAULTS = {  # step -> failpoint; F1, F5, F11, F2
    1: "engine.generate:kill:step=1:engine=0",
    2: "reward.score:kill:step=2",
    3: "engine.update:kill:version=4:engine=1",
    4: "engine.generate:stop:step=4",
}
LEARNER_FAULTS = (  # a straggler that is hedged, F3, F6
    "engine.generate:stop:step=1:engine=0",
    "learner.backward:kill:step=3:rank=1",
    "controller.learn:kill:step=4",
)


@pytest.fixture(scope="module")
def cluster(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory):
    with RayCluster(hosts, tmp_path_factory.mktemp("ray")) as found:
        yield found


@pytest.fixture(scope="module")
def make_run(cluster: RayCluster, words: list[str], tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("runs")

    def make(name: str, *more: str) -> Run:
        common = [
            "rollout.deterministic=true",
            f"grpo.max_steps={STEPS}",
            "grpo.optim.lr=0.003",
            "checkpoint.every=1",
            "checkpoint.keep=9",
            "cluster.learner_placement=spread",
            "rollout.suspect_after_s=10",
            "rollout.call_timeout_s=25",
            "rollout.push_timeout_s=25",
        ]
        return Run(directory / name, [*words, *common, *more], cluster)

    return make


@pytest.fixture(scope="module")
def reference(make_run) -> Run:
    return make_run("reference").start().finish()


def failpoints(*entries: str) -> str:
    return "failpoints=[" + ",".join(f'"{e}"' for e in entries) + "]"


@pytest.fixture(scope="module")
def engine_faults(make_run) -> Run:
    return make_run("engines", failpoints(*ENGINE_FAULTS.values())).start().finish()


@pytest.fixture(scope="module")
def learner_faults(make_run) -> Run:
    run = make_run("learners", failpoints(*LEARNER_FAULTS), "checkpoint.every=2", "rollout.hedge=true").start()
    assert run.wait() == -9, run.said[-3000:]
    return run.start().finish()


def fault(run: Run, point: str) -> dict:
    (found,) = [e for e in run.events("fault") if e["point"] == point]
    return found


def before(run: Run, event: dict) -> dict:
    """The phase that the controller was in when something happened."""
    return [e for e in run.events("phase") if e["time"] <= event["time"]][-1]


def test_the_reference_used_both_hosts(reference: Run, hosts: Hosts):
    (learners,) = reference.events("learners/ready")
    assert sorted(learners["hosts"]) == ["node1", "node2"]
    assert {e["host"] for e in reference.events("engine/ready")} == {"node1", "node2"}
    assert not reference.events("engine/dead") and not reference.events("learners/failed")


def test_f1_an_engine_killed_while_generating(engine_faults: Run, reference: Run):
    (event,) = [e for e in engine_faults.events("fault") if e["point"] == "engine.generate" and e["action"] == "kill"]
    assert (before(engine_faults, event)["phase"], event["step"]) == ("generate", 1)
    dead = next(e for e in engine_faults.events("engine/dead") if e["step"] == 1)
    assert (dead["engine"], dead["phase"], dead["pid"]) == (0, "generate", event["pid"])
    after = [e for e in engine_faults.events() if e["time"] > dead["time"] and e.get("engine") == 0]
    assert [e["event"] for e in after][:4] == ["engine/restarting", "engine/ready", "engine/stale", "engine/healthy"]
    assert_same(engine_faults, reference)


def test_f2_a_hung_engine(engine_faults: Run, reference: Run):
    (event,) = [e for e in engine_faults.events("fault") if e["action"] == "stop"]
    assert (before(engine_faults, event)["phase"], event["step"]) == ("generate", 4)
    about = [e for e in engine_faults.events() if e.get("engine") == event["engine"] and e["time"] > event["time"]]
    suspect, dead = about[:2]
    assert (suspect["event"], dead["event"], dead["step"]) == ("engine/suspect", "engine/dead", 4)
    assert "no answer after 25 s" in dead["reason"] and dead["pid"] == event["pid"]
    assert_same(engine_faults, reference)


def test_f5_the_reward_actor_killed(engine_faults: Run, reference: Run):
    event = fault(engine_faults, "reward.score")
    assert (before(engine_faults, event)["phase"], event["step"]) == ("reward", 2)
    (failed,) = engine_faults.events("reward/failed")
    assert failed["phase"] == "reward" and "died" in failed["reason"]
    first, second = engine_faults.events("reward/ready")
    assert first["pid"] == event["pid"] and second["time"] > failed["time"]
    assert_same(engine_faults, reference)


def test_f11_a_receiver_dies_in_a_weight_push(engine_faults: Run, reference: Run):
    event = fault(engine_faults, "engine.update")
    assert before(engine_faults, event)["phase"] == "sync" and event["version"] == 4
    dead = next(e for e in engine_faults.events("engine/dead") if e["phase"] == "sync")
    assert dead["engine"] == 1 and "weight push" in dead["reason"]
    push = next(e for e in engine_faults.events("push/done") if e["version"] == 4)
    assert 1 not in push["engines"]
    assert_same(engine_faults, reference)


def test_a_stragglers_prompt_is_hedged(learner_faults: Run, reference: Run):
    (event,) = [e for e in learner_faults.events("fault") if e["action"] == "stop"]
    suspect = learner_faults.events("engine/suspect")[0]
    hedged = learner_faults.events("engine/hedged")[0]
    assert suspect["engine"] == hedged["engine"] == event["engine"] == 0 and hedged["step"] == suspect["step"] == 1
    done = next(e for e in learner_faults.events("step/done") if e["step"] == 1)
    dead = [e for e in learner_faults.events("engine/dead") if e["time"] < done["time"]]
    assert hedged["time"] < done["time"] and not dead  # the step did not wait for the straggler's end
    assert_same(learner_faults, reference)


def test_f3_a_learner_killed_in_backward(learner_faults: Run, reference: Run):
    event = fault(learner_faults, "learner.backward")
    assert (before(learner_faults, event)["phase"], event["step"], event["rank"]) == ("learn", 3, 1)
    failed = learner_faults.events("learners/failed")[0]
    assert failed["phase"] == "learn" and "rank 1 died" in failed["reason"]
    restored = next(e for e in learner_faults.events("learners/restored") if e["time"] > failed["time"])
    assert (restored["from_step"], restored["world_size"]) == (2, 2)
    assert_same(learner_faults, reference)


def test_f6_the_controller_killed(learner_faults: Run, reference: Run):
    event = fault(learner_faults, "controller.learn")
    assert (before(learner_faults, event)["phase"], event["action"], event["step"]) == ("learn", "kill", 4)
    first, second = learner_faults.events("run/start")
    assert first["pid"] == event["pid"] and second["from_step"] in (2, 4)  # 4 where its checkpoint was finished
    assert len(learner_faults.events("run/end")) == 1
    assert_same(learner_faults, reference)


def test_f4_a_node_cut_off_and_back(make_run, cluster: RayCluster, hosts: Hosts, reference: Run):
    run = make_run("link", "cluster.node_wait_s=200").start()
    run.until("phase", phase="generate", step=2)
    hosts[1].cut_link()
    lost = run.until("node/lost", timeout=60)
    assert lost["host"] == hosts[1].ip
    hosts[1].restore_link()
    cluster.start(hosts[1])
    run.finish()
    failed = run.events("learners/failed")[0]
    assert failed["step"] == lost["step"] == 2
    restored = next(e for e in run.events("learners/restored") if e["time"] > failed["time"])
    assert restored["world_size"] == 2
    assert [e["host"] for e in run.events("node/joined")] == [hosts[1].ip]
    assert_same(run, reference)


def test_a_node_that_never_comes_back_costs_its_share_only(make_run, cluster: RayCluster, hosts: Hosts, reference: Run):
    # the other host has room for one learner, not for two
    run = make_run("fewer", "cluster.node_wait_s=5", "cluster.learner_cpus=2", "cluster.engine_cpus=1").start()
    run.until("phase", phase="learn", step=2)
    hosts[1].power_off()
    try:
        run.finish()
    finally:
        hosts[1].power_on()
        cluster.start(hosts[1])
    restored = run.events("learners/restored")[-1]
    assert restored["world_size"] == 1
    assert run.steps() == list(range(STEPS)) and run.prompts() == reference.prompts()


def test_two_runs_on_two_hosts_cannot_share_a_directory(make_run, cluster: RayCluster, hosts: Hosts, reference: Run):
    run = make_run("locked", "grpo.max_steps=50").start()
    run.until("learners/ready")
    pid = run.until("run/start")["pid"]
    again = [sys.executable, "launch/grpo.py", "--config", "configs/demo.yaml", f"output={run.output}", *run.words]
    refused = hosts[1].run(again, cwd=ROOT, env=cluster.env)
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if "another process" in line]
    assert f"another process is running in this directory (pid {pid} on node1): end it" in line
    assert line.endswith(f"delete {run.output}/.lock")
    run.cluster.hosts[0].kill(pid, "TERM")
    assert run.wait() == 75, run.said[-2000:]
