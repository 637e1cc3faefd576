"""`Checkpoints`: save, retain and resume, by the controller. Files only: no torch, no Ray.

    checkpoints/step_000030/deepspeed/   ZeRO-3 shards: weights, master weights, optimizer (one writer a rank)
                            model/       the Hugging Face model directory at this step
                            state.json   step, number of learners, sampler position, the settings that a resumed run
                                         must share, those that checkpoint.accept let differ, the metric that
                                         ranks it, and size and sha256 of every file
    checkpoints/latest -> step_000030

A checkpoint is written beside, synced, hashed and renamed; `latest` is moved last. state.json is written when all other
files are on the disk: a directory without it, or whose files differ from it, does not count. Hidden names are a
checkpoint being written (.writing_*) or removed (.removing_*).
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
from tatar_dist.run.events import Events
from tatar_dist.run.files import Files, first_damage, sync, written_whole
from tatar_dist.run.identity import require_same

STATE = "state.json"
WRITING, REMOVING = ".writing_", ".removing_"

CheckpointRef = tuple[Path, dict[str, Any]]  # directory, content of state.json


class Savers(Protocol):
    """The learners, an actor a rank. `save` takes a snapshot; the future is done once written."""

    actors: Any

    def save(self, directory: Path) -> Future[Files]: ...


@dataclass
class PendingSave:
    """A save under way: final and temporary directory, state at its start, learners' writing."""

    final: Path
    beside: Path
    state: dict[str, Any]
    files: Future[Files]
    began: float


class Checkpoints:
    """The checkpoints of one run directory. For use from one thread."""

    def __init__(self, run: Path, config: CheckpointConfig, events: Events) -> None:
        self.root, self.config, self.events = run / "checkpoints", config, events
        self._pending: PendingSave | None = None
        self._accepted: list[dict[str, Any]] = []  # changes of settings on the way to the present weights
        self._damaged: set[str] = set()  # names that `resume` skipped: they must not count as the newest that stay

    # Saving ---------------------------------------------------------------------------------------------------------

    def save(self, step: int, state: dict[str, Any], learners: Savers, metrics: dict[str, float]) -> None:
        """Begin the checkpoint of `step` from a snapshot taken now; `poll` or `finish` completes it.

        With `checkpoint.asynchronous` a failed write is reported and the run goes on, until `finish`.

        Raises:
            UserError: not asynchronous, and it could not be written; earlier checkpoints stay as they are.
        """
        self.finish(strict=False)
        final, began = self.root / f"step_{step:06d}", time.perf_counter()
        beside = self.root / f"{WRITING}{final.name}.{secrets.token_hex(4)}"  # a name that no late writer knows
        best = self.config.keep_best
        ranked_by = {best: metrics[best]} if best in metrics else {}
        state = {"step": step, "learners": len(learners.actors), "accepted": self._accepted, **state}
        state = json.loads(json.dumps({**state, "metrics": ranked_by}))  # a copy: training goes on
        try:
            self._sweep()
            beside.mkdir(parents=True)
            files = learners.save(beside)
        except OSError as e:
            files = Future()  # for `finish`, which treats it like a later failure
            files.set_exception(e)
        self._pending = PendingSave(final, beside, state, files, began)
        if not self.config.asynchronous:
            self.finish()

    def poll(self) -> None:
        """Complete the save under way if all files are written. Raises learners' errors but OSError."""
        if self._pending and self._pending.files.done():
            self.finish(strict=False)

    def finish(self, strict: bool = True) -> None:
        """Wait for the save under way and complete it.

        Raises:
            UserError: it could not be written and `strict`, or the learners do not see the directory.
        """
        pending, error = self._pending, None
        if pending is None:
            return
        try:
            files = pending.files.result()
            if missing := first_damage(pending.beside, files, hashes=False):
                raise FileNotFoundError(missing)
            self._seal(pending.beside, {**pending.state, "files": files})
            self._publish(pending.beside, pending.final)
            self._retain()
        except OSError as e:
            if isinstance(e, FileNotFoundError) and pending.beside.is_dir():
                raise UserError(
                    f"{pending.beside}: {e}: the learners see another file system here. output must lie on one that "
                    "all nodes share, or set checkpoint.storage=local"
                ) from e
            error = e
        finally:
            self.abandon()  # nothing is left of a published one
        if error is not None:
            return self._failed(pending.final, error, strict)
        seconds, size = time.perf_counter() - pending.began, sum(f["bytes"] for f in files.values())
        self.events.log("checkpoint/saved", path=str(pending.final), seconds=round(seconds, 3), bytes=size)

    def abandon(self) -> None:
        """Forget the save under way, for example because the learners died."""
        if self._pending is not None:
            self._pending.files.cancel()
            shutil.rmtree(self._pending.beside, ignore_errors=True)
            self._pending = None

    def _failed(self, final: Path, error: OSError, strict: bool) -> None:
        """Report that `final` could not be written and which one remains. Raises if `strict`."""
        last, reason = next(iter(_newest_first(self.root)), None), error.strerror or str(error)
        message = f"{final}: cannot write the checkpoint: {reason}; " + (
            f"{last.name} is kept" if last else "there is no earlier checkpoint"
        )
        with contextlib.suppress(OSError):  # the event log may lie on the same full disk
            self.events.log("checkpoint/failed", path=str(final), reason=reason)
        if strict:
            raise UserError(message) from error
        print(f"{message}. Training continues; the next attempt is at the next interval", file=sys.stderr)

    def _seal(self, beside: Path, state: dict[str, Any]) -> None:
        """Write state.json, at once and last: from here on `beside` is a complete checkpoint."""
        with written_whole(beside / STATE) as part:
            part.write_text(json.dumps({**state, "sha256": _digest(state)}))
            for path in (part, *{(beside / name).parent for name in state["files"]}):
                sync(path)
        sync(beside)

    def _publish(self, beside: Path, final: Path) -> None:
        """Rename a complete checkpoint to its name. After a kill in between, `resume` does the rest."""
        self._hide(final)
        beside.rename(final)
        self._damaged.discard(final.name)
        sync(self.root)
        self._point(final)

    def _point(self, final: Path) -> None:
        """Point `latest` to this checkpoint."""
        link = self.root / ".latest"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        os.replace(link, self.root / "latest")
        sync(self.root)

    def _hide(self, directory: Path) -> None:
        """Rename to a hidden name for `_sweep` to delete, so that a half-deleted one never counts."""
        if directory.exists():
            directory.rename(self.root / f"{REMOVING}{directory.name}.{secrets.token_hex(4)}")

    def _retain(self) -> None:
        """Delete the checkpoints that the rules do not keep."""
        undamaged = [(d, state) for d, state in finished(self.root.parent) if d.name not in self._damaged]
        stay = kept(undamaged, self.config)
        for directory in _newest_first(self.root):
            if directory not in stay:
                self._hide(directory)
        self._sweep()

    def _sweep(self) -> None:
        """Delete what is hidden: checkpoints to remove, and what a killed process left half written."""
        for prefix in (WRITING, REMOVING):
            for directory in self.root.glob(f"{prefix}*"):
                shutil.rmtree(directory, ignore_errors=True)

    # Resuming -------------------------------------------------------------------------------------------------------

    def resume(self, identity: dict[str, Any], by: str | None = None) -> CheckpointRef | None:
        """Return the newest undamaged checkpoint and point `latest` to it; None if there is none.

        by: only of the process that wrote this into state.json.

        Damaged ones are skipped with a line on stderr.

        Raises:
            UserError: it is of a run with other settings than `identity`, or all checkpoints are damaged.
        """
        self.abandon()
        for beside in self.root.glob(f"{WRITING}*"):
            if _inspect(beside, self.config.verify)[1] is None:  # complete when the process was killed
                self._publish(beside, self.root / beside.name.removeprefix(WRITING).partition(".")[0])
        self._sweep()
        skipped = []
        for directory in _newest_first(self.root):
            state, damage = _inspect(directory, self.config.verify)
            if damage is None and by not in (None, state.get("by")):
                continue
            if damage is None:
                accepted = require_same(str(directory), state.get("same", {}), identity, self.config.accept)
                self._accepted = state.get("accepted", [])
                if accepted:
                    entry = {"step": state["step"], "changes": accepted}
                    self._accepted = [*self._accepted, entry]
                    self.events.log("checkpoint/accepted", **entry)
                self._point(directory)
                return directory, state
            self._damaged.add(directory.name)
            skipped.append(f"{directory.name}: {damage}")
            self.events.log("checkpoint/skipped", path=str(directory), reason=damage)
            print(f"{directory}: damaged, skipped: {damage}", file=sys.stderr)
        if skipped:
            raise UserError(
                f"{self.root}: all checkpoints are damaged ({'; '.join(skipped)}): restore one from a copy, or start "
                "over with checkpoint.resume=false"
            )
        return None


