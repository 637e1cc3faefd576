"""Checkpoints of a run: written beside, synced, renamed; `latest` is moved last.

    checkpoints/step_000030/deepspeed/   ZeRO-3 shards: weights, master weights, optimizer (one writer a rank)
                            model/       the Hugging Face model directory at this step
                            state.json   step, sampler position, and what a run must have in common to continue
    checkpoints/latest -> step_000030

A checkpoint without state.json was not finished and does not count. Pure file work: the learners write through `fill`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tatar_dist.errors import UserError

STATE = "state.json"


def _sync_tree(directory: Path) -> None:
    """fsync every file and directory below, so that a rename never names data that a power cut can still lose."""
    for root, _, files in os.walk(directory):
        for name in [*files, "."]:
            fd = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


class Checkpoints:
    """The checkpoints of one run directory; `keep` newest stay."""

    def __init__(self, run: Path, keep: int) -> None:
        self.root, self.keep = run / "checkpoints", max(1, keep)

    def save(self, step: int, state: dict[str, Any], fill: Callable[[Path], None]) -> Path:
        """Write the checkpoint of `step`. `fill(directory)` writes the learners' part.

        Raises:
            UserError: no space left; the checkpoints that were there stay as they were.
        """
        final = self.root / f"step_{step:06d}"
        beside = self.root / f".writing_{final.name}"
        try:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            fill(beside)
            (beside / STATE).write_text(json.dumps({"step": step, **state}))
            _sync_tree(beside)
        except OSError as e:
            shutil.rmtree(beside, ignore_errors=True)
            cause = getattr(e, "cause", e)  # Ray wraps what an actor raised
            raise UserError(
                f"{final}: cannot write the checkpoint: {cause.strerror or cause}; the last one is kept"
            ) from e
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        if final.exists():
            shutil.rmtree(final)
        beside.rename(final)
        link = self.root / ".latest"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        os.replace(link, self.root / "latest")
        for old in self._finished()[self.keep :]:
            shutil.rmtree(old)
        return final

    def _finished(self) -> list[Path]:
        """Finished checkpoints, the last written first: a step's number says nothing when a run was started afresh."""
        states = list(self.root.glob(f"step_*/{STATE}"))
        return [s.parent for s in sorted(states, key=lambda s: (s.stat().st_mtime_ns, s.parent.name), reverse=True)]

    def resume(self, same: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
        """`latest`, if it was written by a run that has the settings `same`; None when there is no checkpoint.

        Raises:
            UserError: it was written by another kind of run.
        """
        found = self.latest()
        if found is None:
            return None
        before = found[1].get("same", {})
        for key, value in same.items():
            if before.get(key) != value:
                raise UserError(
                    f"{found[0]}: a checkpoint of a run with {key}={before.get(key)}, this one has {key}={value}: give "
                    "another output, or checkpoint.resume=false to start over"
                )
        return found

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """(directory, state) of the newest finished checkpoint, or None."""
        for directory in self._finished():
            try:
                return directory, json.loads((directory / STATE).read_text())
            except (OSError, ValueError):
                continue  # interrupted while writing: the one before it counts
        return None
