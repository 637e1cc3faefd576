"""A learner: the Ray actor that holds one ZeRO-3 rank and runs SFT and GRPO steps on it.

The controller sends every rank its rows of one global batch; all ranks make the same calls. A step returns the same
`StepReport` on every rank, its metrics reduced over the global batch.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tatar_dist.config.schema import Config
from tatar_dist.errors import RunError
from tatar_dist.learner.sharding import Shard
from tatar_dist.learner.transfer import RankFiles
from tatar_dist.run.failpoints import Failpoints
from tatar_dist.run.process import check_visible_gpus, importing, open_log, process_facts, use_node_caches
from tatar_dist.types import StepReport


class WeightsOutOfSync(RunError):
    """Engine and learner log-probabilities differ: the engine samples from other weights."""


class Learner:
    """One rank. Plain class: `tatar_dist.cluster.ray_cluster` makes the Ray actor of it."""

    def __init__(self, config: Config, rank: int, world_size: int) -> None:
        open_log(config.output, f"learner-{rank}")
        self.config, self.rank, self.world_size = config, rank, world_size
        self._senders: dict[str, Any] = {}  # of weight pushes, by way
        self.failpoints = Failpoints(config.failpoints, config.output, rank=rank)
        self._files = RankFiles()
        self._last: tuple[Any, int] | None = None  # the last update's last micro-batch, on the CPU, and its step

    def setup(self, rendezvous: Any, stage: str, total_steps: int, threads: int) -> dict[str, Any]:
        """Join the group at `rendezvous` (process_group.py); load and shard the model. Collective.

        Returns its rank, the model's parameters and where the process runs, for the log.
        """
        os.environ.update(RANK=str(self.rank), WORLD_SIZE=str(self.world_size), LOCAL_RANK="0")
        check_visible_gpus()
        use_node_caches()
        with importing():
            import torch

            from tatar_dist.learner import process_group

            self.device = process_group.local_device(self.config.cluster)  # before what takes long
            import deepspeed  # noqa: F401

            from tatar_dist.algo.schedule import needs_reference
            from tatar_dist.learner.batch import Collator
            from tatar_dist.learner.rendezvous import listening, silence
            from tatar_dist.learner.zero3 import Zero3

        torch.set_num_threads(threads)
        torch.manual_seed(self.config.seed)
        others = listening()
        group = (rendezvous, self.rank, self.world_size, self.device, self.config.cluster)
        self.store = process_group.init_process_group(*group)
        self.stage, self.stage_config = stage, getattr(self.config, stage)
        with_reference = stage == "grpo" and needs_reference(self.config.grpo)
        self.zero3 = Zero3(
            self.config,
            self.stage_config.optim,
            reference_path=self.config.model.path if with_reference else None,
            temperature=self.config.rollout.temperature if stage == "grpo" else 1.0,
            device=self.device,
        )
        if self.device.type == "cpu":  # NCCL connects lazily and authenticates by a secret of the run
            silence(listening() - others)
        self.total_steps = total_steps
        self.collate = Collator(self.zero3.backbone)
        self._hand_over()
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.zero3.engine.module.parameters())
        return {"rank": self.rank, "parameters": parameters, **process_facts()}

    def _batches(self, shard: Shard) -> Iterator[Any]:
        """Yield the micro-batches of a shard, on the CPU; a thread prepares the next ones meanwhile.

        Images are decoded and preprocessed once per step. Only the batch in use is moved to the device.
        """
        self.collate.new_step()
        with ThreadPoolExecutor(1) as thread:
            for batch in [thread.submit(self.collate, rows) for rows in shard]:
                yield batch.result()

    def sft_step(self, shard: Shard, step: int, global_tokens: int) -> StepReport:
        """Make an optimiser step on this rank's rows. `global_tokens`: the batch's trained tokens."""
        from tatar_dist.algo.loss import sft_loss
        from tatar_dist.algo.schedule import learning_rate

        start = time.perf_counter()
        lr = learning_rate(self.stage_config.optim, step, self.total_steps)
        self.zero3.set_learning_rate(lr)
        total, norm = 0.0, 0.0
        for i, prepared in enumerate(self._batches(shard)):
            batch = prepared.to(self.device)
            self.zero3.begin(last=i == len(shard) - 1)
            out = self.zero3.engine(batch)
            out.logp.register_hook(lambda _: self.failpoints.reach("learner.backward", step=step))
            loss = sft_loss(out.logp, batch.mask, global_tokens)
            self.zero3.backward(loss)
            norm = self.zero3.optimizer_step() or norm
            total += float(loss.detach())
        if math.isfinite(norm):  # otherwise the update was dropped
            self._last = prepared, step
        self._check_due(step)
        metrics = self.zero3.all_reduce({"loss/total": total})
        metrics |= {"optim/lr": lr, "optim/grad_norm": norm}
        return StepReport(metrics, time.perf_counter() - start)

    def sft_loss(self, shard: Shard) -> dict[str, float]:
        """Reduce negative log-likelihood and tokens by task over all ranks' held-out micro-batches."""
        import torch

        self.zero3.engine.eval()
        sums = {f"{k}/{t}": 0.0 for k in ("nll", "tokens") for t in ("iqa", "iaa")}
        with torch.no_grad():
            for rows, prepared in zip(shard, self._batches(shard), strict=True):
                batch = prepared.to(self.device)
                logp = self.zero3.engine(batch).logp * batch.mask
                for r, row in enumerate(rows):
                    sums[f"nll/{row.task}"] -= float(logp[r].sum())
                    sums[f"tokens/{row.task}"] += float(batch.mask[r].sum())
        self.zero3.engine.train()
        return self.zero3.all_reduce(sums)

    def grpo_step(self, shard: Shard, step: int) -> StepReport:
        """Make `inner_iterations` steps of clipped policy loss and k3 KL on this rank's rows.

        Before the (first) update the engine's log-probabilities are compared with the learner's on all tokens of the
        step; a mean gap over `grpo.logprob_gap_limit` raises on every rank and nothing is updated.

        Raises:
            WeightsOutOfSync: the comparison failed.
        """
        import torch
        import torch.distributed as dist

        from tatar_dist.algo.loss import PolicyLoss, policy_loss
        from tatar_dist.algo.schedule import importance, kl_beta, learning_rate

        start, g, n = time.perf_counter(), self.config.grpo, len(shard)
        form = PolicyLoss(
            clip_low=g.clip_low,
            clip_high=g.clip_high,
            ratio=g.ratio,
            importance=importance(self.config),
            importance_mode=g.importance_mode,
            importance_cap=g.importance_cap,
            importance_floor=g.importance_floor,
            objective=g.objective,
            clip_delta=g.clip_delta,
            tau_positive=g.tau_positive,
            tau_negative=g.tau_negative,
        )
        beta, lr = kl_beta(g, step, self.total_steps), learning_rate(g.optim, step, self.total_steps)
        self.zero3.set_learning_rate(lr)
        batches: Any = self._batches(shard)
        reference: list[Any] = [None] * n
        old: list[Any] = [None] * n
        if self.zero3.has_reference or g.inner_iterations > 1:
            kept = []
            with torch.no_grad():
                for i, prepared in enumerate(batches):
                    kept.append(prepared)
                    batch = prepared.to(self.device)
                    reference[i] = self.zero3.reference_logp(batch) if self.zero3.has_reference else None
                    old[i] = self.zero3.engine(batch).logp if g.inner_iterations > 1 else None
            batches = kept
        sums: dict[str, float] = {}
        gap_sum, gap_max, ratio_max, norm, updated = 0.0, 0.0, 0.0, 0.0, False
        gap: dict[str, float] = {}
        for iteration in range(g.inner_iterations):
            for i, prepared in enumerate(batches):
                batch = prepared.to(self.device)
                self.zero3.begin(last=i == n - 1)
                out = self.zero3.engine(batch)
                out.logp.register_hook(lambda _: self.failpoints.reach("learner.backward", step=step))
                if iteration == 0:
                    difference = ((out.logp.detach() - batch.sampled_logprobs) * batch.mask).abs()
                    gap_sum += float(difference.sum())
                    gap_max = max(gap_max, float(difference.max()))
                parts = policy_loss(
                    form,
                    out.logp,
                    old[i],
                    reference[i],
                    batch.advantage,
                    batch.mask,
                    batch.weight,
                    kl_beta=beta,
                    engine_logp=batch.sampled_logprobs,
                    entropy=out.entropy,
                )
                self.zero3.backward(parts.loss)
                for key, value in parts.sums.items():
                    sums[key] = sums.get(key, 0.0) + value
                ratio_max = max(ratio_max, parts.ratio_max)
                if iteration == 0 and i == n - 1:
                    gap = self._checked_gap(gap_sum, gap_max, sums["tokens"])  # before anything is updated
                made = self.zero3.optimizer_step()
                norm = made if made and math.isfinite(norm) else norm  # one that is not finite is reported
                updated = updated or bool(made) and math.isfinite(made)
        if updated:
            self._last = prepared, step
        self._check_due(step)
        total = self.zero3.all_reduce(sums)
        ratio = self.zero3.all_reduce({"ratio": ratio_max}, dist.ReduceOp.MAX)["ratio"]
        policy, kl = (total.get(k, 0.0) / g.inner_iterations for k in ("policy", "kl"))
        trained = max(total["trained"], 1.0)
        metrics = {
            "loss/policy": policy,
            "loss/kl": kl,
            "loss/kl_beta": beta,
            "loss/total": policy + beta * kl,
            "policy/entropy": total["entropy"] / total["tokens"],
            "policy/clip_fraction": total["clipped"] / trained,
            "policy/ratio_max": ratio,
            **{f"policy/{k}": total[k] / trained for k in ("importance_mean", "importance_cut") if k in total},
            "optim/lr": lr,
            "optim/grad_norm": norm,
            **gap,
        }
        self._hand_over()
        return StepReport(metrics, time.perf_counter() - start)

    def _hand_over(self) -> None:
        """Return cached memory before a push: an engine that shares the GPU wakes up in it."""
        if self.config.cluster.placement == "colocated":
            self.zero3.release_memory()

    def _checked_gap(self, gap_sum: float, gap_max: float, tokens: float) -> dict[str, float]:
        """Reduce the gap over all ranks. Raises WeightsOutOfSync if its mean is over the limit."""
        import torch.distributed as dist

        s = self.zero3.all_reduce({"gap": gap_sum, "tokens": tokens})
        worst = self.zero3.all_reduce({"gap": gap_max}, dist.ReduceOp.MAX)["gap"]
        mean, limit, lag = s["gap"] / s["tokens"], self.config.grpo.logprob_gap_limit, self.config.grpo.staleness
        if not mean <= limit:
            raise WeightsOutOfSync(
                f"engine and learner log-probabilities differ by {mean:.3g} nats a token on average (limit "
                f"grpo.logprob_gap_limit={limit:g}, worst {worst:.3g}). Likely causes: a weight push was skipped or "
                "did not reach the vision tower or lm_head, the engine's encoder or prefix cache was not reset, engine "
                "and learner use other dtypes, pixels or temperature"
                + (f"; or, with grpo.staleness={lag}, the policy moved that far: raise the limit." if lag else ".")
            )
        return {"sync/logprob_gap": mean, "sync/logprob_gap_max": worst}

    def push(self, way: str, part: str, *arguments: Any) -> Any:
        """Call the method `part` of this rank's sender of the push `way` (sync/)."""
        from tatar_dist.sync import WAYS

        if way not in self._senders:
            self._senders[way] = WAYS[way][0](self.zero3, self.rank, self.failpoints)
        return getattr(self._senders[way], part)(*arguments)

    def push_stream(self, way: str, part: str, *arguments: Any) -> Iterator[Any]:
        """Call like `push` a method that yields: Ray streams generator functions only."""
        yield from self.push(way, part, *arguments)

    def logprob_gap(self, shard: Shard) -> dict[str, float]:
        """Return mean and largest |engine - learner| log-probability over ranks, without an update.

        Raises:
            WeightsOutOfSync: the mean is over `grpo.logprob_gap_limit`.
        """
        batches = [b.to(self.device) for b in self._batches(shard)]
        gaps = [
            (logp - b.sampled_logprobs * b.mask).abs() for logp, b in zip(self._logps(batches), batches, strict=True)
        ]
        self._hand_over()
        total, worst = sum(float(g.sum()) for g in gaps), max(float(g.max()) for g in gaps)
        return self._checked_gap(total, worst, sum(float(b.mask.sum()) for b in batches))

    def _logps(self, batches: list[Any]) -> list[Any]:
        """Return the log-probabilities of micro-batches, 0 where masked, without gradients."""
        import torch

        self.zero3.engine.eval()
        with torch.no_grad():
            logps = [self.zero3.engine(b).logp * b.mask for b in batches]
        self.zero3.engine.train()
        return logps

    def flip(self, bit: int) -> tuple[int, int]:
        """Move all weights, or move them back (`Zero3.flip`)."""
        self.failpoints.reach("learner.flip")
        return self.zero3.flip(bit)

    def probe(self, shard: Shard, bit: int) -> dict[str, float]:
        """Compare with the engine while all weights are moved by `flip(bit)`, in nats a token.

        Returns "gap", the mean |engine - learner|, and by part of the model what the gap would be if the engine had
        that part unmoved.
        """
        batches = [b.to(self.device) for b in self._batches(shard)]
        moved = self._logps(batches)

        def apart(logps: Any) -> float:
            return sum(float((a - b).abs().sum()) for a, b in zip(moved, logps, strict=True))

        sums = {"tokens": sum(float(b.mask.sum()) for b in batches)}
        sums["gap"] = apart(b.sampled_logprobs * b.mask for b in batches)
        for part in sorted({self.zero3.backbone.part_of(name) for name, *_ in self.zero3.metadata()}):
            self.zero3.flip(bit, part)
            sums[part] = apart(self._logps(batches))
            self.zero3.flip(bit, part)
        self._hand_over()
        total = self.zero3.all_reduce(sums)
        tokens = total.pop("tokens")
        return {key: nats / tokens for key, nats in total.items()}

    def save(self) -> int:
        """Snapshot a checkpoint into CPU memory, to be written later. Collective. Returns its bytes."""
        self._files.snapshot = []  # free a snapshot that was never written
        self._files.snapshot = self.zero3.snapshot()
        size: int = self.zero3.engine.checkpoint_engine.bytes
        return size

    def _check_due(self, step: int) -> None:
        """Check the weights before a checkpoint that is due after `step`."""
        every = self.config.checkpoint.every
        if step + 1 == self.total_steps or (every and (step + 1) % every == 0):
            self.check_weights()

    def check_weights(self) -> None:
        """Run the last update's last micro-batch again, with the weights after it. Collective.

        Raises:
            RunError: they give a log-probability that is not finite, on any rank.
        """
        import torch

        if self._last is None:
            return
        batch, step = self._last[0].to(self.device), self._last[1]
        with torch.no_grad():
            bad = not torch.isfinite(self.zero3.engine(batch).logp * batch.mask).all()
        if self.zero3.all_reduce({"bad": float(bad)})["bad"]:
            raise RunError(
                f"step {step}: with the weights after it log-probabilities are not finite: no checkpoint of them is "
                f"written, earlier ones stay. Lower {self.stage}.optim.lr or {self.stage}.optim.clip_norm"
            )

    def files(self, part: str, *arguments: Any) -> Any:
        """Call the method `part` of this rank's files (transfer.py); some run beside training."""
        return getattr(self._files, part)(*arguments)

    def load(self, directory: str | None, saved_ranks: int) -> None:
        """Restore a checkpoint of `saved_ranks` ranks; `directory` None: received files. Collective."""
        self.zero3.load(Path(directory) if directory else self._files.received, saved_ranks)
        self._files.discard()
        self._hand_over()