def finished(run: Path, damaged: list[str] | None = None) -> Iterator[CheckpointRef]:
    """Yield a run's checkpoints with all their files in their sizes, the last written first.

    damaged: takes what is wrong with the others.
    """
    for directory in _newest_first(run / "checkpoints"):
        state, damage = _inspect(directory, hashes=False)
        if damage is None:
            yield directory, state
        elif damaged is not None:
            damaged.append(f"{directory.name}: {damage}")


def latest(run: Path) -> CheckpointRef | None:
    """Return the first of `finished`, or None."""
    return next(finished(run), None)


def kept(finished: Sequence[CheckpointRef], config: CheckpointConfig) -> set[Path]:
    """Return the directories to keep; `finished` is newest first. The newest wins ties for best."""
    stay = {directory for directory, _ in finished[: config.keep]}
    if config.keep_every:
        stay |= {directory for directory, state in finished if state["step"] % config.keep_every == 0}
    sign = 1 if config.best_mode == "max" else -1
    values = [(state["metrics"].get(config.keep_best, math.nan), directory) for directory, state in finished]
    rated = [(sign * value, directory) for value, directory in values if math.isfinite(value)]
    if rated:
        stay.add(max(rated, key=lambda r: r[0])[1])
    return stay


def _newest_first(root: Path) -> list[Path]:
    """Sort by time of writing, as a run that started over repeats its step numbers."""

    def written(directory: Path) -> tuple[int, str]:
        state = directory / STATE
        return (state if state.exists() else directory).stat().st_mtime_ns, directory.name

    return sorted((d for d in root.glob("step_*") if d.is_dir()), key=written, reverse=True)


def _inspect(directory: Path, hashes: bool) -> tuple[dict[str, Any], str | None]:
    """Return state.json and the first damage or None; `hashes`: read files and compare hashes."""
    try:
        state = json.loads((directory / STATE).read_text())
    except (OSError, ValueError):
        state = None
    if not isinstance(state, dict) or state.pop("sha256", None) != _digest(state):
        return {}, f"{STATE} cannot be read"
    return state, first_damage(directory, state["files"], hashes)


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
