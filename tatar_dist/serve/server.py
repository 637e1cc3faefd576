"""Starts vLLM's server for a model directory, in this process, after everything that can be wrong was looked at.

In: a model directory, an address, config keys. Out: a server that runs until Ctrl-C or SIGTERM, and then nothing: no
process, no socket. Sizes of pictures and the dtype are the model directory's own, which is what it was trained with.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import logging
import os
import socket
import sys
import warnings
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tatar_dist import CONFIGS
from tatar_dist.config import Config, ModelConfig, RolloutConfig, load_config
from tatar_dist.errors import RunError, UserError

MIDDLEWARE = "tatar_dist.serve.middleware.Front"
CPU_SEQS = 16  # answers at once; each may take the room of a whole prompt in a CPU engine's batch


@dataclass(frozen=True)
class Address:
    """Where to listen. `key_env`: the environment variable with the API key. `open`: without a key on any address."""

    host: str = "127.0.0.1"
    port: int = 8000
    key_env: str | None = None
    open: bool = False


def run(model: Path, address: Address, words: list[str]) -> None:
    """Serve until told to stop.

    Raises:
        UserError: no model of a known family, an address that is taken or open to others by accident, a wrong key.
        RunError: vLLM could not load the model.
    """
    key = _key(address)
    with _bound(address) as sock:
        family = _family(model)
        _set_environment()
        config = load_config([], [*_model_words(model, family), *words])
        args = _arguments(config, str(model))
        host = f"[{address.host}]" if ":" in address.host else address.host
        args.host, args.port, args.api_key = address.host, sock.getsockname()[1], [key] if key else None
        args.address = f"http://{host}:{args.port}"
        print(f"loading {model} ({config.model.family}, {config.model.dtype}) …", file=sys.stderr, flush=True)
        _serve(args, sock)


def _key(address: Address) -> str | None:
    key = None
    if address.key_env is not None:
        key = os.environ.get(address.key_env)
        if not key:
            raise UserError(f"--api-key-env {address.key_env}: that environment variable is not set, or empty")
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise UserError(f"--api-key-env {address.key_env}: a key is made of visible ASCII characters, no blanks")
    if not (key or address.open or _loopback(address.host)):
        raise UserError(
            f"--host {address.host}: others could use the server; name the variable that holds an API key with "
            "--api-key-env NAME, or add --open"
        )
    return key


def _loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise UserError(f"--host {host}: no such address") from None
    return all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found)


def _bound(address: Address) -> socket.socket:
    """The socket, bound before anything is loaded. Raises UserError."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM: a restart need not wait for old connections
    try:
        sock.bind((address.host, address.port))
    except OSError as e:
        sock.close()
        hint = "in use; choose another with --port" if e.errno == errno.EADDRINUSE else e.strerror or e
        raise UserError(f"port {address.port} on {address.host}: {hint}") from None
    return sock


def _family(model: Path) -> str:
    """The family that config.json names. Raises UserError when the directory holds no model of a known one."""
    from tatar_dist.backbones import family, names

    if not model.is_dir():
        raise UserError(f"--model {model}: no such directory")
    file = model / "config.json"
    if not file.is_file():
        raise UserError(f"--model {model}: no config.json in it, so it is not a Hugging Face model directory")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{file}: not valid JSON: {e}") from None
    kind = found.get("model_type") if isinstance(found, dict) else None
    if kind not in names():
        raise UserError(f"--model {model}: model_type is {kind!r}; families that can be served: {', '.join(names())}")
    family(kind).check_directory(str(model))
    return kind


def _model_words(model: Path, family: str) -> list[str]:
    """Config keys that the model directory answers; the user's own come after them."""
    from transformers import AutoImageProcessor

    settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
    text = settings.get("text_config", settings)
    dtype = settings.get("dtype") or settings.get("torch_dtype") or ModelConfig.dtype
    length = min(RolloutConfig.max_model_len, text.get("max_position_embeddings", RolloutConfig.max_model_len))
    try:
        size = AutoImageProcessor.from_pretrained(model).size
        least, most = int(size["shortest_edge"]), int(size["longest_edge"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        said = " ".join(str(e).split())[:200]
        raise UserError(f"--model {model}: its image processor cannot be read: {said}") from None
    words = {
        "output": '""',
        "model.path": json.dumps(str(model)),
        "model.family": family,
        "model.dtype": "float32" if dtype == "float32" else "bfloat16",
        "model.min_pixels": least,
        "model.max_pixels": min(most, ModelConfig.max_pixels),  # Qwen's own 12.8 megapixels would fill a context
        "rollout.max_model_len": length,
        "data.prompts": json.dumps(str(CONFIGS / "prompts.yaml")),
    }
    if not _gpu():
        words["rollout.max_num_seqs"] = CPU_SEQS
    return [f"{key}={value}" for key, value in words.items()]


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _set_environment() -> None:
    """What vLLM and transformers read as they are imported."""
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    # libraries tell each other; and an engine that is told to stop leaves shared memory to Python's tracker
    quiet["PYTHONWARNINGS"] = "ignore::FutureWarning,ignore::UserWarning:multiprocessing.resource_tracker"
    defaults = {**quiet, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not _gpu():
        defaults |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_TARGET_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("vllm").setLevel(logging.ERROR)  # until vLLM configures it, as told above


def _arguments(config: Config, shown: str) -> Namespace:
    """vLLM's server arguments, as its own command line would parse them, with ours beside them."""
    from tatar_dist.backbones import family
    from tatar_dist.prompts import Prompts

    m, r = config.model, config.rollout
    prompts = Prompts.load(config.data.prompts)
    forbidden = family(m.family)(m).forbidden_ids()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(r.cpu_kv_cache_gib))

    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from tatar_dist.records import TASKS
    from tatar_dist.serve.chat import Scoring

    options: dict[str, Any] = {
        "model": m.path,
        "dtype": m.dtype,
        "seed": config.seed,
        "tensor-parallel-size": r.tensor_parallel,
        "max-model-len": r.max_model_len,
        "max-num-seqs": r.max_num_seqs,
        "limit-mm-per-prompt": json.dumps({"image": 1, "video": 0}),
        "mm-processor-kwargs": json.dumps({"min_pixels": m.min_pixels, "max_pixels": m.max_pixels}),
        "generation-config": "vllm",
        "middleware": MIDDLEWARE,
        "uvicorn-log-level": "warning",
    }
    if _gpu():
        options["gpu-memory-utilization"] = r.gpu_memory_utilization
    else:
        # A seeded request whose prefill is chunked crashes vLLM's CPU sampler: leave room for all prompts at once.
        options["max-num-batched-tokens"] = r.max_num_seqs * r.max_model_len
    words = [f"--{name}={value}" for name, value in options.items()]
    words += ["--served-model-name", shown, *TASKS, "--disable-log-stats", "--no-use-tqdm-on-load"]
    words += [] if _gpu() else ["--enforce-eager"]
    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    args.shown = shown
    args.scoring = Scoring(shown, prompts, tuple(forbidden), r.max_new_tokens)
    return args


def _serve(args: Namespace, sock: socket.socket) -> None:
    """Run vLLM's server on a bound socket until a signal ends it."""
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker
    from vllm.utils.system_utils import set_ulimit

    set_ulimit()  # many connections
    try:
        uvloop.run(run_server_worker(args.address, sock, args))
    except RuntimeError as e:
        if "ngine core" not in str(e):
            raise
        raise RunError(f"vLLM could not load {args.model}: {e}") from e
    print("stopped", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the engine has ended; taking down this interpreter, triton would list its leaks on 40 lines
