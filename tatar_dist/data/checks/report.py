"""Report on `data validate`: terminal table, `M.validate.md`, `M.validate.png`, JSON.

All four only present a `Validation`; texts and figure start with the verdict.
"""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from tatar_dist.data.checks.rows import BINS, PoolFacts
from tatar_dist.data.checks.validation import MEANING, WARNINGS, Checked, Validation
from tatar_dist.run.files import write_whole, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

INK, QUIET, BLUE, AMBER, RED = "#22303c", "#8a97a3", "#3b7ea1", "#d9902f", "#b8433b"
PANELS = 12  # score histograms in the picture; the summary has every pool


def counted(n: int, word: str) -> str:
    plural = word if n == 1 else word[:-1] + "ies" if word.endswith("y") else word + "s"
    return f"{n:,} {plural}"


def printable(text: str) -> str:
    """Return the text on one line, with escapes for control, format, surrogate and separator characters."""
    unseen = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    shown = (c if unicodedata.category(c) not in unseen else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


def plain(text: str) -> str:
    """Escape a text for Markdown, so that nothing in it is markup or ends a table's cell."""
    return re.sub(r"([\\`*<\[|])", r"\\\1", printable(text))


def verdict(validation: Validation) -> str:
    """Return one sentence: whether the data can be used, and if not, how much of it cannot."""
    if not validation.rows:
        return "No rows: there is nothing to check."
    if validation.ok:
        warned = f"; {counted(validation.warnings, 'warning')}" if validation.warnings else ""
        return f"All {counted(validation.rows, 'row')} can be used and no split leaks{warned}."
    parts = [f"{path.name} has no rows" for path in validation.without_rows]
    if validation.unusable:
        parts.append(f"{validation.unusable:,} of {counted(validation.rows, 'row')} cannot be used")
    if validation.leaking:
        parts.append(
            f"{counted(validation.leaking, 'row')} leak{'s' if validation.leaking == 1 else ''} between splits"
        )
    return " and ".join(parts) + "."


def hint(manifest: Checked) -> str | None:
    """Suggest --images if none of many image files is there, which is one mistake and not many; else None."""
    if manifest.absent < manifest.files or 2 * manifest.files <= manifest.rows:
        return None
    return f"no image was found under {manifest.root}: name their directory with --images"


def written_reports(validation: Validation) -> list[Path]:
    """Write the summary of every manifest, and the figure of those with rows. Returns the summaries' paths.

    Raises UserError if they cannot be written.
    """
    paths = []
    for manifest in validation.manifests:
        with writing(summary := manifest.place("validate.md")):
            write_whole(summary, markdown(validation, manifest))
        if manifest.rows:
            with writing(drawn := manifest.place("validate.png")):
                write_whole(drawn, picture(validation, manifest))
        else:  # remove that of an earlier run
            manifest.place("validate.png").unlink(missing_ok=True)
        paths.append(summary)
    return paths


def _range(pool: PoolFacts) -> str:
    return f"{pool.low:.1f}–{pool.high:.1f}" if pool.scored else "–"


def _share(part: int, of: int) -> str:
    """Format a share in per cent; rounding never makes it 100 or 0."""
    if part in (0, of) or not of:
        return "–" if not of else f"{100 * part // of} %"
    return f"{min(99.9, max(0.1, 100 * part / of)):.1f} %"


def pool_cells(pool: PoolFacts) -> list[str]:
    """Return the cells of POOL_COLUMNS. The last three are shares of the pool's rows."""
    spread = [f"{pool.mean:.1f}", f"{pool.std:.1f}"] if pool.scored else ["–", "–"]
    shares = [_share(part, pool.rows) for part in (pool.rationales, pool.attributes, pool.stds)]
    return [pool.dataset, pool.task, pool.split, f"{pool.rows:,}", _range(pool), *spread, *shares]


POOL_COLUMNS = ["data set", "task", "split", "rows", "scores", "mean", "std", "rationale", "attributes", "score_std"]


def markdown(validation: Validation, manifest: Checked) -> str:
    """Return the summary of one manifest as Markdown that is readable as text."""
    fate = validation.fate_of(manifest)
    alone = Validation([manifest], fate)
    lines = [f"# {plain(manifest.path.name)}", "", f"**{plain(verdict(alone))}**", ""]
    if advice := hint(manifest):
        lines += [plain(advice[0].upper() + advice[1:] + "."), ""]
    if len(validation.manifests) > 1:
        others = ", ".join(m.path.name for m in validation.manifests if m is not manifest)
        lines += [plain(f"Checked together with {others}: {verdict(validation)}"), ""]
    if manifest.rows:
        lines += [f"![Scores and sizes of pictures]({quote(manifest.place('validate.png').name)})", ""]
    if manifest.log.counts:
        lines += ["## Problems", "", f"All of them, a line each: {plain(manifest.log.path.name)}.", ""]
        lines += ["| rows | code | meaning |", "|---:|---|---|"]
        for code, n, _ in manifest.log.in_order():
            lines.append(f"| {n:,} | {code}{' (warning)' if code in WARNINGS else ''} | {MEANING[code]} |")
        lines.append("")
        for code, n, examples in manifest.log.in_order():
            lines += [f"**{code}**" + (f", the first {len(examples)} of {n:,}" if n > len(examples) else ""), ""]
            for e in examples:
                where = f"row {e.row}, {e.sample_id}: " if e.row is not None else ""
                lines.append(f"- {plain(where + e.message)}")
            lines.append("")
    lines += ["## Pools", "", "Shares of rows that have a rationale, attributes, the spread of opinions.", ""]
    lines += ["| " + " | ".join(POOL_COLUMNS) + " |", "|---|---|---|" + "---:|" * (len(POOL_COLUMNS) - 3)]
    lines += ["| " + " | ".join(map(plain, pool_cells(p))) + " |" for p in manifest.pools.values()]
    lines += ["", "## Pictures", "", "| pictures | kind |", "|---:|---|"]
    lines += [
        f"| {n:,} | {kind} |" for counts in (manifest.formats, manifest.notes) for kind, n in counts.most_common()
    ]
    return "\n".join(lines) + "\n"


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
            "hint": hint(m),
        }
        for m in validation.manifests
    ]
    numbers = {k: getattr(validation, k) for k in ("ok", "rows", "unusable", "leaking", "warnings")}
    return numbers | {"verdict": verdict(validation), "manifests": manifests}


