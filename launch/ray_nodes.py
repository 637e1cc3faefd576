"""Wait until every node of a Ray cluster has joined; say which one has not. Used by the launchers and their tests.

    python launch/ray_nodes.py ADDRESS SECONDS NAME=IP [NAME=IP ...]

Asks Ray's control process only; the token comes from the environment. Several nodes may have one IP. Exit status 1 and
one line on stderr when the time is over.
"""

from __future__ import annotations

import sys
import time
from collections import Counter

from ray._raylet import GcsClient

ALIVE = 0  # GcsNodeInfo.GcsNodeState
POLL_S = 0.3


def missing(address: str, nodes: list[tuple[str, str]]) -> list[str]:
    """Names of the nodes that are not there. Raises what the client raises while nothing answers at `address`."""
    found = GcsClient(address=address).get_all_node_info(timeout=10)
    there = Counter(node.node_manager_address for node in found.values() if node.state == ALIVE)
    absent = []
    for name, ip in nodes:
        if there[ip]:
            there[ip] -= 1
        else:
            absent.append(name)
    return absent


def main(address: str, seconds: str, *words: str) -> int:
    nodes = [(name, ip) for name, _, ip in (word.partition("=") for word in words)]
    end = time.monotonic() + float(seconds)
    reason = f"Ray does not answer at {address}"
    while time.monotonic() < end:
        try:
            absent = missing(address, nodes)
        except Exception as e:  # Ray's client has no class of its own for "not up yet"
            reason = f"Ray does not answer at {address}: {' '.join(str(e).split())[:200]}"
        else:
            if not absent:
                return 0
            reason = f"did not join: {', '.join(absent)}"
        time.sleep(POLL_S)
    print(f"{reason} (within {seconds} s)", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
