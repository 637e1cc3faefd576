"""Runs of `tatar-dist grpo` on a Ray cluster of hosts, and what is asked of them: events, prompts, weights."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from hosts import wait_until
from ray_hosts import ROOT, RayCluster

from tatar_dist.run.events import read_events

STEPS = 5
START_S = 240  # for actors to come up on two shared cores


@dataclass
class Run:
    """One run directory. `start` may be called again: the same command continues."""

    output: Path
    words: list[str]
    cluster: RayCluster
    process: subprocess.Popen[str] | None = None

    def start(self) -> Run:
        command = [sys.executable, "launch/grpo.py", f"output={self.output}", *self.words]
        command[2:2] = ["--config", "configs/demo.yaml"]
        self.process = self.cluster.hosts[0].popen(
            command, cwd=ROOT, env=self.cluster.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        return self

    def wait(self, timeout: float = 420) -> int:
        """Exit status of the driver; what it said is kept in `said`."""
        assert self.process is not None
        try:
            _, self.said = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not finished after {timeout:g} s; last events: {self.events()[-5:]}") from None
        return self.process.returncode

    def finish(self, timeout: float = 420) -> Run:
        assert self.wait(timeout) == 0, f"{self.said[-3000:]}\n{self.events()[-8:]}"
        return self

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        found = read_events(self.output)
        return [e for e in found if name is None or e["event"] == name]

    def until(self, name: str, timeout: float = START_S, **fields: Any) -> dict[str, Any]:
        """The first event of this name and these fields, as soon as it is there."""

        def look() -> dict[str, Any] | None:
            assert self.process is None or self.process.poll() is None or self._find(name, fields), "the driver ended"
            return self._find(name, fields)

        return wait_until(look, timeout, f"event {name} {fields}")

    def _find(self, name: str, fields: dict[str, Any]) -> dict[str, Any] | None:
        return next((e for e in self.events(name) if fields.items() <= e.items()), None)

    def prompts(self) -> list[tuple[int, str, int]]:
        """(step, group, index) of every completion that was learned from, as often as it was."""
        files = sorted((self.output / "rollouts").glob("step_*.parquet"))
        tables = [pq.read_table(f, columns=["step", "group_id", "index"]).to_pylist() for f in files]
        return sorted((r["step"], r["group_id"], r["index"]) for t in tables for r in t)

    def steps(self) -> list[int]:
        return [json.loads(line)["step"] for line in (self.output / "metrics.jsonl").read_text().splitlines()]

    def weights(self, step: int = STEPS) -> str:
        file = self.output / f"checkpoints/step_{step:06d}/model/model.safetensors"
        return hashlib.sha256(file.read_bytes()).hexdigest()


def assert_same(run: Run, reference: Run) -> None:
    """Every step once, every prompt once, and the reference's weights to the bit."""
    assert run.steps() == reference.steps() == list(range(STEPS))
    assert run.prompts() == reference.prompts()
    assert run.weights() == reference.weights()
    assert reference.weights(1) != reference.weights()  # it learned something
