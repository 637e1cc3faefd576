"""The way of pushing that a run takes, and the object store instead if its check fails."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tatar_dist.config.schema import Config
from tatar_dist.faults.waiting import Waits
from tatar_dist.sync import weight_push
from tatar_dist.sync.object_store import ObjectStorePush
from tatar_dist.sync.push import PushResult, WeightPush

if TYPE_CHECKING:
    from tatar_dist.learner.group import LearnerGroup

OBJECT_STORE = "object_store"


class CheckedPush:
    """A `WeightPush` by the way called `name`, after `fall_back` by the object store.

    Attributes:
        spare: the push through the object store, which serves engines that start late, too.
        fell_back: `fall_back` was called.
    """

    def __init__(self, config: Config, name: str, waits: Waits, log: Callable[..., None]) -> None:
        self.name, self.log, self.fell_back = name, log, False
        self.spare: WeightPush = ObjectStorePush(config, waits, log)
        r = config.rollout
        if name != OBJECT_STORE and r.push_check_s:  # both sides must give up what hangs within the limit of the check
            config = replace(config, rollout=replace(r, push_timeout_s=min(r.push_timeout_s, r.push_check_s / 4)))
        self._way = weight_push(config, name, waits, log)

    def push(self, learners: LearnerGroup, engines: Mapping[int, Any], version: int) -> PushResult:
        return self._way.push(learners, engines, version)

    def fall_back(self, reason: str) -> None:
        """Take the object store from now on; log why and say it on stderr."""
        if self.fell_back:
            return
        self.log("push/fallback", way=self.name, reason=reason)
        print(
            f"tatar-dist: weight push by {self.name}: the check before training failed ({reason}); "
            "the run goes on with the object store",
            file=sys.stderr,
        )
        self._way, self.name, self.fell_back = self.spare, OBJECT_STORE, True
