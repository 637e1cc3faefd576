"""Run a command on a Ray cluster of hosts made of network namespaces: `python tests/cluster/on_hosts.py 2 COMMAND …`.

For benchmarks and by hand. The command runs on the first host, with RAY_ADDRESS and the token in its environment, and
sees this machine's files; its exit status is this one's. As root, after .ci/packages.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from hosts import Hosts
from ray_hosts import RayCluster


def main() -> int:
    count, command = int(sys.argv[1]), sys.argv[2:]
    with (
        tempfile.TemporaryDirectory() as directory,
        Hosts(count) as hosts,
        RayCluster(hosts, Path(directory)) as cluster,
    ):
        process = hosts[0].popen(command, cwd=Path.cwd(), env=cluster.env)
        return process.wait()


if __name__ == "__main__":
    sys.exit(main())
