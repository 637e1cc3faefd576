"""What the tests of the report build: small runs on disk, and the page that the report makes of them, parsed."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tatar_dist.data.writing import write_manifest
from tatar_dist.report.html import write

SCRIPT = "<script>alert(1)</script>"
BREAKOUT = '"><img src=x onerror=alert(2)>'
HOSTILE = SCRIPT + BREAKOUT + "' onmouseover=alert(3) {{ 7 * 7 }}</style></details>"
EXECUTING = {"script", "iframe", "object", "embed", "link", "base", "form", "input", "foreignobject", "use", "image"}
FETCHING = {"src", "href", "xlink:href", "srcset", "action", "poster", "data", "background", "formaction"}


class Page(HTMLParser):
    """Every tag with its attributes, and the text outside <style>, as a browser would read them."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.styles, self.texts, self._open = "", [], []
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data):
        if self._open and self._open[-1] == "style":
            self.styles += data
        else:
            self.texts.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag]

    @property
    def sections(self) -> list[str]:
        return re.findall(r"<h2>(.*?)</h2>", self.source)

    @property
    def notes(self) -> list[str]:
        return re.findall(r"<p>Left out: (.*?)</p>", self.source)


def assert_safe(page: Page) -> None:
    """Nothing that runs, nothing that loads."""
    for tag, attributes in page.tags:
        assert tag not in EXECUTING, tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            anchor = (tag, name) == ("a", "href") and value.startswith("#")
            assert name not in FETCHING or anchor or value.startswith("data:image/"), (tag, name, value)
            assert "javascript:" not in (value or "").lower()
    css = page.styles + " ".join(a.get("style") or "" for _, a in page.tags)
    assert "url(" not in css and "@import" not in css
    policy = next(a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script-src" not in policy


def report(directory: Path) -> Page:
    file = write(directory)
    assert file == directory / "report.html"
    page = Page(file)
    assert_safe(page)
    return page


def png(color: tuple[int, int, int] = (10, 200, 30)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(out, "PNG")
    return out.getvalue()


def lines(directory: Path, rows: list[dict], name: str = "metrics.jsonl") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return directory


def sft_rows(n: int = 12) -> list[dict]:
    rows = [{"step": i, "loss/total": 2.0 - 0.1 * i, "optim/grad_norm": 1.0, "time/step": 0.5} for i in range(n)]
    for i in (5, 11):
        rows[min(i, n - 1)] |= {"eval/loss/iqa": 1.5 - 0.05 * i, "eval/loss/iaa": 1.7 - 0.05 * i}
    return rows


def grpo_rows(n: int = 10) -> list[dict]:
    return [
        {
            "step": i,
            "reward/total/iqa": 1.0 + 0.1 * i,
            "reward/gaussian/iqa": 0.3 + 0.05 * i,
            "reward/total/iaa": 1.2,
            "reward/thurstone/iaa": 0.5,
            "reward/frac_zero_std/total/iqa": 0.1,
            "completion/tokens/iqa": 40.0,
            "completion/parse_failures/iqa": 0.0,
            "loss/kl": 0.001 * i,
            "loss/total": 0.0,
            "policy/entropy": 1.0,
            "optim/grad_norm": 0.4,
            "sync/logprob_gap": 1e-7,
            "time/step": 4.0,
            "time/generate": 3.0,
            "time/learn": 0.9,
        }
        for i in range(n)
    ]


def rollouts(directory: Path, rows: list[dict], step: int = 9) -> None:
    (directory / "rollouts").mkdir(parents=True, exist_ok=True)
    base = {"step": step, "index": 0, "dataset": "set-iqa", "task": "iqa", "target": 50.0, "reward": 1.0}
    pq.write_table(pa.Table.from_pylist([base | r for r in rows]), directory / "rollouts" / f"step_{step:06d}.parquet")


def predictions(
    n: int = 10, dataset: str = "set-iqa", task: str = "iqa", prefix: str = "", off: float = 3.0
) -> list[dict]:
    return [
        {
            "sample_id": f"{prefix}{i}",
            "dataset": dataset,
            "task": task,
            "source": f"photo_{i % 2}",
            "target": 10.0 * i,
            "prediction": min(100.0, 10.0 * i + off),
            "completion": f"<think>view number {i} of {dataset}</think><answer>{10 * i + off}</answer>",
            "truncated": False,
        }
        for i in range(n)
    ]


def scores(srcc: float | None = 0.9, **changes) -> dict:
    return {"n": 10, "n_parsed": 10, "srcc": srcc, "plcc": 0.8, "mae": 3.0, "reason": {}} | changes


def evaluation(directory: Path, datasets: dict[str, dict], rows: list[dict] | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.json").write_text(json.dumps({"model": "m", "datasets": datasets}))
    if rows is not None:
        pq.write_table(pa.Table.from_pylist(rows), directory / "predictions.parquet")
    return directory


def demo(directory: Path) -> Path:
    """A finished demo: three evaluations, two trainings, stages and gains."""
    lines(directory / "sft", sft_rows())
    lines(directory / "grpo", grpo_rows())
    for name, srcc, off in (("baseline", None, 40.0), ("sft_eval", 0.7, 20.0), ("grpo_eval", 0.9, 3.0)):
        rows = predictions(16, "demo-iqa", "iqa", "q", off) + predictions(16, "demo-iaa", "iaa", "a", off)
        evaluation(directory / name, {"demo-iqa": scores(srcc), "demo-iaa": scores(srcc)}, rows)
    pictures = [
        {
            "sample_id": f"q{i}",
            "dataset": "demo-iqa",
            "task": "iqa",
            "image_bytes": png(),
            "score": 10.0,
            "split": "test",
        }
        for i in range(16)
    ]
    (directory / "data").mkdir()
    write_manifest(directory / "data" / "iqa_test.parquet", pictures)
    summary = {
        "stages": [
            {"name": "sft", "seconds": 70.0, "budget_seconds": 60.0, "reused": False},
            {"name": "grpo_eval", "seconds": 0.0, "budget_seconds": 30.0, "reused": True},
        ],
        "gains": {"iqa": {"srcc": [0.2, 0.1, 0.3], "reward_gaussian": [0.01, -0.1, 0.12]}},
        "table": [],
    }
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def one_row_manifest(directory: Path, sample_id: str) -> Path:
    """A manifest of one IQA image."""
    path = directory / "train.parquet"
    row = {"sample_id": sample_id, "dataset": "set-iqa", "task": "iqa", "image_bytes": png(), "score": 50.0}
    write_manifest(path, [{**row, "split": "train"}])
    return path
