"""Rows as small integers: never further off than half a step, right on average, and nothing but what was written."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tidelock.errors import NonFiniteError, WireError
from tidelock.wire.codec import Codec
from tidelock.wire.quantise import SMALLEST_SCALE, Quantiser

INT8, INT4 = Quantiser(127, 1), Quantiser(7, 2)
LARGEST = torch.finfo(torch.float32).max
both = pytest.mark.parametrize("quantiser", [INT8, INT4], ids=["int8", "int4"])
# Every number that fp32 has: denormal, huge, zero of both signs.
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ROWS = arrays.arrays("float32", st.tuples(st.integers(1, 5), st.integers(1, 17)), elements=FLOATS).map(torch.from_numpy)
SEEDS = st.none() | st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**128), st.integers(0, 99))


def there_and_back(quantiser, x_NW, seed=None):
    data = quantiser.encode("a tensor", x_NW, seed)
    assert len(data) == len(x_NW) * quantiser.row_bytes(x_NW.shape[1])
    return quantiser.decode("a tensor", data, tuple(x_NW.shape))


@both
@given(x_NW=ROWS, seed=SEEDS)
@settings(max_examples=300)
def test_no_number_is_off_by_more_than_half_a_step_or_a_step(quantiser, x_NW, seed):
    back_NW = there_and_back(quantiser, x_NW, seed).double()
    x_NW = x_NW.double()
    step_N1 = (x_NW.abs().amax(1, keepdim=True) / quantiser.levels).clamp(min=SMALLEST_SCALE)
    assert back_NW.isfinite().all()
    assert ((back_NW - x_NW).abs() <= step_N1 * ((0.5 if seed is None else 1.0) + 1e-4)).all()
    assert (back_NW[x_NW == 0] == 0).all()
    if seed is None:  # the sign is kept, the largest number too
        assert (back_NW * x_NW >= 0).all()


@given(x_NW=ROWS, seed=SEEDS, codec=st.sampled_from([Codec.INT8, Codec.INT4]))
@settings(max_examples=300)
def test_no_row_is_off_by_more_than_the_stated_bound(x_NW, seed, codec):
    back_NW = codec.decode("a tensor", codec.encode("a tensor", x_NW, seed=seed), tuple(x_NW.shape)).double()
    error_N, norm_N = (back_NW - x_NW).norm(dim=1), x_NW.double().norm(dim=1)
    bound = codec.error_bound(x_NW.shape[1], stochastic=seed is not None)
    assert (error_N <= norm_N * (bound + 1e-4) + 2.0**-120).all()


@pytest.mark.parametrize(("codec", "levels"), [(Codec.INT8, 127), (Codec.INT4, 7)])
def test_the_bound_is_reached(codec, levels):
    x_NW = torch.full((1, 577), 0.5 - 1e-6)
    x_NW[0, 0] = levels
    error = (codec.decode("a tensor", codec.encode("a tensor", x_NW), (1, 577)) - x_NW).norm() / x_NW.norm()
    assert error.item() == pytest.approx(codec.error_bound(577, stochastic=False), rel=1e-3)
    assert codec.error_bound(577, stochastic=True) == 24 / levels


def test_floating_codecs_keep_their_bounds():
    x_NW = torch.randn(64, 96)
    for codec in (Codec.FP32, Codec.BF16):
        back_NW = codec.decode("a tensor", codec.encode("a tensor", x_NW), (64, 96)).float()
        assert ((back_NW - x_NW).norm(dim=1) / x_NW.norm(dim=1)).max() <= codec.error_bound(96, stochastic=False)


@both
@pytest.mark.parametrize("seed", [None, (3, 4, 5)])
def test_integers_times_a_power_of_two_are_exact(quantiser, seed):
    q_W = torch.arange(-quantiser.levels, quantiser.levels + 1, dtype=torch.float32)
    for power in (-110, -3, 0, 17, 120):
        x_NW = (q_W * 2.0**power)[None]
        assert torch.equal(there_and_back(quantiser, x_NW, seed), x_NW)


@both
@pytest.mark.parametrize("value", [LARGEST, 65504.0, 65536.0, 1e30, 1e-30, 2.0**-118])
def test_huge_and_tiny_rows_are_as_exact_as_others(quantiser, value):
    x_NW = torch.tensor([[value, -value, value / 3]])
    back_NW = there_and_back(quantiser, x_NW)
    assert back_NW[0, :2].tolist() == pytest.approx([value, -value], rel=1e-6)
    assert back_NW[0, 2].item() == pytest.approx(value / 3, abs=value / quantiser.levels * 0.51)


@both
def test_rows_do_not_know_each_other(quantiser):
    x_NW = torch.randn(7, 33) * torch.logspace(-30, 30, 7)[:, None]
    alone = torch.cat([there_and_back(quantiser, x_NW[row : row + 1]) for row in range(7)])
    assert torch.equal(there_and_back(quantiser, x_NW), alone)


@both
def test_some_rows_can_be_read_alone(quantiser):
    x_NW = torch.randn(23, 5)
    data = quantiser.encode("a tensor", x_NW, None)
    every = quantiser.decode("a tensor", data, (23, 5))
    assert torch.equal(quantiser.decode("a tensor", data, (23, 5), slice(None, None, 3)), every[::3])


@both
def test_stochastic_rounding_is_right_on_average(quantiser):
    torch.manual_seed(1)
    row_W = torch.rand(50) * 2 - 1
    row_W[0] = 1.0
    draws = 40_000
    step = 1 / quantiser.levels
    back_NW = there_and_back(quantiser, row_W.expand(draws, -1), (11, 0, 0)).double()
    mean_W = back_NW.mean(0)
    # A draw's deviation is at most half a step: five of the mean's deviations, and what 16 bits cost.
    allowed = step * (5 * 0.5 / math.sqrt(draws) + 2.0**-16)
    assert (mean_W - row_W.double()).abs().max() < allowed
    # To the nearest it would not be: the test can fail.
    nearest_W = there_and_back(quantiser, row_W[None])[0].double()
    assert (nearest_W - row_W.double()).abs().max() > 10 * allowed
    # Each draw is one of the two neighbours, as often as it must be.
    fraction_W = (row_W.double() / step) % 1
    variance_W = back_NW.var(0)
    assert torch.allclose(variance_W, fraction_W * (1 - fraction_W) * step**2, atol=0.02 * step**2)


@both
def test_numbers_are_rounded_independently(quantiser):
    x_NW = torch.full((2000, 51), 0.3 / quantiser.levels)
    x_NW[:, 0] = 1.0
    up_NW = (there_and_back(quantiser, x_NW, (2, 0, 0))[:, 1:] > 0).double()
    correlation = torch.corrcoef(up_NW.T) - torch.eye(50, dtype=torch.float64)
    assert correlation.abs().max() < 6 / math.sqrt(2000)


@both
def test_one_seed_gives_the_same_bytes_and_another_others(quantiser):
    x_NW = torch.randn(20, 33)
    first, again, other = (quantiser.encode("a tensor", x_NW, seed) for seed in ((1, 2, 3), (1, 2, 3), (1, 2, 4)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_seed_draws_the_same_in_every_version():
    x_NW = torch.full((1, 9), 0.5)
    x_NW[0, 0] = 7.0
    assert INT4.encode("a tensor", x_NW, (1, 2, 3)).tolist() == [0, 0, 128, 63, 7, 16, 16, 1, 0]


@both
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [(0, 0), (2, 4)])
@pytest.mark.parametrize("seed", [None, (1,)])
def test_no_integer_stands_for_what_is_not_finite(quantiser, bad, place, seed):
    x_NW = torch.randn(3, 5)
    x_NW[place] = bad
    with pytest.raises(NonFiniteError, match="expected finite numbers"):
        quantiser.encode("a tensor", x_NW, seed)


def changed(quantiser, at, value, shape=(2, 3)):
    data = quantiser.encode("a tensor", torch.randn(shape), None)
    data[at : at + len(value)] = torch.tensor(list(value), dtype=torch.uint8)
    return data


@both
@pytest.mark.parametrize(
    "scale", [0.0, -1.0, math.inf, -math.inf, math.nan, 1e-40, SMALLEST_SCALE / 2, LARGEST, LARGEST / 6.9]
)
def test_a_scale_that_none_can_have_is_refused(quantiser, scale):
    value = bytes(torch.tensor([scale]).view(torch.uint8).numpy())
    with pytest.raises(WireError, match=r"Reading a tensor: expected scales from .*, got another"):
        quantiser.decode("a tensor", changed(quantiser, 4, value), (2, 3))


@pytest.mark.parametrize(("quantiser", "value"), [(INT8, 0x80), (INT4, 0x08), (INT4, 0x81)])
def test_an_integer_that_none_can_be_is_refused(quantiser, value):
    with pytest.raises(WireError, match=f"expected integers from -{quantiser.levels} to {quantiser.levels}, got -"):
        quantiser.decode("a tensor", changed(quantiser, 8, [value]), (2, 3))


def test_the_half_byte_behind_an_odd_row_must_be_empty():
    with pytest.raises(WireError, match="expected an empty half byte at the end of each row, got a number there"):
        INT4.decode("a tensor", changed(INT4, 9, [0x11]), (2, 3))


def test_the_largest_scale_does_not_overflow():
    for quantiser in (INT8, INT4):
        data = quantiser.encode("a tensor", torch.tensor([[LARGEST, -LARGEST]]), None)
        assert quantiser.decode("a tensor", data, (1, 2)).isfinite().all()
