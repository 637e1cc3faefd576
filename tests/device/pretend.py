"""A pretended accelerator: fake tensors on a device of their own, and DeepSpeed on it.

In torch's CUDA build the device is "cuda" (pretended_gpu.py), with DeepSpeed's own accelerator, real streams and events
around kernels that do not run. The CPU build has no such device, so one is registered.
`FakeAccelerator` runs real module code on tensors without memory: devices, dtypes and shapes are checked as on a GPU,
allocations are counted, no kernel runs. The values of integers are kept, because vision towers compute shapes from
them. torch lets a process register one such device, and its autograd engine then takes it for the machine's
accelerator, so these tests have a process of their own.
"""

from __future__ import annotations

import sys
import traceback
import weakref
from collections import Counter
from types import FrameType
from typing import Any

from pretended_gpu import CUDA  # isort: skip # before torch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "cuda" if CUDA else "pretend"
RANKS = 8
LIBRARY = torch.library.Library("aten", "IMPL")
aten = torch.ops.aten
SMALL = 1 << 16  # the maker of a smaller tensor is not looked up
ALLOCATED_BY = (  # file, function, part
    ("tatar_dist/learner/policy", "TokenLogprob", "head"),
    ("tatar_dist/learner/policy", "_logits", "head"),
    ("deepspeed/runtime/zero/stage3", "__avg_scatter_grads", "reduction"),
    ("deepspeed/runtime/zero/stage3", "_prepare_fp32_grad_for_sub_group", "step"),
    ("deepspeed/runtime/zero/stage3", "_setup_for_real_optimizer", "gradients"),  # and the reduce bucket
    ("deepspeed/runtime/zero/stage3", "_create_fp32_partitions", "optimizer"),
    ("deepspeed/runtime/zero/stage3", "step_with_gradscaler", "optimizer"),  # the moments of AdamW
    ("deepspeed/runtime/zero/stage3", "", "weights"),
    ("deepspeed/runtime/zero/partition", "wrapped_fn", "weights"),  # zero.Init
    ("deepspeed/runtime/zero/partition", "", "gathered"),
)
MADE_UP = {torch.bool: False, torch.uint8: 0}  # what a check reads: nothing is wrong. Any other unknown number is 1


def register() -> torch.device:
    """Register the device with torch and DeepSpeed, once in a process. "cuda" needs nothing."""
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    if CUDA:
        assert type(get_accelerator()) is CUDA_Accelerator, "DeepSpeed would take another device's branches"
        return torch.device(NAME, 0)

    class Accelerator(CPU_Accelerator):
        def device_name(self, device_index: int | None = None) -> str:
            return NAME if device_index is None else f"{NAME}:{device_index}"

        def device(self, device_index: int | None = None) -> torch.device:
            return torch.device(NAME, device_index or 0)

        def current_device(self) -> int:
            return 0

        def current_device_name(self) -> str:
            return f"{NAME}:0"

        def communication_backend_name(self) -> str:
            return "fake"

        def on_accelerator(self, tensor: torch.Tensor) -> bool:
            return tensor.device.type == NAME

    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME)
        getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
        set_accelerator(Accelerator())
        # without a kernel of the device torch takes it apart, into five temporaries that a GPU does not have
        LIBRARY.impl("silu_backward", lambda grad, x: torch.empty_like(x), "PrivateUse1")
    return torch.device(NAME, 0)


def join_process_group() -> None:
    """Be rank 0 of RANKS, whose collectives return at once. Once in a process, because DeepSpeed keeps the groups."""
    import deepspeed

    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
        deepspeed.init_distributed("fake", auto_mpi_discovery=False, verbose=False)


