"""Result table of an evaluation, PLCC / SRCC per data set, as Markdown, LaTeX, CSV and on the terminal.

Averages follow the data sets of their task. The counts n and parsed accompany the correlations, because a correlation
over half of the answers is not comparable with one over all of them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tatar_dist.assets import CONFIGS

COLUMNS = ("data set", "n", "parsed", "truncated", "missing", "PLCC", "SRCC", "KRCC", "PLCC, fitted", "RMSE", "MAE")
KEYS = ("plcc", "srcc", "krcc", "plcc_fitted", "rmse", "mae")
GROUPS = {"in_domain": "average, in domain", "cross_domain": "average, cross domain", "all": "average"}
WIDE = 110  # columns of a terminal that all of the table fits
VARIANTS = {"expected": "expected score", "sample_mean": "mean of samples"}


def rows_of(result: Mapping[str, Any]) -> list[list[str]]:
    """Return rows of cells under COLUMNS: "" where a column does not apply, "—" for an undefined value."""
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
                cells = ["", "", "", "", *(_number(mean[k]) for k in ("plcc", "srcc")), "", "", "", ""]
                rows.append([f"{task.upper()}, {GROUPS[group]}", *cells])
    return rows


def _row(name: str, m: Mapping[str, Any]) -> list[str]:
    counts = [str(m[k]) for k in ("n", "n_parsed", "n_truncated", "n_missing")]
    return [name, *counts, *(_number(m[k], 3 if k not in ("rmse", "mae") else 2) for k in KEYS)]


def _number(value: float | None, digits: int = 3) -> str:
    return "—" if value is None else f"{value:.{digits}f}"


def published_rows(result: Mapping[str, Any], path: Path = CONFIGS / "published.yaml") -> list[list[str]]:
    """Return [METHOD, "PLCC / SRCC" per evaluated set] from configs/published.yaml; the first row is the header."""
    import yaml

    found: dict[str, Any] = yaml.safe_load(path.read_text())
    names = [n for n in result["datasets"] if any(n in sets for sets in found.values())]
    if not names:
        return []
    ours = ["this model", *(_pair(result["datasets"][n]) for n in names)]
    others = [[method, *(_pair(sets.get(n, {})) for n in names)] for method, sets in found.items()]
    return [["PLCC / SRCC", *names], ours, *(row for row in others if any(c != "—" for c in row[1:]))]


def _pair(m: Mapping[str, Any]) -> str:
    values = [_number(m.get(k)) for k in ("plcc", "srcc")]
    return "—" if values == ["—", "—"] else " / ".join(values)


def notes_of(result: Mapping[str, Any]) -> list[str]:
    """Return notes on the figures: intervals, policies, and reasons for undefined values."""
    notes = []
    for name, m in result["datasets"].items():
        notes += [f"{name}: {k.upper()} 95 % [{ci[0]:.3f}, {ci[1]:.3f}]" for k, ci in m["ci95"].items() if ci]
        notes += [f"{name}: {k}: {why}" for k, why in m["reason"].items()]
        if m["n_parsed"] < m["n"]:
            how = "left out" if m["unparsed"] == "drop" else "counted as 50"
            notes.append(f"{name}: {m['n'] - m['n_parsed']} answers without a score, {how}")
        if m["n_out_of_range"]:
            notes.append(f"{name}: {m['n_out_of_range']} answers outside 0 to 100, clamped")
    for task, groups in result.get("averages", {}).items():
        notes += [f"{task.upper()}: no value for {', '.join(g['without'])}" for g in groups.values() if g["without"]]
    return list(dict.fromkeys(notes))


def markdown(rows: list[list[str]], head: tuple[str, ...] | list[str] = COLUMNS) -> str:
    """Format a Markdown table: first column left-aligned, the others right-aligned."""
    lines = [list(head), ["---", *(["---:"] * (len(head) - 1))], *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines) + "\n"


def latex(result: Mapping[str, Any]) -> str:
    """Format a booktabs table with one PLCC/SRCC column per data set, as papers print it."""
    sets = result["datasets"]
    names = " & ".join(_tex(n) for n in sets)
    cells = " & ".join("/".join(_number(m[k]).lstrip("0").replace("—", "--") for k in ("plcc", "srcc"))
                       for m in sets.values())  # fmt: skip
    return "\n".join(
        [
            f"\\begin{{tabular}}{{l{'c' * len(sets)}}}",
            "\\toprule",
            f"PLCC/SRCC & {names} \\\\",
            "\\midrule",
            f"{_tex(Path(str(result['model'])).name)} & {cells} \\\\",
            "\\bottomrule",
            "\\end{tabular}",
            "",
        ]
    )


def _tex(text: str) -> str:
    return "".join(f"\\{c}" if c in "_%&#$" else c for c in text)


def as_csv(result: Mapping[str, Any]) -> str:
    """Format every metric of every set as CSV, in full precision."""
    out = io.StringIO()
    keys = ("n", "n_parsed", "n_truncated", "n_missing", *KEYS)
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["dataset", "task", "answers", *keys])
    for answers in ("datasets", *VARIANTS):
        for name, m in result.get(answers, {}).items():
            label = "greedy" if answers == "datasets" else answers
            writer.writerow([name, m.get("task", ""), label, *("" if m[k] is None else m[k] for k in keys)])
    return out.getvalue()


def write(directory: Path, result: Mapping[str, Any], published: bool) -> None:
    """Write table.md, table.tex and table.csv."""
    text = markdown(rows_of(result)) + "".join(f"\n- {note}" for note in notes_of(result))
    others = published_rows(result) if published else []
    if others:
        text += "\n\n" + markdown(others[1:], others[0])
    (directory / "table.md").write_text(text.rstrip() + "\n")
    (directory / "table.tex").write_text(latex(result))
    (directory / "table.csv").write_text(as_csv(result))


def show(result: Mapping[str, Any], published: bool) -> None:
    """Print the table on the terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for title, head, rows in (
        (str(result["model"]), list(COLUMNS), rows_of(result)),
        *([("published, as their papers give it", p[0], p[1:])] if (p := published and published_rows(result)) else []),
    ):
        # nothing truncated, say; on a narrow terminal what papers do not print
        narrow = {"KRCC", "PLCC, fitted", "RMSE"} if console.width < WIDE else set()
        drop = {i for i in range(1, len(head)) if head[i] in narrow or all(row[i] in ("", "0") for row in rows)}
        table = Table(title=escape(title), title_justify="left")
        for i, name in enumerate(head):
            if i not in drop:
                table.add_column(name, justify="right" if i else "left", no_wrap=bool(i), overflow="fold")
        for row in rows:
            style = "bold" if "average" in row[0] else None
            table.add_row(*(escape(cell) for i, cell in enumerate(row) if i not in drop), style=style)
        console.print(table)
    for note in notes_of(result):
        console.print(f"  {note}", style="dim", highlight=False, markup=False)
