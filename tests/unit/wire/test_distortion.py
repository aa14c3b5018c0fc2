"""What rounding takes: measured on the bytes that leave, by role, and refused when it is more than it can be."""

from __future__ import annotations

import pytest
import torch

from tidelock.errors import WireError
from tidelock.wire.codec import Codec
from tidelock.wire.distortion import Distortion
from tidelock.wire.egress import Egress
from tidelock.wire.ledger import Kind, Ledger


def measured(tensor, codec, *, seed=None, role="activation"):
    distortion = Distortion()
    encoded = codec.encode("a tensor", tensor, seed=seed)
    distortion.measure(role, "embedding", tensor, encoded, codec, stochastic=seed is not None)
    return distortion.totals()


@pytest.mark.parametrize("codec", [Codec.BF16, Codec.INT8, Codec.INT4])
@pytest.mark.parametrize("rows", [1, 5, 8])
def test_the_error_of_every_row_of_a_small_tensor(codec, rows):
    x_NW = torch.randn(rows, 33)
    decoded_NW = codec.decode("a tensor", codec.encode("a tensor", x_NW), (rows, 33)).double()
    relative_N = (decoded_NW - x_NW).norm(dim=1) / x_NW.double().norm(dim=1)
    assert measured(x_NW, codec) == {
        "activation": {
            "mean": pytest.approx(relative_N.mean().item()),
            "max": pytest.approx(relative_N.max().item()),
            "bound": codec.error_bound(33, stochastic=False),
            "tokens": rows,
        }
    }


@pytest.mark.parametrize("rows", [9, 100, 4096])
def test_of_a_large_tensor_some_rows_from_top_to_bottom(rows):
    x_NW = torch.randn(rows, 16)
    x_NW[: rows // 2] = 0
    error = measured(x_NW, Codec.INT4)["activation"]
    assert 4 <= error["tokens"] <= 8
    assert 0.3 * error["max"] < error["mean"] < 0.8 * error["max"]  # about half of the rows were zeros, without error


def test_measures_add_up_by_role():
    distortion = Distortion()
    rows = [torch.randn(3, width) for width in (4, 400, 40)]
    single = []
    for x_NW in rows:
        encoded = Codec.INT8.encode("a tensor", x_NW)
        distortion.measure("gradient", "final_gradient", x_NW, encoded, Codec.INT8, stochastic=False)
        single.append(measured(x_NW, Codec.INT8)["activation"])
    total = distortion.totals()["gradient"]
    assert total["tokens"] == 9
    assert total["mean"] == pytest.approx(sum(error["mean"] for error in single) / 3)
    assert total["max"] == max(error["max"] for error in single)
    assert total["bound"] == Codec.INT8.error_bound(400, stochastic=False)


@pytest.mark.parametrize("codec", [Codec.BF16, Codec.INT8, Codec.INT4])
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 2.0**-120, 1e38])
@pytest.mark.parametrize("seed", [None, (1, 2, 3)])
def test_no_row_of_finite_numbers_is_called_wrong(codec, value, seed):
    for shape in [(), (1,), (5,), (3, 7), (2, 3, 4), (0, 4), (4, 0)]:
        measured(torch.randn(shape).clamp_(-3, 3) * value, codec, seed=seed)


def test_what_is_not_finite_crosses_in_bf16_and_is_not_measured():
    assert measured(torch.tensor([[1.0, float("nan")]]), Codec.BF16) == {}


@pytest.mark.parametrize("codec", [Codec.BF16, Codec.INT8, Codec.INT4])
def test_bytes_that_say_something_else_are_found(codec):
    x_NW = torch.randn(4, 32)
    wrong = codec.encode("a tensor", x_NW.flip(0))
    with pytest.raises(WireError, match=rf"Sending a embedding as {codec.value}: expected every token's error to be"):
        Distortion().measure("activation", "embedding", x_NW, wrong, codec, stochastic=False)


def test_the_door_measures_what_leaves_by_its_role():
    egress = Egress(Ledger())
    for kind in (Kind.EMBEDDING, Kind.SITE_OUTPUT, Kind.FINAL_GRADIENT, Kind.INPUT_GRADIENT):
        list(egress.tensor(kind, torch.randn(4, 16), Codec.INT8, pass_seed=None))
    assert {role: error["tokens"] for role, error in egress.ledger.distortion.totals().items()} == {
        "activation": 8,
        "gradient": 8,
    }


def test_nothing_is_lost_in_fp32():
    egress = Egress(Ledger())
    list(egress.tensor(Kind.EMBEDDING, torch.randn(4, 16), Codec.FP32))
    assert egress.ledger.distortion.totals() == {}


def test_the_door_rounds_alike_at_every_attempt():
    egress, tensor = Egress(Ledger()), torch.randn(4, 16)

    def frames(kind=Kind.INPUT_GRADIENT, **options):
        return list(egress.tensor(kind, tensor, Codec.INT4, **{"site": 3, "pass_seed": 9, **options}))

    assert frames() == frames()
    data = {frames(**options)[0][-40:] for options in ({}, {"site": 4}, {"pass_seed": 8}, {"pass_seed": None})}
    data.add(frames(Kind.FINAL_GRADIENT)[0][-40:])
    assert len(data) == 5
