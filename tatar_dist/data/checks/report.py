"""Present a `Validation`: terminal table, `M.validate.md`, `M.validate.png`, JSON."""

from __future__ import annotations

import io
import re
import textwrap
import unicodedata
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tatar_dist.data.checks.sheet import near_duplicates_sheet
from tatar_dist.data.checks.validation import BINS, MEANING, WARNINGS, Checked, PoolFacts, Validation
from tatar_dist.run.files import write_whole, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

INK, QUIET, BLUE, AMBER, RED = "#22303c", "#8a97a3", "#3b7ea1", "#d9902f", "#b8433b"
PANELS = 12  # histograms in the picture, which takes long to lay out; the summary has every pool
TEMPLATE = Path(__file__).with_name("validate.md.j2")
POOL_COLUMNS = ["data set", "task", "split", "rows", "scores", "mean", "std", "rationale", "attributes", "score_std"]


def counted(n: int, word: str) -> str:
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def printable(text: str) -> str:
    """Return text on one line: control, format, surrogate and separator characters escaped."""
    unseen = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    shown = (c if unicodedata.category(c) not in unseen else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


def plain(text: str) -> str:
    """Escape a text for Markdown, so that nothing in it is markup or ends a table's cell."""
    return re.sub(r"([\\`*<\[|])", r"\\\1", printable(text))


def verdict(validation: Validation) -> str:
    """Say whether the data can be used and what was compared between splits, or how much cannot."""
    if not validation.rows:
        return "No rows: there is nothing to check."
    if validation.ok:
        warned = f"; {counted(validation.warnings, 'warning')}" if validation.warnings else ""
        alike = f", but {counted(validation.near, 'pair')} of pictures across splits are nearly the same"
        leaks = (alike if validation.near else " and no split leaks") if validation.compared else ""
        compared = validation.compared or "One split: nothing to compare."
        return f"All {counted(validation.rows, 'row')} can be used{leaks}{warned}. {compared}"
    parts = [f"{path.name} has no rows" for path in validation.without_rows]
    if validation.unusable:
        parts.append(f"{validation.unusable:,} of {counted(validation.rows, 'row')} cannot be used")
    if validation.leaking:
        verb = "leaks" if validation.leaking == 1 else "leak"
        parts.append(f"{counted(validation.leaking, 'row')} {verb} between splits")
    return " and ".join(parts) + "."


def alone(validation: Validation, manifest: Checked) -> Validation:
    """Return the part of the result that concerns one manifest."""
    return replace(validation, manifests=[manifest], fate=validation.fate_of(manifest))


def near_sheet(manifest: Checked) -> Path | None:
    """Return the path of the manifest's sheet of near-duplicates; None if it has none."""
    return manifest.place("near-duplicates.jpg") if manifest.log.counts["near-duplicate"] else None


def hint(manifest: Checked) -> str | None:
    """Suggest --images if none of many image files exists, a single mistake; else return None."""
    wrong_root = manifest.absent == manifest.files and 2 * manifest.files > manifest.rows
    return f"no image was found under {manifest.root}: name their directory with --images" if wrong_root else None


def written_reports(validation: Validation) -> list[Path]:
    """Write all summaries, figures and sheets of near-duplicates. Returns the summaries' paths."""
    for manifest in validation.manifests:
        with writing(summary := manifest.place("validate.md")):
            write_whole(summary, markdown(validation, manifest))
        with writing(drawn := manifest.place("validate.png")):
            if manifest.rows:
                write_whole(drawn, picture(validation, manifest))
            else:  # that of an earlier run would mislead
                drawn.unlink(missing_ok=True)
        with writing(drawn := manifest.place("near-duplicates.jpg")):
            if near_sheet(manifest):
                write_whole(drawn, near_duplicates_sheet(validation, manifest))
            else:
                drawn.unlink(missing_ok=True)
    return [manifest.place("validate.md") for manifest in validation.manifests]


def pool_cells(pool: PoolFacts) -> list[str]:
    """Return the cells of POOL_COLUMNS. The last three are shares of the pool's rows."""
    scores = ["–", "–", "–"]
    if pool.scored:
        scores = [f"{pool.low:.1f}–{pool.high:.1f}", f"{pool.mean:.1f}", f"{pool.std:.1f}"]
    shares = [f"{part / pool.rows:.1%}" for part in (pool.rationales, pool.attributes, pool.stds)]
    return [pool.dataset, pool.task, pool.split, f"{pool.rows:,}", *scores, *shares]


def markdown(validation: Validation, manifest: Checked) -> str:
    """Return the summary of one manifest as Markdown that is readable as text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters |= {"plain": plain, "verdict": verdict}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        validation=validation,
        manifest=manifest,
        alone=alone(validation, manifest),
        sheet=near_sheet(manifest),
        others=[m.path.name for m in validation.manifests if m is not manifest],
        hint=hint(manifest),
        meaning=MEANING,
        warnings=WARNINGS,
        columns=POOL_COLUMNS,
        pools=map(pool_cells, manifest.pools.values()),
        kinds=[*manifest.formats.most_common(), *manifest.notes.most_common()],
    )


def as_json(validation: Validation) -> dict[str, Any]:
    manifests = [
        {
            "path": str(m.path),
            "rows": m.rows,
            "problems": dict(m.log.counts),
            "formats": dict(m.formats),
            "notes": dict(m.notes),
            "pools": [p.as_json() for p in m.pools.values()],
            "summary": str(m.place("validate.md")),
            "picture": str(m.place("validate.png")) if m.rows else None,
            "problems_file": str(m.log.path),
            "near_duplicates": str(sheet) if (sheet := near_sheet(m)) else None,
            "hint": hint(m),
        }
        for m in validation.manifests
    ]
    numbers = {k: getattr(validation, k) for k in ("ok", "rows", "unusable", "leaking", "near", "warnings")}
    return numbers | {"verdict": verdict(validation), "manifests": manifests}


def print_summary(validation: Validation, console: Console) -> None:
    """Print the verdict, the problems, the pools and the paths of the summaries."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    mark, style = ("✓", "bold green") if validation.ok else ("✗", "bold red")
    console.print(Text(f"{mark} {printable(verdict(validation))}", style=style))
    problems = Table("manifest", box=box.SIMPLE_HEAD, pad_edge=False)
    problems.add_column("rows", justify="right")
    problems.add_column("problem", no_wrap=True)
    problems.add_column("for instance")
    pools = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for k, name in enumerate(POOL_COLUMNS[:8]):  # what fits 80 columns; the summary has the rest
        pools.add_column(name, justify="left" if k < 3 else "right", overflow="fold")
    for m in validation.manifests:
        for code, n, (first, *_) in m.log.in_order():
            kind = Text(code, style="yellow" if code in WARNINGS else "red")
            problems.add_row(Text(printable(m.path.name)), f"{n:,}", kind, Text(printable(first.text)))
        for pool in m.pools.values():
            pools.add_row(*(Text(printable(cell)) for cell in pool_cells(pool)[:8]))
    if problems.rows:
        console.print(problems)
    console.print(pools)
    for m in validation.manifests:
        console.print(Text(f"summary {m.place('validate.md')}", style="dim"), soft_wrap=True)
        if sheet := near_sheet(m):
            console.print(Text(f"pairs   {sheet}", style="dim"), soft_wrap=True)


def picture(validation: Validation, manifest: Checked) -> bytes:
    """Return a PNG with the histogram of the scores of each pool, of PANELS at most."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no window system

    pools = sorted(manifest.pools.values(), key=lambda p: (p.dataset, p.task, p.split))
    shown = pools[:PANELS]
    across = min(3, len(shown))
    down = -(-len(shown) // across)
    figure = Figure(figsize=(9.6, 2.25 * down + 0.9), dpi=130, layout="constrained")
    title = textwrap.fill(printable(f"{manifest.path.name}: {verdict(alone(validation, manifest))}"), 90)
    color = INK if alone(validation, manifest).ok else RED
    # parse_math: `$` in a name is literal
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=color, weight="bold", parse_math=False)
    panels = figure.subplots(down, across, squeeze=False, sharex=True).ravel()
    for axes in panels[len(shown) :]:
        axes.axis("off")
    for axes, pool in zip(panels, shown, strict=False):
        _draw_scores(axes, pool)
    if len(pools) > PANELS:
        figure.supxlabel(f"and {len(pools) - PANELS} more pools, in the summary", fontsize=8, color=QUIET)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a letter the font lacks is drawn as a box
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_scores(axes: Axes, pool: PoolFacts) -> None:
    suspicious = any(True for _ in pool.suspicions())
    edges = np.linspace(0, 100, BINS + 1)[:-1]
    axes.bar(edges, pool.histogram, width=100 / BINS * 0.9, align="edge", color=AMBER if suspicious else BLUE)
    axes.set(xlim=(0, 100), yticks=[])
    axes.tick_params(colors=QUIET, labelsize=8, length=2, labelbottom=True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(QUIET)
    axes.set_title(printable(pool.name), loc="left", fontsize=9, color=INK, weight="bold", parse_math=False)
    statistics = f"mean {pool.mean:.0f}, std {pool.std:.0f}" if pool.scored else "no valid score"
    caption = f"{counted(pool.rows, 'row')}, {statistics}{' (suspicious)' if suspicious else ''}"
    axes.set_xlabel(caption, fontsize=8, color=QUIET)
