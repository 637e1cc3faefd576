"""`tatar-dist bench data`: reading pictures, importing 100,000 rows, and starting a sampler on 10 million.

In: nothing. Out: how fast pictures are validated (the slower of two kinds of manifest; hashing and checks included) as
a share of Pillow decoding alone (images.py); seconds and peak memory of whole processes, start of Python included,
beside their targets (5 s an import; 2 s and 300 MiB a sampler). The limit of an import is what reading the file's text
takes (csv or json alone); that of the sampler is importing pyarrow and reading the footer. The manifest of ten million
rows is written here by `ManifestWriter`, eight sets, as an import writes it.
"""

from __future__ import annotations

import csv
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from tatar_dist.bench import images
from tatar_dist.bench.harness import result, summary
from tatar_dist.bench.process import timed

ROWS, LARGE = 100_000, 10_000_000
IMPORT_TARGET, START_TARGET, MEMORY_TARGET = 5.0, 2.0, 300.0
REPEATS = 3
SAMPLER = """
import json, sys, time
began = time.perf_counter()
from tatar_dist.data.manifest import read_manifest
from tatar_dist.data.sampler import PromptSampler
sampler = PromptSampler([read_manifest(sys.argv[1])], seed=0)
batch = sampler.next_batch(128)
found = {"start": time.perf_counter() - began, "torch": "torch" in sys.modules}
began = time.perf_counter()
for m, row in batch:
    sampler.manifests[m].row(row)
found["row"] = (time.perf_counter() - began) / len(batch)
began = time.perf_counter()
for _ in range(1000):
    sampler.next_batch(128)
found["draw"] = (time.perf_counter() - began) / 128_000
print(json.dumps(found))
"""
FOOTER = "import sys, pyarrow.parquet as pq; pq.ParquetFile(sys.argv[1]).metadata"


def write_ava(file: Path, n: int = ROWS) -> None:
    """n lines like those of AVA.txt: index, image id, ten vote counts, two tags, challenge."""
    rng = np.random.default_rng(0)
    votes = rng.multinomial(210, np.ones(10) / 10, n)
    with file.open("w") as f:
        f.writelines(f"{i} {900_000 + i} {' '.join(map(str, v))} 1 22 1396\n" for i, v in enumerate(votes.tolist(), 1))


def write_list(file: Path, n: int = ROWS) -> None:
    """The same number of images as a JSON list of image and gt_score."""
    scores = np.random.default_rng(0).uniform(0, 10, n).round(4).tolist()
    file.write_text(json.dumps([{"image": f"{i}.jpg", "gt_score": s} for i, s in enumerate(scores)]))


def write_csv(file: Path, n: int = ROWS) -> None:
    """The same number of images as TAD66K's CSV."""
    scores = np.random.default_rng(0).uniform(0, 10, n).round(4).tolist()
    file.write_text("image,score\n" + "".join(f"{i}.jpg,{s}\n" for i, s in enumerate(scores)))


def write_large(file: Path, n: int = LARGE) -> None:
    """A manifest of n rows: eight sets, four of a task, paths instead of pictures."""
    from tatar_dist.data.writing import ManifestWriter

    rng, block = np.random.default_rng(0), 65_536
    with ManifestWriter(file) as writer:
        for start in range(0, n, block):
            ids = pa.array(np.arange(start, min(start + block, n))).cast(pa.string())
            pool = start // block % 8
            columns = {
                "sample_id": ids,
                "image": ids,
                "score": pa.array(rng.uniform(0, 100, len(ids))),
                "score_std": pa.array(rng.uniform(0, 20, len(ids))),
            }
            words = {"dataset": f"set-{pool}", "task": ("iqa", "iaa")[pool % 2], "split": "train"}
            same = {name: pa.repeat(word, len(ids)) for name, word in words.items()}
            writer.write(pa.table(columns | same))


def _csv_alone(file: Path) -> None:
    with file.open() as f:
        for _ in csv.reader(f, delimiter="," if file.suffix == ".csv" else " "):
            pass


