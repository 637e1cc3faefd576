"""Assign rows to ranks, balanced by cost, and to micro-batches, within a token budget.

A unit is the completions that share a prompt. Every rank gets a list of micro-batches, each a list of units, and all
ranks get equally many, because they must make the same collective calls. Pure and deterministic; the simulator
(plan/simulate/step.py) uses it as it is.

A unit is dealt whole, most costly first, to the rank with the least (longest processing time first, Graham 1969). Then
units are parted while that lowers the cost of the rank with the most: each part computes the prompt again. Units are
also parted where one is over the budget, and where a rank has fewer micro-batches than another. A micro-batch stays
empty where a rank has fewer rows than others have micro-batches.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from tatar_dist.models.costs import RowCosts, Unit

MicroBatches = list[list["Unit"]]  # of one rank


def pack(units: Sequence[Unit], ranks: int, budget: int, costs: RowCosts = RowCosts()) -> list[MicroBatches]:  # noqa: B008
    """Pack units into micro-batches of at most `budget` tokens a rank; a longer row goes alone."""
    packed = [_cut(dealt, budget) for dealt in _deal(units, ranks, costs)]
    most = max(map(len, packed))
    for batches in packed:
        while len(batches) < most:
            _one_more(batches)
        batches.sort(key=_tokens, reverse=True)  # similar k-th batches on all ranks: collectives wait for the slowest
    return packed


def _tokens(batch: Sequence[Unit]) -> int:
    return sum(u.tokens for u in batch)


def _deal(units: Sequence[Unit], ranks: int, costs: RowCosts) -> list[list[Unit]]:
    heap = [(0.0, rank) for rank in range(ranks)]
    own: list[list[Unit]] = [[] for _ in range(ranks)]
    for unit in sorted(units, key=lambda u: (-costs.of(u), u.rows)):
        load, rank = heapq.heappop(heap)
        own[rank].append(unit)
        heapq.heappush(heap, (load + costs.of(unit), rank))
    loads = [load for load, _ in sorted(heap, key=lambda entry: entry[1])]
    while ranks > 1 and _relieve(own, loads, costs):
        pass
    return own


def _relieve(own: list[list[Unit]], loads: list[float], costs: RowCosts) -> bool:
    """Move rows from the rank with most cost to that with least, if that lowers the larger cost."""
    heavy, light = max(range(len(own)), key=loads.__getitem__), min(range(len(own)), key=loads.__getitem__)
    best = loads[heavy] * (1 - 1e-3)  # a smaller gain does not pay for computing the prompt twice
    move = None
    for at, unit in enumerate(own[heavy]):
        rest = loads[heavy] - costs.of(unit)
        for n in range(1, len(unit.rows)):
            stays, goes = unit.parted(n)
            after = rest + costs.of(stays), loads[light] + costs.of(goes)
            if max(after) < best:
                best, move = max(after), (at, stays, goes, after)
    if move:
        _, own[heavy][move[0]], goes, (loads[heavy], loads[light]) = move
        own[light].append(goes)
    return move is not None


def _cut(units: Sequence[Unit], budget: int) -> MicroBatches:
    """Cut units into micro-batches within the budget by best fit, the largest unit first."""
    batches: MicroBatches = []
    for unit in sorted((p for u in units for p in _within(u, budget)), key=lambda u: (-u.tokens, u.rows)):
        room = [b for b in batches if _tokens(b) + unit.tokens <= budget]
        if room:
            max(room, key=_tokens).append(unit)
        else:
            batches.append([unit])
    return batches


def _within(unit: Unit, budget: int) -> list[Unit]:
    """Split a unit into nearly equal parts of at most `budget` tokens."""
    if unit.tokens <= budget or len(unit.rows) == 1:
        return [unit]
    first, second = unit.parted(len(unit.rows) // 2)
    return _within(first, budget) + _within(second, budget)


def _one_more(batches: MicroBatches) -> None:
    """Split the largest micro-batch that can be split; else add an empty one."""
    for batch in sorted(batches, key=_tokens, reverse=True):
        units = batch
        if len(batch) == 1 and len(batch[0].rows) > 1:
            units = list(batch[0].parted(len(batch[0].rows) // 2))
        if len(units) > 1:
            batches.remove(batch)
            batches += [units[::2], units[1::2]]
            return
    batches.append([])
