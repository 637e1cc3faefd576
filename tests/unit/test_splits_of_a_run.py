"""Which rows a run reads of a manifest: those of the section's split, so that no test row is ever trained on."""

from __future__ import annotations

import pytest

from tatar_dist.config.schema import DataConfig
from tatar_dist.data.writing import write_manifest
from tatar_dist.errors import UserError
from tatar_dist.prompts.source import read_manifests


def written(path, splits: str):
    names = {"r": "train", "v": "validation", "t": "test"}
    rows = (
        {"sample_id": f"s{i}", "dataset": "d", "task": "iqa", "image_bytes": b"x", "score": float(i), "split": names[s]}
        for i, s in enumerate(splits)
    )
    write_manifest(path, rows)
    return str(path)


@pytest.mark.parametrize(("section", "rows"), [("train", 4), ("validation", 1), ("test", 2)])
def test_of_a_manifest_with_several_splits_each_section_reads_its_own(tmp_path, section, rows):
    data = DataConfig(**{section: [written(tmp_path / "m.parquet", "rrtvrtr")]})
    (manifest,) = read_manifests(data, section)
    assert [(p.split, p.rows) for p in manifest.pools] == [(section, rows)]


def test_training_refuses_a_manifest_without_training_rows(tmp_path):
    data = DataConfig(train=[written(tmp_path / "m.parquet", "tttv")])
    with pytest.raises(UserError, match="m.parquet: column split: holds test, validation rows only, data.train reads"):
        read_manifests(data, "train")


@pytest.mark.parametrize("section", ["validation", "test"])
def test_held_out_sections_never_take_rows_of_a_manifest_that_keeps_others_apart(tmp_path, section):
    path = written(tmp_path / "m.parquet", "rrt" if section == "validation" else "rrv")
    with pytest.raises(UserError, match=f"rows only, data.{section} reads {section} rows"):
        read_manifests(DataConfig(**{section: [path]}), section)


def test_a_test_on_training_rows_is_done_and_said(tmp_path, capsys):
    data = DataConfig(test=[written(tmp_path / "m.parquet", "rrr")])
    assert sum(p.rows for p in read_manifests(data, "test")[0].pools) == 3
    assert "m.parquet has no test rows: data.test takes its train rows" in capsys.readouterr().err