def _import(directory: Path, name: str, file: Path, images: Path | None, alone: Callable[[], Any]) -> dict[str, Any]:
    words = ["-m", "tatar_dist", "data", "import", name, "--annotations", str(file), "--split", "train"]
    words += ["--images", str(images or directory), "--output", str(directory / "m.parquet"), "--json"]
    words += [] if images else ["--no-check-images"]
    runs = [timed(words) for _ in range(REPEATS)]
    kept = json.loads(runs[0][1])["kept"]
    start = time.perf_counter()
    alone()
    limit = time.perf_counter() - start
    what = f"{name}: {file.name}" + (f", {ROWS:,} files looked for" if images else "")
    seconds = sorted(r["seconds"] for r, _ in runs)
    peak = max(r["peak_mib"] for r, _ in runs)
    return {"what": what, "kept": kept, "seconds": seconds, "peak_mib": peak, "limit_seconds": limit}


def run() -> dict[str, Any]:
    """All measurements, as what `--json` prints. Each whole process runs three times."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        pictures = images.checks(directory)
        ava, lines, table = directory / "AVA.txt", directory / "list.json", directory / "train.csv"
        write_ava(ava), write_list(lines), write_csv(table)
        empty = directory / "images"
        empty.mkdir()
        for i in range(ROWS):
            (empty / f"{i}.jpg").touch()
        imports = [
            _import(directory, "AVA", ava, None, lambda: _csv_alone(ava)),
            _import(directory, "TAD66K", table, None, lambda: _csv_alone(table)),
            _import(directory, "TAD66K", lines, None, lambda: json.loads(lines.read_text())),
            _import(directory, "TAD66K", lines, empty, lambda: json.loads(lines.read_text())),
        ]
        large = directory / "large.parquet"
        start = time.perf_counter()
        write_large(large)
        written = time.perf_counter() - start
        starts = [timed(["-c", SAMPLER, str(large)]) for _ in range(REPEATS)]
        footer = min(timed(["-c", FOOTER, str(large)])[0]["seconds"] for _ in range(REPEATS))
        inside = json.loads(starts[0][1])
        size = large.stat().st_size
    seconds = sorted(json.loads(said)["start"] for _, said in starts)
    peak = max(m["peak_mib"] for m, _ in starts)
    slowest = max(i["seconds"][-1] for i in imports)
    met = slowest < IMPORT_TARGET and seconds[-1] < START_TARGET and peak < MEMORY_TARGET and not inside["torch"]
    slower = min(("bytes in rows", "files"), key=lambda way: pictures["checks"][way]["ratio"]["median"])
    return result(
        "data",
        f"Pillow alone, {slower}",
        pictures["checks"][slower]["ratio"],
        images.TARGET,
        "1: decoding, without reading, hashing and checks",
        pictures=pictures,
        imports=imports,
        sampler={
            "rows": LARGE,
            "bytes": size,
            "write_seconds": written,
            "start_seconds": seconds,
            "peak_mib": peak,
            "limit_seconds": footer,
            "row_seconds": inside["row"],
            "draw_seconds": inside["draw"],
            "torch_imported": inside["torch"],
        },
        targets={"import_s": IMPORT_TARGET, "start_s": START_TARGET, "peak_mib": MEMORY_TARGET, "met": met},
    )


def print_table(found: dict[str, Any]) -> None:
    """The measurements beside limit and target."""
    images.print_table(found["pictures"])
    console = Console(soft_wrap=True)
    table = Table(title=f"data import of {ROWS:,} rows, the whole command", title_justify="left")
    for column in ("annotations", "median", "slowest", "text alone", "peak"):
        table.add_column(column, justify="left" if column == "annotations" else "right")
    for i in found["imports"]:
        low, median, high = i["seconds"]
        table.add_row(
            i["what"], f"{median:.2f} s", f"{high:.2f} s", f"{i['limit_seconds']:.2f} s", f"{i['peak_mib']:.0f} MiB"
        )
    console.print(table)
    s = found["sampler"]
    console.print(
        f"A sampler on {s['rows']:,} rows ({s['bytes'] / 1e6:.0f} MB, written in {s['write_seconds']:.0f} s) gives "
        f"its first batch after {s['start_seconds'][1]:.2f} s, {s['peak_mib']:.0f} MiB at most; "
        f"a process that only reads the footer takes {s['limit_seconds']:.2f} s."
    )
    console.print(
        f"Then {1e6 * s['draw_seconds']:.1f} µs to draw a row, {1e3 * s['row_seconds']:.1f} ms to read one at random."
    )
    t = found["targets"]
    console.print(
        f"Targets: an import under {t['import_s']:g} s, a start under {t['start_s']:g} s and {t['peak_mib']:g} MiB, "
        f"no torch: {'met' if t['met'] else '[red]not met[/red]'}."
    )
    console.print(summary(found))
