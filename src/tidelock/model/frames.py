"""Frames: the frozen outer factors of `core`, and projections of taps; nothing of them ever crosses the wire.

For a projection of D numbers in and W out they are A (r x D), whose rows are orthonormal, and B (W x r), whose columns
are. Seeded ones follow from the projection's full name alone. Those of the SVD are the first r right and left singular
vectors of its frozen weight, as LoRA-XS has them (Balazy et al., arXiv 2405.17604, equation 2), but without the
singular values. Frames of a smaller rank are the first of a larger one's. A cloud keeps one set of them however many
devices there are.

May import errors, `model` and libraries.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
import torch

from tidelock.errors import ModelError
from tidelock.model.geometry import Place

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from tidelock.model.geometry import Geometry, SiteId

FRAME_KINDS = ("seeded", "svd")
# Of what a device may ask: it bounds what a cloud keeps.
MAX_RANK = 256


@final
@dataclass(frozen=True, slots=True)
class FrameChoice:
    """Between which frames all modules of a pass are.

    Attributes:
        kind: One of `FRAME_KINDS`.
        rank: r.
    """

    kind: str
    rank: int


def draw_frames(path: str, width: int, output_width: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return the frames A, shape (r, D), and B, shape (W, r), of a projection, both fp32 on the CPU.

    Args:
        path: The projection's full name in the causal model.
        width: D, numbers per token that it reads.
        output_width: W, numbers per token that it gives.
        rank: r, at most either of them.
    """
    return _orthonormal(f"{path} A", width, rank).T.contiguous(), _orthonormal(f"{path} B", output_width, rank)


@torch.no_grad()
def svd_frames(weight_WD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the frames A, shape (r, D), and B, shape (W, r), of a frozen weight, both fp32 on the CPU.

    They are the singular vectors of its r largest singular values, largest first. Where two of these are equal, or
    fewer than r are more than 0, the weight does not say which directions they are, and machines may differ.

    Args:
        weight_WD: Of a projection, in any dtype.
        rank: r, at most W and D.
    """
    # bf16, so that frames do not depend on what a side holds the weights in; fp64, so that machines agree on them.
    exact_WD = weight_WD.detach().to("cpu", torch.bfloat16).double()
    is_wide = exact_WD.shape[0] < exact_WD.shape[1]
    long_LS = exact_WD.T if is_wide else exact_WD
    # The smaller side's from its Gram matrix, ascending: half of the time that an SVD takes.
    short_SR = torch.linalg.eigh(long_LS.T @ long_LS).eigenvectors.flip(1)[:, :rank]
    short_SR = short_SR * _signs(short_SR.gather(0, short_SR.abs().argmax(0, keepdim=True)))
    # The other side's are the images of these; where one is of no length, QR finds a direction for it.
    q, r = torch.linalg.qr(long_LS @ short_SR)
    long_LR = q * _signs(r.diagonal())
    b_WR, a_DR = (short_SR, long_LR) if is_wide else (long_LR, short_SR)
    return a_DR.T.float().contiguous(), b_WR.float().contiguous()


def _signs(values: Tensor) -> Tensor:
    """Return 1 or -1 for each value, also for 0."""
    return torch.where(values < 0, -1.0, 1.0).to(values)


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
    """The frames of one model's projections, made when they are first asked for; safe to use from several threads.

    Args:
        geometry: The model's.
        device: Where they are kept.
        dtype: In what.
        weight_of: Returns the frozen weight of a named projection at a site, shape (W, D); None where no frames of the
            SVD will be asked for.
    """

    def __init__(
        self,
        geometry: Geometry,
        device: torch.device,
        dtype: torch.dtype,
        weight_of: Callable[[SiteId, str], Tensor] | None = None,
    ) -> None:
        self._geometry = geometry
        self._device = device
        self._dtype = dtype
        self._lock = threading.Lock()
        self._weight_of = weight_of
        self._made: dict[tuple[SiteId, str, FrameChoice], tuple[Tensor, Tensor]] = {}
        self._of_taps: dict[tuple[int, int], Tensor] = {}

    def at(self, site: SiteId, names: Sequence[str], choice: FrameChoice) -> list[tuple[Tensor, Tensor]]:
        """Return A, shape (r, D), and B, shape (W, r), of each named projection of an attention.

        Raises:
            ModelError: Frames of the SVD where there are no weights.
        """
        return [self._one(site, name, choice) for name in names]

    def narrow(self, block: int, tap_ND: Tensor, width: int | None) -> Tensor:
        """Return a block's output at W numbers a token, shape (N, W); None leaves it as it is.

        It is projected to W orthonormal directions, of which a smaller W has the first.
        """
        if width is None:
            return tap_ND
        count = _drawn_for(width, tap_ND.shape[1])
        with self._lock:
            drawn_DW = self._of_taps.get((block, count))
            if drawn_DW is None:
                name = f"{self._geometry.block_path(block)} tap"
                drawn_DW = _orthonormal(name, tap_ND.shape[1], count).to(self._device, self._dtype)
                self._of_taps[block, count] = drawn_DW
        return tap_ND @ drawn_DW[:, :width]

    def _one(self, site: SiteId, name: str, choice: FrameChoice) -> tuple[Tensor, Tensor]:
        whole = self._geometry.sites[site]
        output_width = whole.output_width((name,))
        count = _drawn_for(choice.rank, min(whole.width, output_width))
        key = site, name, FrameChoice(choice.kind, count)
        with self._lock:
            if key not in self._made:
                if choice.kind == "svd":
                    a_RD, b_WR = svd_frames(self._weight(site, name), count)
                else:
                    path = self._geometry.projection_path(site.block, name)
                    a_RD, b_WR = draw_frames(path, whole.width, output_width, count)
                self._made[key] = a_RD.to(self._device, self._dtype), b_WR.to(self._device, self._dtype)
            a_RD, b_WR = self._made[key]
        return a_RD[: choice.rank], b_WR[:, : choice.rank]

    def _weight(self, site: SiteId, name: str) -> Tensor:
        if self._weight_of is None:
            msg = (
                f"Frames of the SVD at {site.name}: expected the weights of the model, got none. Make them where the "
                "model is."
            )
            raise ModelError(msg)
        return self._weight_of(site, name)


def _drawn_for(count: int, most: int) -> int:
    """Return how many directions are made where so many are asked for, and so many there can be.

    In powers of two, since a QR of other columns rounds otherwise: what one is must not depend on how many were asked
    for before. So few are kept, too.
    """
    return min(1 << (count - 1).bit_length(), most)


def largest_rank(geometry: Geometry) -> int:
    """Return the largest rank that frames at the attentions of a model can have."""
    sites = [site for site_id, site in geometry.sites.items() if site_id.place is Place.ATTN]
    widths = [width for site in sites for width in (site.width, *(part.width for part in site.projections))]
    return min(MAX_RANK, *widths)
