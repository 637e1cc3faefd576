"""Chaos: GRPO of the tiny model on two hosts while random faults hit it, until all its steps are done.

    python tests/cluster/chaos.py --minutes 5 --seed 1 --output runs/chaos
    python tests/cluster/chaos.py --minutes 20 --every 120  # a fault every two minutes; else as soon as one is over

Faults of the matrix (test_faults.py) at random times on random processes; the seed and every fault stand in
OUTPUT/faults.jsonl. Ends with status 1 unless every step was made, with every prompt of the sampler's order exactly
once. What it cost, by kind of fault, is printed and written to OUTPUT/figures.json, with the effective training time
(effective.py) and what the rest of the time went to. With --every it counts until that many seconds after the last
fault, and until a step follows it: the steps that are left then are made in peace.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from conftest import integration
from effective import effective
from hosts import Host, Hosts, wait_until
from ray_hosts import RayCluster
from rich.console import Console
from rich.table import Table
from runs import Run

from tatar_dist.config.load import load_config
from tatar_dist.config.schema import Config
from tatar_dist.data.writing import write_manifest
from tatar_dist.demo.tiny.build import build
from tatar_dist.run.status import RunWatcher
from tatar_dist.sampling import make_sampler

STEPS_A_MINUTE = 25  # two idle cores make 24 with faults; what is left when the time is up is made in peace
STEPS_IN_PEACE = 95  # a minute, with --every
RECOVERS_S = 240  # a fault after which no step follows within this time was not survived
CONTROLLER_STATUS = {"controller killed": -9, "preempted": 75}
WORDS = [
    "checkpoint.every=5",
    "cluster.learner_placement=spread",
    "cluster.learner_restarts=10",
    "cluster.node_wait_s=60",
    "cluster.start_timeout_s=120",  # a learner that hangs while it starts is given up after half of it
    "rollout.engine_restarts=10",
    "rollout.hedge=true",
    "rollout.suspect_after_s=3",  # six steps
    "rollout.call_timeout_s=12",
    "rollout.push_timeout_s=12",
    "grpo.optim.schedule=constant",
]


class Chaos:
    """One chaos run; `faults` are the kinds it draws from."""

    def __init__(self, hosts: Hosts, cluster: RayCluster, run: Run, seed: int, log: Path) -> None:
        self.hosts, self.cluster, self.run, self.log = hosts, cluster, run, log
        self.random = random.Random(seed)
        self.costs: dict[str, list[float]] = {}
        self.faults = {
            "engine killed": lambda: self._signal(self._engine(), "KILL"),
            "engine out of memory": self._out_of_memory,
            "engine hung": lambda: self._signal(self._engine(), "STOP"),
            "learner killed": lambda: self._signal(self._learner(), "KILL"),
            "learner hung": lambda: self._signal(self._learner(), "STOP"),
            "reward actor killed": lambda: self._signal(self._reward(), "KILL"),
            "controller killed": lambda: self._controller("KILL"),
            "preempted": lambda: self._controller("USR1"),
            "link cut": self._cut_link,
            "node powered off": self._power_off,
        }

    def go(self, minutes: float, every: float | None) -> None:
        """Faults until the run is over or the time is up, then the rest of the steps in peace.

        Args:
            every: seconds between two faults; None: the next comes soon after the run has recovered.
        """
        self._wait_for_step(0.0)
        due = time.monotonic()
        end = due + minutes * 60
        kinds: list[str] = []
        while time.monotonic() < end and not self._over():
            due += every or 0.0
            wait_until(
                lambda at=due: self._over() or time.monotonic() > at, (every or 0) + RECOVERS_S, "the next fault"
            )
            time.sleep(self.random.uniform(1, 8))  # anywhere in a step
            if not kinds:  # every kind once before any comes again
                kinds = self.random.sample(sorted(self.faults), len(self.faults))
            if not self._over():
                self._inject(kinds.pop())
        self.run.finish(timeout=3600)

    def _over(self) -> bool:
        assert self.run.process is not None
        return self.run.process.poll() is not None

    def _inject(self, kind: str) -> None:
        start = time.time()
        target = self.faults[kind]()
        if target is None:  # it is being restarted at the moment
            return
        with self.log.open("a") as f:
            f.write(json.dumps({"time": round(start, 2), "fault": kind, "target": target}) + "\n")
        if kind in CONTROLLER_STATUS and not self._over():
            status = self.run.wait(120)
            assert status in (CONTROLLER_STATUS[kind], 0), f"{kind}: exit {status}\n{self.run.said[-2000:]}"
            if status == 0:
                return
            self.run.start()
        self._wait_for_step(time.time())
        self.costs.setdefault(kind, []).append(time.time() - start)

    def _wait_for_step(self, since: float) -> None:
        def moved() -> bool:
            return self._over() or any(e["time"] > since for e in self.run.events("step/done")[-1:])

        wait_until(
            moved, RECOVERS_S, f"a step after {self.log.read_text().splitlines()[-1:]}; {self.run.events()[-4:]}"
        )

    def _processes(self) -> Any:
        return RunWatcher(self.run.output).read()

    def _engine(self) -> tuple[str, int] | None:
        living = [e for e in self._processes().engines if e.pid is not None and e.state == "healthy"]
        e = self.random.choice(living) if living else None
        return e and (e.host, e.pid)

    def _learner(self) -> tuple[str, int] | None:
        found = self._processes().learners
        return self.random.choice(list(zip(found.hosts, found.pids, strict=True))) if found else None

    def _reward(self) -> tuple[str, int] | None:
        found = self._processes().reward
        return (found.host, found.pid) if found and found.pid else None

    def _signal(self, target: tuple[str, int] | None, signal: str) -> str | None:
        if target is None:
            return None
        name, pid = target
        host: Host = self.hosts.named(name)
        if host.run(["kill", f"-{signal}", str(pid)]).returncode:
            return None
        return f"{name}:{pid}"

    def _out_of_memory(self) -> str | None:
        target = self._engine()
        if target is None:
            return None
        name, pid = target
        try:
            self.hosts.named(name).out_of_memory(pid)
        except (OSError, subprocess.CalledProcessError):  # it was replaced in between, or had room (TimeoutError)
            return None
        return f"{name}:{pid}"

    def _controller(self, signal: str) -> str | None:
        start = self.run.events("run/start")[-1]
        return self._signal((start["host"], start["pid"]), signal)

    def _cut_link(self) -> str:
        host = self.hosts[1]
        host.cut_link()
        try:
            wait_until(lambda: self._over() or self._lost(host), 60, "the node is given up")
        finally:
            host.restore_link()
        self.cluster.start(host)
        return host.name

    def _lost(self, host: Host) -> bool:
        lost = [e for e in self.run.events("node/lost") if e["host"] == host.ip]
        joined = [e for e in self.run.events("node/joined") if e["host"] == host.ip]
        return len(lost) > len(joined)

    def _power_off(self) -> str:
        host = self.hosts[1]
        host.power_off()
        time.sleep(self.random.uniform(1, 10))
        host.power_on()
        self.cluster.start(host)
        return host.name


def check(run: Run, config: Config) -> None:
    """Every step once, in order, each with the sampler's next prompts. Raises AssertionError."""
    total = config.grpo.max_steps
    assert total is not None and run.steps() == list(range(total)), run.steps()
    sampler, expected = make_sampler(config), []
    for step in range(total):
        refs = sampler.next_batch(config.grpo.prompts_per_step)
        samples = [sampler.get(r) for r in refs]
        groups = [f"{step:06d}/{s.dataset}/{s.sample_id}" for s in samples]
        expected += [(step, group, i) for group in groups for i in range(config.grpo.group_size)]
    assert run.prompts() == sorted(expected)


