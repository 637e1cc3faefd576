"""Check before training that weights reach engines: `verify` compares, `check` tries a way.

`check` moves all weights by a few percent, pushes them, compares log-probabilities of engines and learners, moves them
back, pushes again and compares again (sync/README.md). It is for ways of pushing and of running engines that were never
run on the current hardware (plan/proven.py). A way that fails is replaced by the object store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tatar_dist.config.schema import Config
from tatar_dist.errors import Interrupted, LearnersFailed, RunError, UserError
from tatar_dist.faults.stall import Stalled
from tatar_dist.faults.waiting import first_line
from tatar_dist.learner.actor import WeightsOutOfSync
from tatar_dist.learner.sharding import Shard, shard_rows
from tatar_dist.rollout.engine import Sampling
from tatar_dist.sync.checked import OBJECT_STORE, CheckedPush
from tatar_dist.sync.push import PushResult, ask_learners
from tatar_dist.types import LearnerRow, Prompt

PROMPTS = 8
TOKENS = 32  # of a completion: enough to see a wrong layer, a cache or a version
BITS = (3, 5, 6)  # weights move by up to 6, 25 or 50 %; the first is taken at which each part of the model shows
TIMES = 4  # what a missing part would change must be so many times the gap; two gaps may differ by no more
ROUNDING = 1e-5  # nats: a smaller gap says nothing
# With these the run or the learners end, and weights that are moved end with them; all else is a fault of the way.
ENDING = (LearnersFailed, Stalled, UserError, Interrupted)


def verify(pool: Any, learners: Any, prompts: Sequence[Prompt], config: Config) -> dict[str, float]:
    """Return sync/logprob_gap and its _max, in nats, over completions of `prompts`.

    The pool and the learners must hold the same version. Engines on the learners' GPUs sleep afterwards: with their
    keys and values a forward has no memory. Push again.

    Raises:
        WeightsOutOfSync: the mean gap is over `grpo.logprob_gap_limit`.
    """
    shards = _answers(pool, learners, prompts, config)
    calls = [a.logprob_gap.remote(shard) for a, shard in zip(learners.actors, shards, strict=True)]
    gap: dict[str, float] = learners.wait(calls)[0]
    return gap


def _answers(pool: Any, learners: Any, prompts: Sequence[Prompt], config: Config) -> list[Shard]:
    """Sample completions of 8 prompts, or of one an engine; return each rank's share of them."""
    asked, ranks = list(prompts)[: max(PROMPTS, len(pool.engines))], len(learners.actors)
    n = -(-ranks // len(asked))  # every rank has a completion
    r = config.rollout
    groups = pool.generate(asked, Sampling(n, r.temperature, min(TOKENS, r.max_new_tokens), config.seed, step=-1))
    rows = [
        LearnerRow(
            image_id=g.prompt.group_id,
            image=g.prompt.sample.image,
            prompt_text=g.prompt.text,
            completion_ids=c.token_ids,
            task=g.prompt.sample.task,
            advantage=0.0,
            weight=0.0,
            sampled_logprobs=c.logprobs,
            prompt_token_ids=g.prompt_token_ids,
            prompt_tokens=len(g.prompt_token_ids),
        )
        for g in groups
        for c in g.completions
    ]
    pool.prepare_update()
    return shard_rows(rows, ranks, config.grpo.micro_tokens)


def check(
    push: CheckedPush, pool: Any, learners: Any, prompts: Sequence[Prompt], version: int, begin: Callable[[], None]
) -> None:
    """Push weights as `version` and check it; if that fails, by the object store, checked too.

    The weights are the same afterwards, bit by bit. After a LearnersFailed, a stop or an error that ends the run they
    may be moved: such learners must not be used again. Engines on the learners' GPUs sleep, as after `verify`.

    Args:
        begin: called before each of the two.

    Raises:
        WeightsOutOfSync: the object store fails, too.
        LearnersFailed: a rank died or hangs. The object store is taken from then on.
    """
    while True:
        start = time.monotonic()
        try:
            begin()
            facts = _try(push, pool, learners, prompts, version)
        except ENDING as e:
            if isinstance(e, LearnersFailed | Stalled):
                push.fall_back(first_line(e))
            raise
        except Exception as e:
            if push.fell_back:
                raise
            push.fall_back(first_line(e))
        else:
            push.log("push/checked", way=push.name, seconds=round(time.monotonic() - start, 2), **facts)
            return


def _try(push: CheckedPush, pool: Any, learners: Any, prompts: Sequence[Prompt], version: int) -> dict[str, Any]:
    """Make one check; return its figures. Raises WeightsOutOfSync, or what went wrong."""
    config, waits = learners.config, learners.waits
    seconds, gap_limit = config.rollout.push_check_s, config.grpo.logprob_gap_limit
    end, failed = time.monotonic() + seconds, dict[int, str]()

    def load(engines: Mapping[int, Any], version: int) -> PushResult:
        result = push.push(learners, engines, version)
        failed.update(result.failed)
        return result

    def send() -> None:
        pool.push(load, version)
        if failed and not push.fell_back:  # by the object store, failed engines are restarted as at any time
            raise RunError("; ".join(f"engine {i}: {reason}" for i, reason in failed.items()))

    def in_time() -> bool:
        # the object store's stream must be read to its end, or the learners wait in it; after a fallback engines may be
        # starting anew
        if time.monotonic() > end and push.name != OBJECT_STORE:
            raise RunError(f"not done within rollout.push_check_s={seconds:g} s")
        return True

    for bit in BITS:
        with _moved(learners, bit, seconds), waits.interruptible(in_time):
            send()
            shards = _answers(pool, learners, prompts, config)
            calls = [a.probe.remote(shard, bit) for a, shard in zip(learners.actors, shards, strict=True)]
            seen: dict[str, float] = learners.wait(calls)[0]
        moved = seen.pop("gap")
        unseen = [part for part, nats in seen.items() if nats < TIMES * max(moved, ROUNDING)]
        if not unseen or moved > gap_limit:
            break
    with waits.interruptible(in_time):
        send()
        gap = verify(pool, learners, prompts, config)["sync/logprob_gap"]
    low, high = sorted((gap, moved))
    clear = not unseen and TIMES * gap <= min(seen.values())  # both gaps are far below what any missing part would give
    if not clear and not high <= max(TIMES * max(low, ROUNDING), gap_limit if push.fell_back else 0):
        raise WeightsOutOfSync(
            f"engine and learner log-probabilities differ by {moved:.2g} nats a token after a push of moved weights, "
            f"by {gap:.2g} after a push of the true ones"
        )
    nats = {"gap": round(gap, 8), "moved": round(moved, 8), "seen": {part: round(v, 8) for part, v in seen.items()}}
    return {"bit": bit, **nats, **({"unseen": ", ".join(unseen)} if unseen else {})}


@contextmanager
def _moved(learners: Any, bit: int, seconds: float) -> Iterator[None]:
    """Move all weights of the learners inside, unless what happens inside ends them."""

    def flip() -> list[tuple[int, int]]:
        return ask_learners(learners, [a.flip.remote(bit) for a in learners.actors], seconds, "moving weights")

    failure, before = None, flip()
    try:
        yield
    except ENDING:
        raise
    except Exception as e:
        failure = e
    if [after for _, after in flip()] != [sums for sums, _ in before]:
        raise LearnersFailed("weights that were moved for the check of the push did not come back as they were")
    if failure:
        raise failure
