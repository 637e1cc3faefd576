"""DeepSpeed's checkpoint files as a snapshot: tensors are copied to the CPU at once, the files written when asked.

`engine.checkpoint_engine = SnapshotEngine()`; then `engine.save_checkpoint(...)` touches no disk and leaves jobs, which
any thread may run while training goes on. The files are what DeepSpeed itself would have written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from torch.utils._pytree import tree_leaves

from tatar_dist.run.files import Job


class SnapshotEngine(TorchCheckpointEngine):
    """Loads like DeepSpeed's own engine; `save` keeps a copy. Paths are relative to the checkpoint's directory."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0  # of the last snapshot
        self._jobs: list[Job] = []

    def clear(self) -> None:
        self._jobs, self.bytes = [], 0

    def take(self) -> list[Job]:
        """Return the jobs of the snapshot; the copies live as long as they do."""
        jobs, self._jobs = self._jobs, []
        return jobs

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass  # run/files.py makes them

    def save(self, state_dict: Any, path: str) -> None:
        copy = clone_tensors_for_torch_save(state_dict)

        def write(file: Path) -> None:
            with open(file, "wb") as f:  # Python's own file: a full disk is then reported as an OSError
                torch.save(copy, f)

        self.add(Path(path).as_posix(), copy, write)

    def add(self, path: str, copied: Any, write: Callable[[Path], None]) -> None:
        """Add a file or directory that `write` makes from `copied`, tensors of any nesting."""
        self.bytes += sum(t.nbytes for t in tree_leaves(copied) if isinstance(t, torch.Tensor))
        self._jobs.append((path, write))