def figures(chaos: Chaos, run: Run, seconds: float, seed: int, steps: int, every: float | None) -> dict[str, Any]:
    done, events = run.events("step/done"), run.events()
    kinds = {
        kind: {"n": len(c), "median_s": round(statistics.median(c), 1), "max_s": round(max(c), 1)}
        for kind, c in sorted(chaos.costs.items())
    }
    faults = [json.loads(line) for line in chaos.log.read_text().splitlines()[1:]]
    if every and faults:
        last = faults[-1]["time"]
        recovered = next((e["time"] for e in done if e["time"] > last), last)
        events = [e for e in events if e["time"] <= max(last + every, recovered)]
    return {
        "seed": seed,
        "minutes": round(seconds / 60, 1),
        "steps": steps,
        "steps_made_again": len(done) - steps,
        **effective(events, faults),
        "faults": sum(len(c) for c in chaos.costs.values()),
        "kinds": kinds,
        "driver_starts": len(run.events("run/start")),
        "learner_restarts": len(run.events("learners/restarting")),
        "engine_restarts": len(run.events("engine/restarting")),
        **recoveries(run),
    }


def recoveries(run: Run) -> dict[str, float | None]:
    """Median seconds, from the event log: the first start, the way back of dead engines and of failed learners."""
    events = run.events()

    def after(start: dict[str, Any], name: str, **fields: Any) -> dict[str, Any] | None:
        later = (e for e in events if e["time"] >= start["time"] and e["event"] == name)
        return next((e for e in later if fields.items() <= e.items()), None)

    def median(starts: str, ends: str, *same: str) -> float | None:
        pairs = [(e, after(e, ends, **{k: e[k] for k in same})) for e in run.events(starts)]
        found = [end["time"] - e["time"] for e, end in pairs if end]
        return round(statistics.median(found), 1) if found else None

    first = run.events("run/start")[0]
    begun, loads = after(first, "phase"), [e["seconds"] for e in run.events("engine/ready")]
    return {
        "first_start_s": round(begun["time"] - first["time"], 1) if begun else None,
        "engine_load_s": round(statistics.median(loads), 1),
        "engine_dead_to_healthy_s": median("engine/dead", "engine/healthy", "engine"),
        "learners_failed_to_restored_s": median("learners/failed", "learners/restored"),
    }


