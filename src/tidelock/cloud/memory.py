"""How much memory a pass takes, measured on the model at hand, and who may take it.

May import `model`, errors and libraries.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from tidelock.errors import CloudBusy
from tidelock.model.geometry import Place
from tidelock.model.rows import Rows
from tidelock.model.walk import Batch, Walk

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tidelock.model.cut import CutModel
    from tidelock.model.frames import FrameChoice
    from tidelock.model.geometry import Geometry, SiteId

_PROBE_WIDTHS = (16, 64)
NO_PLACE = "Opening a pass: expected a free place, as its device holds one already, got none. Go on with one at a time."


@final
@dataclass(frozen=True, slots=True)
class PassCost:
    """What autograd keeps of a training pass until its backward.

    Attributes:
        per_token: Bytes for each of a row's T tokens.
        per_token_squared: Bytes for each of its T x T pairs, where a family's attention keeps its scores.
    """

    per_token: float
    per_token_squared: float

    def bytes_for(self, rows: int, width: int, at_sites: int = 0) -> int:
        """Return the bytes that a training pass of so many rows of that width keeps; see `bytes_at_sites`."""
        return int(rows * ((self.per_token + at_sites) * width + self.per_token_squared * width * width))


def bytes_at_sites(
    geometry: Geometry, itemsize: int, active: Mapping[SiteId, tuple[str, ...]], frames: FrameChoice | None = None
) -> int:
    """Return the bytes for each token that a training pass keeps at its active sites, beside what autograd does.

    That is the device's answer, and what the device was sent where autograd does not have that anyway: at an output,
    and through frames.

    Args:
        geometry: The model's.
        itemsize: Bytes of a number as the model computes.
        active: The targeted linears of each active site.
        frames: Those between which all modules are, if there are any.
    """
    kept = 0
    for site, names in active.items():
        read, given = geometry.sites[site].widths(names, frames)
        kept += given + (read if frames is not None or site.place is not Place.ATTN else 0)
    return itemsize * kept


def bytes_of_taps(geometry: Geometry, tokens: int, blocks: int, width: int | None) -> int:
    """Return the most bytes of taps that may wait to be sent, when a device reads slowly.

    Args:
        geometry: The model's.
        tokens: Real tokens of the pass.
        blocks: How many blocks are tapped.
        width: Numbers per token of each; None is as many as the block gives.
    """
    return 4 * tokens * blocks * (width or geometry.block_width)


def measure_cost(cut: CutModel, *, recompute: bool = False) -> PassCost:
    """Return what passes through this model keep, from two small ones.

    Args:
        cut: The model.
        recompute: Whether they keep what each block was given, and of one block at a time what is inside.
    """
    narrow, wide = _PROBE_WIDTHS
    kept_narrow, kept_wide = (_kept_bytes(cut, width) for width in _PROBE_WIDTHS)
    squared = max(0.0, (kept_wide / wide - kept_narrow / narrow) / (wide - narrow))
    linear, blocks = max(0.0, kept_narrow / narrow - squared * narrow), cut.geometry.num_blocks
    if not recompute:
        return PassCost(linear, squared)
    # One state more: what the final norm was given. Of the lowest block only what is above its site was counted.
    given = cut.dtype.itemsize * cut.geometry.block_width * (blocks + 1)
    inside = max(1, blocks - 1)
    return PassCost(given + linear / inside, squared / inside)


@final
class _ZeroSites:
    """Answers zero at every site."""

    def __init__(self, cut: CutModel) -> None:
        self._sites = cut.geometry.sites

    def forward(self, site: SiteId, x_ND: Tensor) -> Tensor:
        width = sum(projection.width for projection in self._sites[site].projections)
        return x_ND.new_zeros(x_ND.shape[0], width)

    def backward(self, site: SiteId, grad_NW: Tensor, *, need_input: bool) -> Tensor | None:
        return grad_NW.new_zeros(grad_NW.shape[0], self._sites[site].width) if need_input else None


def _kept_bytes(cut: CutModel, width: int) -> int:
    """Return the bytes of all tensors that one row of that width saves for backward, weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in cut.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = Batch(
        embeddings_NE=torch.zeros(width, cut.geometry.embedding_width),
        rows=Rows((0,), (width,), width),
        select_M=torch.arange(width),
        active={
            site_id: tuple(p.name for p in site.projections)
            for site_id, site in cut.geometry.sites.items()
            if site_id.place is Place.ATTN
        },
        training=True,
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        walk = Walk(cut, batch, _ZeroSites(cut))
        walk.forward()
    return sum(storages.values())


@final
class MemoryBudget:
    """Lets passes in as long as their memory fits; the others wait, first come first served.

    Args:
        limit_bytes: What all passes together may keep; None for no limit.
    """

    def __init__(self, limit_bytes: int | None) -> None:
        self.limit_bytes = limit_bytes
        self._condition = threading.Condition()
        self._used = 0
        self._line: list[object] = []

    def fits(self, size_bytes: int) -> bool:
        """Return whether a pass of this size could ever run."""
        return self.limit_bytes is None or size_bytes <= self.limit_bytes

    @contextmanager
    def reserve(self, size_bytes: int, *, may_wait: bool = True) -> Iterator[None]:
        """Hold that much memory inside; wait for it before.

        Raises:
            CloudBusy: It would have to wait, and may not.
        """
        ticket = object()
        with self._condition:
            if not may_wait and (self._line or not self.fits(self._used + size_bytes)):
                raise CloudBusy(NO_PLACE)
            self._line.append(ticket)
            self._condition.wait_for(lambda: self._line[0] is ticket and self.fits(self._used + size_bytes))
            self._line.pop(0)
            self._used += size_bytes
            self._condition.notify_all()
        try:
            yield
        finally:
            with self._condition:
                self._used -= size_bytes
                self._condition.notify_all()
