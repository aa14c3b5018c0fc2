"""One micro-batch's way through the frozen blocks and back, as a chain of segments.

The autograd graph is cut at the input of every block and at the input of every active site: both are leaves, and so is
the device's answer at a site. Backward is then a walk over the segments with one `torch.autograd.grad` each, and
whoever answers at the sites may be far away: no network wait ever happens inside the autograd engine, which other
users of the same GPU share.

Nothing is computed that the mathematics does not need: blocks before the lowest active site run without a graph,
backward stops at that site and asks for no input gradient there, and padding is never handed to a site.

Shapes: B rows, T positions, N real tokens, M selected tokens, D hidden width, W the widths of a site's projections
together. May import errors, `model` and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, final

import torch
from torch import Tensor

from tidelock.errors import ModelError
from tidelock.model.cut import BlockCall, CutModel, visiting
from tidelock.model.rows import Rows, pack, unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import Cache


class Sites(Protocol):
    """Whoever holds the PEFT modules and answers at the active sites."""

    def forward(self, block: int, x_ND: Tensor) -> Tensor:
        """Return what the module adds to the site's projections, side by side, shape (N, W)."""
        ...

    def backward(self, block: int, grad_NW: Tensor, *, need_input: bool) -> Tensor | None:
        """Take the gradient of what `forward` returned; return that of its input, shape (N, D), if it is needed."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch at the cut: all that the frozen blocks need to know of it.

    Attributes:
        embeddings_NE: Word embeddings of the real tokens.
        rows: Where those tokens are in the batch.
        select_M: Which of the N tokens' final states are wanted, int64.
        active: The targeted projections of each active site, by block.
        training: Whether a backward pass will follow.
        seed: Fixes every random choice of the pass that is not the bank's.
        learns_from: The lowest active block whose module learns; None is the lowest active one. No gradient goes below.
    """

    embeddings_NE: Tensor
    rows: Rows
    select_M: Tensor
    active: Mapping[int, tuple[str, ...]]
    training: bool
    seed: int = 0
    learns_from: int | None = None

    @property
    def lowest(self) -> int | None:
        """The block at which backward ends; None without an active site."""
        return min(self.active, default=None) if self.learns_from is None else self.learns_from

    def split(self, count: int) -> list[Batch]:
        """Return at most `count` batches of whole rows, in order, of about as many rows each."""
        if count == 1:
            return [self]
        batches, start = [], 0
        for number, rows in enumerate(self.rows.split(count)):
            end = start + rows.num_tokens
            inside = (self.select_M >= start) & (self.select_M < end)
            embeddings, select = self.embeddings_NE[start:end], self.select_M[inside] - start
            seed = self.seed + number
            batches.append(Batch(embeddings, rows, select, self.active, self.training, seed, self.learns_from))
            start = end
        return batches


@final
@dataclass(slots=True)
class _Segment:
    """One block's piece of the graph: its input leaf, its output, and the three cuts at its site if that is active."""

    start_BTD: Tensor
    end_BTD: Tensor
    site_before_BTD: Tensor | None = None
    site_after_BTD: Tensor | None = None
    answer_NW: Tensor | None = None


