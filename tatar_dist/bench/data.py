"""Time reading pictures, importing rows and starting a sampler: `tatar-dist bench data`.

The ratio is Pillow's seconds over those of `validate` for 400 JPEGs of a megapixel, from a manifest with the pictures
in its rows and from one with paths, of which the slower counts. Pillow decodes the same bytes, in memory, in as many
threads, in turns. Validation also hashes (4-9 % of decoding such a JPEG) and reads the file.

Imports and the sampler are whole processes, start of Python included, with a target for seconds (5 s an import; 2 s and
300 MiB a sampler). The limit of an import is parsing the file's text with csv or json; that of the sampler is importing
pyarrow and reading the footer. The manifest of ten million rows is written by `manifest_writer` in eight sets, as an
import writes it.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from tatar_dist.bench.harness import in_turns, ratio, result, seconds_of, timed
from tatar_dist.data.checks.validate import validate
from tatar_dist.data.writing import manifest_writer, write_manifest
from tatar_dist.demo.data.photos import PHOTOS, load_photo

PICTURES, PIXELS, TARGET = 400, 1_000_000, 0.8
ROWS, LARGE = 100_000, 10_000_000
IMPORT_TARGET, START_TARGET, MEMORY_TARGET = 5.0, 2.0, 300.0
ROUNDS, REPEATS = 5, 3
SAMPLER = """
import json, sys, time
began = time.perf_counter()
from tatar_dist.data.manifest import read_manifest
from tatar_dist.data.sampler import PromptSampler
sampler = PromptSampler([read_manifest(sys.argv[1])], seed=0)
batch = sampler.next_batch(128)
seconds = {"start": time.perf_counter() - began, "torch": "torch" in sys.modules}
began = time.perf_counter()
for m, row in batch:
    sampler.manifests[m].row(row)
seconds["row"] = (time.perf_counter() - began) / len(batch)
began = time.perf_counter()
for _ in range(1000):
    sampler.next_batch(128)
seconds["draw"] = (time.perf_counter() - began) / 128_000
print(json.dumps(seconds))
"""
FOOTER = "import sys, pyarrow.parquet as pq; pq.ParquetFile(sys.argv[1]).metadata"


def jpegs(n: int) -> list[bytes]:
    """Return n different JPEGs (by trailing bytes) of about a megapixel, quality 80 to 95."""
    kinds = []
    for photo in PHOTOS:
        image = load_photo(photo)
        factor = (PIXELS / (image.width * image.height)) ** 0.5
        image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)
        for quality in (80, 90, 95):
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality)
            kinds.append(buffer.getvalue())
    return [kinds[i % len(kinds)] + str(i).encode() for i in range(n)]


def validation(directory: Path) -> dict[str, Any]:
    """Measure validation by kind of manifest, beside Pillow alone."""
    workers, pictures = len(os.sched_getaffinity(0)), jpegs(PICTURES)
    embedded, files = directory / "embedded.parquet", directory / "files.parquet"
    same = {"dataset": "bench", "task": "iqa", "score": 50.0, "split": "train"}
    for i, data in enumerate(pictures):
        (directory / f"{i}.jpg").write_bytes(data)
    write_manifest(embedded, (same | {"sample_id": f"{i}", "image_bytes": p} for i, p in enumerate(pictures)))
    write_manifest(files, (same | {"sample_id": f"{i}", "image": f"{i}.jpg"} for i in range(PICTURES)))

    def pillow() -> None:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda data: Image.open(io.BytesIO(data)).load(), pictures))

    ways = {
        "Pillow alone": pillow,
        "bytes in rows": lambda: validate([embedded], workers=workers),
        "files": lambda: validate([files], workers=workers),
    }
    times = dict(zip(ways, in_turns(*ways.values(), rounds=ROUNDS), strict=True))
    return {
        way: {
            "seconds": median(seconds),
            "pictures_per_second": PICTURES / median(seconds),
            "ratio": ratio(times["Pillow alone"], seconds),
        }
        for way, seconds in times.items()
    }


def write_annotations(directory: Path) -> tuple[Path, Path, Path]:
    """Write ROWS annotations: AVA.txt (ten vote counts), TAD66K's CSV, a JSON list of gt_score."""
    rng = np.random.default_rng(0)
    ava, table, listed = (directory / name for name in ("AVA.txt", "train.csv", "list.json"))
    votes = rng.multinomial(210, np.ones(10) / 10, ROWS).tolist()
    scores = rng.uniform(0, 10, ROWS).round(4).tolist()
    lines = (f"{i} {900_000 + i} {' '.join(map(str, v))} 1 22 1396\n" for i, v in enumerate(votes, 1))
    ava.write_text("".join(lines))
    table.write_text("image,score\n" + "".join(f"{i}.jpg,{s}\n" for i, s in enumerate(scores)))
    listed.write_text(json.dumps([{"image": f"{i}.jpg", "gt_score": s} for i, s in enumerate(scores)]))
    return ava, table, listed


