"""Experiment trackers: a run's metrics in TensorBoard, Weights & Biases and MLflow, by the config section `track`.

Offline they write to `tensorboard/`, `wandb/` and `mlflow.db` of the run directory. Online, each follows its own
environment variables (WANDB_API_KEY, MLFLOW_TRACKING_URI). `trackers.json` keeps the ids, so that a resumed run
continues the same W&B and MLflow run; from step 0 it is a new one. Each tracker has a thread of its own. The run waits
for it only at its end, and there not for long. A tracker that fails or hangs is warned about once and left out; the run
goes on, and metrics.jsonl has everything.

W&B and MLflow are extras. Tests run both offline (tests/unit/test_trackers_offline.py); online they were never run.
"""

from __future__ import annotations

import json
import logging
import math
import netrc
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

from tatar_dist.config.schema import Config, to_yaml
from tatar_dist.errors import UserError
from tatar_dist.run.events import Events
from tatar_dist.run.files import write_whole

IDS = "trackers.json"
BEHIND = 1000  # steps that may wait for a tracker; it misses what comes then
OPEN_S = 120.0  # to open
CLOSE_S = 30.0  # all together, to write what waits and to close

_ids_lock = threading.Lock()


class Tracker(Protocol):
    """Where metrics go. Its constructor takes (config, run directory, first step)."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """All values are finite."""

    def close(self) -> None: ...


class TensorBoard:
    """RUN/tensorboard. What an earlier process wrote of the steps that are run again is hidden."""

    def __init__(self, config: Config, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run; `step` is a metric of ours and the axis of all others, because W&B's own counter would
    drop the steps that a resumed run repeats. `wandb sync RUN/wandb/offline-*` uploads what was written offline."""

    def __init__(self, config: Config, run: Path, step: int) -> None:
        if config.track.mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # to its makers; read at the import
        import wandb

        t = config.track
        self._run = wandb.init(
            project=t.project,
            name=t.name or run.name,
            id=kept_id(run, "wandb", lambda: secrets.token_hex(4)),
            resume="allow",
            mode=cast(Any, t.mode),  # config/rules.py knows which there are
            dir=str(run),
            config=asdict(config),
            settings=wandb.Settings(silent=True),  # it prints nothing between our lines, and asks nothing
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """An MLflow run in the experiment `track.project`; offline in RUN/mlflow.db, where
    `mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db` shows it."""

    def __init__(self, config: Config, run: Path, step: int) -> None:
        if config.track.mode == "offline":
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read at the import
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table that it makes
        t, offline = config.track, config.track.mode == "offline"
        self._client = MlflowClient(f"sqlite:///{run.absolute()}/mlflow.db" if offline else None)
        files = (run.absolute() / "mlflow").as_uri() if offline else None

        def create() -> str:
            known = self._client.get_experiment_by_name(t.project)
            experiment = known.experiment_id if known else self._client.create_experiment(t.project, files)
            created: str = self._client.create_run(experiment, run_name=t.name or run.name).info.run_id
            self._client.log_text(created, to_yaml(config), "config.yaml")
            return created

        self._id = kept_id(run, "mlflow", create)
        self._client.update_run(self._id, status="RUNNING")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


KINDS: dict[str, Callable[[Config, Path, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def check_trackers(config: Config, kinds: Mapping[str, Any] = KINDS) -> None:
    """Raises UserError: the package of a tracker that is asked for is not installed, or it has no key to go online."""
    wanted = [name for name in kinds if getattr(config.track, name)]
    for name in wanted:
        if find_spec(name) is None:
            extra = "" if name == "tensorboard" else f" (pip install 'tatar_dist[{name}]')"
            raise UserError(
                f"track.{name}=true: package {name} is not installed: install it{extra}, or set track.{name}=false"
            )
    if "wandb" in wanted and config.track.mode == "online" and not has_wandb_key():
        raise UserError(
            "track.mode=online: there is no key for Weights & Biases: set WANDB_API_KEY, run `wandb login`, or set "
            "track.mode=offline"
        )


class _Thread:
    """A tracker in a daemon thread, which opens it, gives it what is put, and closes it. No call here waits for it."""

    def __init__(self, name: str, make: Callable[[], Tracker], clock: Callable[[], float]) -> None:
        self.missed = 0  # steps
        self._clock = clock
        self._error: Exception | None = None
        self._opened = False
        self._late = clock() + OPEN_S
        self._waiting: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, args=(make,), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def _work(self, make: Callable[[], Tracker]) -> None:
        try:
            tracker = make()
            self._opened = True
            while (step := self._waiting.get()) is not None:
                tracker.log(*step)
            tracker.close()
        except Exception as e:  # any library's, any network's
            self._error = e

    @property
    def error(self) -> Exception | None:
        """What it failed with, also by not opening in time."""
        if self._error is None and not self._opened and self._clock() > self._late:
            return TimeoutError(f"not open after {OPEN_S:g} s")
        return self._error

    def put(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._waiting.qsize() < BEHIND:
            self._waiting.put((step, metrics))
        else:
            self.missed += 1

    def end(self) -> None:
        """Let it write what waits and close."""
        self._waiting.put(None)

    def ended(self, until: float) -> Exception | None:
        """Wait for that, until a time of the clock at most; what it failed with."""
        self._thread.join(max(0.0, until - self._clock()))
        if self._thread.is_alive():
            return TimeoutError(f"did not close within {CLOSE_S:g} s; its last steps may be missing there")
        return self._error

    def leave(self) -> None:
        """Should it come back to life, it closes at once."""
        with suppress(queue.Empty):
            while True:
                self._waiting.get_nowait()
        self._waiting.put(None)


class Trackers:
    """The trackers that the config asks for, opened at the first `log`.

    Raises:
        UserError: one needs a package that is not installed, or W&B a key, which it would ask for on the terminal.
    """

    def __init__(
        self,
        config: Config,
        run: Path,
        events: Events,
        kinds: Mapping[str, Callable[..., Tracker]] = KINDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config, self.run, self.events, self.kinds, self.clock = config, run, events, kinds, clock
        self._wanted = [name for name in kinds if getattr(config.track, name)]
        self._open: dict[str, _Thread] = {}
        check_trackers(config, kinds)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """To every tracker, without values that are not finite. Raises nothing that a tracker raises; never waits."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for name in list(self._wanted):
            if name not in self._open:
                self._open[name] = _Thread(name, partial(self.kinds[name], self.config, self.run, step), self.clock)
            thread = self._open[name]
            if (error := thread.error) is not None:
                self._leave(name, error)
                continue
            missed = thread.missed
            thread.put(step, finite)
            if thread.missed and not missed:
                _warn(f"{name} is {BEHIND} steps behind: it misses steps from {step} on until it has caught up")

    def rewind(self, step: int) -> None:
        """The run goes on at `step`; at 0 it is another one."""
        self.close()
        if step == 0:
            (self.run / IDS).unlink(missing_ok=True)

    def close(self) -> None:
        """Within CLOSE_S. They open again at the next `log`."""
        for thread in self._open.values():
            thread.end()
        until = self.clock() + CLOSE_S
        for name, thread in list(self._open.items()):
            if (error := thread.ended(until)) is not None:
                self._leave(name, error)
        self._open.clear()

    def _leave(self, name: str, error: Exception) -> None:
        self._wanted.remove(name)
        self._open.pop(name).leave()
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        logging.getLogger(__name__).warning("%s failed and is left out", name, exc_info=error)
        _warn(f"{name} failed and is left out from now on: {reason}")
        self.events.log("tracker/failed", tracker=name, reason=reason)


def _warn(text: str) -> None:
    print(f"tatar-dist: {text}", file=sys.stderr)


def has_wandb_key() -> bool:
    """Whether W&B finds a key where it looks for one: in its variables, or in the netrc file, where `wandb login` puts
    it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc").authenticators(host) is not None
    except (OSError, ValueError, netrc.NetrcParseError):
        return False


def kept_id(run: Path, name: str, make: Callable[[], str]) -> str:
    """The id that trackers.json of `run` has for `name`, or a new one, which it then has."""
    file = run / IDS
    if (found := _ids(file).get(name)) is not None:
        return found
    made = make()
    with _ids_lock:  # trackers open at the same time
        write_whole(file, json.dumps(_ids(file) | {name: made}))
    return made


def _ids(file: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    return found