@final
class Walk:
    """Runs one batch forward and, when it trains, backward once.

    Args:
        cut: The frozen decoder.
        batch: What to run.
        sites: Asked at every active site, in the order of the blocks, and in reverse on the way back.
        between_segments: Called between blocks, so that a server can let another user compute.
    """

    def __init__(
        self, cut: CutModel, batch: Batch, sites: Sites, between_segments: Callable[[], None] = lambda: None
    ) -> None:
        self._cut = cut
        self._batch = batch
        self._sites = sites
        self._between_segments = between_segments
        self._shape_BT = (len(batch.rows.lengths), batch.rows.width)
        self._indices_N = None if batch.rows.is_dense else batch.rows.indices().to(cut.device)
        self._lowest = batch.lowest
        self._segments: list[_Segment] = []
        self._current: _Segment | None = None
        self._last_leaf: Tensor | None = None
        self._final_MD: Tensor | None = None

    def forward(self, cache: Cache | None = None) -> Tensor:
        """Return the decoder's final states at the selected tokens, shape (M, D), detached."""
        rows = self._batch.rows
        mask_BT = rows.mask().to(self._cut.device)
        embeddings_BTE = unpack(
            self._batch.embeddings_NE.to(self._cut.device, self._cut.dtype), self._indices_N, self._shape_BT
        )
        # When it generates, a row padded at the left counts its positions from its first real token.
        positions_BT = None if cache is None else (mask_BT.cumsum(1) - 1).clamp(min=0)
        return self._run(embeddings_BTE, mask_BT, positions_BT, cache)

    def extend(self, embeddings_BE: Tensor, cache: Cache) -> Tensor:
        """Return the final states of one more token in every row, shape (B, D), after a `forward` with this cache."""
        rows = self._batch.rows
        past = cache.get_seq_length()
        mask_BT = torch.cat([rows.mask(), torch.ones(self._shape_BT[0], past + 1 - rows.width, dtype=torch.long)], 1)
        positions_BT = (mask_BT.sum(1, keepdim=True) - 1).to(self._cut.device)
        self._indices_N = None
        self._shape_BT = (self._shape_BT[0], 1)
        embeddings_BTE = embeddings_BE.to(self._cut.device, self._cut.dtype)[:, None]
        return self._run(embeddings_BTE, mask_BT.to(self._cut.device), positions_BT, cache, select_all=True)

    def _run(
        self,
        embeddings_BTE: Tensor,
        mask_BT: Tensor,
        positions_BT: Tensor | None,
        cache: Cache | None,
        *,
        select_all: bool = False,
    ) -> Tensor:
        with torch.set_grad_enabled(self._batch.training):
            final_BTD = self._cut.run(embeddings_BTE, mask_BT, self._run_blocks, positions_BT=positions_BT, cache=cache)
            final_ND = pack(final_BTD, self._indices_N)
            final_MD = final_ND if select_all else final_ND.index_select(0, self._batch.select_M.to(final_ND.device))
        if self._batch.training:
            self._final_MD = final_MD
        return final_MD.detach()

    def _run_blocks(self, calls: Sequence[BlockCall], hidden_BTD: Tensor) -> Tensor:
        """Return the last block's output; called by the decoder's own forward through its last stub."""
        for index, call in enumerate(calls):
            if index:
                self._between_segments()
            needs_graph = self._batch.training and self._lowest is not None and index >= self._lowest
            with torch.set_grad_enabled(needs_graph):
                hidden_BTD = self._run_block(call, hidden_BTD.detach(), needs_graph=needs_graph)
        self._last_leaf = hidden_BTD.detach().requires_grad_(self._batch.training)
        return self._last_leaf

    def _run_block(self, call: BlockCall, start_BTD: Tensor, *, needs_graph: bool) -> Tensor:
        # The lowest segment's input needs no gradient: nothing below it is trained.
        start_BTD.requires_grad_(needs_graph and bool(self._segments))
        self._current = _Segment(start_BTD, start_BTD)
        end_BTD = visiting(self, call, start_BTD)
        self._current.end_BTD = end_BTD
        if needs_graph:
            self._segments.append(self._current)
        return end_BTD

    def enter_site(self, block: int, x_BTD: Tensor) -> Tensor:
        """Ask for the answer when the first projection of an active site is reached; see `SiteVisitor`."""
        segment = self._current
        if segment is None or block not in self._batch.active:
            return x_BTD
        if segment.site_after_BTD is None:
            segment.site_before_BTD = x_BTD
            segment.site_after_BTD = x_BTD.detach().requires_grad_(segment.start_BTD.requires_grad)
            answer_NW = self._sites.forward(block, pack(segment.site_after_BTD.detach(), self._indices_N))
            segment.answer_NW = answer_NW.to(x_BTD).requires_grad_(torch.is_grad_enabled())
        elif x_BTD is not segment.site_before_BTD:
            msg = (
                f"Site {self._cut.geometry.sites[block].name}: expected its projections to read one and the same "
                "input, got different ones. This attention cannot be a site."
            )
            raise ModelError(msg)
        return segment.site_after_BTD

    def leave_projection(self, block: int, projection: str, y_BTW: Tensor) -> Tensor:
        """Add the device's answer to a projection; see `SiteVisitor`."""
        segment = self._current
        targets = self._batch.active.get(block, ())
        if segment is None or segment.answer_NW is None or projection not in targets:
            return y_BTW
        widths = {p.name: p.width for p in self._cut.geometry.sites[block].projections}
        parts = segment.answer_NW.split([widths[name] for name in targets], dim=1)
        return y_BTW + unpack(parts[targets.index(projection)], self._indices_N, self._shape_BT)

    def backward(self, grad_MD: Tensor) -> None:
        """Walk back over the segments, handing every active site its gradient.

        Args:
            grad_MD: Gradient of what `forward` returned.
        """
        if self._final_MD is None or self._last_leaf is None:
            return
        grad_MD = grad_MD.to(self._final_MD.device, self._final_MD.dtype)
        (grad_BTD,) = torch.autograd.grad(self._final_MD, [self._last_leaf], grad_MD)
        self._final_MD = self._last_leaf = None
        for block in range(self._cut.geometry.num_blocks - 1, (self._lowest or 0) - 1, -1):
            self._between_segments()
            grad_BTD = self._back_through(block, self._segments.pop(), grad_BTD)

    def _back_through(self, block: int, segment: _Segment, grad_BTD: Tensor) -> Tensor:
        """Return the gradient of a segment's input, given that of its output."""
        start, before, after, answer = (
            segment.start_BTD,
            segment.site_before_BTD,
            segment.site_after_BTD,
            segment.answer_NW,
        )
        if before is None or after is None or answer is None:
            return torch.autograd.grad(segment.end_BTD, [start], grad_BTD)[0]
        need_input = start.requires_grad
        wanted = [answer, after, start] if need_input else [answer]
        # The norm before the site is walked through a second time below, and some families (Phi, BLOOM's post-norm)
        # also read its output elsewhere in the block, so that it is walked through here too: its graph must stay.
        grads = torch.autograd.grad(segment.end_BTD, wanted, grad_BTD, retain_graph=need_input)
        grad_x_ND = self._sites.backward(block, grads[0], need_input=need_input)
        if not need_input or grad_x_ND is None:
            return grad_BTD
        grad_site_BTD = grads[1] + unpack(grad_x_ND.to(grads[1]), self._indices_N, self._shape_BT)
        (through_norm_BTD,) = torch.autograd.grad(before, [start], grad_site_BTD)
        return grads[2] + through_norm_BTD
