"""What processes of a run read from their environment when libraries are imported. Imports little itself."""

from __future__ import annotations

from tatar_dist.config.schema import Config

# every process
COMMON_ENV = {
    "TOKENIZERS_PARALLELISM": "false",
    # an idle OpenMP pool must not spin on cores that another process was handed
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
    "TRANSFORMERS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",
}
CPU_ENGINE_ENV = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_TARGET_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def engine_environment(config: Config, gpu: bool, threads: int) -> dict[str, str]:
    """What vLLM reads, by name, in the process that an engine lives in. `threads`: of OpenMP."""
    network = config.cluster.network_interface
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(config.rollout.cpu_kv_cache_gib),
        "OMP_NUM_THREADS": str(threads),
        **({"NCCL_SOCKET_IFNAME": network} if network else {}),
        "GLOO_SOCKET_IFNAME": "lo",  # an engine's workers are on one node, and gloo answers strangers
        **({} if gpu else CPU_ENGINE_ENV),
    }
