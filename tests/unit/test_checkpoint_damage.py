"""Damaged checkpoints are noticed and skipped; a writer killed at any moment leaves the old or the new one whole."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
from checkpoint_cases import SAME, SIZES, Learners, checkpoints, content, damage, names, save, tag_of

from tatar_dist.errors import UserError
from tatar_dist.run.checkpoints import latest
from tatar_dist.run.events import read_events

# Damage -------------------------------------------------------------------------------------------------------------


def two(tmp_path: Path) -> Path:
    store = checkpoints(tmp_path)
    save(store, 1, learners=Learners("old"))
    return save(store, 2, learners=Learners("new"))


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("how", ["flip", "truncate", "grow", "empty", "remove"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(tmp_path, capsys, name, how):
    file = two(tmp_path) / name
    whole = file.read_bytes()
    if how == "flip":
        damage(file, len(whole) // 2)
    elif how == "remove":
        file.unlink()
    else:
        file.write_bytes({"truncate": whole[:-1], "grow": whole + b"\0", "empty": b""}[how])
    found = checkpoints(tmp_path).resume(SAME)
    assert found[1]["step"] == 1 and tag_of(found[0]) == "old"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "step_000002: damaged, skipped" in said and name in said
    (event,) = [e for e in read_events(tmp_path) if e["event"] == "checkpoint/skipped"]
    assert name in event["reason"] and "step_000002" in event["path"]


def test_without_verify_sizes_are_compared_and_hashes_are_not(tmp_path):
    newest = two(tmp_path)
    damage(newest / "model" / "model.safetensors", 5)
    assert checkpoints(tmp_path, verify=False).resume(SAME)[0] == newest
    (newest / "model" / "model.safetensors").write_bytes(b"short")
    assert checkpoints(tmp_path, verify=False).resume(SAME)[1]["step"] == 1


@pytest.mark.parametrize("state", [None, "", '{"step": 2', "\x00" * 20, "[]", '{"step": 2, "files": {}}'])
def test_a_state_that_cannot_be_read_is_skipped(tmp_path, state):
    newest = two(tmp_path)
    (newest / "state.json").unlink()
    if state is not None:
        (newest / "state.json").write_text(state)
    assert checkpoints(tmp_path).resume(SAME)[1]["step"] == 1
    assert latest(tmp_path)[1]["step"] == 1


def test_any_flipped_bit_of_the_state_is_noticed_or_does_not_matter(tmp_path):
    newest = two(tmp_path)
    whole, state = (newest / "state.json").read_bytes(), latest(tmp_path)[1]
    for position in range(len(whole)):
        damage(newest / "state.json", position)
        found = latest(tmp_path)
        assert found[1]["step"] == 1 or found[1] == state, f"byte {position}"
        (newest / "state.json").write_bytes(whole)


def test_when_all_are_damaged_the_run_does_not_start_over_by_itself(tmp_path):
    newest = two(tmp_path)
    damage(newest / "deepspeed" / "rank_0.pt", 0)
    (newest.parent / "step_000001" / "deepspeed" / "rank_1.pt").unlink()
    with pytest.raises(UserError) as e:
        checkpoints(tmp_path).resume(SAME)
    assert all(part in str(e.value) for part in ("step_000001", "step_000002", "checkpoint.resume=false"))


# F7: killed at any moment -------------------------------------------------------------------------------------------


class Killed:
    """Kills this process with SIGKILL at byte `at_byte` of the files, or before file operation `at_operation`."""

    OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink")

    def __init__(self, at_byte: int = -1, at_operation: int = -1) -> None:
        self.at_byte, self.at_operation, self.bytes, self.operations = at_byte, at_operation, 0, 0

    def watch(self) -> None:
        sys.addaudithook(self._hook)

    def _hook(self, event: str, _: tuple) -> None:
        if event in self.OPERATIONS:
            if self.operations == self.at_operation:
                os.kill(os.getpid(), signal.SIGKILL)
            self.operations += 1

    def job(self, tag: str, name: str):
        def write(path: Path) -> None:
            with open(path, "wb", buffering=0) as f:
                data = content(tag, name)
                stop = self.at_byte - self.bytes
                if 0 <= stop < len(data):
                    f.write(data[:stop])
                    os.kill(os.getpid(), signal.SIGKILL)
                f.write(data)
                self.bytes += len(data)

        return write


def child(run: Path, step: int, killed: Killed, counted) -> None:
    killed.watch()
    save(checkpoints(run, keep=1), step, {"tag": "new"}, Learners("new", job=killed.job))
    counted.value = killed.operations


def in_a_process(run: Path, step: int, killed: Killed) -> tuple[int, int]:
    """(exit status, file operations) of a process that saves `step` of `run`."""
    fork = multiprocessing.get_context("fork")
    counted = fork.Value("i", 0)
    process = fork.Process(target=child, args=(run, step, killed, counted))
    process.start()
    process.join(60)
    return process.exitcode, counted.value


@pytest.mark.parametrize("step", [2, 1], ids=["the next step", "the same step again"])
def test_a_writer_killed_at_any_byte_or_between_any_two_renames_leaves_the_old_or_the_new_one_whole(tmp_path, step):
    save(checkpoints(tmp_path / "whole", keep=1), 1, {"tag": "old"}, Learners("old"))
    status, operations = in_a_process(tmp_path / "whole", step, Killed())
    assert status == 0 and operations > 15
    total = sum(SIZES.values())
    points = [Killed(at_byte=total * i // 10) for i in range(10)]
    points += [Killed(at_operation=i) for i in range(operations)]
    found = []
    for i, point in enumerate(points):
        run = tmp_path / f"run{i}"
        save(checkpoints(run, keep=1), 1, {"tag": "old"}, Learners("old"))
        assert in_a_process(run, step, point)[0] == -signal.SIGKILL
        store = checkpoints(run, keep=1)
        directory, state = store.resume(SAME)
        assert tag_of(directory) == state["tag"], f"point {i}"
        assert (tmp_path / f"run{i}" / "checkpoints" / "latest").resolve() == directory.resolve()
        assert not [n for n in names(run) if n.startswith((".writing", ".removing"))]
        found.append(state["tag"])
        save(store, 9, learners=Learners("new"))
        assert names(run) == ["latest", "step_000009"]
    assert found[:10] == ["old"] * 10  # no byte of a file that is not finished counts
    assert found[10:] == sorted(found[10:], reverse=True) and found[-1] == "new"  # old up to one operation, then new
