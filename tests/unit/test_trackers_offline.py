"""The real W&B and MLflow clients, offline: what a run logged is in their files, a resumed run goes on in its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tatar_dist.config.load import load_config
from tatar_dist.run.events import Events, read_events
from tatar_dist.run.tracking import IDS, Trackers

pytestmark = pytest.mark.xdist_group("trackers")  # who share one run
NAN = float("nan")
BLOCK, HEADER, IDENT = 32768, 7, 7  # of a .wandb file: LevelDB's log format behind an identifier


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of three steps, and its continuation from step 2 to 4."""
    path = tmp_path_factory.mktemp("tracked") / "run"
    path.mkdir()
    words = [f"output={path}", "model.path=unused", "track.tensorboard=false", "track.wandb=true", "track.mlflow=true"]
    config = load_config([], words)
    for first, last in ((0, 3), (2, 5)):
        trackers = Trackers(config, path, Events(path))
        for step in range(first, last):
            trackers.log(step, {"loss/total": 1 / (step + 1), "eval/a-b.c/srcc": NAN if step == 1 else 0.5})
        trackers.close()
    assert not read_events(path), "a tracker failed"
    return path


def records(file: Path) -> list:
    """The protobuf records of an offline W&B run."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, found, whole = file.read_bytes(), IDENT, [], b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # padding at the end of a block
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # a whole one, or the last part of one
            found.append(Record.FromString(whole))
            whole = b""
    return found


def test_wandb_has_every_step_under_one_id(run):
    ids = json.loads((run / IDS).read_text())
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime_ns)
    assert len(files) == 2
    logged = []
    for file in files:
        found = records(file)
        assert {r.run.run_id for r in found if r.WhichOneof("record_type") == "run"} == {ids["wandb"]}
        assert [r.exit.exit_code for r in found if r.WhichOneof("record_type") == "exit"] == [0]
        for r in found:
            if r.WhichOneof("record_type") == "history":
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in r.history.item}
                logged.append((items["step"], items["loss/total"], items.get("eval/a-b.c/srcc")))
    assert [step for step, *_ in logged] == [0, 1, 2, 2, 3, 4]
    assert all(loss == pytest.approx(1 / (step + 1)) for step, loss, _ in logged)
    assert [srcc for *_, srcc in logged] == [0.5, None, 0.5, 0.5, 0.5, 0.5]


def test_mlflow_has_every_step_in_one_finished_run_with_its_configuration(run):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run}/mlflow.db")
    experiment = client.get_experiment_by_name("tatar_dist")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == json.loads((run / IDS).read_text())["mlflow"]
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    history = {m.step: m.value for m in client.get_metric_history(found.info.run_id, "loss/total")}
    assert history == {step: pytest.approx(1 / (step + 1)) for step in range(5)}
    assert {m.step for m in client.get_metric_history(found.info.run_id, "eval/a-b.c/srcc")} == {0, 2, 3, 4}
    assert [a.path for a in client.list_artifacts(found.info.run_id)] == ["config.yaml"]
    assert list((run / "mlflow").rglob("config.yaml"))


def test_offline_mlflow_tells_its_makers_nothing(tmp_path):
    """In a process that does not look like a test, where MLflow's telemetry is off by itself."""
    code = """
import sys
from pathlib import Path
from tatar_dist.run import tracking
from tatar_dist.config.load import load_config
run = Path(sys.argv[1])
tracking.MLflow(load_config([], [f"output={run}", "model.path=unused"]), run, 0).close()
from mlflow.telemetry.utils import is_telemetry_disabled  # its client says nothing: without a network it goes by itself
print(is_telemetry_disabled())
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "CI", "MLFLOW", "GITHUB"))}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["True"], done.stdout + done.stderr
