"""An engine of vLLM's CUDA wheel on a pretended GPU: its worker, model runner and our pushes are real.

Kernels return at once, so every token is number 0; copies are made, so weights arrive.
"""

from __future__ import annotations

import io
import threading
from itertools import repeat
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import config_of
from kernels import concatenation
from PIL import Image

from tatar_dist.errors import RunError
from tatar_dist.rollout.engine import RolloutEngine, Sampling
from tatar_dist.sync.nccl import NcclSender
from tatar_dist.sync.object_store import buckets, copied, load
from tatar_dist.types import Prompt, Sample

WORDS = ("cluster.placement=colocated", "rollout.push=cuda_ipc", "model.min_pixels=12544", "model.max_pixels=12544")
BUCKET = 1 << 18  # bytes: several for the tiny model, one of them for a tensor that is larger
NORM = "model.language_model.norm.weight"
LIMIT_S = 60


@pytest.fixture(scope="module")
def engine(tiny, tmp_path_factory):
    short = ("rollout.max_model_len=512", "rollout.max_num_seqs=8")
    engine = RolloutEngine(config_of(tiny, tmp_path_factory.mktemp("run"), *WORDS, *short), 0)
    engine.setup(1, 0)
    return engine


@pytest.fixture(scope="module")
def prompts(engine):
    png = io.BytesIO()
    Image.fromarray(np.zeros((112, 112, 3), np.uint8)).save(png, "PNG")
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a plain view"}]}]
    text = engine.llm.get_tokenizer().apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return [Prompt(Sample(f"{i}", "", "iqa", png.getvalue(), 50.0), text, f"{i}") for i in range(3)]


def runner(engine):
    return engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner


def weights(tiny, value):
    """All weights under the learner's names in the order of a push, the last norm filled with `value`."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny, dtype=torch.bfloat16)
    with torch.no_grad():
        model.get_parameter(NORM).fill_(value)
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def norm(engine):
    return set(runner(engine).model.language_model.model.norm.weight.cpu().tolist())


def push(engine, tiny, version):
    on_gpu = ((name, tensor.cuda()) for name, tensor in weights(tiny, version))
    engine.start_update(version)
    for bucket in copied(buckets(on_gpu, repeat(BUCKET), True)):
        engine.update({"bucket": bucket})
    engine.finish_update()


def test_it_runs_the_first_model_runner_with_flash_attention(engine):
    one = runner(engine)
    assert type(one).__module__ == "vllm.v1.worker.gpu_model_runner"
    assert {group.backend.get_name() for groups in one.attn_groups for group in groups} == {"FLASH_ATTN"}
    assert {p.device.type for p in one.model.parameters()} == {"cuda"}


@pytest.mark.parametrize("sampling", [Sampling(1, 0.0, 5, expected=True), Sampling(4, 1.0, 5, seed=1, top_p=0.9)])
def test_it_answers(engine, prompts, sampling):
    groups = engine.generate(prompts, sampling, engine.version)
    assert [len(g.completions) for g in groups] == [sampling.n] * 3
    for completion in (c for g in groups for c in g.completions):
        assert completion.token_ids == (0,) * 5 and len(completion.logprobs) == 5


def test_a_push_by_the_object_store_arrives_awake_and_asleep(engine, prompts, tiny):
    push(engine, tiny, 1)
    assert norm(engine) == {1.0}
    engine.sleep()
    push(engine, tiny, 2)
    assert norm(engine) == {2.0} and engine.version == 2
    engine.generate(prompts, Sampling(1, 0.0, 2), 2)


def test_both_ways_between_a_gpu_and_the_store_lead_through_pinned_memory_which_is_used_again(tiny):
    def found():
        stats = torch.cuda.host_memory_stats()  # of pinned memory
        return stats["active_requests.allocated"], stats["allocated_bytes.current"]

    sent, there = weights(tiny, 1.0), []
    (asked, kept), on_gpu = found(), [(name, tensor.cuda()) for name, tensor in sent]
    for _ in range(2):
        made, loaded = list(copied(buckets(on_gpu, repeat(BUCKET), True))), []
        there.append(found())
        for bucket in made:
            load(SimpleNamespace(load_weights=loaded.extend), bucket, torch.device("cuda"))
        there.append(found())
        assert {t.device.type for _, t in loaded} == {"cuda"}
        assert all(torch.equal(t.cpu(), w) for (_, t), (_, w) in zip(loaded, sent, strict=True))
        del made, bucket
    assert [n - asked for n, _ in there] == [len(sent) * i for i in (1, 2, 3, 4)]
    assert there[1][1] > kept and there[3][1] == there[1][1]


@pytest.fixture
def nccl(engine, tiny):
    """Form a group of a sender in this process and the engine; returns the sender and what an update is told."""

    def form(value):
        named = [(n, t.cuda()) for n, t in weights(tiny, value)]
        metadata = [(n, t.dtype, list(t.shape)) for n, t in named]
        sender = NcclSender(SimpleNamespace(full_parameters=lambda: iter(named), metadata=lambda: metadata), 0, None)
        unique = sender.unique_id()
        group = {"nccl_unique_id_b64": unique, "world_size": 2, "packed": True}
        assert sender.join(unique, 2, LIMIT_S) is None
        engine.join_push({"nccl": {**group, "rank_offset": 1, "packed_buffer_size_bytes": BUCKET}})
        return sender, sender.metadata()

    with concatenation():
        yield form


def test_a_push_by_nccl_arrives(engine, tiny, nccl):
    sender, metadata = nccl(3.0)
    engine.start_update(3)
    sent = []
    sending = threading.Thread(target=lambda: sent.append(sender.broadcast(BUCKET, LIMIT_S)))
    sending.start()
    engine.update({**metadata, "timeout_s": LIMIT_S})
    sending.join()
    engine.finish_update()
    assert norm(engine) == {3.0}
    assert sent == [(sum(t.nbytes for _, t in weights(tiny, 3.0)), None)]


def test_an_nccl_push_without_a_sender_ends_at_the_deadline(engine, nccl):
    _, metadata = nccl(4.0)
    engine.start_update(4)
    with pytest.raises(RunError, match="given up after 1 s"):
        engine.update({**metadata, "timeout_s": 1})
