"""Time `data validate` beside Pillow decoding alone: `tatar-dist bench images`.

For 400 JPEGs of a megapixel, cut from the demo's photographs: validating a manifest with the pictures in its rows and
one with paths, `decode_image`, by which learners and engines read them, and the whole command. The limit is the same
bytes, in memory, decoded by Pillow in as many threads. All are measured in turns, so that a busy machine slows all.
Beyond that, validation hashes (4-9 % of decoding such a JPEG) and reads the file; the command adds the start of Python
and drawing, a second or so whatever the manifest's size, hence its larger manifest.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from tatar_dist.bench.harness import in_turns, ratio, result
from tatar_dist.data.checks.validate import look_at, validate
from tatar_dist.data.images import decode_image
from tatar_dist.data.writing import write_manifest
from tatar_dist.demo.data.photos import PHOTOS, load_photo

PICTURES, PIXELS, REPEATS = 400, 1_000_000, 5
COMMAND = 2000  # pictures of the whole command
TARGET = 0.8


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


def rows(pictures: list[bytes], directory: Path | None) -> Iterator[dict[str, Any]]:
    """Yield manifest rows with the bytes, or with paths of files written to `directory`."""
    for i, data in enumerate(pictures):
        row = {"sample_id": f"bench-{i}", "dataset": "bench", "task": "iqa", "score": i % 1000 / 10, "split": "train"}
        if directory is None:
            yield row | {"image_bytes": data}
        else:
            (directory / f"{i}.jpg").write_bytes(data)
            yield row | {"image": f"{i}.jpg"}


def decode(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as image:
        image.load()


def threads(work: Callable[[bytes], Any], pictures: list[bytes], workers: int) -> None:
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(work, pictures):
            pass


def _for_training(data: bytes) -> None:
    decode_image(data, "bench")


def _hash_and_decode(data: bytes) -> None:
    look_at(memoryview(data))


def processes(pictures: list[bytes], workers: int) -> None:
    """Do the same in spawned processes, which get the bytes through a pipe."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(_hash_and_decode, pictures, chunksize=4):
            pass


def command(manifest: Path) -> None:
    words = [sys.executable, "-m", "tatar_dist", "data", "validate", str(manifest), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr}")


def _beside(pillow: Callable[[], Any], ways: dict[str, Callable[[], Any]], rounds: int, n: int) -> dict[str, Any]:
    """Measure each way and Pillow alone in turns; ratio = seconds of Pillow alone / seconds."""
    times = dict(zip(("Pillow alone", *ways), in_turns(pillow, *ways.values(), rounds=rounds), strict=True))
    return {
        name: {
            "pictures": n,
            "seconds": median(taken),
            "pictures_per_second": n / median(taken),
            "ratio": ratio(times["Pillow alone"], taken),
        }
        for name, taken in times.items()
    }


def checks(directory: Path) -> dict[str, Any]:
    """Measure every way of reading pictures beside Pillow alone."""
    workers = len(os.sched_getaffinity(0))
    pictures = jpegs(PICTURES)
    embedded, files = (directory / f"{n}.parquet" for n in ("embedded", "files"))
    write_manifest(embedded, rows(pictures, None))
    write_manifest(files, rows(pictures, directory))
    ways = {
        "bytes in rows": lambda: validate([embedded], workers=workers),
        "files": lambda: validate([files], workers=workers),
        "decode_image": lambda: threads(_for_training, pictures, workers),
        "processes": lambda: processes(pictures, workers),
    }
    return _beside(lambda: threads(decode, pictures, workers), ways, REPEATS, PICTURES)


def slower(found: dict[str, Any]) -> str:
    """Return the slower kind of manifest in what `checks` found."""
    return min(("bytes in rows", "files"), key=lambda way: found[way]["ratio"]["median"])


def run() -> dict[str, Any]:
    """Measure everything."""
    workers = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as temporary:
        found, large = checks(Path(temporary)), Path(temporary) / "large.parquet"
        many = jpegs(COMMAND)
        write_manifest(large, rows(many, None))
        way = {"whole command": lambda: command(large)}
        whole = _beside(lambda: threads(decode, many, workers), way, 3, COMMAND)
    worst = slower(found)
    limit = "1: decoding, without reading, hashing and checks"
    return result("images", f"Pillow alone, {worst}", found[worst]["ratio"], TARGET, limit, ways=found, command=whole)
