"""Break metrics down: averages over data sets, in and across domains, and metrics of slices of a set.

Takes metrics by data set and prediction rows (runner.py); returns dicts of metrics. An average is the plain mean over
data sets, as papers of this field report it. A data set without a value is excluded from it and listed, not counted as
0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tatar_dist.data.registry import Registry, read_registry
from tatar_dist.evaluate.metrics import score_metrics
from tatar_dist.types import TASKS

AVERAGED = ("srcc", "plcc")
WIDTH = 20  # points of a slice of targets
LEAST = 10  # rows of a slice that are worth a correlation


def averages(found: Mapping[str, Mapping[str, Any]], in_domain: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """Return task -> {"in_domain", "cross_domain", "all"} -> {srcc, plcc, datasets, without}; empty groups are absent.

    Args:
        found: metrics by data set, each with its `task`.
        in_domain: data sets of the training data. None takes the flags of configs/datasets.yaml; sets that are not in
            that file count in `all` only.
    """
    registry = read_registry() if in_domain is None else None
    inside = {name: _is_inside(name, in_domain, registry) for name in found}
    result: dict[str, dict[str, Any]] = {}
    for task in TASKS:
        own = [name for name, m in found.items() if m.get("task") == task]
        groups = {
            "in_domain": [n for n in own if inside[n] is True],
            "cross_domain": [n for n in own if inside[n] is False],
            "all": own,
        }
        entry = {group: _mean({n: found[n] for n in names}) for group, names in groups.items() if names}
        if entry:
            result[task] = entry
    return result


def _is_inside(name: str, listed: Sequence[str] | None, registry: Registry | None) -> bool | None:
    plain = name.removesuffix("/iqa").removesuffix("/iaa")
    if registry is None:
        return plain in (listed or ())
    return registry.datasets[plain].in_domain if plain in registry.datasets else None


def _mean(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    entry: dict[str, Any] = {"datasets": list(metrics)}
    for name in AVERAGED:
        values = [m[name] for m in metrics.values() if m[name] is not None]
        entry[name] = float(np.mean(values)) if values else None
    entry["without"] = [n for n, m in metrics.items() if any(m[k] is None for k in AVERAGED)]
    return entry


def slices(
    rows: Sequence[Mapping[str, Any]], keys: Sequence[str], unparsed: str = "drop"
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return data set -> "KEY=VALUE" -> metrics, by members of `meta` (distortion, style) and by target range.

    A data set name used for both tasks is split into NAME/iqa and NAME/iaa. Slices of fewer than `LEAST` rows are
    omitted. A row whose value is a list counts in the slice of each member.
    """
    names = [name for name, _ in {(r["dataset"], r["task"]) for r in rows}]
    groups: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for r in rows:
        for name in _slices_of(r, keys):
            own = r["dataset"] if names.count(r["dataset"]) == 1 else f"{r['dataset']}/{r['task']}"
            groups.setdefault(own, {}).setdefault(name, []).append(r)
    return {
        dataset: {
            name: score_metrics(
                np.array([r["target"] for r in part], np.float64),
                np.array([math.nan if r["prediction"] is None else r["prediction"] for r in part], np.float64),
                unparsed=unparsed,
                n_truncated=sum(r["truncated"] for r in part),
            ).to_dict()
            for name, part in sorted(parts.items())
            if len(part) >= LEAST
        }
        for dataset, parts in groups.items()
    }


def _slices_of(row: Mapping[str, Any], keys: Sequence[str]) -> Iterator[str]:
    low = min(int(row["target"] // WIDTH) * WIDTH, 100 - WIDTH)
    yield f"target={low:02d}-{low + WIDTH}"
    meta = json.loads(row["meta"]) if row["meta"] else {}
    for key in keys:
        for value in _values(meta.get(key)):
            yield f"{key}={value}"


def _values(found: Any) -> set[str]:
    """Return a scalar as text, a list by member, and an object by its `family` or `name`."""
    if found is None:
        return set()
    if isinstance(found, list):
        return set().union(*map(_values, found))
    if isinstance(found, dict):
        return _values(found.get("family", found.get("name")))
    return {str(found)}
