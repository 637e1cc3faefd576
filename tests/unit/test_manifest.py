"""Manifests: what is written is read back, and every fault is named by file, row and column."""

from __future__ import annotations

import io
import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tatar_dist.data import writing
from tatar_dist.data.images import UnreadableImage, decode_image
from tatar_dist.data.manifest import read_manifest
from tatar_dist.data.schema import SCHEMA
from tatar_dist.data.writing import write_manifest
from tatar_dist.errors import UserError


def picture(kind: str = "PNG", size: tuple[int, int] = (4, 3), **save) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (10, 200, 30)).save(buffer, kind, **save)
    return buffer.getvalue()


def row(i: int = 0, **changes) -> dict:
    base = {"sample_id": f"s{i}", "dataset": "d", "task": "iqa", "image_bytes": picture(), "score": float(i % 100)}
    return base | {"split": "train", "rationale": f"text {i}", "meta": {"photo": "p", "n": i}} | changes


def written(path, rows, **kwargs):
    write_manifest(path, rows, **kwargs)
    return path


def test_what_is_written_is_read_back_from_any_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "EMBEDDED_ROWS", 4)
    path = written(tmp_path / "m.parquet", (row(i) for i in range(25)))
    assert pq.ParquetFile(path).metadata.num_row_groups == 7
    manifest = read_manifest(path)
    assert len(manifest) == 25 and [(p.dataset, p.task, p.split, p.rows) for p in manifest.pools] == [
        ("d", "iqa", "train", 25)
    ]
    for i in (24, 0, 13, 12, 3, 4):
        sample = manifest.get(i)
        assert (sample.sample_id, sample.score, sample.rationale) == (f"s{i}", float(i), f"text {i}")
        assert sample.meta == {"photo": "p", "n": i} and sample.image == picture()
    with pytest.raises(IndexError):
        manifest.get(25)


def test_row_groups_hold_at_most_256_rows_and_the_contract_columns(tmp_path):
    file = pq.ParquetFile(written(tmp_path / "m.parquet", (row(i, image_bytes=b"x") for i in range(600))))
    assert [file.metadata.row_group(g).num_rows for g in range(3)] == [256, 256, 88]
    contract = "sample_id dataset task image image_bytes score score_raw score_std split rationale attributes meta"
    assert file.schema_arrow.names == contract.split() == SCHEMA.names


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path):
    path = written(tmp_path / "m.parquet", [row(1)])

    def broken():
        yield row(2)
        raise RuntimeError("source failed")

    with pytest.raises(RuntimeError):
        write_manifest(path, broken())
    assert len(read_manifest(path)) == 1 and read_manifest(path).sample_id(0) == "s1"
    assert list(tmp_path.iterdir()) == [path]


def test_an_unknown_column_is_refused_when_writing(tmp_path):
    with pytest.raises(KeyError, match="scroe"):
        write_manifest(tmp_path / "m.parquet", [row(scroe=3)])


def test_a_manifest_survives_pickling_after_it_was_read_from(tmp_path):
    manifest = read_manifest(written(tmp_path / "m.parquet", [row(0), row(1)]))
    manifest.get(0)
    assert pickle.loads(pickle.dumps(manifest)).get(1).sample_id == "s1"


def test_an_image_path_is_read_relative_to_the_manifest(tmp_path):
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "a.png").write_bytes(b"bytes of a")
    path = written(tmp_path / "m.parquet", [row(0, image_bytes=None, image="pics/a.png")])
    assert read_manifest(path).get(0).image == b"bytes of a"


@pytest.mark.parametrize("name", ["../secret.png", "pics/../../secret.png", "/etc/hostname"])
def test_an_image_path_cannot_leave_the_manifests_directory(tmp_path, name):
    (tmp_path / "secret.png").write_bytes(b"secret")
    path = written(tmp_path / "set" / "m.parquet", [row(0, image_bytes=None, image=name)])
    with pytest.raises(UserError, match="m.parquet: row 0, column image: .* leads outside"):
        read_manifest(path).get(0)


def test_a_missing_picture_is_named_by_row(tmp_path):
    path = written(tmp_path / "m.parquet", [row(0), row(1, image_bytes=None, image="no.png"), row(2, image_bytes=None)])
    manifest = read_manifest(path)
    with pytest.raises(UnreadableImage, match="row 1, column image: 'no.png': No such file"):
        manifest.get(1)
    with pytest.raises(UserError, match="row 2, column image: neither"):
        manifest.get(2)


