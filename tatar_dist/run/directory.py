"""The directory of a run: its files (README.md), and the lock that keeps a second run out."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tatar_dist.config.schema import Config, to_yaml
from tatar_dist.errors import Interrupted, UserError
from tatar_dist.run.events import Events
from tatar_dist.run.failpoints import Failpoints
from tatar_dist.run.files import json_lines, lock, write_whole, written_whole
from tatar_dist.run.process import open_log, process_facts
from tatar_dist.run.tracking import Trackers
from tatar_dist.types import SPLITS, ScoredGroup

HALF_WRITTEN = (".*.tmp", "rollouts/**/.*.tmp")  # patterns of files that a killed run leaves (files.py)
LEASE_S = 120.0
PROMPTS = "prompts.yaml"  # the wording that the run used (prompts/source.py)
IN_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the entrypoint of `ray job submit`


def check_output(config: Config) -> None:
    """Raise UserError if what is written to `output` would be lost."""
    if IN_RAY_JOB in os.environ and not Path(config.output).is_absolute():
        raise UserError(
            f"output={Path(config.output)}: a Ray job's working directory goes when the job ends: give an absolute "
            "path that every node sees"
        )


class RunDirectory:
    """Open and lock the run directory `config.output`. Close it or use it as a context manager.

    Raises:
        UserError: it cannot be made or written, another process has it open, or a tracker's package is missing.
    """

    def __init__(self, config: Config) -> None:
        self.path = Path(config.output)
        check_output(config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a+")  # noqa: SIM115  held as long as the run lives
        except OSError as e:
            raise UserError(f"output={self.path}: cannot write there: {e.strerror}") from e
        if not _locked(self._lock):
            self._lock.seek(0)
            raise UserError(
                f"output={self.path}: another process is running in this directory ({self._lock.read() or 'unknown'}): "
                f"end it, or give another output; if its host is gone and the lock stays, delete {self.path / '.lock'}"
            )
        self._lock.truncate(0)
        self._lock.write(f"pid {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()
        for pattern in HALF_WRITTEN:
            for file in self.path.glob(pattern):
                file.unlink(missing_ok=True)
        self.records = {"config.yaml": to_yaml(config)}
        self.events = Events(self.path)
        self._failpoints = Failpoints(config.failpoints, str(self.path))
        self._trackers = Trackers(config, self.path, self.events)
        self._quarantine_file = self.path / "quarantine.jsonl"
        rows = _intact(self._quarantine_file, _sample)
        self._quarantined = {_sample(row): row for row in rows}
        self._met: set[tuple[str, str]] = set()  # of them, since this start
        self._manifests = {str(Path(config.data.root) / m) for split in SPLITS for m in getattr(config.data, split)}
        if self._quarantine_file.exists():  # without a line cut off by a crash, which would swallow the next one
            write_whole(self._quarantine_file, "".join(map(_line, rows)))

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._trackers.close()
        self._lock.close()

    def record(self) -> None:
        """Write what the run is made with: `records`, text by file name.

        Call it when nothing can refuse the run any more: the files describe what is trained here.
        """
        for name, text in self.records.items():
            write_whole(self.path / name, text)

    @contextmanager
    def running(
        self, stage: str, total: int, first: int, learners: int, engines: int, push: str | None = None
    ) -> Iterator[None]:
        """Log the start and the end of a stage as events, with its process log open in between."""
        facts = {"stage": stage, "total": total, "from_step": first, "learners": learners, "engines": engines}
        self.events.log("run/start", **process_facts(), **facts, push=push)
        open_log(self.path, "controller", printed=False)
        try:
            yield
        except BaseException as e:
            stopped = isinstance(e, Interrupted | KeyboardInterrupt)
            cause = getattr(e, "cause", None) or e  # Ray wraps what an actor raised
            reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:500]}"
            self.events.log("run/interrupted" if stopped else "run/failed", reason=reason)
            if not stopped:
                logging.getLogger(__name__).exception("the run failed")
            raise
        self.events.log("run/end")

    def begin(self, phase: str, step: int) -> None:
        """Log that a phase of the loop begins, and fire the failpoints of the controller."""
        self.events.begin(phase, step)
        self._failpoints.reach(f"controller.{phase}", step=step)

    def rewind(self, step: int) -> None:
        """Forget metrics, rollouts and quarantined samples of steps >= `step`.

        Held-out samples are checked at every start: one that is usable now is forgotten, as is one of a manifest that
        the run does not read any more.
        """
        self._trackers.rewind(step)
        for key, row in list(self._quarantined.items()):
            since = row.get("step", -1)  # None: before the first step
            held_out = since is None
            if held_out and (key[1] not in self._manifests or key not in self._met) or not held_out and since >= step:
                del self._quarantined[key]
                self._met.discard(key)
        if self._quarantine_file.exists():
            write_whole(self._quarantine_file, "".join(map(_line, self._quarantined.values())))
        kept = [row for row in _intact(self.path / "metrics.jsonl", lambda row: row["step"] + 0) if row["step"] < step]
        write_whole(self.path / "metrics.jsonl", "".join(map(_line, kept)))
        for file in (self.path / "rollouts").rglob("step_*.parquet"):
            if int(file.stem.removeprefix("step_")) >= step:
                file.unlink()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl, and hand the same scalars to the trackers."""
        with open(self.path / "metrics.jsonl", "a") as f:
            f.write(_line({"step": step, **metrics}))
        self._trackers.log(step, metrics)

    def quarantine(self, sample_id: str, where: str, reason: str) -> None:
        """Note a sample that cannot be used, once even if resumed; the run goes on without it."""
        key = sample_id, where
        self._met.add(key)
        if key not in self._quarantined:
            row = {"sample_id": sample_id, "manifest": where, "reason": reason, "step": self.events.step}
            self._quarantined[key] = row
            with open(self._quarantine_file, "a") as f:
                f.write(_line(row))

    def rollouts(self, step: int, scored: Sequence[ScoredGroup], replaced: Sequence[ScoredGroup] = ()) -> None:
        """Write all completions of a step's global batch with reward terms, as one Parquet file.

        The groups that others replaced (sampling.py) go to rollouts/replaced/, as they were scored before that.
        """
        file = self.path / "rollouts" / f"step_{step:06d}.parquet"
        write_rollouts(file, step, scored)
        if replaced:
            write_rollouts(file.parent / "replaced" / file.name, step, replaced)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl: None for non-finite values; lines other than JSON objects are skipped."""
    return json_lines(run / "metrics.jsonl")


def _sample(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the key of a line of quarantine.jsonl. Raises a TypeError if its step is no number."""
    key = str(row["sample_id"]), str(row["manifest"])
    (row.get("step") or 0) + 0
    return key


