"""vLLM's options and its processes' environment: for rollouts, scoring and the server.

Imports little, because the environment must be set before torch and vLLM are imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tatar_dist.config.schema import Config
from tatar_dist.run.process import check_gpu

# every process
COMMON_ENV = {
    # the order of NVML, by which Ray numbers GPUs; CUDA's own puts the fastest first
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    "TOKENIZERS_PARALLELISM": "false",
    # an idle OpenMP pool must not spin on cores that another process uses
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
    "TRANSFORMERS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",
    # Ray's default of 15 starves workers beside any busy process of the machine
    "RAY_worker_niceness": "0",
}
# rollout.quantization=fp8: bfloat16 weights, of files and pushes, are rounded by row as they are loaded, activations by
# token. Not the vision tower, whose widths are no multiples of 16.
FP8 = {"quantization": "fp8_per_channel", "quantization_config": {"ignore": ["visual.*"]}}
CPU_ENGINE_ENV = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_TARGET_DEVICE": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    # the model runs eagerly, but vLLM compiles one of the sampler's functions at the first call, which takes seconds
    "TORCH_COMPILE_DISABLE": "1",
}


def engine_environment(config: Config, gpu: bool, threads: int) -> dict[str, str]:
    """Return the environment variables of an engine's process. `threads`: OpenMP threads."""
    network = config.cluster.network_interface
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        # CPUs and older GPUs have only the first model runner; newer GPUs would sample with another, never tested here
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        # the sampler that is tested; the other one is compiled by nvcc at its first use
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        # a process that has counted its GPUs must not fork one that uses them
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_CPU_KVCACHE_SPACE": str(config.rollout.cpu_kv_cache_gib),
        "OMP_NUM_THREADS": str(threads),
        **({"NCCL_SOCKET_IFNAME": network} if network else {}),
        "GLOO_SOCKET_IFNAME": "lo",  # an engine's workers are on one node, and gloo accepts any connection
        **({} if gpu else CPU_ENGINE_ENV),
    }


def set_environment(variables: Mapping[str, str]) -> None:
    """Set environment variables of this process, except those that are set already."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def gpu_available(config: Config) -> bool:
    """Return whether torch sees a GPU. Raises UserError if not and the configuration names GPUs."""
    import torch

    found = torch.cuda.is_available()
    check_gpu(config.cluster.gpus_per_node, found)
    return found


def vllm_options(config: Config, gpu: bool) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` for every use of an engine; the server sets them, too."""
    m, r = config.model, config.rollout
    options: dict[str, Any] = {
        "model": m.path,
        "dtype": m.dtype,
        "seed": config.seed,
        "tensor_parallel_size": r.tensor_parallel,
        "max_model_len": r.max_model_len,
        "max_num_seqs": r.max_num_seqs,
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        "mm_processor_kwargs": {"min_pixels": m.min_pixels, "max_pixels": m.max_pixels},
        "generation_config": "vllm",  # ignore the checkpoint's
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if gpu:
        return options | {"gpu_memory_utilization": r.gpu_memory_utilization}
    # A seeded request whose prefill is chunked crashes vLLM's CPU sampler: leave room for all prompts at once.
    return options | {"enforce_eager": True, "max_num_batched_tokens": r.max_num_seqs * r.max_model_len}
