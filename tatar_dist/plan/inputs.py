"""Check that the files a stage reads exist, before anything heavy is imported or started."""

from __future__ import annotations

from pathlib import Path

from tatar_dist.config.schema import Config
from tatar_dist.data.manifest import existing
from tatar_dist.models import family
from tatar_dist.prompts.answer import Prompts


def check_inputs(config: Config, stage: str) -> None:
    """Look for the manifests, the prompts and the model directory of `stage`.

    Raises:
        UserError: a path that does not exist, and the directory it was looked up in; a model directory without a model
            of `model.family`.
    """
    splits = ["test"] if stage == "evaluate" else ["train"]
    if stage == "sft" or (stage == "grpo" and config.grpo.eval_every):
        splits.append("validation")
    for split in splits:
        for name in getattr(config.data, split):
            existing(Path(config.data.root) / name)
    Prompts.load(config.data.prompts)
    family(config.model.family).check_directory(config.model.path)
