"""`tatar-dist bench images`: how fast `data validate` is, beside Pillow decoding alone.

In: nothing. Out: for 400 JPEGs of a megapixel, cut from the demo's photographs, the seconds of validating a manifest
with the pictures in its rows and one with paths, of `decode_image`, by which learners and engines read them, and of the
whole command. The limit: the same bytes, in memory, decoded by Pillow in as many threads, and nothing else. Both are
measured in turn, so that a busy machine slows both. `bench data` has all of it but the whole command.

What validation cannot avoid beyond that is hashing (blake2b reads a gigabyte a second or so: 4-9 % of decoding such a
JPEG) and reading the file. The command adds the start of Python and drawing, a second or so whatever the manifest's
size, hence the larger manifest.
"""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from tatar_dist.data.checks.validate import look_at, validate
from tatar_dist.data.images import decode_image
from tatar_dist.data.writing import write_manifest
from tatar_dist.demo.data.photos import PHOTOS, load_photo

PICTURES, PIXELS, REPEATS = 400, 1_000_000, 5
COMMAND = 2000  # pictures of the whole command
TARGET = 0.8


def jpegs(n: int) -> list[bytes]:
    """n different JPEGs (a comment behind the picture makes them so) of about a megapixel, quality 80 to 95."""
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
    """Manifest rows with the bytes, or with paths of files written to `directory`."""
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
    """The other way: spawned processes, which get the bytes through a pipe."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(_hash_and_decode, pictures, chunksize=4):
            pass


def seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall-clock and processor seconds, those of child processes included."""

    def processor() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in usages)

    start, spent = time.perf_counter(), processor()
    work()
    return time.perf_counter() - start, processor() - spent


def command(manifest: Path) -> None:
    words = [sys.executable, "-m", "tatar_dist", "data", "validate", str(manifest), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr}")


def _ratios(limit: Callable[[], Any], ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Seconds of the limit and of each way, measured in turn, and limit / way of the same turn.

    `ratio` is of wall-clock time. `processor_ratio` is of processor time: it holds on a machine that others use, too.
    """
    limit()  # files into the page cache, plugins loaded
    times: dict[str, list[tuple[float, float]]] = {"pillow": [], **{k: [] for k in ways}}
    for _ in range(repeats):
        times["pillow"].append(seconds(limit))
        for name, way in ways.items():
            times[name].append(seconds(way))
    found: dict[str, Any] = {}
    for name, taken in times.items():
        found[name] = {"seconds": median(wall for wall, _ in taken)}
        for which, key in enumerate(("ratio", "processor_ratio")):
            ratio = [p[which] / t[which] for p, t in zip(times["pillow"], taken, strict=True)]
            found[name][key] = {"min": min(ratio), "median": median(ratio), "max": max(ratio)}
    return found


def checks(directory: Path) -> dict[str, Any]:
    """Every way beside Pillow alone; ratio = seconds of Pillow alone / seconds, 1 is the limit."""
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
    found = _ratios(lambda: threads(decode, pictures, workers), ways, REPEATS)
    return {
        "workers": workers,
        "target": TARGET,
        "bytes_per_picture": round(sum(map(len, pictures)) / PICTURES),
        "checks": {"pictures": PICTURES, **found},
    }


def run() -> dict[str, Any]:
    """All measurements, as what `--json` prints."""
    with tempfile.TemporaryDirectory() as temporary:
        found, large = checks(Path(temporary)), Path(temporary) / "large.parquet"
        many = jpegs(COMMAND)
        write_manifest(large, rows(many, None))
        pillow = lambda: threads(decode, many, found["workers"])  # noqa: E731
        whole = _ratios(pillow, {"whole command": lambda: command(large)}, 3)
    return found | {"command": {"pictures": COMMAND, **whole}}


def _spread(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})"


def print_table(found: dict[str, Any]) -> None:
    """The measurements beside their limit."""
    console = Console()
    size = f"{found['bytes_per_picture'] / 1000:.0f} kB"
    table = Table(
        title=f"data validate, JPEGs of a megapixel ({size}), {found['workers']} threads", title_justify="left"
    )
    for name in ("", "pictures", "a second", "of the limit", "processor time"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for part in (p for p in ("checks", "command") if p in found):
        n = found[part]["pictures"]
        for way, m in ((w, m) for w, m in found[part].items() if w != "pictures"):
            shown = [_spread(m[k]) if way != "pillow" else "1" for k in ("ratio", "processor_ratio")]
            label = "Pillow alone" if way == "pillow" else way
            table.add_row(label, f"{n:,}", f"{n / m['seconds']:,.0f}", *shown)
    console.print(table)
    console.print(f"Of the limit: Pillow's time / time, median (least–greatest); target {found['target']}.")
    console.print("Processor: the same of processor time. Beyond decoding: reading, a blake2b hash, the checks.")
