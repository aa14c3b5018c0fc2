"""What is said of codecs: the ratio is that of the model's own widths, the bound that of its widest row."""

from __future__ import annotations

import math

import pytest
from transformers import LlamaConfig

from tests.support.sites import attn
from tidelock.model.ends import empty_model
from tidelock.model.frames import FrameChoice
from tidelock.model.geometry import Geometry, geometry_of
from tidelock.run.codecs import describe_codecs, describe_distortion
from tidelock.wire.codec import Codecs

ALL = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(scope="module")
def smollm2() -> Geometry:
    """Return the shape of SmolLM2-135M: width 576, and 960 of q, k and v together."""
    config = LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, vocab_size=8
    )
    return geometry_of(empty_model(config))


def test_every_codec_states_its_ratio_and_its_bound(smollm2: Geometry) -> None:
    active = dict.fromkeys(map(attn, range(30)), ALL)
    assert describe_codecs(Codecs(), smollm2, active) == (
        "On the wire: activations in fp32, exact; gradients in fp32, exact"
    )
    bound = math.sqrt(959 / (4 * 127**2 + 959))
    assert describe_codecs(Codecs.named("int8", "bf16"), smollm2, active) == (
        f"On the wire: activations in int8, 3.98 times smaller than fp32, each token off by at most {bound:.2%}; "
        "gradients in bf16, 2.00 times smaller than fp32, each token off by at most 0.39%"
    )


def test_between_frames_only_the_rank_counts(smollm2: Geometry) -> None:
    said = describe_codecs(Codecs.named("int8"), smollm2, {attn(7): ALL}, FrameChoice("svd", 32))
    # The embedding of 576 numbers; 96 into the site and out of it, and of its gradients one.
    activations = 4 * (576 + 96 + 96) / ((4 + 576) + 2 * (4 + 96))
    gradients = 4 * 96 / (4 + 96)
    assert f"activations in int8, {activations:.2f} times" in said
    assert f"gradients in int8, {gradients:.2f} times" in said


def test_the_ratio_counts_what_crosses_and_nothing_else(smollm2: Geometry) -> None:
    said = describe_codecs(Codecs.named("int4", stochastic_rounding=True), smollm2, {attn(7): ALL})
    # Embedding, site input, site output; of the only site's gradients one.
    activations = 4 * (576 + 576 + 960) / ((4 + 288) + (4 + 288) + (4 + 480))
    gradients = 4 * 960 / (4 + 480)
    assert f"activations in int4, {activations:.2f} times" in said
    assert f"gradients in int4 rounded stochastically, {gradients:.2f} times" in said
    assert said.endswith(f"at most {math.sqrt(959) / 7:.2%}")


def test_what_was_measured_is_said_by_role() -> None:
    totals = {
        "gradient": {"mean": 0.2, "max": 0.3, "bound": 4.4, "tokens": 7},
        "activation": {"mean": 0.00812, "max": 0.0123, "bound": 0.1, "tokens": 9},
    }
    assert describe_distortion(totals) == (
        "Rounded on the wire: a token's activations off by 0.81% on average and 1.23% at most, gradients off by 20.00% "
        "on average and 30.00% at most"
    )
