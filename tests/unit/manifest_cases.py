"""Manifests for the tests of `data validate`: rows with real pictures, and files as other programs write them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tatar_dist.data.manifest import SCHEMA
from tatar_dist.data.writing import write_manifest


def picture(colour: int = 0, kind: str = "PNG", size: tuple[int, int] = (32, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (colour % 256, colour // 256, 99)).save(buffer, kind)
    return buffer.getvalue()


def row(i: int, **changes) -> dict:
    base = {"sample_id": f"s{i}", "dataset": "d", "task": "iqa", "image_bytes": picture(i), "score": float(i % 101)}
    return base | {"split": "train"} | changes


def written(path: Path, rows: list[dict]) -> Path:
    write_manifest(path, rows)
    return path


def raw(path: Path, rows: list[dict]) -> Path:
    """A manifest as another program may write it, without our writer's checks."""
    columns = {n: [r.get(n) for r in rows] for n in SCHEMA.names}
    pq.write_table(pa.table(columns, schema=SCHEMA), path, row_group_size=7)
    return path


def problems(path: Path) -> list[tuple]:
    lines = path.with_name(f"{path.stem}.problems.jsonl").read_text().splitlines()
    return [(p["row"], p["code"]) for p in map(json.loads, lines)]


def codes(path: Path) -> set[str]:
    return {code for _, code in problems(path)}
