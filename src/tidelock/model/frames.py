"""Frames: the frozen outer factors of `core`, and projections of taps, which device and cloud draw for themselves.

For a projection of D numbers in and W out they are A (r x D), whose rows are orthonormal, and B (W x r), whose columns
are. They follow from the projection's full name alone, and those of a smaller rank are the first of a larger one's. So
nothing of them crosses the wire, and a cloud keeps one set of them however many devices there are.

May import errors, `model` and libraries.
"""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING, final

import numpy as np
import torch

from tidelock.model.geometry import Place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tidelock.model.geometry import Geometry, SiteId

# Of what a device may ask: it bounds what a cloud keeps.
MAX_RANK = 256


def draw_frames(path: str, width: int, output_width: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return the frames A, shape (r, D), and B, shape (W, r), of a projection, both fp32 on the CPU.

    Args:
        path: The projection's full name in the causal model.
        width: D, numbers per token that it reads.
        output_width: W, numbers per token that it gives.
        rank: r, at most either of them.
    """
    return _orthonormal(f"{path} A", width, rank).T.contiguous(), _orthonormal(f"{path} B", output_width, rank)


def _orthonormal(name: str, size: int, count: int) -> Tensor:
    """Return orthonormal columns, shape (size, count), that span a random space; the first do not depend on `count`."""
    # NumPy promises to keep its bit generators; normal numbers are made of their bits here (Box and Muller, 1958).
    bits = np.random.PCG64(int.from_bytes(hashlib.sha256(name.encode()).digest(), "little"))
    uniform = (bits.random_raw(2 * size * count) >> np.uint64(11)).astype(np.float64).reshape(count, 2, size)
    uniform = (uniform + 0.5) / 2**53
    gaussian = np.sqrt(-2 * np.log(uniform[:, 0])) * np.cos(2 * np.pi * uniform[:, 1])
    q, r = np.linalg.qr(gaussian.T)
    # Which of two opposite columns a QR gives is left to the library: the one with which r's diagonal is positive.
    return torch.from_numpy((q * np.sign(np.diagonal(r))).astype(np.float32))


@final
class Frames:
    """The frames of one model's projections, drawn when they are first asked for; safe to use from several threads.

    Args:
        geometry: The model's.
        device: Where they are kept.
        dtype: In what.
    """

    def __init__(self, geometry: Geometry, device: torch.device, dtype: torch.dtype) -> None:
        self._geometry = geometry
        self._device = device
        self._dtype = dtype
        self._lock = threading.Lock()
        self._drawn: dict[tuple[SiteId, str], tuple[Tensor, Tensor]] = {}
        self._of_taps: dict[tuple[int, int], Tensor] = {}

    def at(self, site: SiteId, names: Sequence[str], rank: int) -> list[tuple[Tensor, Tensor]]:
        """Return A, shape (r, D), and B, shape (W, r), of each named projection of an attention."""
        return [self._one(site, name, rank) for name in names]

    def narrow(self, block: int, tap_ND: Tensor, width: int | None) -> Tensor:
        """Return a block's output at W numbers a token, shape (N, W); None leaves it as it is.

        It is projected to W orthonormal directions, of which a smaller W has the first.
        """
        if width is None:
            return tap_ND
        # In powers of two, since a QR of other columns rounds otherwise: what a tap is must not depend on which widths
        # were asked for before. So few are kept, too.
        count = min(1 << (width - 1).bit_length(), tap_ND.shape[1])
        with self._lock:
            drawn_DW = self._of_taps.get((block, count))
            if drawn_DW is None:
                name = f"{self._geometry.block_path(block)} tap"
                drawn_DW = _orthonormal(name, tap_ND.shape[1], count).to(self._device, self._dtype)
                self._of_taps[block, count] = drawn_DW
        return tap_ND @ drawn_DW[:, :width]

    def _one(self, site: SiteId, name: str, rank: int) -> tuple[Tensor, Tensor]:
        with self._lock:
            drawn = self._drawn.get((site, name))
            if drawn is None or len(drawn[0]) < rank:
                whole = self._geometry.sites[site]
                path = self._geometry.projection_path(site.block, name)
                a_RD, b_WR = draw_frames(path, whole.width, whole.output_width((name,)), rank)
                drawn = a_RD.to(self._device, self._dtype), b_WR.to(self._device, self._dtype)
                self._drawn[site, name] = drawn
        return drawn[0][:rank], drawn[1][:, :rank]


def largest_rank(geometry: Geometry) -> int:
    """Return the largest rank that frames at the attentions of a model can have."""
    sites = [site for site_id, site in geometry.sites.items() if site_id.place is Place.ATTN]
    widths = [width for site in sites for width in (site.width, *(part.width for part in site.projections))]
    return min(MAX_RANK, *widths)
