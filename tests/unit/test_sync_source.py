"""Weight buckets: every tensor exactly once, bounded, bit-exact, and only from the sender; copies as few as may be."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from itertools import repeat
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from tatar_dist.run.failpoints import Failpoints  # noqa: E402
from tatar_dist.sync.object_store import (  # noqa: E402
    PIECE,
    ObjectStoreSender,
    Wire,
    buckets,
    copied,
    from_wire,
    staged,
    to_wire,
)


def tensors(sizes: list[int]) -> list[tuple[str, torch.Tensor]]:
    """One float32 tensor per number of elements."""
    return [(f"layer.{i}.weight", torch.full((n,), float(i))) for i, n in enumerate(sizes)]


def nbytes(bucket: dict[str, Wire]) -> int:
    return sum(w.data.nbytes for w in bucket.values())


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(4, 120))
def test_every_tensor_travels_exactly_once_in_order_and_unchanged(sizes, limit):
    sent = tensors(sizes)
    found = [(name, from_wire(w)) for b in buckets(sent, repeat(limit), True) for name, w in b.items()]
    assert [name for name, _ in found] == [name for name, _ in sent]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, sent, strict=True))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(4, 120))
def test_a_bucket_holds_at_most_its_bytes_unless_one_tensor_alone_is_larger(sizes, limit):
    for bucket in buckets(tensors(sizes), repeat(limit), True):
        assert bucket
        assert nbytes(bucket) <= limit or len(bucket) == 1


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(4, 120))
def test_a_bucket_is_sent_only_when_the_next_tensor_does_not_fit(sizes, limit):
    found = list(buckets(tensors(sizes), repeat(limit), True))
    for bucket, after in zip(found, found[1:], strict=False):
        assert nbytes(bucket) + next(iter(after.values())).data.nbytes > limit


def test_a_tensor_larger_than_a_bucket_goes_alone_between_its_neighbours():
    names = [list(b) for b in buckets(tensors([2, 3, 100, 1, 1]), repeat(24), True)]
    assert names == [
        ["layer.0.weight", "layer.1.weight"],
        ["layer.2.weight"],
        ["layer.3.weight", "layer.4.weight"],
    ]


def test_a_tensor_of_exactly_the_bucket_size_shares_nothing():
    assert [len(b) for b in buckets(tensors([6, 6, 3, 3]), repeat(24), True)] == [1, 1, 2]


def test_no_parameters_make_no_bucket():
    assert list(buckets([], repeat(1024), True)) == []


def test_a_rank_that_does_not_send_yields_nothing_but_gathers_every_tensor():
    gathered = []

    def source() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors([1, 50, 2]):
            gathered.append(name)
            yield name, tensor

    assert list(buckets(source(), repeat(16), False)) == []
    assert len(gathered) == 3  # gathering is collective: the sender would wait for ever


def test_the_sender_gathers_no_further_than_the_tensor_that_did_not_fit():
    gathered = []

    def source() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors([2] * 100):
            gathered.append(name)
            yield name, tensor

    stream = buckets(source(), repeat(24), True)
    assert len(next(stream)) == 3
    assert len(gathered) == 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "int64", "uint8", "bool"])
def test_any_dtype_comes_back_bit_for_bit(dtype):
    torch.manual_seed(0)
    tensor = (torch.randn(3, 5, 2) * 100).to(getattr(torch, dtype))
    wire = to_wire(tensor)
    back = from_wire(pickle.loads(pickle.dumps(wire)))
    assert wire.data.dtype == np.uint8 and (wire.dtype, wire.shape) == (dtype, (3, 5, 2))
    assert back.dtype == tensor.dtype and torch.equal(back, tensor)


def test_not_a_number_and_signed_zero_survive():
    tensor = torch.tensor([float("nan"), -0.0, float("-inf"), 1e-40], dtype=torch.bfloat16)
    back = from_wire(to_wire(tensor))
    assert torch.equal(back.view(torch.int16), tensor.view(torch.int16))


def test_scalars_and_transposed_tensors_keep_their_shape_and_values():
    for tensor in (torch.tensor(2.5), torch.arange(6.0).reshape(2, 3).t()):
        back = from_wire(to_wire(tensor))
        assert back.shape == tensor.shape and torch.equal(back, tensor)


def test_a_received_tensor_is_the_object_stores_own_memory():
    wire = to_wire(torch.ones(4))
    shared = wire.data.copy()
    shared.flags.writeable = False
    back = from_wire(Wire(shared, wire.dtype, wire.shape))
    assert back.data_ptr() == shared.ctypes.data and back.tolist() == [1.0] * 4


def sent_by_ray(wire: Wire, gap: int) -> Wire:
    """The wire from a memory in which buffers lie as Ray lays them, `gap` bytes apart."""
    buffers: list[pickle.PickleBuffer] = []
    text = pickle.dumps(wire, 5, buffer_callback=buffers.append)
    raw = [b.raw() for b in buffers]
    memory, places, at = np.zeros(sum(len(r) + gap for r in raw), np.uint8), [], 0
    for r in raw:
        memory[at : at + len(r)] = r
        places.append(memory[at : at + len(r)])
        at += len(r) + gap
    memory.flags.writeable = False
    return pickle.loads(text, buffers=places)


@pytest.mark.parametrize("n", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE + 5])
def test_pieces_next_to_each_other_are_viewed_as_one_and_others_are_copied(n):
    tensor = torch.arange(n) % 251
    wire = to_wire(tensor.to(torch.uint8))
    for gap in (0, 64):
        back = sent_by_ray(wire, gap)
        assert torch.equal(from_wire(back), tensor.to(torch.uint8))
        assert back.data.flags.owndata == (gap > 0 and n > PIECE), "a copy"


def test_a_bucket_of_a_machine_whose_cores_are_idle_is_not_cut():
    buffers: list[pickle.PickleBuffer] = []
    for idle, pieces in ((True, 1), (False, 3)):
        wire = Wire(np.zeros(3 * PIECE, np.uint8), "uint8", (3 * PIECE,), idle)
        buffers.clear()
        pickle.dumps(wire, 5, buffer_callback=buffers.append)
        assert len(buffers) == pieces


def test_bfloat16_takes_two_bytes_a_parameter_on_the_wire():
    model = torch.nn.Linear(10, 7).to(torch.bfloat16)
    (bucket,) = buckets(model.named_parameters(), repeat(1 << 20), True)
    assert nbytes(bucket) == 2 * (10 * 7 + 7)
    assert {w.dtype for w in bucket.values()} == {"bfloat16"}


def test_a_parameter_that_still_has_a_gradient_can_be_sent():
    parameter = torch.nn.Parameter(torch.ones(3))
    (parameter * 2).sum().backward()
    assert not from_wire(to_wire(parameter)).requires_grad


def test_the_first_buckets_are_small_and_four_of_the_largest_are_the_bytes_in_flight():
    learner = SimpleNamespace(full_parameters=lambda: tensors([1] * 64), device=torch.device("cpu"))
    found = [part["bucket"] for part in ObjectStoreSender(learner, 0, Failpoints([], "")).buckets(128)]
    assert [nbytes(b) for b in found] == [8, 16, *[32] * 7, 8]
    assert [n for b in found for n in b] == [name for name, _ in tensors([1] * 64)]
    assert list(ObjectStoreSender(learner, 1, Failpoints([], "")).buckets(128)) == []


def test_a_bucket_on_a_cpu_is_the_learners_own_memory():
    tensor = torch.ones(4)
    (bucket,) = buckets([("weight", tensor)], repeat(1024), True)
    assert bucket["weight"].data.ctypes.data == tensor.data_ptr()
    assert staged(tensor, torch.device("cpu")) is tensor


def test_a_bucket_of_a_gpu_is_sent_when_it_is_copied_while_the_next_ones_copies_run(monkeypatch):
    seen: list[str] = []
    stream = SimpleNamespace(synchronize=lambda: seen.append("copied"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)

    def made() -> Iterator[dict[str, str]]:
        for name in "abc":
            seen.append(f"{name} starts")
            yield {name: name}

    for bucket in copied(made()):
        seen.extend(f"{name} sent" for name in bucket)
    assert seen == ["a starts", "copied", "b starts", "a sent", "copied", "c starts", "b sent", "copied", "c sent"]


def test_where_no_memory_can_be_pinned_a_copy_goes_without_and_says_so():
    def refuse() -> None:
        raise RuntimeError("CUDA error: out of memory\nmore")

    arrived = torch.ones(2, dtype=torch.uint8)
    tensor = SimpleNamespace(device=torch.device("cpu"), pin_memory=refuse, to=lambda device: arrived)
    with pytest.warns(UserWarning, match="pageable memory, which is slower: RuntimeError: CUDA error: out of memory"):
        assert staged(tensor, torch.device("cuda")) is arrived
