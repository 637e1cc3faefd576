"""Pools of a manifest: which rows belong to which data set, from the footer where it says so, else from the rows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tatar_dist.data import manifest as manifests
from tatar_dist.data import writing
from tatar_dist.data.manifest import read_manifest
from tatar_dist.data.sampler import PromptSampler
from tatar_dist.data.schema import STAMP
from tatar_dist.data.writing import manifest_writer, write_manifest, write_table
from tatar_dist.errors import UserError


def rows(n: int, dataset=lambda i: "a", split=lambda i: "train", task=lambda i: "iaa", **more) -> pa.Table:
    number = range(n)
    return pa.table(
        {
            "sample_id": [f"{i:07d}" for i in number],
            "dataset": [dataset(i) for i in number],
            "task": [task(i) for i in number],
            "image": [f"{i}.jpg" for i in number],
            "score": [float(i % 101) for i in number],
            "split": [split(i) for i in number],
            **more,
        }
    )


def keys(manifest) -> dict:
    return {(p.dataset, p.task, p.split): p.rows for p in manifest.pools}


def test_the_writer_gives_every_pool_row_groups_of_its_own(tmp_path):
    table = rows(9000, dataset=lambda i: "ab"[i % 2], split=lambda i: "train" if i % 10 else "test")
    write_table(tmp_path / "m.parquet", table)
    file = pq.ParquetFile(tmp_path / "m.parquet")
    for g in range(file.metadata.num_row_groups):
        group = file.read_row_group(g)
        assert group.num_rows <= 2048
        assert len(set(zip(group["dataset"].to_pylist(), group["split"].to_pylist(), strict=True))) == 1
    found = read_manifest(tmp_path / "m.parquet")
    expected = Counter(
        zip(table["dataset"].to_pylist(), table["task"].to_pylist(), table["split"].to_pylist(), strict=True)
    )
    assert keys(found) == expected
    for pool in found.pools:
        assert all(found.row(i)["dataset"] == pool.dataset for i in list(pool)[::500])
        assert pool.row(pool.rows - 1) == list(pool)[-1] and pool.row(0) in pool


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["train", "test"])), min_size=1, max_size=60),
    st.integers(1, 9),
)
def test_a_file_of_another_program_that_mixes_pools_is_indexed_by_its_rows(tmp_path_factory, drawn, group):
    path = tmp_path_factory.mktemp("pools") / "m.parquet"
    pq.write_table(rows(len(drawn), lambda i: drawn[i][0], lambda i: drawn[i][1]), path, row_group_size=group)
    found = read_manifest(path)
    assert keys(found) == {(d, "iaa", s): n for (d, s), n in Counter(drawn).items()}
    for pool in found.pools:
        assert [drawn[i] for i in pool] == [(pool.dataset, pool.split)] * pool.rows
        assert [pool.row(k) for k in range(pool.rows)] == list(pool)
        scores = [float(i % 101) for i in pool]
        assert (pool.score_min, pool.score_max) == (min(scores), max(scores))
        assert [i in pool for i in range(-1, len(drawn) + 1)] == [i in set(pool) for i in range(-1, len(drawn) + 1)]


def test_a_group_with_pictures_holds_at_most_256_rows_and_64_mib(tmp_path):
    big = b"x" * (3 << 20)
    write_manifest(
        tmp_path / "m.parquet",
        (
            {"sample_id": str(i), "dataset": "a", "task": "iqa", "split": "train", "score": 1.0, "image_bytes": big}
            for i in range(50)
        ),
    )
    metadata = pq.ParquetFile(tmp_path / "m.parquet").metadata
    assert metadata.num_rows == 50
    assert max(metadata.row_group(g).total_byte_size for g in range(metadata.num_row_groups)) <= 64 << 20
    assert read_manifest(tmp_path / "m.parquet").embedded


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A manifest over the size at which the stamp is believed (lowered to 50 rows)."""
    monkeypatch.setattr(manifests, "TRUSTED_ROWS", 50)
    write_table(tmp_path / "m.parquet", rows(100))
    return tmp_path / "m.parquet"


