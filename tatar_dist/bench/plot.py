"""Draw how a packed update grows: `tatar-dist bench learner --plot FILE.svg`.

The SVG has 2 x 4 panels: seconds and GiB along groups, image tokens, completion tokens and vocabulary. Dots are
measured. The lines are counted (subject.py): FLOPs at the rate of the update that the bench compares, and peak bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

MEASURED, COUNTED, INK, FAINT = "#2b6cb0", "#c05621", "#2d3748", "#e2e8f0"
PATCH = 28  # pixels along an image token
TITLES = {
    "groups": ("groups", "1,024 image tokens, 64 a completion"),
    "image": ("image tokens", "64 tokens a completion"),
    "tokens": ("completion tokens", "1,024 image tokens"),
    "vocab": ("vocabulary", "256 image tokens, 64 a completion"),
}


def series(result: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Return x, seconds and GiB by axis, measured and counted."""
    first = result["growth"]["groups"][0]  # the update that is compared with the per-row one
    rate = first["gflops"] / first["seconds"]
    return {
        name: {
            "x": [(w["pixels"] // PATCH) ** 2 if name == "image" else w[name] for w in works],
            "seconds": [w["seconds"] for w in works],
            "counted seconds": [w["gflops"] / rate for w in works],
            "GiB": [w["mib"] / 1024 for w in works],
            "counted GiB": [w["counted_mib"] / 1024 for w in works],
        }
        for name, works in result["growth"].items()
    }


def draw(result: dict[str, Any], file: Path) -> None:
    """Write the SVG; the same figures give the same file."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "bench"
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 4, figsize=(11, 5.6), sharey="row")
    for column, (name, values) in enumerate(series(result).items()):
        title, held = TITLES[name]
        panels[0, column].set_title(f"along {title}\n{held}", fontsize=9, loc="left", color=INK)
        panels[1, column].set_xlabel(title, fontsize=9, color=INK)
        for axes, unit in zip(panels[:, column], ("seconds", "GiB"), strict=True):
            axes.plot(values["x"], values[f"counted {unit}"], color=COUNTED, linewidth=1.8, label="counted")
            axes.plot(values["x"], values[unit], "o", color=MEASURED, markersize=6.5, label="measured", clip_on=False)
            axes.set_xticks(values["x"], [f"{x:,}" if x < 4096 else f"{x // 1024}k" for x in values["x"]])
            axes.set(xlim=(0, 1.08 * max(values["x"])), ylim=(0, None), axisbelow=True)
            axes.grid(axis="y", color=FAINT, linewidth=0.8)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(labelsize=8.5, colors=INK, length=0)
    panels[0, 0].set_ylabel("seconds an update", fontsize=9, color=INK)
    panels[1, 0].set_ylabel("peak above the model, GiB", fontsize=9, color=INK)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="lower right", ncols=2, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.055, 1, 1))
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