def test_a_missing_file_and_a_file_that_is_not_parquet_are_named(tmp_path):
    with pytest.raises(UserError, match="none.parquet: no such manifest"):
        read_manifest(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("sample_id,score\n")
    with pytest.raises(UserError, match="text.parquet: not a Parquet file"):
        read_manifest(tmp_path / "text.parquet")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "ixa"}, "row 1, column task: 'ixa'"),
        ({"score": float("nan")}, "row 1, column score: nan"),
        ({"score": 100.5}, "row 1, column score: 100.5"),
        ({"score": -0.1}, "row 1, column score: -0.1"),
        ({"score": None}, "row 1, column score: no value"),
        ({"sample_id": "s0"}, "row 1, column sample_id: 's0' was used in row 0"),
        ({"dataset": None}, "row 1, column dataset: no value"),
        ({"dataset": ""}, "row 1, column dataset: is empty"),
        ({"sample_id": ""}, "row 1, column sample_id: is empty"),
        ({"split": "training"}, "row 1, column split: 'training' is none of train, validation, test"),
    ],
)
def test_a_bad_row_is_named_by_file_row_and_column_when_read_and_refused_when_written(tmp_path, changes, message):
    rows = [row(0), row(1, **changes)]
    columns = {n: [r.get(n) for r in rows] for n in ("sample_id", "dataset", "task", "score", "split", "image_bytes")}
    pq.write_table(pa.table(columns), tmp_path / "bad.parquet")
    with pytest.raises(UserError, match=f"bad.parquet: {message}"):
        read_manifest(tmp_path / "bad.parquet")
    with pytest.raises(UserError, match="new.parquet: .*column"):
        written(tmp_path / "new.parquet", rows)
    assert not (tmp_path / "new.parquet").exists()


def table_of(**changes) -> pa.Table:
    columns = {"sample_id": ["a"], "dataset": ["d"], "task": ["iqa"], "image_bytes": [b"x"], "score": [1.0]}
    columns |= {"split": ["train"]}
    return pa.table({k: v for k, v in (columns | changes).items() if v is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": None}, "column task is missing"),
        ({"image_bytes": None}, "neither column image nor column image_bytes"),
        ({"score": ["high"]}, "column score is string, must be double"),
        ({"sample_id": [7]}, "column sample_id is int64, must be string"),
    ],
)
def test_a_missing_or_mistyped_column_is_named(tmp_path, changes, message):
    pq.write_table(table_of(**changes), tmp_path / "m.parquet")
    with pytest.raises(UserError, match=message):
        read_manifest(tmp_path / "m.parquet")


def test_files_of_other_writers_may_lack_optional_columns_and_use_integers(tmp_path):
    pq.write_table(table_of(score=[42]), tmp_path / "m.parquet")
    sample = read_manifest(tmp_path / "m.parquet").get(0)
    assert (sample.score, sample.rationale, sample.meta) == (42.0, None, {})


def test_a_column_that_is_there_twice_is_named(tmp_path):
    table = table_of()
    pq.write_table(table.append_column("score", table["score"]), tmp_path / "m.parquet")
    with pytest.raises(UserError, match="m.parquet: column score is there 2 times"):
        read_manifest(tmp_path / "m.parquet")


def test_an_integer_score_too_large_for_a_float_is_a_wrong_score(tmp_path):
    pq.write_table(table_of(score=[2**62 + 1]), tmp_path / "m.parquet")
    with pytest.raises(UserError, match="row 0, column score: 4.6.*e.18 is not a number from 0 to 100"):
        read_manifest(tmp_path / "m.parquet")


def bad_text(table: pa.Table, column: str) -> pa.Table:
    """The table with bytes that are no UTF-8 in a text column, as some programs write them."""
    values = pa.array([b"\xff\xfe"] * len(table), pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(table), values.buffers())
    return table.set_column(table.column_names.index(column), column, text)


@pytest.mark.parametrize("column", ["sample_id", "dataset", "split"])
def test_text_that_is_not_utf_8_is_named(tmp_path, column):
    pq.write_table(bad_text(table_of(), column), tmp_path / "m.parquet")
    with pytest.raises(UserError, match="m.parquet: rows 0 to 0: not UTF-8 text"):
        read_manifest(tmp_path / "m.parquet")


def test_a_rationale_that_is_not_utf_8_is_named_by_row(tmp_path):
    table = table_of().append_column("rationale", pa.array(["x"]))
    pq.write_table(bad_text(table, "rationale"), tmp_path / "m.parquet")
    with pytest.raises(UserError, match="m.parquet: row 0: a text column is not UTF-8"):
        read_manifest(tmp_path / "m.parquet").get(0)


def test_a_pipe_in_place_of_a_picture_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    path = written(tmp_path / "m.parquet", [row(0, image_bytes=None, image="pipe.jpg")])
    with pytest.raises(UnreadableImage, match="'pipe.jpg': not a regular file"):
        read_manifest(path).get(0)


def test_json_nested_too_deep_is_named(tmp_path):
    manifest = read_manifest(written(tmp_path / "m.parquet", [row(0, meta="[" * 100_000)]))
    with pytest.raises(UserError, match="row 0, column meta: not JSON"):
        manifest.get(0)


def test_broken_json_in_meta_is_named(tmp_path):
    manifest = read_manifest(written(tmp_path / "m.parquet", [row(0, meta="{not json")]))
    with pytest.raises(UserError, match="row 0, column meta: not JSON"):
        manifest.get(0)


def test_an_image_decodes_upright_and_to_rgb():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated by a quarter turn
    assert decode_image(picture("JPEG", (8, 4), exif=exif), "x").size == (4, 8)
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((5, 6), np.uint8)).save(buffer, "PNG")
    assert decode_image(buffer.getvalue(), "x").mode == "RGB"


@pytest.mark.parametrize("data", [b"", b"no picture", picture()[:-30], picture("JPEG", (64, 64))[:200]])
def test_bytes_that_are_no_whole_image_are_unreadable_and_named(data):
    with pytest.raises(UnreadableImage, match="sample s7"):
        decode_image(data, "sample s7")
