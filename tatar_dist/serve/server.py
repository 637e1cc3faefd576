"""Check the inputs and start vLLM's server for a model directory, in this process.

`run` takes a model directory, an address and config overrides. The server runs until Ctrl-C or SIGTERM and leaves no
process or socket behind. Picture sizes, dtype and prompts come from the model directory (scoring/directory.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import ipaddress
import logging
import os
import signal
import socket
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

import psutil

from tatar_dist.config.schema import Config
from tatar_dist.errors import EXIT_INTERRUPTED, RunError, UserError
from tatar_dist.plan.memory import check_fit
from tatar_dist.plan.plan import resolve
from tatar_dist.rollout.options import COMMON_ENV, engine_environment, gpu_available, set_environment, vllm_options
from tatar_dist.run.gpus import check_here
from tatar_dist.scoring.directory import model_config, run_of
from tatar_dist.types import TASKS

MIDDLEWARE = "tatar_dist.serve.middleware.Front"
NOWHERE = "nothing.invalid"  # the only host that vLLM may fetch pictures from: RFC 2606 reserves it, it never exists
SERVER_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "HF_HUB_OFFLINE": "1",
    # meant for other libraries; and a stopped engine leaves its shared memory to Python's resource tracker
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::UserWarning:multiprocessing.resource_tracker",
}
KILL_S = 10.0  # limit for killing the engine's processes: one that waits in the kernel does not end
CPU_SEQS = 16  # answers at once on a CPU, where each may take the room of a whole prompt in the batch


def run(model: Path, host: str, port: int, key_env: str | None, open_to_all: bool, words: list[str]) -> None:
    """Serve, then end the process: status 0, 1 if the engine died, 130 if stopped while loading.

    Args:
        key_env: environment variable that holds the API key.
        open_to_all: allow any host without a key.
        words: config overrides.

    Raises:
        UserError: no model of a known family, an address in use or open to others without a key or `open_to_all`, an
            invalid key, or settings that vLLM refuses.
        RunError: vLLM could not load the model.
    """
    key = _key(host, key_env, open_to_all)
    with _bound(host, port) as sock:
        config = model_config(model, words)  # fail before torch is imported, which takes seconds
        _set_environment(COMMON_ENV)
        check_fit(config, resolve(config, "evaluate"), check_here(config.rollout.tensor_parallel))
        gpu = gpu_available(config)
        config = model_config(model, words if gpu else [f"rollout.max_num_seqs={CPU_SEQS}", *words])
        _set_environment(environment(config, gpu))
        args = _arguments(config, shown_name(model), gpu)
        args.host, args.port, args.api_key = host, sock.getsockname()[1], [key] if key else None
        args.address = f"http://{f'[{host}]' if ':' in host else host}:{args.port}"
        print(f"loading {model} ({config.model.family}, {config.model.dtype}) …", file=sys.stderr, flush=True)
        _serve(args, sock)


def _key(host: str, key_env: str | None, open_to_all: bool) -> str | None:
    """Return the API key or None. Raises UserError: a bad key, or others could use the server."""
    if key_env is not None:
        key = os.environ.get(key_env, "")
        if not key:
            raise UserError(f"--api-key-env {key_env}: that environment variable is not set, or empty")
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise UserError(f"--api-key-env {key_env}: the key must be visible ASCII characters without spaces")
        return key
    try:
        addresses = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise UserError(f"--host {host}: no such address") from None
    if not (open_to_all or all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in addresses)):
        hint = "name the variable that holds an API key with --api-key-env NAME, or add --open"
        raise UserError(f"--host {host}: others could use the server; {hint}")
    return None


def _bound(host: str, port: int) -> socket.socket:
    """Bind a socket and listen before the model loads, to reserve the port. Raises UserError."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM: a restart need not wait for old connections
    try:
        sock.bind((host, port))
        sock.listen()
    except OSError as e:
        sock.close()
        hint = "in use; choose another with --port" if e.errno == errno.EADDRINUSE else e.strerror or e
        raise UserError(f"port {port} on {host}: {hint}") from None
    return sock


