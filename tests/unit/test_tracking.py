"""Trackers: they neither end a run nor hold it up, ids survive a resume, a missing package is said with the extra that
brings it."""

from __future__ import annotations

import json
import statistics
import threading
import time
from pathlib import Path

import pytest

from tatar_dist.cli import main
from tatar_dist.config.load import load_config
from tatar_dist.config.schema import Config
from tatar_dist.errors import UserError
from tatar_dist.run import tracking
from tatar_dist.run.directory import RunDirectory, read_metrics
from tatar_dist.run.events import Events, read_events
from tatar_dist.run.tracking import IDS, Trackers, has_wandb_key, kept_id


def config(path: Path, *words: str) -> Config:
    return load_config([], [f"output={path}", "model.path=unused", *words])


class Fragile:
    """A tracker of this test: notes what it gets, and fails at step 1."""

    def __init__(self, config: Config, run: Path, step: int) -> None:
        self.got: list[tuple[int, dict]] = []
        Fragile.made = [*getattr(Fragile, "made", []), self]

    def log(self, step, metrics):
        if step == 1:
            raise ConnectionError("server is gone\nand more")
        self.got.append((step, dict(metrics)))

    def close(self):
        raise OSError("cannot close either")


class Steady(Fragile):
    def log(self, step, metrics):
        self.got.append((step, dict(metrics)))

    def close(self):
        self.got.append((-1, {}))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_one_line_with_the_extra_before_anything_runs(tmp_path, name, capsys, monkeypatch):
    found = tracking.find_spec  # of a machine without the package, whatever this one has
    monkeypatch.setattr(tracking, "find_spec", lambda package: None if package == name else found(package))
    with pytest.raises(UserError, match=rf"track.{name}=true: package {name} is not .*'tatar_dist\[{name}\]'"):
        RunDirectory(config(tmp_path / "run", f"track.{name}=true"))
    recipe = str(Path(__file__).parents[2] / "configs" / "sft.yaml")
    words = [f"output={tmp_path / 'sft'}", f"track.{name}=true", "cluster.gpus_per_node=0"]
    assert main(["sft", "--config", recipe, *words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"tatar-dist: track.{name}=true: package {name} is not installed")
    RunDirectory(config(tmp_path / "run")).close()  # the lock was let go


def test_a_tracker_that_fails_is_warned_about_once_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    Fragile.made = []
    run = config(tmp_path, "track.mlflow=false", "track.wandb=false")
    monkeypatch.setitem(tracking.KINDS, "tensorboard", Fragile)
    trackers = Trackers(run, tmp_path, Events(tmp_path))
    monkeypatch.setitem(tracking.KINDS, "tensorboard", Steady)
    also = Trackers(run, tmp_path, Events(tmp_path))
    for step in range(4):
        for each in (trackers, also):
            each.log(step, {"a": float(step), "b": float("nan")})
    trackers.close()
    also.close()
    fragile, steady = Fragile.made
    assert fragile.got == [(0, {"a": 0.0})]
    assert steady.got == [*((i, {"a": float(i)}) for i in range(4)), (-1, {})]
    warned = capsys.readouterr().err
    assert warned.count("tensorboard failed and is left out from now on: ConnectionError: server is gone") == 1
    assert "metrics.jsonl has every step" in warned and "track.tensorboard=false" in warned
    failed = [e for e in read_events(tmp_path) if e["event"] == "tracker/failed"]
    assert [(e["tracker"], e["reason"]) for e in failed] == [
        ("tensorboard", "ConnectionError: server is gone and more")
    ]


def wait_for(condition) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


class Asleep(Steady):
    """A tracker whose server does not answer: it waits in one of its calls until it is woken."""

    where, asleep = "", False

    def __init__(self, config, run, step):
        self.awake, self.closed = threading.Event(), threading.Event()
        super().__init__(config, run, step)
        self.wait("open")

    def wait(self, where: str) -> None:
        if where == Asleep.where:
            self.asleep = True
            assert self.awake.wait(500), "nobody woke the tracker of this test"
            self.asleep = False

    def log(self, step, metrics):
        self.wait("log")
        super().log(step, metrics)

    def close(self):
        self.wait("close")
        super().close()
        self.closed.set()


@pytest.mark.parametrize(
    ("where", "behind", "reason"),
    [
        ("open", 30, "more than 30 steps behind"),
        ("log", 30, "more than 30 steps behind"),
        ("open", 1000, "did not close within 2 s; its last steps may be missing there"),
        ("log", 1000, "did not close within 2 s; its last steps may be missing there"),
        ("close", 1000, "did not close within 2 s; its last steps may be missing there"),
    ],
)
def test_a_tracker_that_hangs_holds_no_step_up(tmp_path, capsys, monkeypatch, where, behind, reason):
    monkeypatch.setattr(tracking, "BEHIND", behind)
    monkeypatch.setattr(tracking, "CLOSE_S", 2.0)
    monkeypatch.setattr(Asleep, "where", where)
    Fragile.made = []
    monkeypatch.setattr(tracking, "KINDS", {"tensorboard": Asleep, "json": Steady})
    run = config(tmp_path)
    object.__setattr__(run.track, "json", True)  # another one beside it; a package that is there
    trackers = Trackers(run, tmp_path, Events(tmp_path))

    def made(kind: type) -> list:
        return [t for t in Fragile.made if type(t) is kind]

    took = []
    for step in range(40):
        start = time.perf_counter()
        trackers.log(step, {"a": float(step)})
        took.append(time.perf_counter() - start)
        # the one beside it has kept up, and the other has got as far as it will
        wait_for(lambda step=step: made(Steady) and made(Steady)[-1].got[-1:] == [(step, {"a": float(step)})])
        wait_for(lambda step=step: made(Asleep)[0].asleep or made(Asleep)[0].got[-1:] == [(step, {"a": float(step)})])
    trackers.log(40, {"a": 40.0})
    wait_for(lambda: made(Steady)[-1].got[-1:] == [(40, {"a": 40.0})])
    (asleep,) = made(Asleep)
    assert asleep.asleep == (where != "close")
    trackers.close()
    assert asleep.asleep, "all that came before has returned, and nobody has woken it"
    assert statistics.median(took) < 0.2, "it is not waited for at any step"
    trackers.log(41, {"a": 41.0})
    trackers.close()
    warned = capsys.readouterr().err
    assert warned.count(f"tensorboard failed and is left out from now on: TimeoutError: {reason}") == 1
    assert [e["tracker"] for e in read_events(tmp_path) if e["event"] == "tracker/failed"] == ["tensorboard"]
    assert [s for t in made(Steady) for s, _ in t.got] == [*range(41), -1, 41, -1]
    asleep.awake.set()
    assert asleep.closed.wait(300)  # when its server answers at last, it is closed and its thread ends


def test_wandb_online_without_a_key_is_refused_because_it_would_ask_on_the_terminal(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(file))
    assert not has_wandb_key()
    monkeypatch.setattr(tracking, "find_spec", lambda name: name)
    words = ["track.wandb=true", "track.mode=online"]
    with pytest.raises(UserError, match="track.mode=online: there is no key .*: set WANDB_API_KEY, run `wandb login`"):
        RunDirectory(config(tmp_path / "run", *words))
    file.write_text("machine api.wandb.ai login user password " + "k" * 40)
    assert has_wandb_key()
    RunDirectory(config(tmp_path / "other", *words)).close()
    monkeypatch.setenv("WANDB_BASE_URL", "https://our.server:8080/")
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert has_wandb_key()


def test_tensorboard_without_a_place_costs_the_curves_and_not_the_run(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file is in the way")
    with RunDirectory(config(tmp_path)) as run:
        for step in range(3):
            run.log(step, {"loss/total": 1.0})
        assert [row["step"] for row in read_metrics(run.path)] == [0, 1, 2]
    assert capsys.readouterr().err.count("tensorboard failed and is left out") == 1


def test_no_tracker_is_asked_for_and_none_is_written(tmp_path):
    with RunDirectory(config(tmp_path, "track.tensorboard=false")) as run:
        run.log(0, {"loss/total": 1.0})
    assert not (tmp_path / "tensorboard").exists() and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_resumed_run_keeps_its_ids_and_one_that_begins_anew_gets_others(tmp_path):
    with RunDirectory(config(tmp_path)) as run:
        assert [kept_id(tmp_path, n, lambda n=n: f"{n}-1") for n in ("wandb", "mlflow")] == ["wandb-1", "mlflow-1"]
        run.rewind(5)
        assert kept_id(tmp_path, "wandb", lambda: "other") == "wandb-1"
    with RunDirectory(config(tmp_path)) as run:
        run.rewind(5)
        assert json.loads((tmp_path / IDS).read_text()) == {"wandb": "wandb-1", "mlflow": "mlflow-1"}
        run.rewind(0)
        assert kept_id(tmp_path, "wandb", lambda: "other") == "other"


def test_mode_is_one_of_two(tmp_path):
    with pytest.raises(UserError, match="track.mode='dryrun': must be one of offline, online"):
        config(tmp_path, "track.mode=dryrun")
