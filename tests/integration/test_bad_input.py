"""Bad input is one clear line and exit status 2; a broken image is quarantined and the run goes on."""

from __future__ import annotations

import json

import pytest
from conftest import manifest_rows, model_words

from tatar_dist import cli
from tatar_dist.config.load import load_config
from tatar_dist.data.manifest import read_manifest
from tatar_dist.data.sampler import PromptSampler
from tatar_dist.data.writing import write_manifest
from tatar_dist.prompts.source import PromptSource
from tatar_dist.run.directory import RunDirectory


def fails(capsys, *words: str) -> str:
    """The one line a failing `tatar-dist` call prints."""
    assert cli.main(list(words)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("tatar-dist: "), lines
    return lines[0]


@pytest.fixture
def command(tmp_path, model_untied, manifests):
    return [
        "sft", "--config", "configs/demo.yaml", f"output={tmp_path / 'run'}", *model_words(model_untied),
        f"data.train=[{','.join(manifests)}]", "sft.max_steps=1", "sft.global_batch=4", "cluster.learners=1",
    ]  # fmt: skip


def test_a_missing_manifest_is_named(command, capsys):
    assert "nowhere.parquet: no such manifest" in fails(capsys, *command, "data.train=[nowhere.parquet]")


def test_a_model_directory_without_a_model_is_named(command, capsys, tmp_path):
    assert "no such directory" in fails(capsys, *command, f"model.path={tmp_path}/none")
    assert "no config.json" in fails(capsys, *command, f"model.path={tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "'bert'" in fails(capsys, *command, f"model.path={tmp_path}")


def test_an_unwritable_output_is_named(command, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write there" in fails(capsys, *command, f"output={tmp_path}/file/run")


def test_a_second_run_in_the_same_directory_is_refused(command, capsys, tmp_path, model_untied):
    config = load_config([], [f"output={tmp_path / 'run'}", *model_words(model_untied)])
    with RunDirectory(config):
        assert "another process is running" in fails(capsys, *command)


def test_an_unreadable_image_is_quarantined_once_and_replaced(tmp_path, model_untied):
    rows = manifest_rows("iqa", 6) + manifest_rows("iaa", 6)
    rows[0]["image_bytes"] = b"not an image"
    rows[1]["image_bytes"], rows[1]["image"] = None, "gone.png"
    rows[7]["image_bytes"] = rows[7]["image_bytes"][:300]
    path = tmp_path / "broken.parquet"
    write_manifest(path, rows)
    config = load_config([], [f"output={tmp_path / 'run'}", *model_words(model_untied)])
    with RunDirectory(config) as directory:
        source = PromptSource(config, directory)
        sampler = PromptSampler([read_manifest(path)], 0)
        seen = []
        for step in range(8):
            batch = source.batch(sampler, 4, step)
            assert [p.sample.task for p in batch].count("iqa") == 2
            seen += [p.sample.sample_id for p in batch]
        bad = {rows[i]["sample_id"] for i in (0, 1, 7)}
        assert not bad & set(seen)
        assert set(seen) == {r["sample_id"] for r in rows} - bad
        quarantined = [json.loads(line) for line in (directory.path / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(q["sample_id"] for q in quarantined) == sorted(bad)
    assert all(q["reason"] and q["manifest"] == str(path) for q in quarantined)
