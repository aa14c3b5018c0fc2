"""Tensors in parts: every shape comes back, everything that was not announced is refused, before memory is taken."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidelock.errors import WireError
from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire.codec import WIRE_DTYPES, Part, TensorReader, dtype_from_pb, dtype_to_pb, write_parts
from tidelock.wire.limits import PART_BYTES

DTYPES = st.sampled_from(sorted(WIRE_DTYPES.values(), key=str))
SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)


def read_back(parts, shape, dtype, block=0):
    reader = TensorReader("a tensor", shape, dtype, block=block)
    for part in parts:
        assert not reader.complete
        reader.add(part)
    assert reader.complete
    return reader.tensor()


@given(SHAPES, DTYPES, st.integers(0, 40))
def test_any_shape_comes_back_bit_for_bit(shape, dtype, block):
    tensor = torch.randn(shape).to(dtype)
    back = read_back(write_parts(tensor, dtype, block=block), shape, dtype, block)
    assert back.dtype == dtype
    assert back.shape == shape
    assert torch.equal(back, tensor)


@given(st.integers(-2, 2), st.integers(1, 3), DTYPES)
@settings(max_examples=12)
def test_large_tensors_cross_in_full_parts(beside, parts, dtype):
    numbers = parts * PART_BYTES // dtype.itemsize + beside
    tensor = torch.arange(numbers, dtype=torch.float32).to(dtype)
    written = list(write_parts(tensor, dtype))
    assert [len(part.data) for part in written[:-1]] == [PART_BYTES] * (len(written) - 1)
    assert len(written) == math.ceil(numbers * dtype.itemsize / PART_BYTES)
    assert torch.equal(read_back(written, (numbers,), dtype), tensor)


def test_only_the_first_part_says_shape_and_dtype():
    first, second = write_parts(torch.zeros(PART_BYTES // 2), torch.float32, block=3)
    assert (first.block, first.dtype, first.shape) == (3, pb.FP32, (PART_BYTES // 2,))
    assert (second.block, second.dtype, second.shape) == (3, pb.DTYPE_UNSPECIFIED, ())


def test_numbers_are_rounded_to_the_wire_dtype_and_views_are_written_in_order():
    tensor = torch.randn(3, 5).T.requires_grad_()
    back = read_back(write_parts(tensor, torch.bfloat16), (5, 3), torch.bfloat16)
    assert torch.equal(back, tensor.detach().bfloat16())


def test_bytes_are_little_endian():
    (part,) = write_parts(torch.tensor([1.0]), torch.float32)
    assert bytes(part.data) == b"\x00\x00\x80\x3f"


def test_the_finished_tensor_can_be_written_to():
    back = read_back(write_parts(torch.zeros(2), torch.float32), (2,), torch.float32)
    assert torch.equal(back.add_(1), torch.ones(2))


def test_dtypes_have_numbers():
    assert [dtype_from_pb(dtype_to_pb(dtype)) for dtype in WIRE_DTYPES.values()] == list(WIRE_DTYPES.values())


@pytest.mark.parametrize("number", [pb.DTYPE_UNSPECIFIED, 3, -1, 2**31 - 1])
def test_an_unknown_dtype_is_refused(number):
    with pytest.raises(WireError, match=f"Wire dtype: expected one of .*, got {number}"):
        dtype_from_pb(number)


def a_part(numbers=4, **changes):
    return Part(**{"block": 1, "dtype": pb.FP32, "shape": (2, 2), "data": memoryview(bytes(4 * numbers)), **changes})


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (a_part(block=0), "expected block 1, got block 0"),
        (a_part(dtype=pb.BF16), r"torch.float32 of shape \(2, 2\), got torch.bfloat16"),
        (a_part(dtype=9), "Wire dtype"),
        (a_part(shape=(4,)), r"got torch.float32 of shape \(4,\)"),
        (a_part(shape=()), r"got torch.float32 of shape \(\)"),
        (a_part(3), "expected a part of 16 bytes, got 12 bytes"),
        (a_part(5), "expected a part of 16 bytes, got 20 bytes"),
        (a_part(0), "expected a part of 16 bytes, got 0 bytes"),
    ],
)
def test_a_first_part_of_something_else_is_refused(part, message):
    reader = TensorReader("a gradient", (2, 2), torch.float32, block=1)
    with pytest.raises(WireError, match=f"Reading a gradient: .*{message}|{message}"):
        reader.add(part)
    assert not reader.complete
    with pytest.raises(WireError, match="expected 16 bytes, got 0 bytes"):
        reader.tensor()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (1,)}, "a further part of the same tensor, got the first part of another"),
        ({"dtype": pb.FP32}, "a further part of the same tensor, got the first part of another"),
        ({"block": 2}, "expected block 1, got block 2"),
        ({"data": memoryview(bytes(8))}, "expected a part of 4 bytes, got 8 bytes"),
        ({"data": memoryview(b"")}, "expected a part of 4 bytes, got 0 bytes"),
    ],
)
def test_a_further_part_of_something_else_is_refused(change, message):
    shape = (PART_BYTES // 4 + 1,)
    reader = TensorReader("a state", shape, torch.float32, block=1)
    first, second = write_parts(torch.zeros(shape), torch.float32, block=1)
    reader.add(first)
    assert not reader.complete
    bad = replace(second, **change)
    with pytest.raises(WireError, match=message):
        reader.add(bad)
    with pytest.raises(WireError, match=f"expected {PART_BYTES + 4} bytes, got {PART_BYTES} bytes"):
        reader.tensor()


def test_nothing_can_follow_a_finished_tensor():
    reader = TensorReader("a state", (1,), torch.float32)
    for part in write_parts(torch.zeros(1), torch.float32):
        reader.add(part)
    with pytest.raises(WireError, match="expected a part of 0 bytes, got 4 bytes"):
        reader.add(Part(0, 0, (), memoryview(bytes(4))))


def memory_taken(action):
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "part",
    [
        Part(0, pb.FP32, (2**31, 2**31), memoryview(b"1234")),
        # The right header, and next to no data: nothing is taken for a promise.
        Part(0, pb.FP32, (64, 1 << 20), memoryview(b"1234")),
    ],
)
def test_a_refused_part_takes_no_memory(part):
    reader = TensorReader("an embedding", (64, 1 << 20), torch.float32)

    def add():
        with pytest.raises(WireError):
            reader.add(part)

    assert memory_taken(add) < 1 << 20


def test_memory_is_taken_for_the_expected_size_only():
    shape = (4 * PART_BYTES // 4,)
    first = next(write_parts(torch.zeros(shape), torch.float32))
    assert memory_taken(lambda: TensorReader("a state", shape, torch.float32).add(first)) < 7 * PART_BYTES


@given(st.integers(0, 3), st.integers(0, 3), st.lists(st.integers(0, 3), max_size=3), st.binary(max_size=20))
def test_garbage_raises_nothing_but_our_error(block, dtype, shape, data):
    reader = TensorReader("a state", (2,), torch.float32)
    try:
        reader.add(Part(block, dtype, tuple(shape), memoryview(data)))
    except WireError:
        assert not reader.complete
    else:
        assert (block, dtype, shape, len(data)) == (0, pb.FP32, [2], 8)
        assert reader.complete
