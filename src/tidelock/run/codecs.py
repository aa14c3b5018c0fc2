"""What a run's codecs save and what they cost, in words: before it begins, and as measured at its end.

May import everything below `run`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidelock.units import format_bytes
from tidelock.wire.codec import Codec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tidelock.model.frames import FrameChoice
    from tidelock.model.geometry import Geometry, SiteId
    from tidelock.wire.codec import Codecs


def describe_codecs(
    codecs: Codecs, geometry: Geometry, active: Mapping[SiteId, Sequence[str]], frames: FrameChoice | None = None
) -> str:
    """Return what crosses for a token in training, against fp32, and how far a token can be off.

    Args:
        codecs: Those of the run.
        geometry: The model's, which has the widths.
        active: The linears that are adapted, by site.
        frames: Those between which all modules are, if there are any.
    """
    activations: list[int] = [geometry.embedding_width]
    gradients: list[int] = []
    for site_id in sorted(active):
        read, given = geometry.sites[site_id].widths(tuple(active[site_id]), frames)
        activations += [read, given]
        # Nothing learns below the lowest active site: the gradient of its input is not sent.
        gradients += [given, *([read] if gradients else [])]
    return (
        f"On the wire: activations in {_describe(codecs.activation, activations, stochastic=False)}; gradients in "
        f"{_describe(codecs.gradient, gradients, stochastic=codecs.stochastic)}"
    )


def describe_tap_codec(codec: Codec, embedding_width: int, tap_widths: Sequence[int], final_width: int) -> str:
    """Return what crosses for a token, once, where a cloud gives taps, and how far a token can be off.

    Args:
        codec: Of embeddings, taps and final states.
        embedding_width: Numbers of a token's embedding.
        tap_widths: And of each of its taps.
        final_width: And of its final state, at tokens with a label.
    """
    widths = [embedding_width, *tap_widths, final_width]
    size = sum(codec.size_bytes((1, width)) for width in widths)
    return (
        f"On the wire, once for each example: its embeddings and its taps in "
        f"{_describe(codec, widths, stochastic=False)}; at most {format_bytes(size)} a token"
    )


def _describe(codec: Codec, widths: Sequence[int], *, stochastic: bool) -> str:
    if codec is Codec.FP32:
        return "fp32, exact"
    how = " rounded stochastically" if stochastic else ""
    bound = max(codec.error_bound(width, stochastic=stochastic) for width in widths)
    return (
        f"{codec.value}{how}, {codec.ratio(widths):.2f} times smaller than fp32, each token off by at most {bound:.2%}"
    )


def describe_distortion(totals: Mapping[str, Mapping[str, float]]) -> str:
    """Return what rounding took, as `Distortion.totals` measured it."""
    roles = [
        f"{role}s off by {error['mean']:.2%} on average and {error['max']:.2%} at most"
        for role, error in sorted(totals.items())
    ]
    return f"Rounded on the wire: a token's {', '.join(roles)}"
