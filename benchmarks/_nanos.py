"""Profiles of Jetson Nanos, derived from what the PAC paper says of them, its models and its side networks.

PAC: Pluto and Charon, ICPP '24, doi 10.1145/3673038.3673043, arXiv 2408.10746. From there: a Nano has 0.47 TFLOPS and
its LAN 1000 Mb/s; the memory that a process can use is read off the line in the paper's figure of memory, about 1.5 GB.
Models are T5-Base, BART-Large and T5-Large in fp32, texts of 128 tokens; beside each block stands one of an eighth of
its width with as many heads, which is trained by Adam.

Derived, for a row of s tokens, width d, MLP width m, h heads; w = d / 8:

- weights: 4 d d in an encoder block's attention, 8 d d in a decoder block's two, 2 d m in its MLP; embedding with the
  first block, the head with the last one
- trained beside it: an eighth of the width is a 64th of these weights, and d w for the projection of the tap
- floating-point operations forward: 2 s for each of these weights; backward: 4 s for each trained one, none for others
- seconds: operations by a quarter of 0.47 TFLOPS. The quarter is an assumption
- kept for the backward: the tap (s d), what the side block needs (6 s w, 2 s m / 8, h s s; in a decoder 5 s w and h s s
  more). For T5-Large and 16 rows that is 2.4 GB. The paper's Table 1 has 5.33 GB of activations and optimizer for full
  fine-tuning, and the text up to 58.87 % less: 2.2 GB
- working memory: the frozen block's own activations while it runs, s (8 d + m) and 2 h s s
- what crosses: s (d + w) forward and s w back; between decoder blocks the encoder's output and its gradient too

It is assumed that the decoder reads texts of s tokens too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SEQUENCE = 128
FLOPS = 0.47e12 * 0.25
MEMORY_BYTES = 1_500_000_000
BYTES_PER_SECOND = 125_000_000
LATENCY_SECONDS = 0.0005
_FLOAT = 4


@dataclass(frozen=True)
class Shape:
    """A model's blocks in encoder and decoder, width, MLP width, heads, words."""

    encoder: int
    decoder: int
    width: int
    mlp: int
    heads: int
    words: int


MODELS = {
    "T5-Base": Shape(12, 12, 768, 3072, 12, 32128),
    "BART-Large": Shape(12, 12, 1024, 4096, 16, 50265),
    "T5-Large": Shape(24, 24, 1024, 4096, 16, 32128),
}


def nano_profile(model: str, nanos: int, parts: int = 1) -> dict[str, Any]:
    """Return the profile of a model on so many Nanos, as JSON values.

    Args:
        model: One of `MODELS`.
        nanos: Devices.
        parts: Into how many rows a text is divided; 1 for real ones. PAC divides a micro-batch evenly, fractions of a
            text included; more parts let the planner do so too.
    """
    shape = MODELS[model]
    blocks = [_block(shape, number, parts) for number in range(shape.encoder + shape.decoder)]
    forward = [[_round(block.pop("forward_seconds")) for block in blocks]]
    backward = [[_round(block.pop("backward_seconds")) for block in blocks]]
    times = {"rows": [1], "forward_seconds": forward, "backward_seconds": backward}
    return {
        "format": "tidelock-pool-profile",
        "version": 1,
        "title": f"{model} with a side network on {nanos} Jetson Nanos",
        "blocks": blocks,
        "devices": [{"name": f"nano-{number}", "memory_bytes": MEMORY_BYTES, **times} for number in range(nanos)],
        "links": {"default": {"bytes_per_second": BYTES_PER_SECOND, "latency_seconds": LATENCY_SECONDS}},
    }


def _block(shape: Shape, number: int, parts: int) -> dict[str, Any]:
    s, d, m, h = SEQUENCE, shape.width, shape.mlp, shape.heads
    w, last = d // 8, shape.encoder + shape.decoder - 1
    in_decoder = number >= shape.encoder
    weights = (8 if in_decoder else 4) * d * d + 2 * d * m
    trained = weights // 64 + d * w
    ends = shape.words * d if number in {0, last} else 0
    kept = s * d + 6 * s * w + 2 * s * m // 8 + h * s * s + (5 * s * w + h * s * s if in_decoder else 0)
    streams = 2 if in_decoder else 1
    return {
        "name": f"decoder.{number - shape.encoder}" if in_decoder else f"encoder.{number}",
        "parameter_bytes": _FLOAT * (weights + trained + ends),
        "gradient_bytes": _FLOAT * trained,
        "optimizer_bytes": 2 * _FLOAT * trained,
        "kept_bytes_per_row": _FLOAT * kept // parts,
        "working_bytes_per_row": _FLOAT * (s * (8 * d + m) + 2 * h * s * s) // parts,
        "forward_bytes_per_row": _FLOAT * streams * s * (d + w) // parts,
        "backward_bytes_per_row": _FLOAT * streams * s * w // parts,
        "forward_seconds": 2 * s * (weights + trained) / FLOPS / parts,
        "backward_seconds": 4 * s * trained / FLOPS / parts,
    }


def _round(seconds: float) -> float:
    return round(seconds, 7)
