"""`Checkpoints`: the controller's side of saving, retention and resuming. Pure file work, no torch and no Ray.

    checkpoints/step_000030/deepspeed/   ZeRO-3 shards: weights, master weights, optimizer (one writer a rank)
                            model/       the Hugging Face model directory at this step
                            state.json   step, number of learners, sampler position, what a run must have in common to
                                         continue, the metric that ranks it, and size and sha256 of every file
    checkpoints/latest -> step_000030

A checkpoint is written beside, synced, hashed and renamed; `latest` is moved last. state.json is written when
everything else is on the disk: a directory without it, or whose files are not as it says, does not count. Hidden
names are a checkpoint being written (.writing_*) or removed (.removing_*).

The learners are anything with `actors` (one a rank) and `save(directory) -> Future[Files]`: it takes a snapshot and
returns, and the future is done when all files are written (checkpoint_files.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tatar_dist.config.schema import CheckpointConfig
from tatar_dist.errors import UserError
from tatar_dist.run.checkpoint_files import Files, first_damage
from tatar_dist.run.events import Events
from tatar_dist.run.files import sync, written_whole

STATE = "state.json"
WRITING, REMOVING = ".writing_", ".removing_"

CheckpointRef = tuple[Path, dict[str, Any]]


class Savers(Protocol):
    """The learners, as far as a checkpoint is concerned."""

    actors: Any

    def save(self, directory: Path) -> Future[Files]: ...


@dataclass
class UnderWay:
    """A save that has begun: where it goes, the state that was captured, what the learners still write."""

    final: Path
    beside: Path
    state: dict[str, Any]
    files: Future[Files]
    begun: float


class Checkpoints:
    """The checkpoints of one run directory. One thread calls it."""

    def __init__(self, run: Path, config: CheckpointConfig, events: Events | None = None) -> None:
        self.root, self.config, self.events = run / "checkpoints", config, events
        self._under_way: UnderWay | None = None
        self._damaged: set[str] = set()  # names that were skipped: they must not count as the newest that stay

    # Saving ---------------------------------------------------------------------------------------------------------

    def save(self, step: int, state: dict[str, Any], learners: Savers, metrics: dict[str, float]) -> None:
        """Begin the checkpoint of `step` from a snapshot taken now; finished by `poll` or `finish`.

        With `checkpoint.asynchronous` a failed write is reported and the run goes on, until `finish`.

        Raises:
            UserError: not asynchronous, and it could not be written; those that were there stay as they are.
        """
        self._end(wait=True, strict=False)
        begun, final = time.perf_counter(), self.root / f"step_{step:06d}"
        beside = self.root / f"{WRITING}{final.name}.{secrets.token_hex(4)}"  # a name that no late writer knows
        best = self.config.keep_best
        whole = {"step": step, "learners": len(learners.actors), **state}
        whole["metrics"] = {best: metrics[best]} if best and best in metrics else {}
        captured = json.loads(json.dumps(whole))
        try:
            self._sweep(WRITING, REMOVING)
            beside.mkdir(parents=True)
            files = learners.save(beside)
        except OSError as e:
            files = Future()  # judged with those that fail later: whether it ends the run depends on who asks
            files.set_exception(e)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        self._under_way = UnderWay(final, beside, captured, files, begun)
        if not self.config.asynchronous:
            self.finish()

    def poll(self) -> None:
        """Finish the save under way if all its files are written. Raises what the learners raised but OSError."""
        self._end(wait=False, strict=False)

    def finish(self) -> None:
        """Wait for the save under way and finish it. Raises UserError when it could not be written."""
        self._end(wait=True, strict=True)

    def abandon(self) -> None:
        """Forget the save under way, for example because the learners died."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.files.cancel()
            shutil.rmtree(under_way.beside, ignore_errors=True)

    def _end(self, wait: bool, strict: bool) -> None:
        u = self._under_way
        if u is None or not (wait or u.files.done()):
            return
        try:
            files = u.files.result()
            if unseen := first_damage(u.beside, files, hashes=False):
                raise self._unseen(u.beside, unseen)
            self._seal(u.beside, {**u.state, "files": files})
            self._publish(u.beside, u.final)
            self._retain()
        except OSError as e:
            self._under_way = None
            if isinstance(e, FileNotFoundError) and u.beside.is_dir():
                raise self._unseen(u.beside, str(e)) from e
            return self._failed(u.final, u.beside, e, strict)
        except BaseException:
            self.abandon()
            raise
        self._under_way = None
        size = sum(f["bytes"] for f in files.values())
        self._log("saved", path=str(u.final), seconds=round(time.perf_counter() - u.begun, 3), bytes=size)

    def _unseen(self, beside: Path, what: str) -> UserError:
        shutil.rmtree(beside, ignore_errors=True)
        return UserError(
            f"{beside}: {what}: the learners see another file system here. output must lie on one that all nodes "
            "share, or set checkpoint.storage=local"
        )

    def _failed(self, final: Path, beside: Path, error: OSError, strict: bool) -> None:
        """The partial directory goes; the message names what stays."""
        shutil.rmtree(beside, ignore_errors=True)
        last = next(iter(_newest_first(self.root)), None)
        reason = f"{final}: cannot write the checkpoint: {error.strerror or error}; " + (
            f"{last.name} is kept" if last else "there is none before it"
        )
        with contextlib.suppress(OSError):  # the event log may lie on the same full disk
            self._log("failed", path=str(final), reason=error.strerror or str(error))
        if strict:
            raise UserError(reason) from error
        print(f"{reason}. Training goes on, the next try is at the next interval", file=sys.stderr)

    def _seal(self, beside: Path, state: dict[str, Any]) -> None:
        """state.json appears at once and last: from here on `beside` is a whole checkpoint."""
        with written_whole(beside / STATE) as part:
            part.write_text(json.dumps({**state, "sha256": _digest(state)}))
            for path in (part, *{(beside / name).parent for name in state["files"]}):
                sync(path)
        sync(beside)

    def _publish(self, beside: Path, final: Path) -> None:
        """Give a whole checkpoint its name. Killed between the renames, `resume` does what was left to do."""
        self._hide(final)
        beside.rename(final)
        sync(self.root)
        self._point(final)

    def _point(self, final: Path) -> None:
        link = self.root / ".latest"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        os.replace(link, self.root / "latest")
        sync(self.root)

    def _hide(self, directory: Path) -> None:
        """Out of sight first, so that what is half deleted never counts; `_sweep` deletes."""
        if directory.exists():
            directory.rename(self.root / f"{REMOVING}{directory.name}.{secrets.token_hex(4)}")

    def _retain(self) -> None:
        states = [(d, _read(d)) for d in _newest_first(self.root) if d.name not in self._damaged]
        best = self.config.keep_best
        finished = [Finished(d.name, s["step"], s["metrics"].get(best)) for d, s in states if s is not None]
        stay = kept(finished, self.config)
        for directory in _newest_first(self.root):
            if directory.name not in stay:
                self._hide(directory)
        self._sweep(REMOVING)

    def _sweep(self, *prefixes: str) -> None:
        """Delete what a killed process left half written or half removed."""
        for prefix in prefixes:
            for directory in self.root.glob(f"{prefix}*"):
                shutil.rmtree(directory, ignore_errors=True)

    # Resuming -------------------------------------------------------------------------------------------------------

    def resume(self, identity: dict[str, Any]) -> CheckpointRef | None:
        """The newest whole checkpoint, if it was written by a run that has the settings `identity`; None without any.

        Damaged ones are skipped with a line on stderr. `latest` names what is returned.

        Raises:
            UserError: it was written by another kind of run, or there are checkpoints and all are damaged.
        """
        self.abandon()
        self._recover()
        skipped = []
        for directory in _newest_first(self.root):
            if reason := self._damage(directory):
                self._damaged.add(directory.name)
                skipped.append(f"{directory.name}: {reason}")
                self._log("skipped", path=str(directory), reason=reason)
                print(f"{directory}: damaged, skipped: {reason}", file=sys.stderr)
                continue
            state = _read(directory)
            assert state is not None
            _require_identity(directory, state, identity)
            if not (self.root / "latest").exists() or (self.root / "latest").resolve() != directory.resolve():
                self._point(directory)
            return directory, state
        if skipped:
            raise UserError(
                f"{self.root}: no checkpoint is whole ({'; '.join(skipped)}): put back a copy of one, or start over "
                "with checkpoint.resume=false"
            )
        return None

    def _recover(self) -> None:
        """A checkpoint that was whole when the process was killed gets its name; what was not is deleted."""
        for beside in self.root.glob(f"{WRITING}*"):
            if (beside / STATE).exists() and self._damage(beside) is None:
                self._publish(beside, self.root / beside.name.removeprefix(WRITING).partition(".")[0])
        self._sweep(WRITING, REMOVING)

    def _damage(self, directory: Path) -> str | None:
        state = _read(directory)
        return (
            f"{STATE} cannot be read" if state is None else first_damage(directory, state["files"], self.config.verify)
        )

    def _log(self, what: str, **fields: Any) -> None:
        if self.events is not None:
            self.events.log(f"checkpoint/{what}", **fields)


