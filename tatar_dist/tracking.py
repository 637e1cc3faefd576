"""Experiment trackers: a run's metrics in TensorBoard, Weights & Biases and MLflow, as config section `track` says.

In: what is logged at every step. Out, in the run directory: `tensorboard/`; in mode offline `wandb/` and `mlflow.db`.
Online, each goes where its own environment variables say (WANDB_API_KEY, MLFLOW_TRACKING_URI).
`trackers.json` keeps the ids, so that a resumed run continues the same W&B and MLflow run; from step 0 it is a new one.
Trackers are for looking: one that fails is warned about once and left out, the run goes on, metrics.jsonl has it all.

W&B and MLflow are extras, and their adapters here were written from their documentation and never run.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from tatar_dist.config import Config, to_yaml
from tatar_dist.errors import UserError
from tatar_dist.events import Events

IDS = "trackers.json"


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
        import wandb

        t = config.track
        self._run = wandb.init(
            project=t.project,
            name=t.name or run.name,
            id=kept_id(run, "wandb", lambda: secrets.token_hex(4)),
            resume="allow",
            mode=t.mode,
            dir=str(run),
            config=asdict(config),
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
        from mlflow import MlflowClient

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


class Trackers:
    """The trackers that the config asks for, opened at the first `log`.

    Raises:
        UserError: one needs a package that is not installed.
    """

    def __init__(
        self, config: Config, run: Path, events: Events, kinds: Mapping[str, Callable[..., Tracker]] = KINDS
    ) -> None:
        self.config, self.run, self.events, self.kinds = config, run, events, kinds
        self._wanted = [name for name in kinds if getattr(config.track, name)]
        self._open: dict[str, Tracker] = {}
        for name in self._wanted:
            if find_spec(name) is None:
                extra = "" if name == "tensorboard" else f" (pip install 'tatar_dist[{name}]')"
                raise UserError(
                    f"track.{name}=true: package {name} is not installed: install it{extra}, or set track.{name}=false"
                )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """To every tracker, without values that are not finite. Raises nothing that a tracker raises."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for name in list(self._wanted):
            try:
                if name not in self._open:
                    self._open[name] = self.kinds[name](self.config, self.run, step)
                self._open[name].log(step, finite)
            except Exception as e:  # any library's, any network's: a run of days must not end for a curve
                self._leave(name, e)

    def rewind(self, step: int) -> None:
        """The run goes on at `step`; at 0 it is another one."""
        self.close()
        if step == 0:
            (self.run / IDS).unlink(missing_ok=True)

    def close(self) -> None:
        """They open again at the next `log`."""
        while self._open:
            name, tracker = self._open.popitem()
            try:
                tracker.close()
            except Exception as e:
                self._leave(name, e)

    def _leave(self, name: str, error: Exception) -> None:
        self._wanted.remove(name)
        self._open.pop(name, None)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        logging.getLogger(__name__).warning("%s failed and is left out", name, exc_info=error)
        print(f"tatar-dist: {name} failed and is left out from now on: {reason}", file=sys.stderr)
        self.events.log("tracker/failed", tracker=name, reason=reason)


def kept_id(run: Path, name: str, make: Callable[[], str]) -> str:
    """The id that trackers.json of `run` has for `name`, or a new one, which it then has."""
    file = run / IDS
    ids: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    if name not in ids:
        ids[name] = make()
        beside = file.with_suffix(".tmp")
        beside.write_text(json.dumps(ids))
        os.replace(beside, file)
    return ids[name]
