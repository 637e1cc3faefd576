"""Ray starts where TMPDIR is too long for its sockets, and in no other's directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tatar_dist.errors import UserError
from tatar_dist.run.process import short_temp_dir

LONGEST = 39  # of 107 bytes, beside /ray/session_DATE_TIME_MICROSECONDS_PID/sockets/plasma_store
START = """
import ray
from tatar_dist.cluster.ray_start import start_ray
from tatar_dist.config.load import load_config
start_ray(load_config([], ["output=unused", "model.path=m", "cluster.gpus_per_node=0", "cluster.learners=1"]), None, 1)
print(ray.get(ray.remote(lambda: 7).remote()), ray._private.worker._global_node.get_session_dir_path())
ray.shutdown()
"""


@pytest.mark.parametrize("length", [LONGEST, LONGEST + 1])
def test_a_temporary_directory_of_any_length_will_do(tmp_path_factory, length, tmp_path):
    place = Path("/tmp", "t" * (length - len("/tmp/")))
    place.mkdir()
    try:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"TMPDIR": str(place)}
        done = subprocess.run(
            [sys.executable, "-c", START], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        seven, session = done.stdout.split()
        assert seven == "7" and session.startswith(str(place)) == (length <= LONGEST)
        assert not Path(session).exists() or length <= LONGEST, "what is made elsewhere is deleted"
    finally:
        subprocess.run(["rm", "-rf", str(place)], check=True)


def test_no_short_directory_is_one_line(monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/" + "t" * 90)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="too long for the sockets that Ray makes in it.* at most 39 characters"):
        short_temp_dir()