def test_a_large_stamped_manifest_is_not_read_again_and_a_copy_by_another_program_is(large, monkeypatch):
    table = pq.read_table(large)
    stamp = {STAMP: pq.ParquetFile(large).metadata.metadata[STAMP]}
    twice = pa.concat_tables([table, table.slice(0, 1)]).replace_schema_metadata(stamp)
    pq.write_table(twice, large.with_name("copy.parquet"))
    with pytest.raises(UserError, match="copy.parquet: row 100, column sample_id: '0000000' was used in row 0"):
        read_manifest(large.with_name("copy.parquet"))
    monkeypatch.setattr(manifests, "_check_rows", None)  # would be called, were a row to be read
    assert keys(read_manifest(large)) == {("a", "iaa", "train"): 100}
    monkeypatch.setattr(manifests, "TRUSTED_ROWS", 100)
    with pytest.raises(TypeError):
        read_manifest(large)


def test_a_stamped_manifest_whose_statistics_show_a_wrong_score_or_task_is_refused(large):
    stamp = pq.ParquetFile(large).metadata.metadata[STAMP]
    for column, values, message in (
        ("score", pa.array([*[1.0] * 99, 100.5]), "column score: 100.5 is not a number"),
        ("task", pa.array(["iba"] * 100), "column task: 'iba'"),
    ):
        table = rows(100)
        table = table.set_column(table.column_names.index(column), column, values)
        pq.write_table(table.replace_schema_metadata({STAMP: stamp}), large)
        with pytest.raises(UserError, match=f"m.parquet: .*{message}"):
            read_manifest(large)


@pytest.mark.parametrize("writer", ["ours", "foreign"])
def test_batches_from_pictures_in_rows_open_each_row_group_about_once(tmp_path, monkeypatch, writer):
    """Eight pools in one file of ours, walked in turn; and a foreign file whose rows alternate between splits.

    The cache holds a fifth of the rows or less, so a walk in any order would open a group for nearly every row.
    """
    same = {"image_bytes": b"x" * 1000, "score": 50.0}
    if writer == "ours":
        names = [(f"set-{i % 8}", ("iqa", "iaa")[i % 2], "train") for i in range(8192)]
    else:
        names = [("a", "iqa", ("train", "train", "validation", "test")[i % 4]) for i in range(8192)]
    keys = ("sample_id", "dataset", "task", "split")
    table = [dict(zip(keys, (str(i), *name), strict=True)) | same for i, name in enumerate(names)]
    if writer == "ours":
        monkeypatch.setattr(writing, "EMBEDDED_ROWS", 16)
        write_manifest(tmp_path / "m.parquet", table)
    else:
        pq.write_table(pa.Table.from_pylist(table), tmp_path / "m.parquet", row_group_size=64)
    opened: list[int] = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, g, **more: opened.append(g) or read(self, g, **more)
    )
    found = read_manifest(tmp_path / "m.parquet").of_split("train")
    monkeypatch.setattr(manifests, "GROUP_BYTES", 20_000 if writer == "ours" else 80_000)
    sampler = PromptSampler([found], 0, iqa_fraction=0.5 if writer == "ours" else 1.0, ranked=())
    opened.clear()
    for _ in range(sum(p.rows for p in found.pools) // 16):
        for m, row in sampler.next_batch(16):
            sampler.manifests[m].row(row)
    groups = len(set(opened))
    assert groups >= 64 and len(opened) <= 1.5 * groups, f"{len(opened)} openings of {groups} groups"


def test_a_manifest_of_a_newer_version_is_refused(tmp_path):
    table = rows(3).replace_schema_metadata({STAMP: json.dumps({"version": 99})})
    pq.write_table(table, tmp_path / "m.parquet")
    with pytest.raises(UserError, match="m.parquet: manifest version 99, this tatar_dist reads up to 1"):
        read_manifest(tmp_path / "m.parquet")


@pytest.mark.parametrize("kept", [0.5, 0.95, 0.999])
def test_a_half_written_parquet_file_is_one_clear_error(tmp_path, kept):
    write_table(tmp_path / "m.parquet", rows(3000))
    data = (tmp_path / "m.parquet").read_bytes()
    (tmp_path / "m.parquet").write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(UserError, match="m.parquet: not a Parquet file, or half of one"):
        read_manifest(tmp_path / "m.parquet")


def test_a_writer_that_is_killed_leaves_the_old_manifest(tmp_path):
    write_table(tmp_path / "m.parquet", rows(5))
    code = (
        "import os, sys; from tatar_dist.data.writing import manifest_writer; import pyarrow.parquet as pq\n"
        "table = pq.read_table(sys.argv[1])\n"
        "with manifest_writer(sys.argv[1]) as w:\n    w.write(table); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.parquet")])
    assert killed.returncode == -9 and len(read_manifest(tmp_path / "m.parquet")) == 5


