"""Time reading pictures, importing rows and starting a sampler: `tatar-dist bench data`.

Pictures are validated from two kinds of manifest; the ratio is the slower one's share of Pillow decoding alone
(images.py). Imports and the sampler are whole processes, start of Python included, with a target for seconds (5 s an
import; 2 s and 300 MiB a sampler). The limit of an import is parsing the file's text with csv or json; that of the
sampler is importing pyarrow and reading the footer. The manifest of ten million rows is written by `ManifestWriter` in
eight sets, as an import writes it.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tatar_dist.bench import images
from tatar_dist.bench.harness import result, seconds_of
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
    """Write n lines like AVA.txt: index, image id, ten vote counts, two tags, challenge."""
    rng = np.random.default_rng(0)
    votes = rng.multinomial(210, np.ones(10) / 10, n)
    with file.open("w") as f:
        f.writelines(f"{i} {900_000 + i} {' '.join(map(str, v))} 1 22 1396\n" for i, v in enumerate(votes.tolist(), 1))


def write_list(file: Path, n: int = ROWS) -> None:
    """Write as many images as a JSON list of image and gt_score."""
    scores = np.random.default_rng(0).uniform(0, 10, n).round(4).tolist()
    file.write_text(json.dumps([{"image": f"{i}.jpg", "gt_score": s} for i, s in enumerate(scores)]))


def write_csv(file: Path, n: int = ROWS) -> None:
    """Write as many images as TAD66K's CSV."""
    scores = np.random.default_rng(0).uniform(0, 10, n).round(4).tolist()
    file.write_text("image,score\n" + "".join(f"{i}.jpg,{s}\n" for i, s in enumerate(scores)))


def write_large(file: Path, n: int = LARGE) -> None:
    """Write a manifest of n rows: eight sets, four of a task, paths instead of pictures."""
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
    limit = seconds_of(alone)
    what = f"{name}: {file.name}" + (f", {ROWS:,} files looked for" if images else "")
    seconds = sorted(r["seconds"] for r, _ in runs)
    peak = max(r["peak_mib"] for r, _ in runs)
    return {"what": what, "kept": kept, "seconds": seconds, "peak_mib": peak, "limit_seconds": limit}


def run() -> dict[str, Any]:
    """Measure everything; each whole process runs three times."""
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
        written = seconds_of(lambda: write_large(large))
        starts = [timed(["-c", SAMPLER, str(large)]) for _ in range(REPEATS)]
        footer = min(timed(["-c", FOOTER, str(large)])[0]["seconds"] for _ in range(REPEATS))
        inside = json.loads(starts[0][1])
        size = large.stat().st_size
    seconds = sorted(json.loads(said)["start"] for _, said in starts)
    peak = max(m["peak_mib"] for m, _ in starts)
    slowest = max(i["seconds"][-1] for i in imports)
    met = slowest < IMPORT_TARGET and seconds[-1] < START_TARGET and peak < MEMORY_TARGET and not inside["torch"]
    slower = images.slower(pictures)
    return result(
        "data",
        f"Pillow alone, {slower}",
        pictures[slower]["ratio"],
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
        targets={"import_seconds": IMPORT_TARGET, "start_seconds": START_TARGET, "peak_mib": MEMORY_TARGET, "met": met},
    )
