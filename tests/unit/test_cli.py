"""The command line: light to start, one clear line and exit status 2 for bad input, JSON where it prints results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tatar_dist import __version__
from tatar_dist.cli import app, main
from tatar_dist.commands import doctor, stages
from tatar_dist.errors import UserError

ROOT = Path(__file__).parents[2]
COMMANDS = [
    "rewards",
    "metrics",
    "data",
    "sft",
    "grpo",
    "evaluate",
    "score",
    "compare",
    "demo",
    "probes",
    "bench",
    "rationale",
    "plan",
    "status",
    "report",
    "export",
    "serve",
    "doctor",
    "gpu-check",
]


def rows(n=2, **extra):
    base = {"task": "iqa", "dataset": "d", "completion": "<think>sharp</think><answer>50</answer>"}
    return "".join(json.dumps({**base, "group_id": f"g{i}", "target": 50.0, **extra}) + "\n" for i in range(n))


def only_line(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("tatar-dist: ")
    return lines[0]


def test_starting_imports_nothing_heavy():
    heavy = ("torch", "ray", "vllm", "deepspeed", "transformers")
    code = f"import sys, tatar_dist.cli; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert main([command, "--help"]) == 0
    assert "Usage: tatar-dist " + command in capsys.readouterr().out


def test_every_command_that_takes_input_shows_an_example():
    commands = {c.callback.__name__.replace("_", "-"): c.callback for c in app.registered_commands}
    assert all("Example: [bold]tatar-dist " in f.__doc__ for f in commands.values())
    assert set(commands) | {"data", "rationale"} == set(COMMANDS)


def test_python_dash_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "tatar_dist", "nonsense"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr == "tatar-dist: No such command 'nonsense'.\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["grpo"], "--config"),
        (["grpo", "--config", "nowhere.yaml"], "nowhere.yaml: no such config file"),
        (["grpo", "--config", "configs/grpo.yaml", "grpo.groupsize=4", "--dry-run"], "grpo.group_size"),
        (["plan", "--config", "configs/grpo.yaml", "--stage", "train"], "'sft', 'grpo', 'evaluate'"),
        (["rewards", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["metrics", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(args, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(args) == 2
    assert said in only_line(capsys)


def test_ctrl_c_is_status_130(capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "_print_plans", interrupted)
    assert main(["plan", "--config", str(ROOT / "configs/grpo.yaml")]) == 130
    assert "interrupted" in only_line(capsys)


def test_an_error_of_a_remote_actor_is_told_by_its_cause(capsys, monkeypatch):
    class Wrapped(UserError):
        cause = UserError("disk is full")

    def fails(*_, **__):
        raise Wrapped("Traceback (most recent call last): …")

    monkeypatch.setattr(stages, "_print_plans", fails)
    assert main(["plan", "--config", str(ROOT / "configs/grpo.yaml")]) == 2
    assert only_line(capsys) == "tatar-dist: disk is full"


def test_dry_run_prints_the_split_and_makes_no_run_directory(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sft", "--config", str(ROOT / "configs/sft.yaml"), "cluster.nodes=4", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["learners"], found["split"]) == (32, {"rows": 128, "ranks": 32, "micro_tokens": 16384})
    assert list(tmp_path.iterdir()) == []


def test_plan_needs_no_output_and_counts_like_a_person(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["plan", "--config", "configs/demo.yaml", "--stage", "grpo", "data.train=[]"]) == 0
    said = capsys.readouterr().out
    assert "1 controller, 2 learners, 1 engine, 1 reward" in said and "1 vLLM engine " in said


def test_plan_shows_all_stages(capsys):
    assert main(["plan", "--config", str(ROOT / "configs/grpo.yaml"), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["sft", "grpo", "evaluate"]


def test_rewards_prints_lines_or_writes_them_and_sums_up(tmp_path, capsys):
    batch, out = tmp_path / "batch.jsonl", tmp_path / "out.jsonl"
    batch.write_text(rows())
    assert main(["rewards", str(batch), "--preset", "tatar"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["gaussian"] for line in lines] == [1.0, 1.0]
    assert main(["rewards", str(batch), "--preset", "tatar", "--output", str(out), "--json"]) == 0
    printed = capsys.readouterr().out
    summary = json.loads(printed)
    assert (summary["rows"], summary["parsed"], summary["mean"]["gaussian"]) == (2, 2, 1.0)
    assert printed.endswith("}\n"), "a whole line, for `while read`"
    assert [json.loads(line) for line in out.read_text().splitlines()] == lines


def test_metrics_names_the_bad_row(tmp_path, capsys):
    file = tmp_path / "p.jsonl"
    file.write_text(rows() + rows(1, target=200))
    assert main(["metrics", str(file)]) == 2
    assert f"{file}:3:" in only_line(capsys)


def test_metrics_prints_the_contract_as_json(tmp_path, capsys):
    file = tmp_path / "p.jsonl"
    file.write_text("".join(rows(1, target=t, prediction=t) for t in (10, 50, 90)))
    assert main(["metrics", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["datasets"]["d"]
    assert (found["n"], found["n_parsed"], found["srcc"]) == (3, 3, pytest.approx(1.0))


def test_doctor_json_says_ok_only_if_all_that_is_required_is():
    good, note = doctor.DoctorCheck("a", True, True, "1", "hint"), doctor.DoctorCheck("b", False, False, "?", "do this")
    found = doctor.as_json([good, note])
    assert found["ok"] and [c["hint"] for c in found["checks"]] == ["", "do this"]
    assert not doctor.as_json([doctor.DoctorCheck("c", False, True, "no", "install")])["ok"]


def test_doctor_names_a_tool_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = {c.name for c in doctor._tools() if c.required and not c.ok}
    assert missing == {"gcc", "g++"}


def test_version_is_the_package_version():
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_rewards_scores_each_of_several_files_as_its_own_batch(tmp_path, capsys):
    files = [tmp_path / f"step_{k}.jsonl" for k in range(2)]
    for k, file in enumerate(files):
        file.write_text(rows(2, task="iaa", dataset=f"d{k}"))
    assert main(["rewards", *map(str, files)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    words = ["--output", str(tmp_path / "out.jsonl"), "--json", "--advantage", "per_term"]
    assert main(["rewards", *map(str, files), *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["files"], found["rows"], found["parsed"]) == (2, 4, 4)
    assert (
        found["metrics"]["reward/frac_zero_std/total/iaa"] == 1.0 and found["metrics"]["reward/agreement/iaa"] is None
    )
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 4
    assert main(["rewards", *map(str, files), "--explain", "1"]) == 2
    assert only_line(capsys) == "tatar-dist: --explain looks at one file, give only that"
    assert main(["rewards", str(files[0]), "--advantage", "zscore"]) == 2
    assert "must be one of std, mean, per_term" in only_line(capsys)


@pytest.mark.parametrize("form", [["rollout.nothing=1"], ["--set", "rollout.nothing=1"]])
@pytest.mark.parametrize("command", [["score", "photo.jpg"], ["serve", "--port", "0"]])
def test_score_and_serve_take_config_keys_in_both_forms(command, form, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.jpg").touch()
    assert main([*command, *form, "--model", "tiny-qwen2_5-vl"]) == 2
    assert "rollout.nothing" in capsys.readouterr().err


def test_score_with_config_keys_alone_asks_for_a_picture(capsys):
    assert main(["score", "rollout.max_new_tokens=8", "--model", "tiny-qwen2_5-vl"]) == 2
    assert "rollout.max_new_tokens=8: config keys only: name a picture, too" in capsys.readouterr().err
