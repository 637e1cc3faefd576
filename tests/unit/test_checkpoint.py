"""Checkpoints and export: what was finished is found again, what was torn never counts, a failure costs nothing."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from tatar_dist import export
from tatar_dist.checkpoint import Checkpoints
from tatar_dist.errors import UserError


def fill(text: str = "weights"):
    """What the learners write: a model directory and one shard."""

    def write(directory: Path) -> None:
        (directory / "model").mkdir()
        (directory / "model" / "model.safetensors").write_text(text)
        (directory / "deepspeed").mkdir()
        (directory / "deepspeed" / "rank_0.pt").write_text("shard of " + text)

    return write


def names(run: Path) -> list[str]:
    """Everything under checkpoints/, hidden names too."""
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_a_run_without_checkpoints_has_no_latest(tmp_path):
    assert Checkpoints(tmp_path, keep=2).latest() is None
    assert list(tmp_path.iterdir()) == []  # asking leaves no trace


def test_latest_is_what_was_saved_last_with_its_state(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(3, {"stage": "grpo", "sampler": {"seed": 1}}, fill("a"))
    saved = checkpoints.save(10, {"stage": "grpo", "sampler": {"seed": 2}}, fill("b"))
    directory, state = Checkpoints(tmp_path, keep=2).latest()
    assert directory == saved == tmp_path / "checkpoints" / "step_000010"
    assert state == {"step": 10, "stage": "grpo", "sampler": {"seed": 2}}
    assert (directory / "model" / "model.safetensors").read_text() == "b"
    link = tmp_path / "checkpoints" / "latest"
    assert os.readlink(link) == "step_000010"  # relative: the run directory may be moved
    assert link.resolve() == saved.resolve()


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (2, [3, 4]), (0, [4]), (9, [1, 2, 3, 4])])
def test_only_the_newest_are_kept_and_never_none(tmp_path, keep, left):
    checkpoints = Checkpoints(tmp_path, keep)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, {}, fill())
    assert names(tmp_path) == ["latest", *(f"step_{i:06d}" for i in left)]


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(5, {"try": 1}, fill("old"))
    directory = checkpoints.save(5, {"try": 2}, fill("new"))
    assert checkpoints.latest() == (directory, {"step": 5, "try": 2})
    assert (directory / "model" / "model.safetensors").read_text() == "new"
    assert names(tmp_path) == ["latest", "step_000005"]


def test_a_full_disk_while_saving_is_said_and_leaves_the_last_checkpoint_and_no_half_directory(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    kept = checkpoints.save(1, {"a": 1}, fill("good"))

    def full(directory: Path) -> None:
        fill("half")(directory)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="step_000002: cannot write the checkpoint: No space left on device"):
        checkpoints.save(2, {"a": 2}, full)
    assert checkpoints.latest() == (kept, {"step": 1, "a": 1})
    assert (kept / "model" / "model.safetensors").read_text() == "good"
    assert names(tmp_path) == ["latest", "step_000001"]


def test_any_other_error_while_saving_leaves_no_half_directory(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {}, fill())

    def dies(directory: Path) -> None:
        fill("half")(directory)
        raise RuntimeError("PytorchStreamWriter failed writing file")  # what torch.save says on a full disk

    with pytest.raises((UserError, RuntimeError)):
        checkpoints.save(2, {}, dies)
    assert checkpoints.latest()[1] == {"step": 1}
    assert names(tmp_path) == ["latest", "step_000001"]


def test_after_a_failed_save_the_same_step_can_be_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)

    def dies(directory: Path) -> None:
        (directory / "leftover").write_text("of the first try")
        raise RuntimeError("rank 1 died")

    with pytest.raises(RuntimeError):
        checkpoints.save(2, {}, dies)
    assert checkpoints.latest() is None
    directory = checkpoints.save(2, {}, fill())
    assert not (directory / "leftover").exists()
    assert names(tmp_path) == ["latest", "step_000002"]


@pytest.mark.parametrize("state", [None, "", '{"step": 2', "\x00" * 20])
def test_a_torn_directory_is_not_taken_for_a_checkpoint(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, keep=2)
    whole = checkpoints.save(1, {}, fill())
    torn = tmp_path / "checkpoints" / "step_000002"
    torn.mkdir()
    fill("half")(torn)
    if state is not None:
        (torn / "state.json").write_text(state)
    assert checkpoints.latest() == (whole, {"step": 1})


def test_a_directory_still_being_written_is_not_taken_for_a_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    seen = []

    def look(directory: Path) -> None:
        fill()(directory)
        seen.append(Checkpoints(tmp_path, keep=2).latest())

    checkpoints.save(1, {}, look)
    checkpoints.save(2, {}, look)
    assert seen[0] is None and seen[1][1] == {"step": 1}


def test_a_run_started_afresh_over_an_older_one_finds_its_own_checkpoint(tmp_path):
    """`checkpoint.resume=false` in a directory whose former run got further."""
    former = Checkpoints(tmp_path, keep=2)
    former.save(100, {"run": "former"}, fill("former"))
    afresh = Checkpoints(tmp_path, keep=2)
    afresh.save(10, {"run": "afresh"}, fill("afresh"))
    assert afresh.latest()[1] == {"step": 10, "run": "afresh"}


def test_a_run_directory_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        Checkpoints(tmp_path, keep=1).save(1, {}, fill())


def test_the_state_is_readable_json_beside_the_model(tmp_path):
    directory = Checkpoints(tmp_path, keep=1).save(7, {"sampler": {"excluded": ["é"]}}, fill())
    assert json.loads((directory / "state.json").read_text()) == {"step": 7, "sampler": {"excluded": ["é"]}}


# Export -------------------------------------------------------------------------------------------------------------


def test_export_copies_the_newest_finished_model_and_nothing_else(tmp_path):
    run = tmp_path / "run"
    checkpoints = Checkpoints(run, keep=3)
    checkpoints.save(1, {}, fill("old"))
    checkpoints.save(2, {}, fill("new"))
    torn = run / "checkpoints" / "step_000003"
    torn.mkdir()
    fill("torn")(torn)
    target = export.run(run, tmp_path / "out" / "model")
    assert target == tmp_path / "out" / "model"
    assert {p.name: p.read_text() for p in target.iterdir()} == {"model.safetensors": "new"}
    assert export.model_of(run) == run / "checkpoints" / "step_000002" / "model"


def test_export_takes_an_empty_directory_and_refuses_anything_that_it_would_overwrite(tmp_path):
    run, full, file, empty = (tmp_path / n for n in ("run", "full", "file", "empty"))
    Checkpoints(run, keep=1).save(1, {}, fill())
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
    checkpoints = Checkpoints(tmp_path / "run", keep=1)
    checkpoints.save(1, {}, fill("first"))
    target = export.run(tmp_path / "run", tmp_path / "out")
    checkpoints.save(2, {}, fill("second"))  # keep=1: step 1 goes
    assert (target / "model.safetensors").read_text() == "first"


def test_export_to_a_place_that_cannot_be_written_is_said(tmp_path):
    Checkpoints(tmp_path / "run", keep=1).save(1, {}, fill())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        export.run(tmp_path / "run", tmp_path / "file" / "out")
