"""One vLLM engine: grouped completions with log-probabilities, at a known weight version.

A plain class, which `tatar_dist.cluster.ray_cluster` wraps in a Ray actor. Every sampling parameter is explicit and
none is read from the checkpoint's generation config. Completions are sampled from the distribution that the loss
assumes: the full softmax at the given temperature, without the vision placeholder tokens. `Sampling.top_p` and
`Sampling.schema` are for teachers and judges (rationale construction), whose log-probabilities are not trained on;
training leaves both at their defaults.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tatar_dist.config.schema import Config
from tatar_dist.data.images import decode_image
from tatar_dist.errors import RunError
from tatar_dist.prompts.expected import END
from tatar_dist.rollout.expected import with_expected
from tatar_dist.rollout.options import FP8, gpu_available, vllm_options
from tatar_dist.run.failpoints import Failpoints
from tatar_dist.run.process import check_visible_gpus, importing, open_log, process_facts, use_node_caches
from tatar_dist.types import Completion, Group, Prompt

FORBIDDEN_BIAS = -100.0  # vLLM's smallest logit bias; exp(-100) is 0 beside any sampled token in float32


class WrongWeightVersion(RunError):
    """The engine was asked for completions of a weight version that it does not hold."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a call. `temperature` 0: greedy; `seed`, `step` seed groups; G = n.

    `schema`: JSON schema, as text, that every completion must follow; None: any text. `expected`: also compute
    `Completion.expected`.
    """

    n: int
    temperature: float
    max_tokens: int
    seed: int = 0
    step: int = 0
    top_p: float = 1.0
    schema: str | None = None
    expected: bool = False


def group_seed(seed: int, step: int, sample_id: str) -> int:
    """Hash (run seed, step, sample id) to a group's seed; vLLM adds a completion's index to it."""
    digest = hashlib.blake2b(f"{seed}/{step}/{sample_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def _inputs(prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Convert prompts to vLLM's input; an image shared by several prompts is decoded once."""
    decoded: dict[bytes, Any] = {}
    inputs: list[dict[str, Any]] = []
    for prompt in prompts:
        asked: dict[str, Any] = {"prompt": prompt.text + prompt.begun}
        if prompt.with_image:
            data = prompt.sample.image
            if data not in decoded:
                decoded[data] = decode_image(data, prompt.sample.sample_id)
            asked["multi_modal_data"] = {"image": decoded[data]}
        inputs.append(asked)
    return inputs


