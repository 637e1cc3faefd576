"""Check the inputs and imports of a stage before Ray or a model is started."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tatar_dist.assets import looked_in
from tatar_dist.config.schema import Config
from tatar_dist.data.manifest import existing
from tatar_dist.errors import UserError
from tatar_dist.models import family
from tatar_dist.prompts.answer import Prompts
from tatar_dist.run.directory import check_output
from tatar_dist.run.tracking import check_trackers


def check_inputs(config: Config, stage: str) -> None:
    """Check the output path, trackers, manifests, prompts and model directory of `stage`.

    Raises:
        UserError: a path that does not exist, with the directory it was looked up in; a model directory without a model
            of `model.family`; a tracker that is not installed; a relative output in a Ray job.
    """
    check_output(config)
    check_trackers(config)
    root = None if config.data.image_root is None else Path(config.data.image_root)
    splits = ["test"] if stage == "evaluate" else ["train"]
    if stage == "sft" or (stage == "grpo" and config.grpo.eval_every):
        splits.append("validation")
    for split in splits:
        for name in getattr(config.data, split):
            manifest = existing(Path(config.data.root) / name)
            if root is not None and not root.is_dir() and "image_bytes" not in _columns(manifest):
                raise UserError(f"data.image_root={root}: no such directory{looked_in(root)}")
    Prompts.load(config.data.prompts)
    family(config.model.family).check_directory(config.model.path)


def _columns(manifest: Path) -> list[str]:
    """Return a manifest's column names; ["image_bytes"] if unreadable, as its reader reports the reason later."""
    try:
        return pq.read_schema(manifest).names
    except (pa.ArrowException, OSError):
        return ["image_bytes"]
