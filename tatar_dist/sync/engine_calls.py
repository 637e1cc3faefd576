"""What a `RolloutEngine` on a GPU can be asked besides: NCCL and CUDA IPC pushes, sleep. Never run on a GPU.

Base classes; `llm` is the engine's vLLM, whose workers run `engine_side.PushEngine`.
"""

from __future__ import annotations

from typing import Any


class GpuPushes:
    """`RolloutEngine`'s calls of a GPU push, between `start_update` and `finish_update`."""

    llm: Any

    def nccl_join(self, unique_id: str, rank: int, world_size: int, bucket_bytes: int) -> None:
        """Join the group of `unique_id`; this engine's workers have the ranks from `rank` on. Waits for all others."""
        nccl = {
            "nccl_unique_id_b64": unique_id,
            "rank_offset": rank,
            "world_size": world_size,
            "packed": True,
            "packed_buffer_size_bytes": bucket_bytes,
        }
        self.llm.init_weight_transfer_engine({"init_info": {"nccl": nccl}})

    def nccl_update(self, names: list[str], dtype_names: list[str], shapes: list[list[int]], timeout_s: float) -> None:
        """Receive all weights, while learner rank 0 broadcasts them."""
        update = {"names": names, "dtype_names": dtype_names, "shapes": shapes, "timeout_s": timeout_s}
        self.llm.update_weights({"update_info": update})

    def ipc_update(self, chunk: dict[str, Any]) -> None:
        """Copy one chunk out of a learner's memory on the same GPU."""
        self.llm.update_weights({"update_info": chunk})


class Sleeping:
    """Engines that share the learners' GPUs give their memory back while those work; on a CPU nothing happens."""

    llm: Any
    asleep = False

    def sleep(self) -> None:
        """Free weights and KV cache. Weights are outdated by the update anyway, a push follows every wake-up."""
        if self._can_sleep() and not self.asleep:
            self.llm.sleep(level=2)
        self.asleep = True

    def wake_for_update(self) -> None:
        """Memory for weights, before a push into them; the KV cache's comes with `wake`."""
        if self._can_sleep() and self.asleep:
            self.llm.wake_up(tags=["weights"])

    def wake(self) -> None:
        """Memory for the KV cache, after a push: the engine can generate again."""
        if self._can_sleep() and self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
        self.asleep = False

    def _can_sleep(self) -> bool:
        return bool(self.llm.llm_engine.vllm_config.model_config.enable_sleep_mode)