def print_summary(validation: Validation, console: Console) -> None:
    """Print the verdict, the problems, the pools and the paths of the summaries."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    mark, style = ("✓", "bold green") if validation.ok else ("✗", "bold red")
    console.print(Text(f"{mark} {printable(verdict(validation))}", style=style))
    several = len(validation.manifests) > 1
    if any(m.log.counts for m in validation.manifests):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in (["manifest"] if several else []) + ["rows", "problem", "for instance"]:
            table.add_column(name, justify="right" if name == "rows" else "left", no_wrap=name != "for instance")
        for m in validation.manifests:
            for code, n, (first, *_) in m.log.in_order():
                where = f"row {first.row}, {first.sample_id}: " if first.row is not None else ""
                kind = Text(code, style="yellow" if code in WARNINGS else "red")
                file = [Text(printable(m.path.name))] if several else []
                table.add_row(*file, f"{n:,}", kind, Text(printable(where + first.message)))
        console.print(table)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for k, name in enumerate(POOL_COLUMNS[:8]):  # what fits 80 columns; the summary has the rest
        table.add_column(name, justify="left" if k < 3 else "right", overflow="fold")
    for m in validation.manifests:
        for pool in m.pools.values():
            table.add_row(*(Text(printable(cell)) for cell in pool_cells(pool)[:8]))
    console.print(table)
    for m in validation.manifests:
        if advice := hint(m):
            console.print(Text(printable(advice[0].upper() + advice[1:]), style="bold"))
        console.print(Text(f"summary {m.place('validate.md')}", style="dim"), soft_wrap=True)


def picture(validation: Validation, manifest: Checked) -> bytes:
    """Return a PNG: score histograms by pool, sizes of the images."""
    # The object interface, without pyplot: no global state, no window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pools = sorted(manifest.pools.values(), key=lambda p: (p.dataset, p.task, p.split))
    shown = pools[:PANELS]
    across = min(3, max(1, len(shown)))
    down = -(-len(shown) // across)
    figure = Figure(figsize=(9.6, 2.25 * down + 4.05), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    alone = Validation([manifest], validation.fate_of(manifest))
    figure.suptitle(
        printable(f"{manifest.path.name}: {verdict(alone)}"),
        x=0.01,
        ha="left",
        fontsize=12,
        color=INK if alone.ok else RED,
        weight="bold",
        parse_math=False,  # `$` in a name is literal
    )
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[2.25 * down, 3.15])[:, 0]
    panels = upper.subplots(max(1, down), across, squeeze=False, sharex=True)
    for axes, pool in zip(panels.flat, shown, strict=False):
        _draw_scores(axes, pool)
    for axes in panels.flat[len(shown) :]:
        axes.axis("off")
    if len(pools) > PANELS:
        upper.supxlabel(f"and {len(pools) - PANELS} more pools, in the summary", fontsize=8, color=QUIET)
    _draw_sizes(lower.subplots(), manifest)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a letter the font lacks is drawn as a box
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _plain(axes: Axes, title: str, under: str = "") -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(QUIET)
    axes.tick_params(colors=QUIET, labelsize=8, length=2)
    axes.set_title(title, loc="left", fontsize=9, color=INK, weight="bold", parse_math=False)
    if under:
        axes.set_xlabel(under, fontsize=8, color=QUIET)


def _draw_scores(axes: Axes, pool: PoolFacts) -> None:
    suspicious = any(True for _ in pool.suspicions())
    edges = np.linspace(0, 100, BINS + 1)[:-1]
    axes.bar(edges, pool.histogram, width=100 / BINS * 0.9, align="edge", color=AMBER if suspicious else BLUE)
    axes.set_xlim(0, 100)
    axes.set_yticks([])
    axes.tick_params(labelbottom=True)
    caption = (
        f"{counted(pool.rows, 'row')}, mean {pool.mean:.0f}, std {pool.std:.0f}" if pool.scored else "no valid score"
    )
    _plain(axes, printable(pool.name), caption + (" (suspicious)" if suspicious else ""))


def _draw_sizes(axes: Axes, manifest: Checked) -> None:
    _plain(axes, "Sizes of the pictures", "width, pixels (a dot may be many pictures)")
    from matplotlib.ticker import LogLocator, NullLocator

    if not manifest.sizes:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no picture decodes", ha="center", color=RED, transform=axes.transAxes)
        return
    sizes, counts = np.array(list(manifest.sizes)), np.array(list(manifest.sizes.values()))
    area = 14 + 160 * np.sqrt(counts / counts.max())
    axes.scatter(sizes[:, 0], sizes[:, 1], s=area if len(sizes) < 200 else 6, alpha=0.45, color=BLUE, linewidths=0)
    low, high = max(1, sizes.min() * 0.6), sizes.max() * 1.6
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.plot([low, high], [low, high], color=QUIET, lw=0.7, ls=":")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(base=2, numticks=7))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylabel("height", fontsize=8, color=QUIET)
