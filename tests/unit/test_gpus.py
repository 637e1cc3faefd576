"""Which GPUs no run can use, and what the doctor says of them. A pretended driver answers in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pretended_driver import pretended_driver

from tatar_dist.commands import doctor
from tatar_dist.commands.doctor_gpus import checks
from tatar_dist.config.load import load_config
from tatar_dist.errors import UserError
from tatar_dist.plan.memory import check_fit
from tatar_dist.plan.plan import resolve
from tatar_dist.run.gpus import OTHERS, Gpu, Machine, check, problems

ROOT = Path(__file__).parents[2]
H100 = Gpu(0, "NVIDIA H100 80GB HBM3", 79.6, 79.1, (9, 0), False)
GOOD = Machine("node1", tuple(replace(H100, index=i) for i in range(8)), "580.65.06", (13, 0), True)


def with_gpu(index: int, **facts: object) -> Machine:
    return replace(GOOD, host="node2", gpus=tuple(replace(g, **facts) if g.index == index else g for g in GOOD.gpus))


def test_good_nodes_have_no_problem_and_the_smallest_gpu_counts():
    assert check([]) is None
    assert check([GOOD, with_gpu(3, gib=64.0)]) == 64.0


@pytest.mark.parametrize(
    ("machine", "line"),
    [
        (
            replace(GOOD, driver="535.104.05", cuda=(12, 2)),
            "node1: NVIDIA driver 535.104.05 offers CUDA 12.2, but 13.0 is needed: install driver 580 or newer",
        ),
        (
            with_gpu(5, name="Tesla V100-SXM2-32GB", capability=(7, 0)),
            "node2: GPU 5 (Tesla V100-SXM2-32GB) has compute capability 7.0, but 8.0 is needed: "
            f"{OTHERS} (and 1 more: tatar-dist doctor)",
        ),
        (
            with_gpu(0, mig=True),
            "node2: GPU 0 (NVIDIA H100 80GB HBM3) is divided by MIG, but a process needs whole GPUs: "
            f"run nvidia-smi -i 0 -mig 0 there, or {OTHERS}",
        ),
        (
            with_gpu(7, name="NVIDIA H200"),
            f"node2: GPU 7 (NVIDIA H200) is of another kind than the job's others (NVIDIA H100 80GB HBM3): {OTHERS}",
        ),
        (
            Machine("node3", error="Driver Not Loaded"),
            "node3: the NVIDIA driver does not answer (Driver Not Loaded): nvidia-smi must work there; "
            "after an update of the driver, reboot",
        ),
    ],
)
def test_a_problem_is_one_line_with_host_gpu_found_needed_and_what_to_set(machine, line):
    with pytest.raises(UserError) as e:
        check([GOOD, machine])
    assert str(e.value) == line


def test_fp8_engines_need_newer_gpus():
    gpu = {"name": "NVIDIA A100-SXM4-80GB", "capability": (8, 0)}
    a100 = Machine("node4", (replace(H100, **gpu),), "580.65.06", (13, 0))
    assert check([a100]) and check([GOOD], fp8=True)
    line = (
        "node4: GPU 0 (NVIDIA A100-SXM4-80GB) has compute capability 8.0, but 8.9 is needed: set rollout.quantization"
    )
    with pytest.raises(UserError) as e:
        check([a100], fp8=True)
    assert str(e.value).startswith(f"{line}=none, or {OTHERS}")


def test_a_newer_cuda_beside_an_older_driver_is_enough():
    assert not list(problems([replace(GOOD, driver="570.1", cuda=(13, 0))]))  # NVIDIA's compatibility package
    assert not list(problems([replace(GOOD, driver="590.1", cuda=(13, 1))]))


def test_two_kinds_are_found_between_nodes_too():
    a100 = tuple(replace(g, name="NVIDIA A100-SXM4-80GB", capability=(8, 0)) for g in GOOD.gpus[:2])
    (problem,) = problems([replace(GOOD, host="node2", gpus=a100), GOOD])
    assert problem.found.startswith("node2: GPU 0,1 (NVIDIA A100-SXM4-80GB) is of another kind")


def test_the_doctor_names_the_first_of_many_and_leaves_room():
    many = [replace(with_gpu(i, mig=True), host=f"node{i}") for i in range(6)]
    found = {c.name: c for c in checks(many, " of the nodes")}
    mig = found["MIG of the nodes"]
    assert (
        (mig.ok, mig.required) == (False, True) and mig.found.endswith("; and 3 more") and "node2: GPU 2" in mig.found
    )
    assert found["GPU driver of the nodes"].found == "580.65.06" and found["GPU driver of the nodes"].ok
    assert found["compute capability of the nodes"].found == "9.0"
    assert found["kinds of GPU of the nodes"].found == "48 x NVIDIA H100 80GB HBM3"
    (lost,) = [c for c in checks([Machine("node9", error="Driver Not Loaded")]) if not c.ok]
    assert lost.name == "GPU driver" and "node9" in lost.found


def test_memory_that_another_process_holds_is_a_note():
    taken = {c.name: c for c in checks([with_gpu(4, free=20.0)])}["GPU memory"]
    assert (taken.ok, taken.required) == (False, False) and "node2: GPU 4" in taken.hint


EXAMINE = """
import json, os, sys
from dataclasses import asdict
from tatar_dist.commands.doctor_gpus import examine
from tatar_dist.run.gpus import read_here
first = int(os.environ["FIRST"]) if "FIRST" in os.environ else None
print(json.dumps([asdict(read_here(first)), [asdict(c) for c in examine(cuda=True)]]))
"""


def examined(directory: Path, visible: str | None = None, **gpus: object) -> tuple[dict, dict[str, dict]]:
    """What a process is told by a pretended driver: the machine, and the doctor's checks by name."""
    environment = {**os.environ, **pretended_driver(directory, **gpus), "PYTHONPATH": str(ROOT)}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    environment |= {"CUDA_VISIBLE_DEVICES": visible} if visible is not None else {}
    done = subprocess.run([sys.executable, "-c", EXAMINE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    machine, found = json.loads(done.stdout)
    return machine, {c["name"]: c for c in found}


def test_a_machine_is_read_through_the_driver(tmp_path):
    other = {1: {"name": "NVIDIA T400", "capability": (7, 5), "gib": 4}}
    machine, found = examined(tmp_path, gpus=3, others=other, nvlink=False)
    assert [g["name"] for g in machine["gpus"]] == ["NVIDIA H100 80GB HBM3", "NVIDIA T400", "NVIDIA H100 80GB HBM3"]
    assert (machine["gpus"][1]["gib"], machine["gpus"][1]["capability"]) == (4.0, [7, 5])
    assert (machine["driver"], machine["cuda"], machine["nvlink"]) == ("580.65.06", [13, 0], False)
    assert {name for name, c in found.items() if not c["ok"]} >= {"compute capability", "kinds of GPU", "NVLink"}
    assert found["compute capability"]["required"] and not found["NVLink"]["required"]
    assert found["GPU driver"]["ok"] and found["MIG"]["ok"]


@pytest.mark.parametrize("visible", ["0,2", "GPU-00000000,GPU-00000002"])
def test_gpus_that_cuda_visible_devices_leaves_out_are_no_problem(tmp_path, visible):
    machine, found = examined(tmp_path, visible, gpus=3, others={1: {"name": "NVIDIA T400", "capability": (7, 5)}})
    assert [g["index"] for g in machine["gpus"]] == [0, 2]
    assert all(found[name]["ok"] for name in ("compute capability", "kinds of GPU", "NVLink", "GPU memory"))


def test_gpus_of_other_jobs_are_left_out_and_not_numbered(tmp_path):
    others = {0: {"gib": 0}, 2: {"name": "NVIDIA GB10", "gib": 1 / 1024}}
    machine, found = examined(tmp_path, "1,0", gpus=3, others=others)
    assert [(g["index"], g["name"], g["gib"]) for g in machine["gpus"]] == [
        (1, "NVIDIA GB10", 0.0),
        (0, "NVIDIA H100 80GB HBM3", 80.0),
    ]
    assert machine["error"] == "" and found["GPU driver"]["ok"]


def test_only_gpus_that_ray_has_are_read(tmp_path, monkeypatch):
    """Ray numbers those of CUDA_VISIBLE_DEVICES in its order; a machine may have another GPU for its display."""
    monkeypatch.setenv("FIRST", "2")
    machine, _ = examined(tmp_path, "3,1,0", gpus=4, others={0: {"name": "NVIDIA T400", "capability": (7, 5)}})
    assert [g["index"] for g in machine["gpus"]] == [3, 1]


def test_a_driver_that_does_not_answer_is_a_note_because_the_machine_may_only_plan(tmp_path):
    machine, found = examined(tmp_path, error=18)
    assert machine["gpus"] == [] and "mismatch" in machine["error"]
    assert not found["GPU driver"]["ok"] and not found["GPU driver"]["required"]


def test_kernel_caches_on_a_shared_file_system_are_a_note(tmp_path, monkeypatch):
    from tatar_dist.commands import doctor_gpus

    shared = str(tmp_path / "shared")
    monkeypatch.setenv("TRITON_CACHE_DIR", shared)
    monkeypatch.setattr(
        doctor_gpus, "file_system", lambda place: ("nfs4", True) if place == shared else ("ext4", False)
    )
    found = {c.name: c for c in doctor_gpus.examine(cuda=True)}["kernel caches"]
    assert not found.ok and not found.required and found.found == f"TRITON_CACHE_DIR={shared} (nfs4)"


def test_the_doctor_shows_what_is_wrong_first_and_the_rest_on_request():
    fine, note = doctor.DoctorCheck("fine", True, True, "1"), doctor.DoctorCheck("note", False, False, "2", "look")
    wrong = doctor.DoctorCheck("wrong", False, True, "3", "mend")
    paths = list(doctor._paths())
    given = [fine, note, wrong, *paths]
    assert list(doctor.as_table(given).columns[0].cells) == ["wrong", "note"]
    assert list(doctor.as_table(given, True).columns[0].cells)[:2] == ["wrong", "note"]
    assert len(list(doctor.as_table(given, True).columns[0].cells)) == len(given)
    never = sum(not c.ok for c in paths)
    assert doctor.verdict(given).splitlines() == [
        "[red]Wrong:[/] wrong. Nothing will run before that is put right.",
        f"{1 + len(paths) - never} checks are ok, {never} paths of the program were never run: tatar-dist doctor --all",
    ]
    assert "--all" not in doctor.verdict(given, True)
    assert not doctor.as_table([fine, *paths]).row_count


@pytest.mark.parametrize(
    ("stage", "gib", "words", "line"),
    [
        ("sft", 15, ["cluster.learners=8"], "gradients, optimizer of each learner take 17.4: a learner does not fit"),
        ("grpo", 24, ["cluster.learners=4"], "gradients, optimizer, reference of each learner take 38.6: a learner"),
        ("eval", 12, [], "weights of each engine take 15.4: an engine has no room for a sequence on a node"),
    ],
)
def test_a_gpu_that_the_states_alone_exceed_is_refused_with_what_to_set(stage, gib, words, line):
    config = load_config([str(ROOT / f"configs/{stage}.yaml")], ["model.path=Qwen/Qwen2.5-VL-7B-Instruct", *words])
    plan = resolve(config, "evaluate" if stage == "eval" else stage)
    with pytest.raises(UserError) as e:
        check_fit(config, plan, gib)
    assert str(e.value).startswith(f"the smallest GPU has {gib:.1f} GiB, and ") and line in str(e.value), str(e.value)


def test_a_node_whose_memory_the_offloaded_optimizer_exceeds_is_refused_with_what_to_do():
    words = ["model.path=Qwen/Qwen2.5-VL-7B-Instruct", "cluster.offload_optimizer=true"]
    config = load_config([str(ROOT / "configs/sft.yaml")], words)
    plan = resolve(config, "sft")
    check_fit(config, plan, 80.0, 300.0)
    with pytest.raises(UserError) as e:
        check_fit(config, plan, 80.0, 240.0)
    assert str(e.value) == (
        "cluster.offload_optimizer=true takes 251.3 GiB of a node's memory (gradients, optimizer, a checkpoint's copy)"
        "; the smallest node with GPUs has 240.0: add nodes, or train adapters (model.lora_rank=16)"
    )


def test_a_gpu_that_only_the_estimate_exceeds_is_a_warning_and_cpus_and_unknown_models_are_not_checked(capsys):
    config = load_config([str(ROOT / "configs/sft.yaml")], ["model.gradient_checkpointing=false"])
    plan = resolve(config, "sft")
    check_fit(config, plan, 30.0)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("tatar-dist: the smallest GPU has 30.0 GiB, and by the estimate a learner does not fit")
    check_fit(config, plan, None, 1.0)
    check_fit(replace(config, model=replace(config.model, path="somebody/else")), plan, 1.0)
    assert capsys.readouterr().err == ""
