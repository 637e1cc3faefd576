"""Results of an evaluation: averages, slices, and its table as Markdown, LaTeX, CSV, text.

An average is the plain mean over data sets, as papers of this field report it; a data set without a value is excluded
and listed. The counts n and parsed accompany the correlations, because a correlation over half of the answers is not
comparable with one over all of them.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tatar_dist.assets import CONFIGS
from tatar_dist.data.registry import read_registry
from tatar_dist.evaluate.metrics import score_metrics, set_names
from tatar_dist.run.files import write_whole
from tatar_dist.types import TASKS

COLUMNS = (
    "data set", "n", "parsed", "truncated", "missing", "distinct",
    "PLCC", "SRCC", "KRCC", "PLCC, fitted", "RMSE", "MAE",
)  # fmt: skip
KEYS = ("plcc", "srcc", "krcc", "plcc_fitted", "rmse", "mae")
GROUPS = {"in_domain": "average, in domain", "cross_domain": "average, cross domain", "all": "average"}
AVERAGED = ("srcc", "plcc")
WIDTH = 20  # points of a slice of targets
FEW_DISTINCT = 0.5  # distinct scores an answer: with fewer the notes say so
LEAST = 10  # rows of a slice that are worth a correlation
VARIANTS = {"expected": "expected score", "sample_mean": "mean of samples", "direct": "direct answer"}


def averages(metrics: Mapping[str, Mapping[str, Any]], in_domain: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """Return task -> non-empty in_domain, cross_domain, all -> {srcc, plcc, datasets, without}.

    Args:
        metrics: by data set, each with its `task`.
        in_domain: data sets of the training data. None takes the flags of configs/datasets.yaml; sets that are not in
            that file count in `all` only.
    """
    known = {name: entry.in_domain for name, entry in read_registry().datasets.items()} if in_domain is None else {}
    result: dict[str, dict[str, Any]] = {}
    for task in TASKS:
        groups: dict[str, dict[str, Any]] = {"in_domain": {}, "cross_domain": {}, "all": {}}
        for name, m in metrics.items():
            if m.get("task") == task:
                groups["all"][name] = m
                plain = name.removesuffix("/iqa").removesuffix("/iaa")
                inside = known.get(plain) if in_domain is None else plain in in_domain
                if inside is not None:
                    groups["in_domain" if inside else "cross_domain"][name] = m
        means = {group: _mean(of) for group, of in groups.items() if of}
        if means:
            result[task] = means
    return result


def _mean(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    values = {key: [m[key] for m in metrics.values() if m[key] is not None] for key in AVERAGED}
    means = {key: float(np.mean(known)) if known else None for key, known in values.items()}
    without = [name for name, m in metrics.items() if any(m[key] is None for key in AVERAGED)]
    return {"datasets": list(metrics), **means, "without": without}


def slices(
    rows: Sequence[Mapping[str, Any]], keys: Sequence[str], unparsed: str = "drop"
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return data set -> "KEY=VALUE" -> metrics, by `meta` (distortion, style) and target range.

    Slices of fewer than `LEAST` rows are omitted. A row whose value is a list counts in the slice of each member.
    """
    names = set_names((r["dataset"], r["task"]) for r in rows)
    groups: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for r in rows:
        for name in _slices_of(r, keys):
            groups.setdefault(names[r["dataset"], r["task"]], {}).setdefault(name, []).append(r)
    return {
        dataset: {
            name: score_metrics(
                [r["target"] for r in part],
                [r["prediction"] for r in part],
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
    meta = json.loads(row["meta"] or "{}")
    for key in keys:
        members = meta.get(key)
        names = {_name(m) for m in (members if isinstance(members, list) else [members])}
        yield from (f"{key}={name}" for name in names if name is not None)


def _name(member: Any) -> str | None:
    """Return a value of `meta` as text; an object is named by its `family` or `name`."""
    name = member.get("family", member.get("name")) if isinstance(member, dict) else member
    return None if name is None else str(name)


def rows_of(result: Mapping[str, Any]) -> list[list[str]]:
    """Return cells under COLUMNS: "" where a column does not apply, "—" for an undefined value."""
    rows = []
    averages = result.get("averages", {})
    for task in (*averages, None):
        sets = {n: m for n, m in result["datasets"].items() if m.get("task") == task}
        for name, m in sets.items():
            rows.append(_row(name, m))
            for key, label in VARIANTS.items():
                if name in result.get(key, {}):
                    rows.append(_row(f"{name}, {label}", result[key][name]))
        for group, mean in averages.get(task, {}).items() if task else ():
            if len(sets) > 1 and not (group == "all" and len(averages[task]) > 2):
                cells = ["", "", "", "", "", *(_number(mean[k]) for k in ("plcc", "srcc")), "", "", "", ""]
                rows.append([f"{task.upper()}, {GROUPS[group]}", *cells])
    return rows


def _row(name: str, m: Mapping[str, Any]) -> list[str]:
    n, total = m["n"], m.get("n_total", 0)  # a file of an earlier version has no total
    part = f"{n:,} of {total:,}" if n + m["n_missing"] < total else str(n)
    counts = [part, *(str(m.get(k, "")) for k in ("n_parsed", "n_truncated", "n_missing", "n_distinct"))]
    return [name, *counts, *(_number(m[k], 3 if k not in ("rmse", "mae") else 2) for k in KEYS)]


def _number(value: float | None, digits: int = 3) -> str:
    return "—" if value is None else f"{value:.{digits}f}"


def published_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Return header, then [METHOD, "PLCC / SRCC" per evaluated set] from configs/published.yaml."""
    published: dict[str, Any] = yaml.safe_load((CONFIGS / "published.yaml").read_text())
    names = [n for n in result["datasets"] if any(n in sets for sets in published.values())]
    if not names:
        return []
    ours = ["this model", *(_pair(result["datasets"][n]) for n in names)]
    others = [[method, *(_pair(sets.get(n, {})) for n in names)] for method, sets in published.items()]
    return [["PLCC / SRCC", *names], ours, *(row for row in others if set(row[1:]) != {"—"})]


def _pair(m: Mapping[str, Any]) -> str:
    values = [_number(m.get(k)) for k in ("plcc", "srcc")]
    return "—" if values == ["—", "—"] else " / ".join(values)


def notes_of(result: Mapping[str, Any]) -> list[str]:
    """Return notes on the figures: intervals, policies, and reasons for undefined values."""
    notes = []
    for name, m in result["datasets"].items():
        if m["n"] + m["n_missing"] < m.get("n_total", 0):
            notes.append(f"{name}: {m['n']:,} of its {m['n_total']:,} rows, spread over the scores (data.eval_limit)")
        notes += [f"{name}: {k.upper()} 95 % [{ci[0]:.3f}, {ci[1]:.3f}]" for k, ci in m["ci95"].items() if ci]
        notes += [f"{name}: {k}: {why}" for k, why in m["reason"].items()]
        if m["n_parsed"] < m["n"]:
            how = "left out" if m["unparsed"] == "drop" else "counted as 50"
            notes.append(f"{name}: {m['n'] - m['n_parsed']} answers without a score, {how}")
        if m.get("n_distinct", m["n"]) < FEW_DISTINCT * m["n_parsed"]:
            notes.append(f"{name}: {_ties(name, result)}")
        if m["n_out_of_range"]:
            notes.append(f"{name}: {m['n_out_of_range']} answers outside 0 to 100, clamped")
    seconds = {kind: f" and {s:.3g} s" if s else "" for kind, s in result.get("seconds_per_answer", {}).items()}
    for name, m in result.get("direct", {}).items():
        whole = result["datasets"][name]
        if m["n"]:
            notes.append(
                f"{name}: a direct answer takes {m['tokens']:.0f} tokens{seconds['direct']}; one with its thought "
                f"{whole['tokens']:.0f}{seconds['greedy']} (wall-clock time of all sets over the number of answers)"
            )
    for task, groups in result.get("averages", {}).items():
        notes += [f"{task.upper()}: no value for {', '.join(g['without'])}" for g in groups.values() if g["without"]]
    return list(dict.fromkeys(notes))


def _ties(name: str, result: Mapping[str, Any]) -> str:
    """Describe how few scores a set's answers have, and what SRCC scores without such ties have."""
    m = result["datasets"][name]
    text = f"{m['n_distinct']} distinct scores in {m['n_parsed']} answers, the commonest {m['n_commonest']} times"
    others = [f"{_number(m[f'srcc_{key}'])} of the {label}" for key, label in VARIANTS.items() if f"srcc_{key}" in m]
    if others:
        return f"{text}; SRCC {_number(m['srcc'])} of them, {', '.join(others)}"
    return f"{text}; evaluate.expected=true gives scores with fewer ties" if "averages" in result else text


def markdown(rows: list[list[str]], head: tuple[str, ...] | list[str] = COLUMNS) -> str:
    """Format a Markdown table: first column left-aligned, the others right-aligned."""
    lines = [list(head), ["---", *(["---:"] * (len(head) - 1))], *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines) + "\n"


def latex(result: Mapping[str, Any]) -> str:
    """Format a booktabs table with one PLCC/SRCC column per data set, as papers print it."""
    sets = result["datasets"]
    cells = ["/".join(_number(m[k]).lstrip("0").replace("—", "--") for k in ("plcc", "srcc")) for m in sets.values()]
    model = Path(str(result["model"])).name
    return (
        f"\\begin{{tabular}}{{l{'c' * len(sets)}}}\n\\toprule\n"
        f"{' & '.join(['PLCC/SRCC', *map(_tex, sets)])} \\\\\n\\midrule\n"
        f"{' & '.join([_tex(model), *cells])} \\\\\n\\bottomrule\n\\end{{tabular}}\n"
    )


def _tex(text: str) -> str:
    return "".join(f"\\{c}" if c in "_%&#$" else c for c in text)


def as_csv(result: Mapping[str, Any]) -> str:
    """Format every metric of every set as CSV, in full precision."""
    out = io.StringIO()
    counts = ("n", "n_parsed", "n_truncated", "n_missing")
    keys = (*counts, *KEYS, "n_total", "n_distinct", "tokens", *(f"srcc_{variant}" for variant in VARIANTS))
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["dataset", "task", "answers", *keys])
    for answers in ("datasets", *VARIANTS):
        for name, m in result.get(answers, {}).items():
            label = "greedy" if answers == "datasets" else answers
            writer.writerow([name, m.get("task", ""), label, *(m.get(k) for k in keys)])  # None is an empty cell
    return out.getvalue()


def write(directory: Path, result: Mapping[str, Any], published: bool) -> None:
    """Write table.md, table.tex and table.csv."""
    text = markdown(rows_of(result)) + "".join(f"\n- {note}" for note in notes_of(result))
    others = published_rows(result) if published else []
    if others:
        text += "\n\n" + markdown(others[1:], others[0])
    write_whole(directory / "table.md", text.rstrip() + "\n")
    write_whole(directory / "table.tex", latex(result))
    write_whole(directory / "table.csv", as_csv(result))


def show(result: Mapping[str, Any], published: bool = False) -> None:
    """Print the table and notes, without columns that are all 0 and, if narrow, some others."""
    rows = rows_of(result)
    kept = [i for i in range(len(COLUMNS)) if any(r[i] not in ("", "0") for r in rows)]
    width = 1 + sum(3 + max(len(row[i]) for row in (COLUMNS, *rows)) for i in kept)
    if width > Console().width:
        kept = [i for i in kept if COLUMNS[i] not in ("KRCC", "PLCC, fitted", "RMSE")]  # what papers do not print
    cells = [("average" in row[0], [row[i] for i in kept]) for row in rows]
    print_table(str(result["model"]), [COLUMNS[i] for i in kept], cells, notes_of(result))
    if published and (others := published_rows(result)):
        print_table("published, as their papers give it", others[0], [(False, row) for row in others[1:]])


def print_table(
    title: str, head: Sequence[str], rows: Iterable[tuple[bool, Sequence[str]]], notes: Iterable[str] = ()
) -> None:
    """Print rows of (whether bold, cells) as a rich table, first column left-aligned, and notes."""
    table = Table(title=escape(title), title_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left", no_wrap=bool(i), overflow="fold")
    for bold, cells in rows:
        table.add_row(*map(escape, cells), style="bold" if bold else None)
    Console().print(table)
    for note in notes:
        Console().print(f"  {note}", style="dim", highlight=False, markup=False)
