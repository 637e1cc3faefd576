"""The CUDA wheels of torch, vLLM and DeepSpeed without a GPU: `make test-cuda-build`.

This process has two H100 of `pretended_driver`: what asks the driver gets answers, memory holds tensors, kernels return
at once. With the CPU build these tests fail, they do not skip.
"""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from pretended_driver.cuda import cuda_build, give_gpus, pretended_nccl

from tatar_dist.config.load import load_config
from tatar_dist.config.schema import Config
from tatar_dist.rollout.options import COMMON_ENV, engine_environment, set_environment

assert cuda_build() is not None, "tests/cuda_build needs torch's CUDA build: make test-cuda-build"
WITHOUT_GPU = dict(os.environ)
_directory = TemporaryDirectory()
give_gpus(Path(_directory.name), gpus=2)
os.environ["VLLM_NCCL_SO_PATH"] = str(pretended_nccl(Path(_directory.name)))

MODELS = runpy.run_path(str(Path(__file__).parents[1] / "device" / "models.py"))["MODELS"]


def config_of(model: str | Path, output: Path, *words: str) -> Config:
    settings = [f"output={output}", f"model.path={model}", "cluster.gpus_per_node=2", "model.dtype=bfloat16"]
    return load_config([], [*settings, *words])


set_environment(COMMON_ENV | engine_environment(config_of("unused", Path("unused")), True, 1))


@pytest.fixture
def without_gpu() -> dict[str, str]:
    """The environment as it was: no driver at all."""
    return WITHOUT_GPU


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two layers, with weights."""
    from tatar_dist.demo.tiny.build import TinySizes, build

    sizes = TinySizes(vocab=512, text_layers=2, vision_depth=2)
    corpus = ["a plain view of it", "system user assistant"] * 20
    return build(tmp_path_factory.mktemp("tiny"), corpus=corpus, sizes=sizes)


@pytest.fixture(scope="session")
def large(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a Qwen2.5-VL-7B without its weights."""
    from safetensors.torch import save_file
    from transformers import AutoProcessor

    directory = tmp_path_factory.mktemp("Qwen2.5-VL-7B")
    processor = AutoProcessor.from_pretrained(tiny)
    processor.save_pretrained(directory)
    shape = MODELS["Qwen2.5-VL-7B"].config(processor.tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    shape.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    shape.save_pretrained(directory)
    save_file({}, directory / "model.safetensors")
    return directory


@pytest.fixture
def make_config(large: Path, tmp_path: Path) -> Callable[..., Config]:
    """make_config('key=value', ...) -> a checked Config of the 7B."""
    return lambda *words: config_of(large, tmp_path, *words)