class RolloutEngine:
    """A vLLM engine in this process."""

    def __init__(self, config: Config, index: int) -> None:
        if config.output:
            open_log(config.output, f"engine-{index}")
        self.config, self.index = config, index
        self.failpoints = Failpoints(config.failpoints, config.output, engine=index)
        self.version = -1
        self._updating: int | None = None
        self._asleep = False

    def setup(self, threads: int, version: int) -> dict[str, Any]:
        """Load the model. `version`: the weight version of the files in `model.path`."""
        start = time.perf_counter()
        r = self.config.rollout
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        check_visible_gpus()
        use_node_caches()
        with importing():
            import torch

            gpu = gpu_available(self.config)  # before what takes long
            from vllm import LLM
            from vllm.config.weight_transfer import WeightTransferConfig

            from tatar_dist.models import family
            from tatar_dist.sync import vllm_backend

        options = vllm_options(self.config, gpu) | (FP8 if r.quantization == "fp8" else {})
        if gpu:
            options["enable_sleep_mode"] = self.config.cluster.placement == "colocated"
            if r.tensor_parallel > 1:
                options["distributed_executor_backend"] = "mp"  # in a placement group vLLM would choose Ray
        else:
            torch.set_num_threads(threads)
            torch._dynamo.config.disable = True  # options.py; torch has read the variable where it came first
        try:
            self.llm = LLM(
                **options,
                logprobs_mode="processed_logprobs",
                weight_transfer_config=WeightTransferConfig(backend=vllm_backend.BACKEND),
                worker_extension_cls=vllm_backend.EXTENSION,
                # A model may otherwise write blanks, which JSON allows in any number, until it is cut off.
                structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
            )
        except Exception as e:  # too little memory, a damaged model, an option that vLLM refuses
            here, reason = process_facts(), f"{type(e).__name__}: {' '.join(str(e).split())[:500]}"
            where = f"{here['host']}, GPU {here['gpu']}" if gpu else here["host"]
            raise RunError(f"engine {self.index} on {where} did not start: {reason}") from e
        self.llm.init_weight_transfer_engine({"init_info": {}})
        self.forbidden = family(self.config.model.family)(self.config.model).forbidden_ids()
        self.version = version
        return {**process_facts(), "seconds": round(time.perf_counter() - start, 2)}

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Group]:
        """Sample `sampling.n` completions for each prompt, in one batch.

        Raises:
            WrongWeightVersion: the engine does not hold weight version `version` (a restarted engine holds the
                initial weights; sampling from them silently would train on the wrong policy).
        """
        if self.version != version:
            raise WrongWeightVersion(f"engine {self.index} holds weight version {self.version}, asked for {version}")
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        self.failpoints.reach("engine.generate", step=sampling.step)
        if self.config.rollout.deterministic:
            self._reset_caches()
        form = StructuredOutputsParams(json=sampling.schema) if sampling.schema else None
        inputs = _inputs(prompts)
        params = [
            SamplingParams(
                n=sampling.n,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=0,
                min_p=0.0,
                repetition_penalty=1.0,
                max_tokens=sampling.max_tokens,
                seed=group_seed(sampling.seed, sampling.step, p.sample.sample_id) if sampling.temperature else None,
                logprobs=0,
                logit_bias={i: FORBIDDEN_BIAS for i in self.forbidden},
                skip_special_tokens=True,
                structured_outputs=form,
                stop=[END] if p.begun else None,
                include_stop_str_in_output=bool(p.begun),
            )
            for p in prompts
        ]
        outputs = self.llm.generate(inputs, params, use_tqdm=False)
        groups = [self._group(p, o, version) for p, o in zip(prompts, outputs, strict=True)]
        return with_expected(self.llm, groups, inputs) if sampling.expected else groups

    @staticmethod
    def _group(prompt: Prompt, output: Any, version: int) -> Group:
        completions = tuple(
            Completion(
                text=prompt.begun + c.text,
                token_ids=tuple(c.token_ids),
                logprobs=tuple(step[t].logprob for step, t in zip(c.logprobs, c.token_ids, strict=True)),
                finish_reason="stop" if c.finish_reason == "stop" else "length",
            )
            for c in sorted(output.outputs, key=lambda c: c.index)
        )
        return Group(prompt, tuple(output.prompt_token_ids), completions, version)

    # A weight push: `join_push` where the way needs a group, `start_update`, `update` by part, `finish_update`.

    def join_push(self, membership: dict[str, Any]) -> None:
        """Join the process group of a push; blocks until all members have joined."""
        self.llm.init_weight_transfer_engine({"init_info": membership})

    def start_update(self, version: int) -> None:
        """Begin a weight push; the engine serves nothing until `finish_update`."""
        self._updating, self.version = version, -1
        if self._can_sleep() and self._asleep:
            self.llm.wake_up(tags=["weights"])  # the KV cache's memory comes after the push
        self.llm.start_weight_update()

    def update(self, part: dict[str, Any]) -> int:
        """Load one part of the weights (sync/). Returns its size in bytes, 0 for GPU transfers."""
        self.failpoints.reach("engine.update", version=self._updating)
        self.llm.update_weights({"update_info": part})
        return sum(w.data.nbytes for w in part.get("bucket", {}).values())

    def finish_update(self) -> int:
        """End the push, drop every cache that depends on weights. Returns the new version."""
        assert self._updating is not None, "finish_update without start_update"
        self.llm.finish_weight_update(weight_version=str(self._updating))
        if self._can_sleep() and self._asleep:
            self.llm.wake_up(tags=["kv_cache"])
        self._asleep = False
        self._reset_caches()
        self.version, self._updating = self._updating, None
        return self.version

    def abandon_update(self) -> None:
        """End a push that was cut short: the weights are of two versions until the next push."""
        if self._updating is not None:
            self.finish_update()
        self.version = -1

    def sleep(self) -> None:
        """Free the memory of weights and KV cache for learners on the same GPU; no effect on a CPU.

        The weights are lost; a push follows every sleep.
        """
        if self._can_sleep() and not self._asleep:
            self.llm.sleep(level=2)
        self._asleep, self.version = True, -1

    def _can_sleep(self) -> bool:
        return bool(self.llm.llm_engine.vllm_config.model_config.enable_sleep_mode)

    def _reset_caches(self) -> None:
        """Reset the prefix cache and the cached vision outputs, which a prefix-cache reset keeps.

        Raises:
            RunError: the prefix cache is in use, so that states of the old weights would stay in it.
        """
        if not self.llm.reset_prefix_cache():
            raise RunError(f"engine {self.index}: the prefix cache is in use and keeps states of the old weights")
        self.llm.llm_engine.reset_encoder_cache()
