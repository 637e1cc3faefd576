"""The parts of `gpu-check`, the riskiest first, and what each needs.

Imports only the standard library: the parts themselves are imported in the process of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

LEARNER, ZERO3 = ("torch", "transformers"), ("torch", "transformers", "deepspeed")
ENGINE, ALL = ("vllm", "ray"), ("vllm", "ray", "deepspeed")


class NotHere(Exception):
    """The part cannot run here, which is no failure: no GPU, or one that is too small."""


@dataclass(frozen=True)
class CheckSetting:
    """Where the parts run.

    device: cuda, or cpu with `--pretend`; gpus: their number; place: directory of one part.
    """

    device: str
    gpus: int
    place: str = ""

    @property
    def pretend(self) -> bool:
        return self.device == "cpu"

    @property
    def slack(self) -> int:
        """Return the factor on all times: other processes may use a CPU's cores."""
        return 5 if self.pretend else 1


@dataclass(frozen=True)
class Part:
    """One part, in a process of its own.

    run: `module:function`, called with the setting and `variant`; returns a line of text and figures by name.
    limit_s: seconds after which its process is ended. required: whether a failure counts in the exit status.
    """

    name: str
    run: str
    limit_s: float
    modules: tuple[str, ...]
    variant: str = ""
    gpus: int = 1
    on_cpu: bool = True
    required: bool = True

    def missing(self, setting: CheckSetting) -> str | None:
        """Return what keeps the part from running here, or None."""
        absent = [module for module in self.modules if find_spec(module) is None]
        if absent:
            return f"{', '.join(absent)} not installed"
        if setting.pretend:
            return None if self.on_cpu else "runs on GPUs only"
        return f"needs {self.gpus} GPUs" if self.gpus > setting.gpus else None


L, E = "tatar_dist.gpu_check.learner_parts", "tatar_dist.gpu_check.engine_parts"
PARTS = (
    Part("devices", f"{L}:devices", 120, ("torch",)),
    Part("packed", f"{L}:packed", 90, LEARNER),
    Part("engine", f"{E}:engine", 240, ENGINE),
    Part("zero3", f"{L}:zero3", 90, ZERO3),
    Part("push-object-store", f"{E}:push", 180, ALL, variant="object_store"),
    Part("push-cuda-ipc", f"{E}:push", 180, ALL, variant="cuda_ipc", on_cpu=False),
    Part("push-nccl", f"{E}:push", 180, ALL, variant="nccl", gpus=2, on_cpu=False),
    Part("engine-tp2", f"{E}:engine", 180, ENGINE, variant="tp2", gpus=2, on_cpu=False),
    Part("sleep", f"{E}:sleep", 180, ENGINE),
    Part("grpo", f"{E}:grpo", 240, ALL),
    Part("speed-3b", f"{L}:speed", 60, LEARNER, variant="3B"),
    Part("speed-7b", f"{L}:speed", 60, LEARNER, variant="7B", on_cpu=False),
    Part("engine-v2", f"{E}:engine", 180, ENGINE, variant="v2", on_cpu=False, required=False),
)
