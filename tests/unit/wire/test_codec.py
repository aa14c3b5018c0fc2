"""Tensors in parts: every shape comes back, everything that was not announced is refused, before memory is taken."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidelock.errors import ConfigError, NonFiniteError, WireError
from tidelock.run.config import CODECS as CODEC_NAMES
from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire.codec import Codec, Codecs, Part, TensorReader, rounding_seed, write_parts
from tidelock.wire.limits import PART_BYTES

CODECS = st.sampled_from(list(Codec))
DTYPES = {Codec.FP32: torch.float32, Codec.BF16: torch.bfloat16}
FLOATS = st.sampled_from(list(DTYPES))
SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)


def write(tensor, codec, **options):
    return write_parts("a tensor", tensor, codec, **options)


def read_back(parts, shape, codec, site=0):
    reader = TensorReader("a tensor", shape, codec, site=site)
    for part in parts:
        assert not reader.complete
        reader.add(part)
    assert reader.complete
    return reader.tensor()


@given(SHAPES, FLOATS, st.integers(0, 40))
def test_any_shape_comes_back_bit_for_bit(shape, codec, site):
    tensor = torch.randn(shape).to(DTYPES[codec])
    back = read_back(write(tensor, codec, site=site), shape, codec, site)
    assert back.dtype == DTYPES[codec]
    assert back.shape == shape
    assert torch.equal(back, tensor)


@given(SHAPES, st.sampled_from([Codec.INT8, Codec.INT4]), st.none() | st.integers(0, 2**64 - 1))
def test_any_shape_comes_back_as_the_rounded_rows(shape, codec, seed):
    tensor = torch.randn(shape)
    seed = rounding_seed(seed, "a tensor", 3)
    back = read_back(write(tensor, codec, seed=seed), shape, codec)
    assert (back.dtype, back.shape) == (torch.float32, shape)
    if tensor.numel():
        rows = codec.decode("a tensor", codec.encode("a tensor", tensor, seed=seed), shape)
        assert torch.equal(back.view(rows.shape), rows)


@given(st.integers(-2, 2), st.integers(1, 3), CODECS)
@settings(max_examples=20)
def test_large_tensors_cross_in_full_parts(beside, parts, codec):
    shape = (parts * PART_BYTES // codec.size_bytes((1, 1021)) + beside, 1021)
    tensor = torch.randn(shape)
    written = list(write(tensor, codec))
    assert [len(part.data) for part in written[:-1]] == [PART_BYTES] * (len(written) - 1)
    assert len(written) == math.ceil(codec.size_bytes(shape) / PART_BYTES)
    assert sum(len(part.data) for part in written) == codec.size_bytes(shape)
    expected = codec.decode("a tensor", codec.encode("a tensor", tensor), shape)
    assert torch.equal(read_back(written, shape, codec), expected)


def test_only_the_first_part_says_shape_and_codec():
    first, second = write(torch.zeros(PART_BYTES // 2), Codec.FP32, site=3)
    assert (first.site, first.codec, first.shape) == (3, pb.FP32, (PART_BYTES // 2,))
    assert (second.site, second.codec, second.shape) == (3, pb.CODEC_UNSPECIFIED, ())


@pytest.mark.parametrize("codec", Codec)
def test_views_and_other_dtypes_are_written_as_the_numbers_that_they_show(codec):
    tensor = torch.randn(3, 5).T.requires_grad_()
    back, expected = (read_back(write(x, codec), (5, 3), codec) for x in (tensor, tensor.detach().clone()))
    assert torch.equal(back, expected)
    half = torch.randn(5, 3).half()
    back, expected = (read_back(write(x, codec), (5, 3), codec) for x in (half, half.float()))
    assert torch.equal(back, expected)


def test_numbers_are_rounded_to_bf16():
    tensor = torch.randn(5, 3)
    assert torch.equal(read_back(write(tensor, Codec.BF16), (5, 3), Codec.BF16), tensor.bfloat16())


def test_bytes_are_little_endian():
    (part,) = write(torch.tensor([1.0]), Codec.FP32)
    assert bytes(part.data) == b"\x00\x00\x80\x3f"


# As docs/protocol.md has it: the scales of all rows, then their integers.
ROWS = torch.tensor([[7.0, -7.0, 3.0], [0.0, 0.0, 0.0], [-14.0, 2.0, 0.0]])
ONE, TWO = b"\x00\x00\x80\x3f", b"\x00\x00\x00\x40"
SMALLEST = b"\x00\x00\x00\x01"


def test_the_bytes_of_int4():
    (part,) = write(ROWS, Codec.INT4)
    #                                           even below odd, half a byte left: 7 -7, 3 | 0 0, 0 | -7 1, 0
    assert bytes(part.data) == ONE + SMALLEST + TWO + bytes([0x97, 0x03, 0x00, 0x00, 0x19, 0x00])


def test_the_bytes_of_int8():
    (part,) = write(ROWS * 127 / 7, Codec.INT8)
    assert bytes(part.data) == ONE + SMALLEST + TWO + bytes([127, 129, 54, 0, 0, 0, 129, 18, 0])


@pytest.mark.parametrize("codec", Codec)
def test_the_finished_tensor_can_be_written_to(codec):
    back = read_back(write(torch.zeros(2), codec), (2,), codec)
    assert torch.equal(back.add_(1), torch.ones(2))


def test_codecs_have_numbers():
    assert {codec.to_pb(): Codec.from_pb(codec.to_pb()) for codec in Codec} == {
        pb.FP32: Codec.FP32,
        pb.BF16: Codec.BF16,
        pb.INT8: Codec.INT8,
        pb.INT4: Codec.INT4,
    }
    assert len(Codec) == len(pb.Codec.keys()) - 1


def test_the_options_names_are_the_codecs():
    assert tuple(codec.value for codec in Codec) == CODEC_NAMES


@pytest.mark.parametrize("number", [pb.CODEC_UNSPECIFIED, 5, -1, 2**31 - 1])
def test_an_unknown_codec_is_refused(number):
    with pytest.raises(WireError, match=f"Wire codec: expected one of .*, got {number}"):
        Codec.from_pb(number)


def test_codecs_by_name():
    assert Codecs.named("fp32") == Codecs()
    assert Codecs.named("int8") == Codecs(Codec.INT8, Codec.INT8)
    assert Codecs.named("fp32", "int4", stochastic_rounding=True) == Codecs(Codec.FP32, Codec.INT4, stochastic=True)


@pytest.mark.parametrize("names", [("int3",), ("fp32", "int3"), ("INT3",), ("",)])
def test_an_unknown_name_is_refused(names):
    with pytest.raises(ConfigError, match=f"^Codec: expected one of fp32, bf16, int8, int4, got '{names[-1]}'"):
        Codecs.named(*names)


@pytest.mark.parametrize("names", [("fp32",), ("bf16",), ("int8", "bf16")])
def test_what_is_not_rounded_to_integers_is_not_rounded_at_random(names):
    with pytest.raises(ConfigError, match=f"expected gradients in int8 or int4, got {names[-1]}"):
        Codecs.named(*names, stochastic_rounding=True)


@given(CODECS, st.lists(st.integers(1, 5000), min_size=1, max_size=4), st.integers(1, 9))
def test_the_ratio_is_that_of_the_bytes(codec, widths, rows):
    written = sum(len(codec.encode("a tensor", torch.zeros(rows, width))) for width in widths)
    assert codec.ratio(widths) == pytest.approx(4 * rows * sum(widths) / written)
    assert written == sum(codec.size_bytes((rows, width)) for width in widths)


def test_ratios_of_a_known_model():
    assert [codec.ratio([576, 960]) for codec in Codec] == pytest.approx([1, 2, 6144 / 1544, 6144 / 776])


@pytest.mark.parametrize("codec", [Codec.INT8, Codec.INT4])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_integers_have_no_place_for_is_refused(codec, bad):
    tensor = torch.randn(4, 5)
    tensor[2, 1] = bad
    with pytest.raises(NonFiniteError, match=r"^Sending a site_input: expected finite numbers, got an infinite"):
        list(write_parts("site_input", tensor, codec))


def test_one_seed_a_tensor():
    seeds = {
        rounding_seed(seed, what, site)
        for seed in (0, 1)
        for what in ("input_gradient", "site_gradient")
        for site in (0, 7)
    }
    assert len(seeds) == 8
    assert rounding_seed(None, "site_gradient", 7) is None


def a_part(numbers=4, **changes):
    return Part(**{"site": 1, "codec": pb.FP32, "shape": (2, 2), "data": memoryview(bytes(4 * numbers)), **changes})


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (a_part(site=0), "expected site 1, got site 0"),
        (a_part(codec=pb.BF16), r"fp32 of shape \(2, 2\), got bf16"),
        (a_part(codec=9), "Wire codec"),
        (a_part(shape=(4,)), r"got fp32 of shape \(4,\)"),
        (a_part(shape=()), r"got fp32 of shape \(\)"),
        (a_part(3), "expected a part of 16 bytes, got 12 bytes"),
        (a_part(5), "expected a part of 16 bytes, got 20 bytes"),
        (a_part(0), "expected a part of 16 bytes, got 0 bytes"),
    ],
)
def test_a_first_part_of_something_else_is_refused(part, message):
    reader = TensorReader("a gradient", (2, 2), Codec.FP32, site=1)
    with pytest.raises(WireError, match=f"Reading a gradient: .*{message}|{message}"):
        reader.add(part)
    assert not reader.complete
    with pytest.raises(WireError, match="expected 16 bytes, got 0 bytes"):
        reader.tensor()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (1,)}, "a further part of the same tensor, got the first part of another"),
        ({"codec": pb.FP32}, "a further part of the same tensor, got the first part of another"),
        ({"site": 2}, "expected site 1, got site 2"),
        ({"data": memoryview(bytes(8))}, "expected a part of 4 bytes, got 8 bytes"),
        ({"data": memoryview(b"")}, "expected a part of 4 bytes, got 0 bytes"),
    ],
)
def test_a_further_part_of_something_else_is_refused(change, message):
    shape = (PART_BYTES // 4 + 1,)
    reader = TensorReader("a state", shape, Codec.FP32, site=1)
    first, second = write(torch.zeros(shape), Codec.FP32, site=1)
    reader.add(first)
    assert not reader.complete
    bad = replace(second, **change)
    with pytest.raises(WireError, match=message):
        reader.add(bad)
    with pytest.raises(WireError, match=f"expected {PART_BYTES + 4} bytes, got {PART_BYTES} bytes"):
        reader.tensor()


def test_nothing_can_follow_a_finished_tensor():
    reader = TensorReader("a state", (1,), Codec.FP32)
    for part in write(torch.zeros(1), Codec.FP32):
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
    reader = TensorReader("an embedding", (64, 1 << 20), Codec.FP32)

    def add():
        with pytest.raises(WireError):
            reader.add(part)

    assert memory_taken(add) < 1 << 20


def test_memory_is_taken_for_the_expected_size_only():
    shape = (4 * PART_BYTES // 4,)
    first = next(write(torch.zeros(shape), Codec.FP32))
    assert memory_taken(lambda: TensorReader("a state", shape, Codec.FP32).add(first)) < 7 * PART_BYTES


@given(st.integers(0, 3), st.integers(0, 5), st.lists(st.integers(0, 3), max_size=3), st.binary(max_size=20), CODECS)
def test_garbage_raises_nothing_but_our_error(site, number, shape, data, codec):
    reader = TensorReader("a state", (2,), codec)
    try:
        reader.add(Part(site, number, tuple(shape), memoryview(data)))
    except WireError:
        assert not reader.complete
    else:
        assert (site, number, shape, len(data)) == (0, codec.to_pb(), [2], codec.size_bytes((2,)))
        assert reader.complete


@given(st.integers(0, 6), st.integers(0, 6), st.sampled_from([Codec.INT8, Codec.INT4]), st.data())
def test_bytes_of_the_right_length_give_finite_numbers_or_our_error(count, width, codec, data):
    size = codec.size_bytes((count, width))
    content = data.draw(st.binary(min_size=size, max_size=size))
    reader = TensorReader("a state", (count, width), codec)
    reader.add(Part(0, codec.to_pb(), (count, width), memoryview(content)))
    try:
        back = reader.tensor()
    except WireError as error:
        assert "Reading a state: expected " in error.message  # noqa: PT017
    else:
        assert back.shape == (count, width)
        assert back.isfinite().all()
