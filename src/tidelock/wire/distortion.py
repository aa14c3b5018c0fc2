"""What rounding on the wire takes from the tensors that this device sends, measured on a few tokens of each.

May import errors and libraries.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, final

import torch

from tidelock.errors import WireError

if TYPE_CHECKING:
    from torch import Tensor

    from tidelock.wire.codec import Codec

# Tokens of each tensor that are measured, evenly spaced: enough for a mean over a run, and next to nothing to compute.
_SAMPLED_ROWS = 8
# Above the bound by what fp32 itself rounds, and by what a row near the smallest numbers of fp32 loses to zero.
_SLACK = 1e-4
_SMALLEST_STEP = 2.0**-124


@final
class _Tally:
    """The errors of one role until now."""

    def __init__(self) -> None:
        self.tokens = 0
        self.total = 0.0
        self.largest = 0.0
        self.bound = 0.0


@final
class Distortion:
    """The relative error of rounding, by role (activation, gradient), over all passes; safe to use from threads.

    A token's error is |x - decoded x| / |x| in the 2-norm, and 0 for a token of zeros.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tallies: dict[str, _Tally] = {}

    def measure(self, role: str, what: str, tensor: Tensor, encoded: Tensor, codec: Codec, *, stochastic: bool) -> None:
        """Compare some tokens of a tensor with what its bytes decode to.

        Args:
            role: What the tensor is counted as.
            what: Its name in error messages.
            tensor: As it was before, on any device.
            encoded: Its bytes, as `Codec.encode` returned them.
            codec: The one that wrote them.
            stochastic: Whether rounding was.

        Raises:
            WireError: A token's error is larger than the codec's bound, so that something is wrong with the encoding.
        """
        if not tensor.numel():
            return
        shape = tuple(tensor.shape)
        width = shape[-1] if shape else 1
        x_NW = tensor.detach().reshape(-1, width)
        rows = slice(None, None, math.ceil(len(x_NW) / _SAMPLED_ROWS))
        # In fp64, where no square overflows or vanishes.
        x_RW = x_NW[rows].to("cpu", torch.float32).to(torch.float64)
        norm_R = x_RW.norm(dim=1)
        error_R = x_RW.sub_(codec.decode(what, encoded, shape, rows)).norm(dim=1)
        # bf16 has infinities too: what is not finite crosses as it is, and the loss or a gradient will tell.
        finite_R = norm_R.isfinite()
        norm_R, error_R = norm_R[finite_R], error_R[finite_R]
        if not len(norm_R):
            return
        bound = codec.error_bound(width, stochastic=stochastic)
        allowed_R = norm_R * (bound + _SLACK) + math.sqrt(width) * _SMALLEST_STEP
        if not bool((error_R <= allowed_R).all()):
            worst = float((error_R / norm_R).max())
            msg = (
                f"Sending a {what} as {codec.value}: expected every token's error to be at most {bound:.3g} of its "
                f"norm, got {worst:.3g}. The optimizer was not moved. Please report this, and use fp32 on the wire."
            )
            raise WireError(msg)
        relative_R = torch.where(norm_R > 0, error_R / norm_R, 0.0)
        with self._lock:
            tally = self._tallies.setdefault(role, _Tally())
            tally.tokens += len(relative_R)
            tally.total += float(relative_R.sum())
            tally.largest = max(tally.largest, float(relative_R.max()))
            tally.bound = max(tally.bound, bound)

    def totals(self) -> dict[str, dict[str, float]]:
        """Return `{role: {"mean", "max", "bound", "tokens"}}` for the roles that were rounded."""
        with self._lock:
            return {
                role: {
                    "mean": tally.total / tally.tokens,
                    "max": tally.largest,
                    "bound": tally.bound,
                    "tokens": tally.tokens,
                }
                for role, tally in self._tallies.items()
            }
