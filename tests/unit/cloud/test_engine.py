"""What a device asks for is checked to the last number before anything is taken or computed for it."""

from __future__ import annotations

import contextlib
import tracemalloc
from dataclasses import replace

import grpc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from tests.support.sites import attn
from tests.unit.hand_device import PROJECTIONS, an_active_site, an_open
from tidelock.cloud.engine import Line, PassAbandoned, TapOrder, read_open
from tidelock.errors import WireError
from tidelock.model.ends import empty_model
from tidelock.model.geometry import geometry_of
from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire.codec import Codec

MAX_TOKENS = 256


@pytest.fixture(scope="session")
def geometry(tiny_folder):
    return geometry_of(empty_model(AutoConfig.from_pretrained(tiny_folder)))


def site(block, *projections):
    return an_active_site(block, projections)


def test_an_order_is_read(geometry):
    message = an_open(
        starts=[0, 2],
        lengths=[5, 3],
        width=5,
        selected=[0, 4, 7],
        active=[site(2, "q_proj", "v_proj"), site(0, "k_proj")],
        gradient_codec=pb.INT4,
        rounding_seed=2**63,
    )
    order = read_open(message, geometry, MAX_TOKENS)
    assert order.training
    assert (order.rows.starts, order.rows.lengths, order.rows.width) == ((0, 2), (5, 3), 5)
    assert order.select_M.tolist() == [0, 4, 7]
    assert order.active == {attn(2): ("q_proj", "v_proj"), attn(0): ("k_proj",)}
    assert (order.activation_codec, order.gradient_codec, order.rounding_seed) == (Codec.FP32, Codec.INT4, 2**63)


def test_no_selection_is_all_tokens_and_not_every_mode_needs_a_site(geometry):
    order = read_open(an_open(mode=pb.EVALUATE, active=[]), geometry, MAX_TOKENS)
    assert order.select_M.tolist() == list(range(8))
    assert (order.active, order.training) == ({}, False)
    left_padded = an_open(mode=pb.GENERATE, starts=[0, 3], lengths=[8, 5], active=[])
    assert not read_open(left_padded, geometry, MAX_TOKENS).training


def taps(*blocks, **settings):
    """Return an order of taps, in a pass without sites."""
    return an_open(**{"mode": pb.EVALUATE, "active": [], **settings}, taps=pb.Taps(blocks=blocks))


def test_an_order_of_taps_is_read(geometry):
    order = read_open(taps(0, 2), geometry, MAX_TOKENS)
    assert order.taps == TapOrder((0, 2), None)
    narrow = an_open(mode=pb.GENERATE, active=[], taps=pb.Taps(blocks=[1], width=32))
    assert read_open(narrow, geometry, MAX_TOKENS).taps == TapOrder((1,), 32)
    assert read_open(an_open(mode=pb.EVALUATE, active=[]), geometry, MAX_TOKENS).taps is None


