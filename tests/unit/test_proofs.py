"""Records of gpu-check: they count for the machine and versions they were made with, and a failure revokes them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_proven import config

from tatar_dist.commands import doctor
from tatar_dist.plan import proven
from tatar_dist.run import gpus, proofs
from tatar_dist.run.gpus import Gpu, Machine

H100 = Machine("node", (Gpu(0, "NVIDIA H100 80GB HBM3", 80, 79, (9, 0), False),) * 2, "580.65.06", (13, 0), True)
NCCL = "cluster.gpus_per_node>0", "rollout.push=nccl"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gpus, "read_here", lambda: H100)
    return tmp_path / "tatar_dist" / "gpu-check.jsonl"


def passed(*parts, machine=H100, status="passed"):
    for part in parts:
        assert proofs.add(part, status, machine) is None


def test_a_record_is_found_as_it_was_written(cache):
    assert proofs.find(["sleep"], H100) is None
    passed("sleep", "packed")
    record = proofs.find(["sleep"], H100)
    assert record["card"] == "NVIDIA H100 80GB HBM3" and record["driver"] == "580.65.06" and record["count"] == 2
    assert record["versions"] == proofs.versions() and {"torch", "ray", "tatar_dist"} <= record["versions"].keys()
    assert proofs.find(["sleep", "packed"], H100)
    assert proofs.find([], H100) is None and proofs.find(["sleep"], Machine("without")) is None


@pytest.mark.parametrize("status", ["failed", "late"])
def test_a_later_failure_revokes_and_a_later_success_restores(status):
    passed("zero3", "engine")
    passed("engine", status=status)
    assert proofs.find(["zero3"], H100) and proofs.find(["zero3", "engine"], H100) is None
    passed("engine")
    assert proofs.find(["zero3", "engine"], H100)


def test_another_card_driver_or_version_does_not_count(monkeypatch):
    passed("sleep")
    a100 = replace(H100, gpus=(replace(H100.gpus[0], name="NVIDIA A100-SXM4-80GB"),))
    assert proofs.find(["sleep"], a100) is None
    assert proofs.find(["sleep"], replace(H100, driver="590.1")) is None
    assert proofs.find(["sleep"], replace(H100, driver="580.95", host="another node"))
    assert proofs.find(["sleep"], replace(H100, gpus=H100.gpus * 4)) is None, "two cards prove nothing of eight"
    passed("sleep", status="failed", machine=a100)
    assert proofs.find(["sleep"], H100)
    monkeypatch.setattr(proofs, "versions", lambda: {"torch": "2.14.0"})
    assert proofs.find(["sleep"], H100) is None


@pytest.mark.parametrize(
    "damage", ["[1, 2]\n", "\x00\xff" * 50 + "\n", '{"part": ["a"], "card": 3}\n', '{"part": "sleep", "ca']
)
def test_a_damaged_file_costs_the_damaged_lines_only(cache, damage):
    passed("sleep")
    with open(cache, "a") as f:
        f.write(damage)
    passed("packed")
    assert proofs.find(["sleep", "packed"], H100)


def test_a_place_that_cannot_be_written_is_a_note(cache):
    cache.parent.write_text("a file in place of the directory")
    note = proofs.add("sleep", "passed", H100)
    assert (
        note.startswith("the records of gpu-check cannot be written: ")
        and str(cache.parent) in note
        and proofs.find(["sleep"], H100) is None
    )
    cache.parent.unlink()
    cache.mkdir(parents=True)
    assert "directory" in proofs.add("sleep", "passed", H100) and proofs.find(["sleep"], H100) is None


def test_a_run_and_the_doctor_say_where_and_when_a_path_was_run():
    c = config(8, push="nccl")
    assert all(proven.NEVER in line and "`tatar-dist gpu-check`" in line for line in proven.warnings_for(c, "grpo"))
    passed("packed", "zero3", "engine", "push-nccl")
    date = proofs.find(["push-nccl"], H100)["date"]
    said = f"run on this machine on {date} (NVIDIA H100 80GB HBM3, driver 580.65.06)"
    assert [line.split("): ")[1] for line in proven.warnings_for(c, "grpo")] == [said + "."] * 2
    rows = {c.name: c for c in doctor._paths()}
    for path in proven.COVERAGE:
        row = rows[path.name]
        assert row.ok == (path.status != proven.NEVER or path.key in NCCL) and (said in row.found) == (path.key in NCCL)
    assert proven.unproven(c)  # a run checks its pushes all the same
    passed("zero3", status="late")
    assert "never run" in proven.warnings_for(c, "grpo")[0] and said in proven.warnings_for(c, "grpo")[1]


def test_every_part_that_a_path_names_exists():
    from tatar_dist.gpu_check.parts import PARTS

    assert {name for path in proven.COVERAGE for name in path.parts} <= {part.name for part in PARTS}


def test_without_a_home_directory_a_run_starts_and_gpu_check_goes_on(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(proofs.Path, "home", homeless)
    assert "home directory" in proofs.add("sleep", "passed", H100)
    assert "never run" in proven.warnings_for(config(gpus=2, push="nccl"), "grpo")[0]
