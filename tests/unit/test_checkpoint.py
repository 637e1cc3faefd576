"""Checkpoints: what was finished is found again, a failure costs nothing, and the rules say what stays."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
from checkpoint_cases import SAME, SIZES, Learners, checkpoints, damage, names, plain_job, save, tag_of

from tatar_dist.config.schema import CheckpointConfig
from tatar_dist.errors import RunError, UserError
from tatar_dist.run.checkpoints import kept, latest
from tatar_dist.run.events import read_events
from tatar_dist.run.files import Files, write_files
from tatar_dist.trainer import Run


class Failing(Learners):
    """Writes the first file, then raises."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, directory: Path) -> Files:
        def job(path: Path) -> None:
            raise self.error

        name = next(iter(SIZES))
        return write_files(directory, [(name, plain_job("half", name)), ("model", job)])


# Saving and finding -------------------------------------------------------------------------------------------------


def test_a_run_without_checkpoints_has_none_and_asking_leaves_no_trace(tmp_path):
    assert checkpoints(tmp_path).resume(SAME) is None and latest(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_what_was_saved_last_is_found_with_its_state_and_the_sizes_and_hashes_of_its_files(tmp_path):
    store = checkpoints(tmp_path)
    save(store, 3, {"sampler": {"seed": 1}}, Learners("old"))
    saved = save(store, 10, {"sampler": {"seed": 2, "excluded": ["é"]}}, Learners("new"))
    directory, state = checkpoints(tmp_path).resume(SAME)
    assert directory == saved == tmp_path / "checkpoints" / "step_000010" and tag_of(directory) == "new"
    assert (state["step"], state["learners"]) == (10, 2)
    assert state["sampler"] == {"seed": 2, "excluded": ["é"]}
    assert {n: f["bytes"] for n, f in state["files"].items()} == SIZES
    assert all(len(f["sha256"]) == 64 for f in state["files"].values())
    assert os.readlink(tmp_path / "checkpoints" / "latest") == "step_000010"  # relative: the run may be moved
    assert latest(tmp_path) == (directory, state)


def test_the_state_is_the_one_of_the_moment_of_saving(tmp_path):
    store, gate, state = checkpoints(tmp_path), threading.Event(), {"same": SAME, "sampler": {"position": 7}}
    store.save(1, state, Learners(gate=gate), {})
    state["sampler"]["position"] = 8  # training goes on
    gate.set()
    store.finish()
    assert latest(tmp_path)[1]["sampler"] == {"position": 7}


def test_while_files_are_written_the_caller_goes_on_and_nothing_counts_yet(tmp_path):
    store, gate = checkpoints(tmp_path), threading.Event()
    save(store, 1, learners=Learners("old"))
    store.save(2, {"same": SAME}, Learners("new", gate), {})
    for step in range(3):
        store.poll()
        store.events.log("step/done", number=step)
    assert tag_of(latest(tmp_path)[0]) == "old"
    gate.set()
    store.finish()
    assert tag_of(latest(tmp_path)[0]) == "new"
    order = [e["event"] for e in read_events(tmp_path)]
    assert order == ["checkpoint/saved", *["step/done"] * 3, "checkpoint/saved"]
    saved = read_events(tmp_path)[-1]
    assert saved["bytes"] == sum(SIZES.values()) and saved["path"].endswith("step_000002") and saved["seconds"] >= 0


def test_poll_finishes_a_save_whose_files_are_written(tmp_path):
    store = checkpoints(tmp_path)
    store.save(1, {"same": SAME}, Learners(), {})
    store.poll()
    assert names(tmp_path) == ["latest", "step_000001"]


def test_a_save_first_finishes_the_one_before(tmp_path):
    store, gate = checkpoints(tmp_path, keep=9), threading.Event()
    store.save(1, {"same": SAME}, Learners("old", gate), {})
    threading.Timer(0.2, gate.set).start()
    save(store, 2, learners=Learners("new"))
    assert names(tmp_path) == ["latest", "step_000001", "step_000002"]


def test_without_asynchronous_saving_a_save_is_finished_when_it_returns(tmp_path):
    checkpoints(tmp_path, asynchronous=False).save(1, {"same": SAME}, Learners(), {})
    assert names(tmp_path) == ["latest", "step_000001"]


def test_an_abandoned_save_leaves_nothing_and_a_late_writer_does_not_bring_it_back(tmp_path):
    store, gate = checkpoints(tmp_path), threading.Event()
    learners = Learners("new", gate)
    store.save(2, {"same": SAME}, learners, {})
    late = store._pending.files
    late.cancel = lambda: False  # a learner on another node, which cannot be told
    store.abandon()
    gate.set()
    assert isinstance(late.exception(30), FileNotFoundError)
    assert names(tmp_path) == []
    store.finish()  # nothing under way
    assert save(store, 2).is_dir()


def test_saving_a_step_again_replaces_it(tmp_path):
    store = checkpoints(tmp_path)
    save(store, 5, learners=Learners("old"))
    assert tag_of(save(store, 5, learners=Learners("new"))) == "new"
    assert names(tmp_path) == ["latest", "step_000005"]


def test_a_run_started_afresh_over_an_older_one_finds_its_own_checkpoint(tmp_path):
    """`checkpoint.resume=false` in a directory whose former run got further."""
    save(checkpoints(tmp_path), 100, {"run": "former"})
    save(checkpoints(tmp_path), 10, {"run": "afresh"})
    assert checkpoints(tmp_path).resume(SAME)[1]["run"] == "afresh"


def test_another_kind_of_run_is_refused(tmp_path):
    save(checkpoints(tmp_path), 1)
    with pytest.raises(UserError, match=r"a run with stage=grpo \(now sft\): give another output"):
        checkpoints(tmp_path).resume({"stage": "sft"})


def test_with_a_process_named_only_its_own_checkpoints_count(tmp_path):
    """A restart of a run with `checkpoint.resume=false`, beside checkpoints of another run with other settings."""
    save(checkpoints(tmp_path), 100, {"same": {"stage": "sft", "seed": 1}, "by": "former"})
    assert checkpoints(tmp_path).resume(SAME, by="me") is None
    save(checkpoints(tmp_path), 10, {"by": "me"})
    assert checkpoints(tmp_path).resume(SAME, by="me")[1]["step"] == 10


def test_what_a_resumed_run_changes_is_named_and_can_be_accepted(tmp_path):
    before, now = (SAME | {"grpo.kl_beta": b, "grpo.optim.lr": lr, "seed": 0} for b, lr in ((0.1, 1.0), (0.2, 2.0)))
    save(checkpoints(tmp_path), 3, {"same": before})
    with pytest.raises(UserError) as refused:
        checkpoints(tmp_path, accept=["grpo.kl_beta"]).resume(now)
    assert "a run with grpo.optim.lr=1.0 (now 2.0): give" in str(refused.value)
    assert "checkpoint.accept=[grpo.optim.lr] if the change is meant" in str(refused.value)
    for accept in (["grpo.kl_beta", "grpo.optim.lr"], ["grpo"]):
        assert checkpoints(tmp_path, accept=accept).resume(now)[1]["step"] == 3
        logged = [e for e in read_events(tmp_path) if e["event"] == "checkpoint/accepted"][-1]
        assert logged["changes"] == {"grpo.kl_beta": [0.1, 0.2], "grpo.optim.lr": [1.0, 2.0]}
    assert checkpoints(tmp_path).resume(before | {"grpo.new": 1}), "a key that another version did not write"


# Failing ------------------------------------------------------------------------------------------------------------

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
WORDS = [
    FULL,
    OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    RuntimeError('Error while serializing: I/O error: Os { code: 28, kind: StorageFull, message: "..." }'),
]


@pytest.mark.parametrize("error", WORDS, ids=["ENOSPC", "EDQUOT", "safetensors"])
def test_a_full_disk_in_the_middle_of_a_run_is_said_and_the_run_goes_on_with_the_last_checkpoint(
    tmp_path, capsys, error
):
    store = checkpoints(tmp_path, keep=1)
    kept = save(store, 1, learners=Learners("old"))
    store.save(2, {"same": SAME}, Failing(error), {})
    store.poll()
    assert tag_of(kept) == "old" and names(tmp_path) == ["latest", "step_000001"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "step_000002: cannot write" in said and "step_000001 is kept" in said
    assert "No space left" in said or "quota exceeded" in said
    assert read_events(tmp_path)[-1]["event"] == "checkpoint/failed"
    assert save(store, 3).is_dir()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_at_the_end_is_an_error(tmp_path, asynchronous):
    store = checkpoints(tmp_path, asynchronous=asynchronous)
    kept = save(store, 1, learners=Learners("old"))
    with pytest.raises(UserError, match="step_000002: cannot write the checkpoint: No space left.*step_000001 is kept"):
        save(store, 2, learners=Failing(FULL))
    assert latest(tmp_path)[0] == kept and names(tmp_path) == ["latest", "step_000001"]


def test_a_disk_known_to_be_full_before_a_byte_is_written_is_judged_like_one_that_fills_up(tmp_path, capsys):
    class Refusing(Learners):
        def save(self, directory: Path) -> Future[Files]:
            raise FULL

    store = checkpoints(tmp_path)
    save(store, 1)
    store.save(2, {"same": SAME}, Refusing(), {})
    store.poll()
    assert capsys.readouterr().err.count("Training continues") == 1 and names(tmp_path) == ["latest", "step_000001"]
    with pytest.raises(UserError, match="step_000003: cannot write the checkpoint: No space left"):
        save(store, 3, learners=Refusing())
    assert names(tmp_path) == ["latest", "step_000001"]


def test_what_kills_the_learners_is_raised_and_leaves_no_half_directory(tmp_path):
    store = checkpoints(tmp_path)
    save(store, 1)
    store.save(2, {"same": SAME}, Failing(RunError("rank 1 died")), {})
    with pytest.raises(RunError, match="rank 1 died"):
        store.poll()
    assert names(tmp_path) == ["latest", "step_000001"]
    store.finish()


def test_learners_that_see_another_file_system_are_noticed_at_the_first_checkpoint(tmp_path):
    class Elsewhere(Learners):
        def write(self, directory: Path) -> Files:
            (tmp_path / "elsewhere").mkdir()
            return super().write(tmp_path / "elsewhere")

    class Nowhere(Learners):
        def write(self, directory: Path) -> Files:
            return super().write(tmp_path / "nowhere")

    for learners in (Elsewhere(), Nowhere()):
        store = checkpoints(tmp_path)
        store.save(1, {"same": SAME}, learners, {})
        with pytest.raises(UserError, match="checkpoint.storage=local"):
            store.poll()
        assert names(tmp_path) == []


def test_a_run_directory_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        checkpoints(tmp_path, asynchronous=False).save(1, {}, Learners(), {})


@pytest.mark.parametrize("error", [UserError("reward term mine.f returned nan for row 1"), RunError("step 2: nan")])
def test_a_good_checkpoint_that_is_being_written_outlives_what_ends_the_run(tmp_path, error):
    run, gate = Run.__new__(Run), threading.Event()
    run._checkpoints = checkpoints(tmp_path)
    run._checkpoints.save(1, {"same": SAME}, Learners("new", gate), {})
    with pytest.raises(type(error)), run.recovering():  # a user's own reward term gives NaN in the step after
        gate.set()
        raise error
    run._checkpoints.abandon()  # as at the end of a run
    assert tag_of(latest(tmp_path)[0]) == "new"


# Retention ----------------------------------------------------------------------------------------------------------

#    settings, metric by step -> steps that stay
RETENTION = [
    ({"keep": 1}, {}, [6]),
    ({"keep": 2}, {}, [5, 6]),
    ({"keep": 9}, {}, [1, 2, 3, 4, 5, 6]),
    ({"keep": 1, "keep_every": 2}, {}, [2, 4, 6]),
    ({"keep": 1, "keep_best": "m"}, {2: 0.9, 4: 0.1, 6: 0.5}, [2, 6]),
    ({"keep": 1, "keep_best": "m", "best_mode": "min"}, {2: 0.9, 4: 0.1, 6: 0.5}, [4, 6]),
    ({"keep": 1, "keep_best": "m"}, {2: 0.9, 4: float("nan"), 5: 0.9}, [5, 6]),  # of equals the newest
    ({"keep": 1, "keep_best": "m"}, {}, [6]),  # never measured
    ({"keep": 2, "keep_every": 3, "keep_best": "m"}, {1: 1.0}, [1, 3, 5, 6]),
]


@pytest.mark.parametrize(("settings", "metric", "stay"), RETENTION)
def test_what_stays(tmp_path, settings, metric, stay):
    store = checkpoints(tmp_path, **settings)
    for step in range(1, 7):
        save(store, step, metrics={"m": metric[step]} if step in metric else {})
    assert names(tmp_path) == ["latest", *(f"step_{i:06d}" for i in stay)]
    assert latest(tmp_path)[1]["step"] == 6


def test_a_value_of_another_metric_does_not_make_a_checkpoint_the_best(tmp_path):
    save(checkpoints(tmp_path, keep=1, keep_best="a"), 1, metrics={"a": 9.0})
    store = checkpoints(tmp_path, keep=1, keep_best="b")
    save(store, 2, metrics={"b": 0.1})
    save(store, 3, metrics={"b": 0.0})
    assert names(tmp_path) == ["latest", "step_000002", "step_000003"]


def test_the_newest_stays_whatever_the_rules_say():
    finished = [(Path(f"step_{i:06d}"), {"step": i, "metrics": {}}) for i in (3, 2, 1)]
    assert kept(finished, CheckpointConfig(keep=1)) == {Path("step_000003")}
    assert kept([], CheckpointConfig()) == set()


def test_a_damaged_checkpoint_does_not_push_out_a_good_one(tmp_path):
    store = checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        save(store, step)
    damage(tmp_path / "checkpoints" / "step_000002" / "model" / "model.safetensors", 5)
    store = checkpoints(tmp_path, keep=2)
    assert store.resume(SAME)[1]["step"] == 1
    assert os.readlink(tmp_path / "checkpoints" / "latest") == "step_000001"
    save(store, 3)
    assert names(tmp_path) == ["latest", "step_000001", "step_000003"]


def test_a_checkpoint_that_replaces_a_damaged_one_of_its_step_stays(tmp_path):
    store = checkpoints(tmp_path, keep=1)
    damage(save(store, 2, learners=Learners("old")) / "model" / "model.safetensors", 5)
    store = checkpoints(tmp_path, keep=1)
    with pytest.raises(UserError, match="all checkpoints are damaged"):
        store.resume(SAME)
    assert tag_of(save(store, 2, learners=Learners("new"))) == "new"
    assert latest(tmp_path)[1]["step"] == 2
