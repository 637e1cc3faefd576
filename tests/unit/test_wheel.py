"""The package from a wheel: its bundled files come along, and commands find them from any directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tatar_dist.assets import CONFIGS, TINY_MODEL, locate
from tatar_dist.cli import main
from tatar_dist.config.load import load_config

pytestmark = pytest.mark.xdist_group("wheel")  # who share one installation
ROOT = Path(__file__).parents[2]
COMMAND = """
import sys, tatar_dist
from tatar_dist.cli import main
assert tatar_dist.__file__.startswith(sys.argv.pop(1)), "not the wheel's package"
sys.exit(main(sys.argv[1:]))
"""
GROUP = '{"group_id": "a", "task": "iqa", "dataset": "d", "target": 50, "completion": "<answer>50.0</answer>"}\n'


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel of this checkout, unpacked where nothing else is."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    unbuilt = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("tatar_dist", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=unbuilt)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*pip, str(target), str(source)], check=True, capture_output=True, text=True)
    return target


@pytest.fixture
def run(installed, tmp_path):
    """`tatar-dist WORDS` of the wheel in an empty directory; returns (exit status, stdout, stderr)."""

    def run(*words):
        env = {**os.environ, "PYTHONPATH": str(installed)}
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, str(installed), *words],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    return run


def test_every_file_of_the_package_is_in_the_wheel(installed):
    kinds = (".py", ".yaml", ".j2", ".jinja", ".json", ".safetensors")  # pages and their pictures stay behind

    def files(root):
        found = (p for p in root.rglob("*") if p.suffix in kinds and "__pycache__" not in p.parts)
        return {str(p.relative_to(root)) for p in found}

    wheel = installed / "tatar_dist"
    assert files(ROOT / "tatar_dist") <= files(wheel)
    assert files(ROOT / "configs") <= files(wheel / "assets" / "configs")


def test_bundled_configs_are_found_by_name_from_any_directory(run, tmp_path):
    for name in ("grpo.yaml", "configs/grpo.yaml"):
        status, out, err = run("plan", "--config", name, "--stage", "grpo", "--json")
        assert status == 0 and '"stage": "grpo"' in out, err
        assert f"{name}: not in {tmp_path}, the bundled file is used" in err


def test_a_config_of_that_name_in_the_working_directory_comes_first(run, tmp_path):
    (tmp_path / "grpo.yaml").write_text("nonsense: 1\n")
    status, _, err = run("plan", "--config", "grpo.yaml")
    assert status == 2 and "unknown key 'nonsense'" in err


def test_the_bundled_model_is_found_by_name(run, installed):
    words = ("--config", "demo.yaml", "output=x", "--stage", "grpo", "--gpu-memory", "8", "--json")
    status, out, err = run("plan", *words, "cluster.gpus_per_node=3")
    assert status == 0 and '"memory": {' in out, err  # sizes are read from the model's config.json


def test_rewards_and_metrics_run_in_an_empty_directory(run, tmp_path):
    (tmp_path / "r.jsonl").write_text(GROUP * 2)
    assert run("rewards", "r.jsonl", "--preset", "tatar")[0] == 0
    (tmp_path / "m.jsonl").write_text('{"dataset": "d", "task": "iqa", "target": 50, "prediction": 51}\n' * 3)
    assert run("metrics", "m.jsonl")[0] == 0
    assert run("--help")[0] == 0


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "--config", "nowhere.yaml"],
        ["rewards", "nowhere.jsonl"],
        ["status", "nowhere"],
        ["report", "nowhere"],
        ["export", "nowhere", "--output", "x"],
        ["compare", "nowhere", "nowhere"],
        ["data", "validate", "nowhere.parquet"],
        ["score", "nowhere.png", "--model", "tiny-qwen2_5-vl"],
        ["sft", "--config", "sft.yaml", "output=x", "data.train=[nowhere.parquet]"],
        ["sft", "--config", "sft.yaml", "output=x", "data.train=[m.parquet]", "data.prompts=nowhere.yaml"],
        ["sft", "--config", "sft.yaml", "output=x", "data.train=[m.parquet]", "model.path=nowhere/"],
        ["sft", "--config", "./nowhere/sft.yaml", "output=x"],
        ["evaluate", "--config", "eval.yaml", "output=x", "data.test=[nowhere.parquet]"],
        ["data", "import", "KonIQ-10k", "--annotations", "nowhere.csv", "--images", ".", "--output", "x"],
        ["data", "sets", "--registry", "nowhere.yaml"],
        ["plan", "--config", "grpo.yaml", "--simulate", "--measured", "nowhere"],
        ["grpo", "--config", "grpo.yaml", "output=x", "data.train=[m.parquet]", "model.path=./no/nowhere"],
    ],
    ids=lambda words: " ".join(words[:1] + words[-1:]),
)
def test_a_missing_path_is_named_with_the_directory_it_was_looked_up_in(run, tmp_path, words):
    (tmp_path / "m.parquet").touch()
    status, _, err = run(*words)
    line = err.strip().splitlines()[-1]
    assert status == 2 and "nowhere" in line and str(tmp_path) in line, err
    assert not (tmp_path / "x").exists()  # nothing was begun


def test_only_a_bare_name_that_does_not_exist_means_a_bundled_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("grpo.yaml") == locate("configs/grpo.yaml") == CONFIGS / "grpo.yaml"
    assert locate("tiny-qwen2_5-vl") == locate("tatar_dist/assets/tiny-qwen2_5-vl") == TINY_MODEL
    for name in ("./grpo.yaml", "../grpo.yaml", "/grpo.yaml", "other/grpo.yaml", "probes", "", "Qwen/Qwen2.5-VL-7B"):
        assert locate(name) == Path(name)
    (tmp_path / "sft.yaml").symlink_to("gone.yaml")
    assert locate("sft.yaml") == Path("sft.yaml")


@pytest.mark.parametrize("path", ["runs/model/", "./runs/model", "runs//model", "Qwen/Qwen2.5-VL-7B-Instruct"])
def test_model_path_stands_as_it_was_given(path):
    """Checkpoints keep it, and a run continues only one of the same."""
    assert load_config([], ["output=x", f"model.path={path}"]).model.path == path


def test_a_package_that_is_not_installed_is_named_and_a_broken_one_keeps_its_traceback(monkeypatch, capsys):
    def fail(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("tatar_dist.cli.app", lambda **_: fail("ray"))
    assert main(["sft"]) == 2
    assert (
        capsys.readouterr().err
        == "tatar-dist: ray is not installed: pip install 'tatar_dist[cpu]' or 'tatar_dist[cuda]'\n"
    )
    for broken in ("ray.gone", "numpy.gone", "numpy"):
        monkeypatch.setattr("tatar_dist.cli.app", lambda broken=broken, **_: fail(broken))
        with pytest.raises(ModuleNotFoundError):
            main(["sft"])