def test_an_id_that_comes_twice_far_apart_is_found_when_written(tmp_path):
    with pytest.raises(UserError, match="'0000003' comes twice; nothing was written"):
        with manifest_writer(tmp_path / "m.parquet") as writer:
            writer.write(rows(5000))
            writer.write(rows(5000).slice(3, 1))
    assert list(tmp_path.iterdir()) == []


def test_images_are_found_whether_the_manifest_is_named_by_a_link_or_from_inside_the_linked_directory(
    tmp_path, monkeypatch
):
    (tmp_path / "storage").mkdir()
    (tmp_path / "project" / "pics").mkdir(parents=True)
    (tmp_path / "project" / "pics" / "0.jpg").write_bytes(b"zero")
    (tmp_path / "project" / "data").symlink_to(tmp_path / "storage")
    write_table(tmp_path / "project" / "data" / "m.parquet", rows(1), image_root=tmp_path / "project" / "pics")
    assert read_manifest(tmp_path / "project" / "data" / "m.parquet").get(0).image == b"zero"
    monkeypatch.chdir(tmp_path / "project" / "data")
    assert read_manifest("m.parquet").get(0).image == b"zero"


def test_images_are_found_below_the_root_that_the_manifest_names_even_after_both_moved(tmp_path):
    (tmp_path / "x" / "pics").mkdir(parents=True)
    (tmp_path / "x" / "pics" / "0.jpg").write_bytes(b"zero")
    write_table(tmp_path / "x" / "lists" / "m.parquet", rows(1), image_root=tmp_path / "x" / "pics")
    (tmp_path / "x").rename(tmp_path / "y")
    assert read_manifest(tmp_path / "y" / "lists" / "m.parquet").get(0).image == b"zero"
    (tmp_path / "y" / "pics").rename(tmp_path / "elsewhere")
    path = tmp_path / "y" / "lists" / "m.parquet"
    assert read_manifest(path, image_root=tmp_path / "elsewhere").get(0).image == b"zero"


def test_a_sampler_on_a_million_rows_holds_only_the_order_of_an_epoch(tmp_path):
    table = rows(2048)
    with manifest_writer(tmp_path / "m.parquet") as writer:
        for k in range(500):
            ids = pa.array(np.char.add(f"{k}-", np.arange(2048).astype(str)))
            writer.write(table.set_column(0, "sample_id", ids))
    code = (
        "import sys, tracemalloc; from tatar_dist.data.manifest import read_manifest\n"
        "from tatar_dist.data.sampler import PromptSampler\n"
        "tracemalloc.start(); s = PromptSampler([read_manifest(sys.argv[1])], 0, 0.0); b = s.next_batch(64)\n"
        "print(tracemalloc.get_traced_memory()[1], len(set(b)), 'torch' in sys.modules, len(str(s.state_dict())))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.parquet")], capture_output=True, text=True, check=True
    ).stdout.split()
    order, modules = 4 * 1_024_000, 2_500_000  # numpy.random is imported on the way
    assert int(out[0]) < order + modules, f"{out[0]} bytes for 1,024,000 rows"
    assert out[1:3] == ["64", "False"] and int(out[3]) < 300