class FakeAccelerator(FakeTensorMode):
    """The mode in which tensors of the device are made.

    Attributes:
        bytes: of all tensors on the device now.
        parts: those bytes by the part of ALLOCATED_BY.
        moment: what runs now, as the test that counts peaks calls it.
        peaks: {moment: largest `bytes` so far}, and {(moment, part): the same of a part of ALLOCATED_BY}.
        dtypes: {operator: (dtypes of its tensors, result last)} of the calls on the device, counted.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.bytes = 0
        self.moment = "setup"
        self.peaks: Counter[Any] = Counter()
        self.parts: Counter[str] = Counter()
        self.dtypes: dict[str, Counter[tuple[torch.dtype, ...]]] = {}
        self._values: dict[int, dict[Any, torch.Tensor]] = {}  # by storage, then by view: autograd makes aliases
        self._storages: dict[int, Any] = {}

    @property
    def avoid_device_init(self) -> bool:
        return True  # torch.tensor(…, device=…) must make its tensor on the CPU first

    def __enter__(self) -> FakeAccelerator:
        self._threads = torch.autograd.set_multithreading_enabled(False)  # the mode is of this thread
        self._threads.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._threads.__exit__(*error)

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        known = all(self._known(x) for x in inputs)
        if func is aten.record_stream.default:  # it has no form for fake tensors
            return None
        if func is aten._local_scalar_dense.default:
            return self._value(inputs[0]).item() if known else MADE_UP.get(inputs[0].dtype, 1)
        if func is aten._pin_memory.default:  # nor has this; what it makes lies on the CPU
            func, args, kwargs = aten.clone.default, args[:1], {}
        values = None
        if known:
            with _disable_current_modes():
                values = func(*tree_map(self._value, args), **tree_map(self._value, kwargs))
        elif func._schema.is_mutable:
            for argument, x in zip(func._schema.arguments, args, strict=False):
                if argument.is_write and isinstance(x, torch.Tensor):
                    self._values.pop(x.untyped_storage()._cdata, None)
        try:
            out = super().dispatch(func, types, args, kwargs)
        except DynamicOutputShapeException:
            if values is None:
                traceback.print_exc()
                raise
            device = inputs[0].device
            with self:
                out = tree_map(lambda v: torch.empty(v.shape, dtype=v.dtype, device=device), values)
        except Exception:
            traceback.print_exc()  # inside a backward the engine ends the process and says nothing
            raise
        outputs = [x for x in tree_leaves(out) if isinstance(x, FakeTensor)]
        for x in outputs:
            self._count(x)
        if values is not None:
            for x, value in zip(tree_leaves(out), tree_leaves(values), strict=True):
                if isinstance(x, FakeTensor) and (value.numel() == 1 or not value.is_floating_point()):
                    self._values.setdefault(x.untyped_storage()._cdata, {})[_view(x)] = value
        if any(x.device.type == NAME for x in (*inputs, *outputs)):
            dtypes = tuple(x.dtype for x in (*inputs, *outputs[:1]))
            self.dtypes.setdefault(func.name(), Counter())[dtypes] += 1
        return out

    def _known(self, x: torch.Tensor) -> bool:
        if not isinstance(x, FakeTensor):
            return x.numel() == 1 or not x.is_floating_point()
        return _view(x) in self._values.get(x.untyped_storage()._cdata, ())

    def _value(self, x: Any) -> Any:
        if isinstance(x, FakeTensor):
            return self._values[x.untyped_storage()._cdata][_view(x)]
        return torch.device("cpu") if isinstance(x, torch.device) else x

    def _count(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            size = storage.nbytes() if x.device.type == NAME else 0
            part = allocated_by(sys._getframe()) if size > SMALL else "activations"
            self.bytes += size
            self.parts[part] += size
            self._storages[key] = weakref.finalize(storage, self._freed, key, size, part)
            if size:
                self.peaks[self.moment] = max(self.peaks[self.moment], self.bytes)
                of_part = self.moment, part
                self.peaks[of_part] = max(self.peaks[of_part], self.parts[part])

    def _freed(self, key: int, size: int, part: str) -> None:
        self._storages.pop(key, None)
        self._values.pop(key, None)
        self.bytes -= size
        self.parts[part] -= size


def allocated_by(frame: FrameType | None) -> str:
    """Return the part of ALLOCATED_BY whose code made a tensor; what no code of it made are activations."""
    while frame is not None:
        for file, function, part in ALLOCATED_BY:
            if file in frame.f_code.co_filename and function in frame.f_code.co_qualname:
                return part
        frame = frame.f_back
    return "activations"


def _view(x: torch.Tensor) -> tuple[Any, ...]:
    return x.dtype, x.storage_offset(), x.shape, x.stride()
