"""What a client gets from TCP ports of a host, with or without a token. Run on any host:

    python stranger.py [--token FILE] [--harmless] IP PORT [PORT ...]     prints {"PORT": "verdict"} as JSON

`--harmless`: only questions that disturb nothing when they are answered.

Verdicts: `closed` (no connection), `http STATUS`, `grpc CODE` (the most that any known method gave: OK before others
before UNAUTHENTICATED), `talks` (sent bytes of neither), `silent` (took the connection and said nothing).
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

SECONDS = 5
# one harmless question to every service that Ray runs
METHODS = (
    "NodeInfoGcsService/GetAllNodeInfo",
    "CoreWorkerService/GetCoreWorkerStats",
    "NodeManagerService/GetNodeStats",
    "ReporterService/GetTraceback",
    "RayletDriver/Init",
)
COMMANDS = ("CoreWorkerService/PushTask", "CoreWorkerService/KillActor", "ObjectManagerService/Push")  # not harmless


def verdict(ip: str, port: int, token: str | None, harmless: bool) -> str:
    try:
        with socket.create_connection((ip, port), SECONDS) as s:
            s.settimeout(SECONDS)
            s.sendall(b"\0" * 64)
            talks = bool(_received(s))
    except OSError:
        return "closed"
    header = {"Authorization": f"Bearer {token}"} if token else {}
    for path in ("/", "/metrics"):
        connection = http.client.HTTPConnection(ip, port, timeout=SECONDS)
        try:
            connection.request("GET", path, headers=header)
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException):
            break
        finally:
            connection.close()
        if status not in (401, 403):
            return f"http {status}"
    else:
        return f"http {status}"
    if not talks:  # a gRPC server speaks first
        return "silent"
    return _grpc(ip, port, token, METHODS if harmless else (*METHODS, *COMMANDS)) or "talks"


def _received(s: socket.socket) -> bytes:
    try:
        return s.recv(64)
    except OSError:
        return b""


def _grpc(ip: str, port: int, token: str | None, methods: tuple[str, ...]) -> str | None:
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    codes = set()
    with grpc.insecure_channel(f"{ip}:{port}") as channel:
        for method in methods:
            try:
                channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=SECONDS, metadata=metadata)
                codes.add("OK")
            except grpc.RpcError as e:
                codes.add(e.code().name)
    codes -= {"UNIMPLEMENTED"}  # another service's port
    if codes == {"UNAVAILABLE"}:
        return None
    return "grpc " + min(codes, key=lambda c: (c != "OK", c == "UNAUTHENTICATED"), default="UNIMPLEMENTED")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--token", type=Path)
    parser.add_argument("--harmless", action="store_true")
    parser.add_argument("ip")
    parser.add_argument("ports", nargs="+", type=int)
    a = parser.parse_args()
    token = a.token and a.token.read_text()
    with ThreadPoolExecutor(8) as pool:
        verdicts = pool.map(lambda port: verdict(a.ip, port, token, a.harmless), a.ports)
        print(json.dumps(dict(zip(a.ports, verdicts, strict=True))))


if __name__ == "__main__":
    main()
