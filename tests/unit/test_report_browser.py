"""The report and the comparison in headless Chromium: nothing complains, nothing is fetched, a phone shows all of it;
screenshots stay in build/report."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import Browser
from report_pages import demo, evaluation, grpo_rows, lines, predictions, scores

from tatar_dist.report import compare
from tatar_dist.report.html import write

SHOTS = Path(__file__).parents[2] / "build" / "report"
SCREENS = {"light": (1200, 900, False), "dark": (1200, 900, True), "phone": (390, 844, False)}


def pages(place: Path) -> dict[str, Path]:
    grpo = lines(place / "grpo", grpo_rows())
    runs = [
        evaluation(place / name, {"set-iqa": scores(srcc)}, predictions(off=off))
        for name, srcc, off in (("a", 0.7, 20.0), ("b", 0.9, 3.0))
    ]
    return {
        "demo": write(demo(place / "demo")),
        "grpo": write(grpo),
        "comparison": compare.write(runs, place / "both.html"),
    }


@pytest.mark.browser
def test_pages_are_quiet_and_fit_every_screen(tmp_path):
    found = pages(tmp_path)
    with Browser(tmp_path / "profile") as page:
        for name, file in found.items():
            page.open(file.absolute().as_uri())
            assert page.text("h1")
            page.value("document.querySelectorAll('details').forEach(d => d.open = true)")
            for screen, (width, height, dark) in SCREENS.items():
                page.look(width, height, dark)
                assert page.value("document.documentElement.scrollWidth <= innerWidth"), (name, screen)
                cut = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)"
                shaded = f"{cut}.every(e => getComputedStyle(e).backgroundAttachment.includes('local'))"
                assert page.value(shaded), "a table is cut without a sign that it scrolls"
                assert not page.value(f"{cut}.some(e => e.closest('.answer'))"), (name, screen)
                page.screenshot(SHOTS / f"{name}-{screen}.png")
            grounds = []
            for dark in (False, True):
                page.look(1200, 900, dark)
                grounds.append(page.value("getComputedStyle(document.body).backgroundColor"))
            assert grounds[0] != grounds[1], name
            fetched = "performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith('data:'))"
            assert page.value(fetched) == [], name
            pictures = "[...document.images].map(i => { i.loading = 'eager'; return i.decode() })"
            page.value(f"Promise.all({pictures}).then(() => true)")  # rejects with what is no picture
        assert page.complaints == []
