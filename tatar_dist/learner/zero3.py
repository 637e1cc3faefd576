"""One rank of DeepSpeed ZeRO-3: sharded policy, optimizer, reference; gathers, checkpoints.

Everything here is collective: all ranks must make the same calls in the same order, after `init_process_group`.
RANK, WORLD_SIZE and LOCAL_RANK are in the environment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tatar_dist.config.schema import Config, OptimConfig
from tatar_dist.errors import UserError
from tatar_dist.learner import lora, reshard
from tatar_dist.learner.policy import PolicyModel
from tatar_dist.models import family
from tatar_dist.run.files import Job

DEEPSPEED_TAG = "deepspeed"


def deepspeed_config(config: Config, optim: OptimConfig, device: torch.device, shard_all: bool) -> dict[str, Any]:
    """Return ZeRO-3's configuration. Gradients are clipped by global norm after averaging.

    The batch size is nominal: `Zero3.begin` marks the last micro-batch of a step, whose number differs by step. Weights
    are copied to the group of process_group.share_within_nodes, if it made one. `shard_all`: small parameters, too.
    """
    from deepspeed.utils import groups

    node = groups._get_zero_param_intra_parallel_group()
    # on a CPU always, so that tests of the demo's small model exercise the same code
    persistence = {"stage3_param_persistence_threshold": 0} if shard_all or device.type == "cpu" else {}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.clip_norm,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "data_types": {
            # zero.Init would round rotary frequencies to bfloat16: at 7B shapes, 0.58 rad at distance 500
            "keep_in_fp32_modules": ["inv_freq"],
            # in bfloat16 a sum over 16 micro-batches is off by 0.4 %
            "grad_accum_dtype": "fp32",
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": 3,
            **persistence,
            "zero_hpz_partition_size": 1 if node is None else dist.get_world_size(node),
            **({"offload_optimizer": {"device": "cpu"}} if config.cluster.offload_optimizer else {}),
        },
    }


class Zero3:
    """The policy of this rank and, with `reference_path`, a frozen reference.

    Attributes:
        engine: the DeepSpeed engine around `PolicyModel`; call it for `TokenLogprobs`.
        has_reference: `reference_logp` may be called.
    """

    def __init__(
        self,
        config: Config,
        optim: OptimConfig,
        *,
        reference_path: str | None,
        temperature: float,
        device: torch.device,
        shard_all: bool = False,
    ) -> None:
        import deepspeed
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        from tatar_dist.learner.snapshot import SnapshotEngine

        self.device, self.optim = device, optim
        self.backbone = family(config.model.family)(config.model)
        self.world_size = dist.get_world_size()
        self.rank = dist.get_rank()
        settings = deepspeed_config(config, optim, device, shard_all)
        self._hf_config = HfDeepSpeedConfig(settings)  # makes from_pretrained shard while it loads; must stay alive
        self._forbidden = self.backbone.forbidden_ids()
        policy = self._wrap(config, temperature, config.model.path)
        self._lora = lora.scale(config.model)
        if self._lora:
            lora.install(policy.backbone, config.model, config.seed)
        if config.model.gradient_checkpointing:
            policy.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy.train()
        named = list(policy.named_parameters())
        frozen = [n for n, p in named if not p.requires_grad] if self._lora else []
        trained = [(n, p) for n, p in named if p.requires_grad]
        groups = parameter_groups(trained, optim.lr_scale, frozen, optim.weight_decay)
        self._scales = [g.pop("scale") for g in groups]
        self.engine, self._optimizer, _, _ = deepspeed.initialize(
            model=policy, model_parameters=groups, optimizer=self._make_optimizer(groups), config=settings
        )
        self.engine.checkpoint_engine = SnapshotEngine()
        # DeepSpeed would copy a script into the directory at once, before it exists
        self.engine._copy_recovery_script = lambda _: None
        self._reference = None
        self.has_reference = reference_path is not None
        if reference_path is not None and not (self._lora and reference_path == config.model.path):
            frozen = self._wrap(config, temperature, reference_path)
            frozen.requires_grad_(False).eval()
            settings = {k: v for k, v in settings.items() if k != "gradient_clipping"}
            self._reference, _, _, _ = deepspeed.initialize(model=frozen, config=settings)

    def _wrap(self, config: Config, temperature: float, path: str) -> PolicyModel:
        model = replace(config.model, path=path)
        backbone = self.backbone if model == config.model else family(model.family)(model)
        policy = PolicyModel(backbone.load_model(), backbone, self._forbidden, temperature, config.model.float32_head)
        for module in policy.modules():  # DeepSpeed moves no buffer of a model built under zero.Init
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)
        return policy

    def _make_optimizer(self, parameters: list[dict[str, Any]]) -> torch.optim.Optimizer:
        o = self.optim
        if o.name == "sgd":
            return torch.optim.SGD(parameters, lr=o.lr, weight_decay=o.weight_decay)
        fused = self.device.type != "cpu"  # one kernel for all shards
        betas = tuple(o.betas)
        return torch.optim.AdamW(parameters, lr=o.lr, betas=betas, eps=o.eps, weight_decay=o.weight_decay, fused=fused)

    def reference_logp(self, batch: Any) -> Tensor:
        """Return (B, C) log-probabilities of the reference: its engine, or policy without adapters."""
        if self._reference is not None:
            return self._reference(batch).logp  # type: ignore[no-any-return]
        assert self.has_reference
        with torch.no_grad(), lora.without(self.engine.module):
            return self.engine(batch).logp  # type: ignore[no-any-return]

    def release_memory(self) -> None:
        """Return cached memory to the device for an engine on it; a 7B leaves some 40 GB cached."""
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()

    def set_learning_rate(self, lr: float) -> None:
        for group, scale in zip(self.engine.optimizer.param_groups, self._scales, strict=True):
            group["lr"] = lr * scale

    def begin(self, last: bool) -> None:
        """Call before the forward of every trained micro-batch; `last`: it is the last of the step."""
        self.engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of this rank's share of a *global* loss.

        DeepSpeed averages gradients over ranks; the losses of `algo` are already divided by the global counts, so the
        share is multiplied back by the number of ranks, and not divided by the accumulation steps.
        """
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def optimizer_step(self) -> float:
        """Call after every backward; updates after a step's last. Returns its gradient norm, else 0.

        DeepSpeed drops an update whose norm is infinite or NaN, on all ranks; the norm is then infinite.
        """
        boundary = self.engine.is_gradient_accumulation_boundary()
        self.engine.step()
        return float(self.engine.get_global_grad_norm() or 0.0) if boundary else 0.0

    def all_reduce(self, values: dict[str, float], op: Any = dist.ReduceOp.SUM) -> dict[str, float]:
        """Reduce named scalars over ranks in float64; every rank must hold the same names."""
        names = sorted(values)
        t = torch.tensor([values[n] for n in names], dtype=torch.float64, device=self.device)
        dist.all_reduce(t, op=op)
        return dict(zip(names, t.tolist(), strict=True))

    def _named(self) -> list[tuple[str, Any]]:
        return [(n.removeprefix(PolicyModel.PREFIX), p) for n, p in self.engine.module.named_parameters()]

    def metadata(self) -> list[tuple[str, torch.dtype, list[int]]]:
        """Return (name, dtype, full shape) of `full_parameters` in its order. Not collective."""
        named = ((n, p) for n, p in self._named() if not lora.is_adapter(n))
        return [(n, p.dtype, list(getattr(p, "ds_shape", p.shape))) for n, p in named]

    def full_parameters(self, everywhere: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield (checkpoint name, full tensor) of every parameter, one layer group at a time.

        Collective. The tensor, which the next update may change, is on rank 0 or `everywhere`; other ranks get an empty
        one. Tied parameters come once; adapters are in their layers' weights.
        """
        import deepspeed

        named, full_here = self._named(), everywhere or self.rank == 0
        for group in layer_groups(named):
            with deepspeed.zero.GatheredParameters([p for _, p in group]):
                if full_here:
                    full = list(lora.merged(group, self._lora))
                else:
                    full = [(n, torch.empty(0, dtype=p.dtype)) for n, p in group if not lora.is_adapter(n)]
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
            yield from full

    def flip(self, bit: int, part: str | None = None) -> tuple[int, int]:
        """Flip a bit of every weight's mantissa, trained or not, or of the weights of one `part`.

        Doing it twice restores the weights bit by bit. Signs and exponents stay, so all values stay finite. Master
        weights and moments stay, too. Collective.

        Args:
            bit: which of bfloat16's 7, from the lowest; a weight moves by 2^(bit-7) of its power of two.

        Returns:
            Sums of the bits of this rank's weights, before and after.
        """
        optimizer: Any = self.engine.optimizer
        before = after = torch.zeros((), dtype=torch.int64, device=self.device)
        optimizer.checkpoint_event_prologue()  # now the shards hold all weights
        for name, p in self._named():
            wide = p.ds_tensor.element_size() == 4
            bits = p.ds_tensor.data.view(torch.int32 if wide else torch.int16)
            before = before + bits.sum(dtype=torch.int64)
            if part in (None, self.backbone.part_of(name)):
                bits.bitwise_xor_(1 << (bit + 16 * wide))
            after = after + bits.sum(dtype=torch.int64)
            p.ds_secondary_tensor = None  # a copy within the node; DeepSpeed would keep that of a frozen weight
        optimizer.checkpoint_event_epilogue()
        return int(before), int(after)

    def snapshot(self) -> list[Job]:
        """Copy this rank's part of a checkpoint to the CPU; the returned jobs write it. Collective.

        deepspeed/ gets this rank's shards of weights, master weights and optimizer, model/ from rank 0 a Hugging Face
        model directory (safetensors, processor, generation config).
        """
        snapshots = self.engine.checkpoint_engine
        snapshots.clear()
        self.engine.save_checkpoint(".", tag=DEEPSPEED_TAG, save_latest=False)
        state = {n: t.to("cpu", copy=True) for n, t in self.full_parameters() if t.numel()}
        if self.rank == 0:
            snapshots.add("model", state, lambda directory: self._write_model(state, directory))
        return snapshots.take()

    def _write_model(self, state: dict[str, Tensor], directory: Path) -> None:
        model: Any = self.engine.module.backbone
        model.save_pretrained(directory, state_dict=state, safe_serialization=True)
        self.backbone.processor.save_pretrained(directory)

    def load(self, directory: Path, saved_ranks: int) -> None:
        """Restore a checkpoint written by any number of ranks. Collective."""
        if saved_ranks != self.world_size:
            reshard.load(directory / DEEPSPEED_TAG, saved_ranks, self.engine, self.rank, self.world_size)
        elif self.engine.load_checkpoint(str(directory), tag=DEEPSPEED_TAG)[0] is None:
            raise RuntimeError(f"{directory}: DeepSpeed found nothing to load")
        for group in self.engine.optimizer.param_groups:  # those of the checkpoint, where the run accepts other ones
            group.update({"betas": tuple(self.optim.betas), "eps": self.optim.eps} if "betas" in group else {})
        for parameter in self.engine.module.parameters():
            parameter.ds_secondary_tensor = None  # a node's copy of what was here before; DeepSpeed drops trained ones


def parameter_groups(
    named: list[tuple[str, Any]],
    lr_scale: dict[str, float],
    frozen: Sequence[str] = (),
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Return optimiser groups {"params", "scale"} by `lr_scale`'s first part in a name, else 1.

    With a weight decay each is halved: norms and biases, which have one dimension, get "weight_decay": 0.
    `frozen`: names of untrained parameters that a part may match, as in a recipe used with adapters.

    Raises:
        UserError: a part that no parameter's name contains.
    """
    groups: dict[tuple[str | None, bool], list[Any]] = {}
    for name, parameter in named:
        part = next((part for part in lr_scale if part in name), None)
        flat = bool(weight_decay) and len(getattr(parameter, "ds_shape", parameter.shape)) < 2
        groups.setdefault((part, flat), []).append(parameter)
    for part in lr_scale:
        if not any(part in name for name in (*frozen, *(n for n, _ in named))):
            raise UserError(f"optim.lr_scale.{part}: no trained parameter's name contains {part!r}")
    return [
        {"params": ps, "scale": 1.0 if part is None else lr_scale[part]} | ({"weight_decay": 0.0} if flat else {})
        for (part, flat), ps in groups.items()
    ]


def layer_groups(named: list[tuple[str, Any]]) -> list[list[tuple[str, Any]]]:
    """Group consecutive parameters by the prefix up to their first number: a layer or a block."""

    def layer(item: tuple[str, Any]) -> str:
        parts = item[0].split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        return ".".join(parts[: number + 1]) if number is not None else "rest"

    return [list(group) for _, group in groupby(named, layer)]