def shown_name(model: Path) -> str:
    """Return the served name, of run or directory; not the path: anyone can read it on the page."""
    name = (run_of(model) or model.resolve()).name or "model"
    return f"{name}-model" if name in TASKS else name


def environment(config: Config, gpu: bool) -> dict[str, str]:
    """Return the variables that vLLM and transformers read on import, here and in the engine."""
    return COMMON_ENV | engine_environment(config, gpu, len(os.sched_getaffinity(0))) | SERVER_ENV


def _set_environment(wanted: Mapping[str, str]) -> None:
    """Set what the user has not; override what would open the server or lock only a part of it."""
    set_environment(wanted)
    os.environ["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] = "0"
    os.environ.pop("VLLM_API_KEY", None)  # vLLM's key guards /v1 only; --api-key-env guards all
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("vllm").setLevel(logging.ERROR)  # until vLLM configures it by the environment


def _line(e: Exception) -> str:
    """Format a library's error as part of one line; of a pydantic error the first message."""
    from pydantic import ValidationError

    message = e.errors()[0]["msg"].removeprefix("Value error, ") if isinstance(e, ValidationError) else str(e)
    return " ".join(message.split())[:300] or type(e).__name__


def _arguments(config: Config, shown: str, gpu: bool) -> Namespace:
    """Return vLLM's server arguments: its defaults for what we do not set, and our attributes."""
    from tatar_dist.models import family
    from tatar_dist.prompts.answer import Prompts

    prompts = Prompts.load(config.data.prompts)
    backbone = family(config.model.family)(config.model)
    backbone.check_weights()
    forbidden = tuple(backbone.forbidden_ids())

    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from tatar_dist.serve.chat import Scoring

    options = vllm_options(config, gpu) | {
        "allowed_media_domains": [NOWHERE],
        "middleware": [MIDDLEWARE],
        "served_model_name": [shown, *TASKS],
        "uvicorn_log_level": "warning",
    }
    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([], Namespace(**options))
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    args.shown, args.serving, args.died = shown, False, None
    args.scoring = Scoring(shown, prompts, forbidden, config.rollout.max_new_tokens)
    return args


def _serve(args: Namespace, sock: socket.socket) -> None:
    """Run vLLM's server on a bound socket until a signal arrives or the engine dies."""
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker
    from vllm.utils.system_utils import set_ulimit

    set_ulimit()  # many connections
    # vLLM replaces these handlers once it has loaded
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        uvloop.run(run_server_worker(args.address, sock, args))
    except ValueError as e:
        if args.serving:
            raise
        raise UserError(f"{args.model}: vLLM rejected the model or its settings: {_line(e)}") from e
    except RuntimeError as e:
        if "ngine core" not in str(e):
            raise
        raise RunError(f"vLLM could not load {args.model}: {e}") from e
    if args.died:
        _leave(f"tatar-dist: the engine of {args.address} died, so the server has ended; start it again", 1)
    _leave("stopped", 0)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Handle a signal while the model loads: end the engine's processes and this one.

    An exception would be lost, because vLLM waits for its engine in ZeroMQ's poll, which drops it. SIGTERM does not
    help either, because an engine handles it only after loading. A loading engine starts other processes: they become
    children of this one when it is killed, so that none is missed.
    """
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1)
    end = time.monotonic() + KILL_S
    while time.monotonic() < end:
        children = [c for c in psutil.Process().children(recursive=True) if not _is_resource_tracker(c)]
        if not children:
            break
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        psutil.wait_procs(children, timeout=1)
    _leave("tatar-dist: interrupted", EXIT_INTERRUPTED)


def _is_resource_tracker(process: psutil.Process) -> bool:
    """Return whether it is Python's tracker, which removes shared memory and ends by itself."""
    try:  # other processes have its name in an option (-W)
        return any("import" in word and "resource_tracker" in word for word in process.cmdline())
    except psutil.Error:
        return False


def _leave(message: str, status: int) -> None:
    """End this process without interpreter shutdown, where triton would print 40 lines of leaks."""
    os.write(2, f"{message}\n".encode())  # print is not reentrant in a signal handler
    os._exit(status)
