"""Start Ray on this machine, reachable by this user alone, or join a cluster."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import signal
import tempfile
import threading
from pathlib import Path

import ray

from tatar_dist.config.schema import Config
from tatar_dist.errors import UserError
from tatar_dist.run.process import short_temp_dir


def start_ray(config: Config, address: str | None, cores: int) -> None:
    """Join the cluster at `address`, or start Ray here for `config`'s actors. Raises UserError."""
    c = config.cluster
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            ray.init(address=address, **quiet)
            return
        _require_token()
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False  # every port on loopback
        elsewhere = {}
        if "RAY_TMPDIR" not in os.environ and (place := short_temp_dir()) != Path(tempfile.gettempdir()):
            elsewhere = {"_temp_dir": str(_own(place))}
        most = max(1, c.gpus_per_node)  # of a number that is left to the plan
        need = 2 + (c.learners or most) * c.learner_cpus + (config.rollout.engines or most) * c.engine_cpus
        ray.init(
            address="local",  # without it Ray joins whatever another run has started on this machine
            num_cpus=max(cores, int(need + 1)),  # logical: processes on a laptop take turns on its cores
            include_dashboard=False,
            object_store_memory=c.object_store_mib << 20,
            **elsewhere,
            **quiet,
        )
    except UserError:
        raise
    except Exception as e:  # Ray raises a bare Exception where a node does not come up in time
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(f"Ray did not start: {reason} (cluster.address={address})") from e
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # ray.init takes it for itself: no checkpoint, no clean end


def _own(place: Path) -> Path:
    """Make a directory of this process in `place`, deleted at its end."""
    directory = Path(tempfile.mkdtemp(prefix="tatar-", dir=place))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def _require_token() -> None:
    """Authenticate by token on the Ray we start: nobody else on this machine may submit work."""
    if "RAY_AUTH_MODE" in os.environ:
        return
    fd, path = tempfile.mkstemp(prefix="tatar-ray-token-")  # mode 600
    with os.fdopen(fd, "w") as f:
        f.write(secrets.token_hex(32))
    atexit.register(Path(path).unlink, missing_ok=True)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": path}
    ray._raylet.Config.initialize("")  # Ray cached the mode when it was imported