def _intact(file: Path, used: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """Read the JSON lines on which `used` works; move others to FILE.damaged and name them."""
    rows, damaged = [], {}
    for number, line in enumerate(file.read_bytes().splitlines() if file.exists() else [], 1):
        try:
            row = json.loads(line)
            used(row)
            rows.append(row)
        except (ValueError, KeyError, TypeError):
            damaged[number] = line
    if damaged:
        with open(f"{file}.damaged", "ab") as f:
            f.writelines(line + b"\n" for line in damaged.values())
        lines = ", ".join(map(str, damaged))
        print(f"tatar-dist: {file}: damaged and left out, kept in {file}.damaged: line {lines}", file=sys.stderr)
    return rows


def _locked(file: Any) -> bool:
    """Take the lock, in several tries, as `tatar-dist status` holds it to see if a run does.
    For a node that died a network file system holds it until its lease ends, when Slurm has started the job again."""
    deadline = time.monotonic() + (LEASE_S if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" else 0.5)
    while not lock(file):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _line(row: Mapping[str, Any]) -> str:
    """Return a line of JSON, which has no NaN or infinity: such a value becomes null."""
    values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(values, allow_nan=False) + "\n"


def write_rollouts(path: Path, step: int, scored: Sequence[ScoredGroup]) -> None:
    """Write a row per completion: its prompt, text, reward terms, reward and advantage."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for s in scored:
        sample = s.group.prompt.sample
        for i, c in enumerate(s.group.completions):
            rows.append(
                {
                    "step": step,
                    "group_id": s.group.prompt.group_id,
                    "index": i,
                    "sample_id": sample.sample_id,
                    "dataset": sample.dataset,
                    "task": sample.task,
                    "target": sample.score,
                    "score_std": sample.score_std,
                    "completion": c.text,
                    "tokens": len(c.token_ids),
                    "finish_reason": c.finish_reason,
                    "logprob_sum": float(sum(c.logprobs)),
                    "weight_version": s.group.weight_version,
                    "parsed": bool(s.parsed[i]),
                    **{name: None if math.isnan(v[i]) else float(v[i]) for name, v in s.terms.items()},
                    "reward": float(s.reward[i]),
                    "advantage": float(s.advantage[i]),
                    "trained": s.trained,
                }
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as place:
        pq.write_table(pa.Table.from_pylist(rows), place)