REFUSED = {
    "no rows": (an_open(starts=[], lengths=[]), "1 to 256 tokens"),
    "no width": (an_open(starts=[0], lengths=[0], width=0), "1 to 256 tokens"),
    "too many tokens": (an_open(starts=[0] * 5, lengths=[1] * 5, width=64), "got 5 x 64"),
    "huge width": (an_open(width=2**32 - 1), "1 to 256 tokens"),
    "a start too few": (an_open(starts=[], lengths=[8]), "runs of real tokens"),
    "a start too many": (an_open(starts=[0, 0], lengths=[8]), "runs of real tokens"),
    "an empty row": (an_open(starts=[0, 0], lengths=[8, 0]), "runs of real tokens"),
    "a row beyond the width": (an_open(starts=[1], lengths=[8]), "within 8 positions"),
    "a start beyond the width": (an_open(starts=[2**32 - 1], lengths=[1]), "within 8 positions"),
    "rows longer than the model": (an_open(lengths=[8], width=65), "at most 64 tokens, got 65"),
    "a token selected twice": (an_open(selected=[1, 1]), "ascending token numbers"),
    "tokens selected backwards": (an_open(selected=[2, 1]), "ascending token numbers"),
    "a token that is not there": (an_open(selected=[0, 8]), "ascending token numbers below 8"),
    "no mode": (an_open(mode=pb.MODE_UNSPECIFIED), "a known mode, got 0"),
    "an unknown mode": (an_open(mode=17), "a known mode, got 17"),
    "prompts padded at the right": (an_open(mode=pb.GENERATE, width=9), "padded at the left"),
    "training without a site": (an_open(active=[]), "an active site to train"),
    "an unknown block": (an_open(active=[site(3, "q_proj")]), "different sites of 3 blocks"),
    "a block twice": (an_open(active=[site(1, "q_proj"), site(1, "k_proj")]), "different sites of 3 blocks"),
    "no projection": (an_open(active=[site(0)]), "linears out of"),
    "an unknown projection": (an_open(active=[site(0, "o_proj")]), "linears out of"),
    "a known and an unknown one": (an_open(active=[site(0, "q_proj", "o_proj")]), "linears out of"),
    "projections out of order": (an_open(active=[site(0, "k_proj", "q_proj")]), "in order"),
    "a projection twice": (an_open(active=[site(0, "q_proj", "q_proj")]), "in order"),
    "one projection too many": (an_open(active=[site(0, *PROJECTIONS, "q_proj")]), "in order"),
    "no activation codec": (an_open(activation_codec=0), "Wire codec"),
    "an unknown gradient codec": (an_open(gradient_codec=5), "Wire codec"),
    "frames of no kind": (an_open(frames=pb.Frames(rank=4)), "frames of a kind out of ('seeded', 'svd'), got number 0"),
    "frames of an unknown kind": (an_open(frames=pb.Frames.FromString(b"\x08\x03\x10\x04")), "frames of a kind out of"),
    "frames of no rank": (
        an_open(frames=pb.Frames(kind=pb.SVD)),
        "frames of a rank from 1 to 16, at attentions only, got rank 0",
    ),
    "frames of too large a rank": (an_open(frames=pb.Frames(kind=pb.SEEDED, rank=17)), "frames of a rank from 1 to 16"),
    "frames at an output": (
        an_open(frames=pb.Frames(kind=pb.SVD, rank=4), active=[pb.ActiveSite(site=2, linears=["down_proj"])]),
        "at attentions only",
    ),
    "taps in training": (taps(0, mode=pb.TRAIN, active=[an_active_site(0)]), "taps in a pass without active sites"),
    "taps and a site": (taps(0, active=[an_active_site(0)]), "taps in a pass without active sites"),
    "no tap": (taps(), "tapped blocks below 3, ascending"),
    "taps twice": (taps(1, 1), "tapped blocks below 3, ascending"),
    "taps backwards": (taps(2, 1), "tapped blocks below 3, ascending"),
    "a tap of an unknown block": (taps(0, 3), "tapped blocks below 3, ascending, got (0, 3)"),
    "taps of no width": (
        an_open(mode=pb.EVALUATE, active=[], taps=pb.Taps(blocks=[0], width=0)),
        "taps of 1 to 32 numbers a token, got 0",
    ),
    "taps wider than a block": (
        an_open(mode=pb.EVALUATE, active=[], taps=pb.Taps(blocks=[0], width=33)),
        "taps of 1 to 32 numbers a token, got 33",
    ),
    "a prefix as long as a row": (
        an_open(starts=[0, 0], lengths=[8, 3], shared=3),
        "a shared prefix of at most 2 tokens, rows padded at the right, got 3",
    ),
    "a prefix of one row": (an_open(starts=[0], lengths=[8], shared=1), "a shared prefix of at most 0 tokens"),
    "a huge prefix": (an_open(starts=[0, 0], lengths=[8, 8], shared=2**32 - 1), "a shared prefix of at most 7 tokens"),
    "a prefix of rows padded at the left": (
        an_open(starts=[0, 1], lengths=[8, 7], shared=2),
        "a shared prefix of at most 6 tokens, rows padded at the right, got 2",
    ),
    "a prefix in generating": (
        an_open(mode=pb.GENERATE, starts=[0, 0], lengths=[8, 8], shared=2),
        "a shared prefix where the family takes rows end to end, in training and evaluation",
    ),
    "a token selected that a prefix has once": (
        an_open(starts=[0, 0], lengths=[8, 8], shared=5, selected=[11]),
        "ascending token numbers below 11",
    ),
    "a seed with exact gradients": (an_open(rounding_seed=0), "a rounding seed with int8 or int4 only, got fp32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_the_model_is_refused(geometry, case):
    message, expected = REFUSED[case]
    with pytest.raises(WireError, match=expected.replace("(", "\\(").replace(")", "\\)")) as caught:
        read_open(message, geometry, MAX_TOKENS)
    assert len(str(caught.value)) < 400


UINT32 = st.one_of(st.integers(0, 12), st.integers(0, 2**32 - 1))
LINEARS = st.lists(st.sampled_from([*PROJECTIONS, "o_proj", "down_proj", "x"]), max_size=4)
SITES = st.builds(pb.ActiveSite, site=UINT32, linears=LINEARS)
OPENS = st.builds(
    pb.Open,
    mode=st.integers(0, 4),
    starts=st.lists(UINT32, max_size=6),
    lengths=st.lists(UINT32, max_size=6),
    width=UINT32,
    selected=st.lists(UINT32, max_size=6),
    active=st.lists(SITES, max_size=4),
    activation_codec=st.integers(0, 5),
    gradient_codec=st.integers(0, 5),
    rounding_seed=st.none() | st.integers(0, 2**64 - 1),
    frames=st.none() | st.builds(pb.Frames, kind=st.integers(0, 3), rank=UINT32),
    shared=st.sampled_from([0, 0, 1, 2]) | UINT32,
    taps=st.none() | st.builds(pb.Taps, blocks=st.lists(UINT32, max_size=4), width=st.none() | UINT32),
)


@given(OPENS)
def test_random_orders_are_refused_or_make_sense(geometry, message):
    try:
        order = read_open(message, geometry, MAX_TOKENS)
    except WireError:
        return
    rows = order.rows
    assert 0 < len(rows.lengths) * rows.width <= MAX_TOKENS
    assert len(rows.indices()) == rows.num_tokens + rows.shared * (len(rows.lengths) - 1)
    assert 0 <= rows.shared < min(rows.lengths)
    assert rows.layout(torch.device("cpu"), joined=True).shape_BT[0] in {1, len(rows.lengths)}
    assert 0 < len(order.select_M) <= rows.num_tokens
    assert order.select_M.max() < rows.num_tokens
    for active, names in order.active.items():
        assert geometry.sites[active].output_width(names) > 0
    if order.taps is not None:
        assert 0 < len(order.taps.blocks) <= geometry.num_blocks
        assert 0 < (order.taps.width or 1) <= geometry.block_width


@given(st.binary(max_size=80))
def test_random_bytes_raise_nothing_else(geometry, data):
    try:
        message = pb.Open.FromString(data)
    except Exception:  # noqa: BLE001  (protobuf's own error is of no public class)
        return
    with contextlib.suppress(WireError):
        read_open(message, geometry, MAX_TOKENS)


def test_a_shared_prefix_is_read(geometry):
    message = an_open(starts=[0, 0], lengths=[8, 5], shared=4, selected=[8])
    order = read_open(message, geometry, MAX_TOKENS)
    assert (order.rows.shared, order.rows.num_tokens, order.select_M.tolist()) == (4, 9, [8])


def test_a_prefix_is_refused_where_the_family_does_not_join_rows(geometry):
    padded = replace(geometry, family=replace(geometry.family, joins_rows=False))
    message = an_open(starts=[0, 0], lengths=[8, 5], shared=4)
    with pytest.raises(WireError, match="expected a shared prefix where the family takes rows end to end"):
        read_open(message, padded, MAX_TOKENS)


MANY = 250_000  # about what fits into one message


@pytest.mark.parametrize(
    "message",
    [
        an_open(starts=[0] * MANY, lengths=[1] * MANY, width=2**32 - 1),
        an_open(starts=[0] * MANY, lengths=[2**32 - 1] * 2, width=100),
        an_open(selected=list(range(MANY))),
        an_open(active=[site(0)] * MANY),
        an_open(active=[pb.ActiveSite(site=2**32 - 1)] * MANY),
        an_open(active=[site(0, *["q_proj"] * MANY)]),
        an_open(active=[site(0, "x" * (1 << 20))]),
    ],
    ids=["rows", "lengths", "selected", "sites", "blocks", "projections", "a name"],
)
@pytest.mark.timeout(60)
def test_a_hostile_order_costs_little_before_it_is_refused(geometry, message):
    tracemalloc.start()
    try:
        with pytest.raises(WireError) as caught:
            read_open(message, geometry, 1 << 16)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 400
    # The message itself is a megabyte; its numbers as Python's take some more.
    assert most < 64 << 20


class Lost(grpc.RpcError):
    """What gRPC raises when the device is gone."""


def broken():
    raise Lost
    yield


def test_a_line_hands_on_what_must_come_next():
    line = Line(iter([pb.DeviceMessage(open=an_open(width=8)).SerializeToString()]), lambda _: None)
    assert line.open().width == 8
    with pytest.raises(PassAbandoned):
        line.open()


@pytest.mark.parametrize("incoming", [iter([]), broken()], ids=["closed", "lost"])
def test_a_device_that_left_ends_the_pass(incoming):
    with pytest.raises(PassAbandoned):
        Line(incoming, lambda _: None).tensor("embedding", (1, 1), Codec.FP32)


@pytest.mark.parametrize(
    "message", [pb.DeviceMessage(), pb.DeviceMessage(open=an_open()), pb.DeviceMessage(site_output=pb.TensorPart())]
)
def test_a_message_out_of_order_is_refused(message):
    line = Line(iter([message.SerializeToString()]), lambda _: None)
    got = message.WhichOneof("body")
    with pytest.raises(WireError, match=f"expected embedding, got {got}"):
        line.tensor("embedding", (1, 1), Codec.FP32)
