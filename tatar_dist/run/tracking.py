"""Trackers of a run's metrics by section `track`: TensorBoard, Weights & Biases, MLflow.

`trackers.json` keeps ids, so that a resumed run continues the same W&B and MLflow run; from step 0 it is a new one.
Each tracker has a thread: MLflow's client blocks, and W&B and TensorBoard, which queue by themselves, block when they
open and close. Tests run W&B and MLflow offline (tests/unit/test_trackers_offline.py); online they were never run.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast

from tatar_dist.config.schema import Config, to_yaml
from tatar_dist.errors import UserError
from tatar_dist.run.events import Events
from tatar_dist.run.files import write_whole

IDS = "trackers.json"
BEHIND = 1000  # steps that may wait for a tracker: with more it is taken to hang
CLOSE_S = 30.0  # for all trackers together to write what waits and to close

_ids_lock = threading.Lock()


class Tracker(Protocol):
    """A tracker, made from (config, run directory, first step); its calls may block and fail."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step, all finite."""

    def close(self) -> None: ...


class TensorBoard:
    """Write to RUN/tensorboard; repeated steps replace what an earlier process wrote of them."""

    def __init__(self, config: Config, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Write to a Weights & Biases run; `wandb sync RUN/wandb/offline-*` uploads an offline one."""

    def __init__(self, config: Config, run: Path, step: int) -> None:
        if config.track.mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read at the import
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
            settings=wandb.Settings(silent=True),  # print nothing between our lines, ask nothing
        )
        self._run.define_metric("step")  # the axis: W&B's own counter drops steps that a resumed run repeats
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """Write to an MLflow run; offline: `mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db`."""

    def __init__(self, config: Config, run: Path, step: int) -> None:
        if config.track.mode == "offline":
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read at the import
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it logs every table that it creates
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


def check_trackers(config: Config) -> list[str]:
    """Return the names of the trackers that the config asks for.

    Raises:
        UserError: the package of one is not installed, or W&B has no key to go online: it would ask on the terminal.
    """
    wanted = [name for name in KINDS if getattr(config.track, name)]
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
    return wanted


def has_wandb_key() -> bool:
    """Return whether W&B finds a key in its environment or the netrc file of `wandb login`."""
    from requests.utils import get_netrc_auth  # a dependency of wandb

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    return get_netrc_auth(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai") is not None


class _TrackerThread(threading.Thread):
    """Open a tracker, write `steps` put to it, close it at None. Daemon: ends with the process."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        super().__init__(name=f"tracker {name}", daemon=True)
        self.make = make
        self.steps: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue()
        self.error: Exception | None = None
        self.left_out = False  # what waits is not written any more
        self.start()

    def run(self) -> None:
        try:
            tracker = self.make()
            while (step := self.steps.get()) is not None and not self.left_out:
                tracker.log(*step)
            tracker.close()
        except Exception as e:  # any library's, any network's
            self.error = e


class Trackers:
    """The configured trackers, opened at the first `log`. Raises UserError as `check_trackers`."""

    def __init__(self, config: Config, run: Path, events: Events) -> None:
        self.config, self.run, self.events = config, run, events
        self._wanted = {name: KINDS[name] for name in check_trackers(config)}
        self._open: dict[str, _TrackerThread] = {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand finite values to every tracker. Never waits, raises nothing that a tracker raises."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for name, kind in list(self._wanted.items()):
            if name not in self._open:
                self._open[name] = _TrackerThread(name, partial(kind, self.config, self.run, step))
            thread = self._open[name]
            thread.steps.put((step, finite))
            if thread.error is not None:
                self._leave_out(name, thread.error)
            elif thread.steps.qsize() > BEHIND:
                self._leave_out(name, TimeoutError(f"more than {BEHIND} steps behind"))

    def rewind(self, step: int) -> None:
        """Close the trackers: logging continues at `step`. Step 0 starts a new run, with new ids."""
        self.close()
        if step == 0:
            (self.run / IDS).unlink(missing_ok=True)

    def close(self) -> None:
        """Close all within CLOSE_S; the next `log` opens them again."""
        for thread in self._open.values():
            thread.steps.put(None)
        deadline = time.monotonic() + CLOSE_S
        for name, thread in list(self._open.items()):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                late = f"did not close within {CLOSE_S:g} s; its last steps may be missing there"
                self._leave_out(name, TimeoutError(late))
            elif thread.error is not None:
                self._leave_out(name, thread.error)
        self._open.clear()

    def _leave_out(self, name: str, error: Exception) -> None:
        """Warn and stop using this tracker; should its blocked thread continue, it closes at once."""
        del self._wanted[name]
        thread = self._open.pop(name)
        thread.left_out = True
        thread.steps.put(None)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        logging.getLogger(__name__).warning("%s failed and is left out", name, exc_info=error)
        print(
            f"tatar-dist: {name} failed and is left out from now on: {reason}; metrics.jsonl has every step. "
            f"To use {name} again, mend the cause and restart the run, which resumes; or set track.{name}=false",
            file=sys.stderr,
        )
        self.events.log("tracker/failed", tracker=name, reason=reason)


def kept_id(run: Path, name: str, make: Callable[[], str]) -> str:
    """Return the id of `name` in trackers.json of `run`; if there is none, create it by `make`."""
    file = run / IDS
    ids = _ids(file)
    if name not in ids:
        created = make()  # may block: not under the lock
        with _ids_lock:  # trackers open at the same time
            ids = _ids(file) | {name: created}
            write_whole(file, json.dumps(ids))
    return ids[name]


def _ids(file: Path) -> dict[str, str]:
    return json.loads(file.read_text()) if file.exists() else {}