def finished(run: Path) -> Iterator[CheckpointRef]:
    """(directory, state) of a run's checkpoints whose files are all there in their sizes, the last written first."""
    for directory in _newest_first(run / "checkpoints"):
        state = _read(directory)
        if state is not None and first_damage(directory, state["files"], hashes=False) is None:
            yield directory, state


def latest(run: Path) -> CheckpointRef | None:
    """The first of `finished`, or None."""
    return next(finished(run), None)


def _newest_first(root: Path) -> list[Path]:
    """The last written first: a step's number says nothing when a run was started afresh."""

    def written(directory: Path) -> tuple[int, str]:
        state = directory / STATE
        return (state if state.exists() else directory).stat().st_mtime_ns, directory.name

    return sorted((d for d in root.glob("step_*") if d.is_dir()), key=written, reverse=True)


def _read(directory: Path) -> dict[str, Any] | None:
    """state.json, or None if it is missing or not what was once written."""
    try:
        state = json.loads((directory / STATE).read_text())
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and state.pop("sha256", None) == _digest(state) else None


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _require_identity(directory: Path, state: dict[str, Any], identity: dict[str, Any]) -> None:
    before = state.get("same", {})
    for key in before | identity:
        was, now = before.get(key), identity.get(key)
        if was != now:
            raise UserError(
                f"{directory}: a checkpoint of a run with {key}={was}, this one has {key}={now}: give another output, "
                "or checkpoint.resume=false to start over"
            )


@dataclass(frozen=True)
class Finished:
    """A whole checkpoint: its directory's name, its step and its value of `checkpoint.keep_best`, if it has one."""

    name: str
    step: int
    metric: float | None = None


def kept(finished: Sequence[Finished], config: CheckpointConfig) -> set[str]:
    """Names of those that stay. `finished`: newest first; the newest always stays. Of equally good ones the newest."""
    stay = {f.name for f in finished[: config.keep]}
    if config.keep_every:
        stay |= {f.name for f in finished if f.step % config.keep_every == 0}
    sign = 1 if config.best_mode == "max" else -1
    rated = [(sign * f.metric, f.name) for f in finished if f.metric is not None and math.isfinite(f.metric)]
    if rated:
        stay.add(max(rated, key=lambda r: r[0])[1])
    return stay