def table(found: dict[str, Any]) -> Table:
    title = f"chaos, seed {found['seed']}: {found['faults']} faults in {found['minutes']} min, {found['steps']} steps"
    shares = ", ".join(f"{what} {share:.1%}" for what, share in found["shares"].items())
    caption = (
        f"effective training time {found['effective_time']:.2f} (a step without a fault {found['undisturbed_step_s']} "
        f"s). {found['wall_s']} s went to {shares}. "
        f"{found['steps_made_again']} steps made again; times are from a fault to the next step. A start takes "
        f"{found['first_start_s']} s, a dead engine is back after {found['engine_dead_to_healthy_s']} s, of which "
        f"loading takes {found['engine_load_s']} s; learners after {found['learners_failed_to_restored_s']} s"
    )
    rows = Table(title=title, caption=caption, min_width=len(title) + 4, title_justify="left", caption_justify="left")
    for column in ("fault", "times", "median, s", "longest, s"):
        rows.add_column(column, justify="left" if column == "fault" else "right")
    for kind, k in found["kinds"].items():
        rows.add_row(kind, str(k["n"]), str(k["median_s"]), str(k["max_s"]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--every", type=float, help="seconds between two faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/chaos"))
    options = parser.parse_args()
    output = options.output.absolute()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    manifests = [str(output / f"{task}.parquet") for task in ("iqa", "iaa")]
    for task, path in zip(("iqa", "iaa"), manifests, strict=True):
        write_manifest(Path(path), integration.manifest_rows(task, 24))
    model = str(build(output / "model", corpus=integration.corpus()))
    integration.train_format(model)
    steps = round(options.minutes * (STEPS_IN_PEACE if options.every else STEPS_A_MINUTE))
    words = [*integration.tiny_words(model, manifests), *WORDS, f"grpo.max_steps={steps}"]
    log = output / "faults.jsonl"
    log.write_text(json.dumps({"seed": options.seed, "minutes": options.minutes, "steps": steps}) + "\n")
    console, start = Console(), time.monotonic()
    with Hosts(2) as hosts, RayCluster(hosts, output) as cluster:
        run = Run(output / "run", words, cluster).start()
        chaos = Chaos(hosts, cluster, run, options.seed, log)
        try:
            chaos.go(options.minutes, options.every)
        finally:
            if run.process is not None:
                run.process.kill()
    check(run, load_config(["configs/demo.yaml"], [f"output={run.output}", *words]))
    found = figures(chaos, run, time.monotonic() - start, options.seed, steps, options.every)
    (output / "figures.json").write_text(json.dumps(found, indent=1))
    console.print(table(found))


if __name__ == "__main__":
    main()
