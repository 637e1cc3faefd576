"""Export: the newest whole model of a run, copied to where nothing is overwritten."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import pytest

from tatar_dist import export
from tatar_dist.checkpoint import Checkpoints
from tatar_dist.checkpoint.files import Files, write
from tatar_dist.config import CheckpointConfig
from tatar_dist.errors import UserError


class Learner:
    """One rank whose model is a text."""

    actors = (0,)

    def __init__(self, text: str) -> None:
        self.text = text

    def save(self, directory: Path) -> Future[Files]:
        done: Future[Files] = Future()
        names = ("model/model.safetensors", "deepspeed/rank_0.pt")
        done.set_result(write(directory, [(name, lambda path: path.write_text(self.text)) for name in names]))
        return done


def save(run: Path, step: int, text: str, keep: int = 3) -> None:
    store = Checkpoints(run, CheckpointConfig(keep=keep))
    store.save(step, {}, Learner(text), {})
    store.finish()


def test_export_copies_the_newest_whole_model_and_nothing_else(tmp_path):
    run = tmp_path / "run"
    for step, text in enumerate(("old", "new", "torn"), start=1):
        save(run, step, text)
    (run / "checkpoints" / "step_000003" / "model" / "model.safetensors").write_text("tor")
    target = export.run(run, tmp_path / "out" / "model")
    assert target == tmp_path / "out" / "model"
    assert {p.name: p.read_text() for p in target.iterdir()} == {"model.safetensors": "new"}
    assert export.model_of(run) == run / "checkpoints" / "step_000002" / "model"


def test_export_takes_an_empty_directory_and_refuses_anything_that_it_would_overwrite(tmp_path):
    run, full, file, empty = (tmp_path / n for n in ("run", "full", "file", "empty"))
    save(run, 1, "weights")
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    file.write_text("mine")
    empty.mkdir()
    for target in (full, file):
        with pytest.raises(UserError, match="exists and is not an empty directory"):
            export.run(run, target)
    assert [p.name for p in full.iterdir()] == ["mine.txt"] and file.read_text() == "mine"
    assert (export.run(run, empty) / "model.safetensors").is_file()


def test_export_of_a_run_without_a_checkpoint_says_so_and_makes_nothing(tmp_path):
    for run in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no finished checkpoint"):
            export.run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_exported_model_outlives_its_run(tmp_path):
    save(tmp_path / "run", 1, "first", keep=1)
    target = export.run(tmp_path / "run", tmp_path / "out")
    save(tmp_path / "run", 2, "second", keep=1)  # step 1 goes
    assert (target / "model.safetensors").read_text() == "first"


def test_export_to_a_place_that_cannot_be_written_is_said(tmp_path):
    save(tmp_path / "run", 1, "weights")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        export.run(tmp_path / "run", tmp_path / "file" / "out")
