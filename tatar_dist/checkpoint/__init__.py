"""Checkpoints of a run: written beside, synced, hashed, renamed; `latest` is moved last.

    checkpoints/step_000030/deepspeed/   ZeRO-3 shards: weights, master weights, optimizer (one writer a rank)
                            model/       the Hugging Face model directory at this step
                            state.json   step, number of learners, sampler position, what a run must have in common to
                                         continue, the metric that ranks it, and size and sha256 of every file
    checkpoints/latest -> step_000030

state.json is written when everything else is on the disk: a directory without it, or whose files are not as it says,
does not count. Hidden names are a checkpoint being written (.writing_*) or removed (.removing_*).
"""

from tatar_dist.checkpoint.store import Checkpoints, Found, finished, latest

__all__ = ["Checkpoints", "Found", "finished", "latest"]