def write_large(file: Path, n: int = LARGE) -> None:
    """Write a manifest of n rows: eight sets, four of a task, paths instead of pictures."""
    rng, block = np.random.default_rng(0), 65_536
    with manifest_writer(file) as writer:
        for start in range(0, n, block):
            ids = pa.array(np.arange(start, min(start + block, n))).cast(pa.string())
            pool = start // block % 8
            same = {"dataset": f"set-{pool}", "task": ("iqa", "iaa")[pool % 2], "split": "train"}
            columns = {"sample_id": ids, "image": ids} | {name: pa.repeat(v, len(ids)) for name, v in same.items()}
            for name, most in (("score", 100), ("score_std", 20)):
                columns[name] = pa.array(rng.uniform(0, most, len(ids)))
            writer.write(pa.table(columns))


def _import(name: str, file: Path, images: Path | None, parse: Callable[[], Any]) -> dict[str, Any]:
    """Time `data import`; with `images` also looking for the files. `parse`: the limit."""
    words = ["-m", "tatar_dist", "data", "import", name, "--annotations", str(file), "--split", "train"]
    words += ["--images", str(images or file.parent), "--output", str(file.parent / "m.parquet")]
    words += [] if images else ["--no-check-images"]
    runs = [timed(words) for _ in range(REPEATS)]
    return {
        "what": f"{name}: {file.name}" + (f", {ROWS:,} files looked for" if images else ""),
        "seconds": [measured["seconds"] for measured, _ in runs],
        "limit_seconds": seconds_of(parse),
    }


def imports(directory: Path) -> list[dict[str, Any]]:
    """Measure the imports of three formats, and of one whose image files are looked for."""
    ava, table, listed = write_annotations(directory)
    images = directory / "images"
    images.mkdir()
    for i in range(ROWS):
        (images / f"{i}.jpg").touch()
    return [
        _import("AVA", ava, None, lambda: list(csv.reader(ava.read_text().splitlines(), delimiter=" "))),
        _import("TAD66K", table, None, lambda: list(csv.reader(table.read_text().splitlines()))),
        _import("TAD66K", listed, None, lambda: json.loads(listed.read_text())),
        _import("TAD66K", listed, images, lambda: json.loads(listed.read_text())),
    ]


def sampler(file: Path) -> dict[str, Any]:
    """Measure the first batch from LARGE rows, and the draws and rows after it."""
    write_large(file)
    starts = [timed(["-c", SAMPLER, str(file)]) for _ in range(REPEATS)]
    inside = [json.loads(output) for _, output in starts]
    return {
        "start_seconds": [run["start"] for run in inside],
        "peak_mib": max(measured["peak_mib"] for measured, _ in starts),
        "limit_seconds": min(timed(["-c", FOOTER, str(file)])[0]["seconds"] for _ in range(REPEATS)),
        "row_seconds": inside[0]["row"],
        "draw_seconds": inside[0]["draw"],
        "torch_imported": inside[0]["torch"],
    }


def run() -> dict[str, Any]:
    """Measure everything; each whole process runs three times."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        validated, imported = validation(directory), imports(directory)
        started = sampler(directory / "large.parquet")
    slower = min(("bytes in rows", "files"), key=lambda way: validated[way]["ratio"]["median"])
    others_met = (
        max(max(row["seconds"]) for row in imported) < IMPORT_TARGET
        and max(started["start_seconds"]) < START_TARGET
        and started["peak_mib"] < MEMORY_TARGET
        and not started["torch_imported"]
    )
    return result(
        "data",
        f"Pillow alone, {slower}",
        validated[slower]["ratio"],
        TARGET,
        "1: decoding, without reading, hashing and checks",
        others_met,
        pictures=validated,
        imports=imported,
        sampler=started,
        targets={"import_seconds": IMPORT_TARGET, "start_seconds": START_TARGET, "peak_mib": MEMORY_TARGET},
    )
