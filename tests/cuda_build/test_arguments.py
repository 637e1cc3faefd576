"""What we hand to vLLM, taken by its CUDA wheel: from our classes to the finished configuration of a 7B on an H100."""

from __future__ import annotations

import pytest

FP8 = ["rollout.quantization=fp8", "grpo.logprob_gap_limit=0.15"]
PLACEMENTS = [
    ["rollout.push=nccl"],
    ["rollout.push=cuda_ipc", "cluster.placement=colocated"],
    ["rollout.push=object_store", "rollout.tensor_parallel=2"],
    ["model.dtype=float32", "rollout.deterministic=true"],
    FP8,
]


class Finished(BaseException):  # an engine makes an error of every exception
    """Carries the configuration out of a constructor."""


@pytest.fixture
def finished(monkeypatch):
    """Ask a callable that makes an engine for the engine's configuration."""
    from vllm.v1.engine.llm_engine import LLMEngine

    def stop(engine_args, usage_context, **_):
        raise Finished(engine_args.create_engine_config(usage_context))

    monkeypatch.setattr(LLMEngine, "from_engine_args", stop)

    def of(start):
        with pytest.raises(Finished) as e:
            start()
        return e.value.args[0]

    return of


def checked(c, config):
    """What every engine of ours has, and how it would run."""
    from vllm.v1.executor import Executor

    assert c.parallel_config.worker_cls == "vllm.v1.worker.gpu_worker.Worker"
    assert c.use_v2_model_runner is False
    assert str(c.model_config.dtype) == f"torch.{config.model.dtype}"
    assert c.model_config.max_model_len == config.rollout.max_model_len
    assert c.scheduler_config.max_num_seqs == config.rollout.max_num_seqs
    assert c.cache_config.gpu_memory_utilization == config.rollout.gpu_memory_utilization
    assert c.model_config.enforce_eager is False and c.compilation_config.cudagraph_mode.name == "FULL_AND_PIECEWISE"
    return Executor.get_class(c).__name__


@pytest.mark.parametrize("words", PLACEMENTS, ids=lambda words: "-".join(words))
def test_an_engine_of_a_run(make_config, finished, words):
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticChannelSym

    from tatar_dist.rollout.engine import RolloutEngine
    from tatar_dist.sync import vllm_backend

    config = make_config(*words)
    c = finished(lambda: RolloutEngine(config, 0).setup(1, 0))
    one = config.rollout.tensor_parallel == 1
    assert checked(c, config) == ("UniProcExecutor" if one else "MultiprocExecutor")
    assert c.weight_transfer_config.backend == vllm_backend.BACKEND
    assert c.parallel_config.worker_extension_cls == vllm_backend.EXTENSION
    assert c.model_config.logprobs_mode == "processed_logprobs"
    assert c.structured_outputs_config.backend == "xgrammar"
    quantized = (c.quant_config.get_name(), c.quant_config.args.linear.weight) if c.quant_config else None
    assert quantized == (("online", kFp8StaticChannelSym) if words is FP8 else None)
    assert c.quant_config is None or c.quant_config.ignored_layers == ["visual.*"]
    colocated = config.cluster.placement == "colocated"
    assert c.model_config.enable_sleep_mode == c.model_config.enable_cumem_allocator == colocated


@pytest.fixture
def weightless(monkeypatch):
    """The directory of the large model has its files' names, not its 15 GB."""
    from tatar_dist.models.base import QwenVL

    monkeypatch.setattr(QwenVL, "check_weights", lambda self: None)


def test_the_scorers_engine(large, finished, weightless):
    from tatar_dist.scoring.scorer import Scorer

    c = finished(lambda: Scorer(large, ["model.dtype=bfloat16"]))
    assert c.model_config.logprobs_mode == "processed_logprobs" and c.use_v2_model_runner is False


def test_the_servers_engine(make_config, weightless):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    from tatar_dist.serve.server import _arguments

    config = make_config()
    args = _arguments(config, "shown", True)
    c = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
    checked(c, config)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
def test_flash_attention_is_chosen(capability):
    import torch
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.selector import AttentionSelectorConfig

    chosen = AttentionSelectorConfig(
        head_size=128, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=None, use_mla=False
    )
    backends, _ = current_platform.get_valid_backends(DeviceCapability(*capability), chosen, num_heads=28)
    assert backends[0].backend.name == "FLASH_ATTN"


def test_fp8_products_need_no_compiler():
    """CUTLASS's kernels come with the wheel. Of rows and tokens; other schemes prefer kernels that nvcc compiles."""
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.kernels.linear import init_fp8_linear_kernel
    from vllm.model_executor.layers.quantization.online.fp8 import Fp8PtpcOnlineLinearMethod as Method

    keys, dtypes = (Method.activation_quant_key, Method.weight_quant_key), (torch.bfloat16, torch.bfloat16)
    with set_current_vllm_config(VllmConfig()):
        kernel = init_fp8_linear_kernel(*keys, *dtypes, (3584, 18944))
    assert type(kernel).__name__ == "CutlassFP8ScaledMMLinearKernel"
