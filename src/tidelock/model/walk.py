"""One micro-batch's way through the frozen blocks and back, as a chain of segments.

The autograd graph is cut at the input of every block and at what every active site reads: both are leaves, and so is
the device's answer at a site. Backward is then a walk over the segments with one `torch.autograd.grad` each, and
whoever answers at the sites may be far away: no network wait ever happens inside the autograd engine, which other
users of the same GPU share.

Nothing is computed that the mathematics does not need: blocks before the lowest active site run without a graph,
backward stops at that site and asks for no input gradient there, and padding is never handed to a site.

A walk can also keep no graph but that of the block which it goes back through (Chen et al., arXiv 1604.06174): each
block runs once more then, from what it was given and what the sites have answered, which are not asked again.

Shapes: B rows, T positions, N real tokens, M selected tokens, D hidden width, W numbers of an answer at a site.
May import errors, `model` and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, final

import torch
from torch import Tensor

from tidelock.errors import ModelError
from tidelock.model.cut import BlockCall, CutModel, visiting
from tidelock.model.rows import Rows, pack, unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import Cache

    from tidelock.model.frames import FrameChoice
    from tidelock.model.geometry import SiteId
    from tidelock.model.rows import Layout


class Sites(Protocol):
    """Whoever holds the PEFT modules and answers at the active sites."""

    def forward(self, site: SiteId, x_ND: Tensor) -> Tensor:
        """Return what the module adds at the site, for several projections side by side, shape (N, W)."""
        ...

    def backward(self, site: SiteId, grad_NW: Tensor, *, need_input: bool) -> Tensor | None:
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
        active: The targeted linears of each active site.
        training: Whether a backward pass will follow.
        seed: Fixes every random choice of the pass that is not the bank's.
        learns_from: The lowest active block whose module learns; None is the lowest active one. No gradient goes below.
        frames: Those between which all modules are; None where they read and give whole states.
    """

    embeddings_NE: Tensor
    rows: Rows
    select_M: Tensor
    active: Mapping[SiteId, tuple[str, ...]]
    training: bool
    seed: int = 0
    learns_from: int | None = None
    frames: FrameChoice | None = None

    @property
    def lowest(self) -> SiteId | None:
        """The site at which backward ends; None without an active one."""
        return min((site for site in self.active if site.block >= (self.learns_from or 0)), default=None)

    def split(self, count: int | None = None, prefix: int = 0) -> list[Batch]:
        """Return micro-batches of whole rows, in order; see `Rows.split`."""
        batches, start = [], 0
        for number, rows in enumerate(self.rows.split(count, prefix)):
            end = start + rows.num_tokens
            inside = (self.select_M >= start) & (self.select_M < end)
            embeddings, select = self.embeddings_NE[start:end], self.select_M[inside] - start
            seed = self.seed + number
            batches.append(replace(self, embeddings_NE=embeddings, rows=rows, select_M=select, seed=seed))
            start = end
        return batches


@final
@dataclass(slots=True)
class _Cut:
    """Where an active site cuts a segment's graph: what came to it, the leaf in its place, and that of the answer."""

    site: SiteId
    input_BTD: Tensor
    before_BTD: Tensor
    after_BTD: Tensor
    answer_NW: Tensor


@final
@dataclass(slots=True)
class _Segment:
    """One block's piece of the graph: its input leaf, its output, and the cuts at its active sites in their order.

    Where the block is to run once more there is its call instead, and what its sites have answered.
    """

    start_BTD: Tensor
    end_BTD: Tensor
    cuts: list[_Cut] = field(default_factory=list)
    call: BlockCall | None = None
    answers: dict[SiteId, Tensor] = field(default_factory=dict)

    def without_graph(self, call: BlockCall) -> _Segment:
        answers = {cut.site: cut.answer_NW for cut in self.cuts}
        return _Segment(self.start_BTD, self.start_BTD, call=call, answers=answers)

    def cut_at(self, site: SiteId) -> _Cut | None:
        return next((cut for cut in self.cuts if cut.site == site), None)


@final
class Walk:
    """Runs one batch forward and, when it trains, backward once.

    Args:
        cut: The frozen decoder.
        batch: What to run.
        sites: Asked at every active site, in the order of the blocks, and in reverse on the way back.
        between_segments: Called between blocks, so that a server can let another user compute.
        recompute: Run each block again on the way back, so that nothing inside of it need be kept until then.
    """

    def __init__(
        self,
        cut: CutModel,
        batch: Batch,
        sites: Sites,
        between_segments: Callable[[], None] = lambda: None,
        *,
        recompute: bool = False,
    ) -> None:
        self._cut = cut
        self._batch = batch
        self._sites = sites
        self._between_segments = between_segments
        self._recompute = recompute
        self._shape_BT = (len(batch.rows.lengths), batch.rows.width)
        self._indices_N: Tensor | None = None
        self._lowest = batch.lowest
        self._segments: list[_Segment] = []
        self._current: _Segment | None = None
        self._last_leaf: Tensor | None = None
        self._final_MD: Tensor | None = None

    def forward(self, cache: Cache | None = None) -> Tensor:
        """Return the decoder's final states at the selected tokens, shape (M, D), detached."""
        layout = self._cut.layout(self._batch.rows, generates=cache is not None)
        return self._run(self._batch.embeddings_NE, layout, cache)

    def extend(self, embeddings_BE: Tensor, cache: Cache) -> Tensor:
        """Return the final states of one more token in every row, shape (B, D), after a `forward` with this cache."""
        layout = self._batch.rows.next_layout(cache.get_seq_length(), self._cut.device)
        return self._run(embeddings_BE, layout, cache, select_all=True)

    def _run(self, embeddings_NE: Tensor, layout: Layout, cache: Cache | None, *, select_all: bool = False) -> Tensor:
        self._indices_N, self._shape_BT = layout.indices_N, layout.shape_BT
        embeddings_BTE = layout.unpack(embeddings_NE.to(self._cut.device, self._cut.dtype))
        with torch.set_grad_enabled(self._batch.training):
            final_BTD = self._cut.run(embeddings_BTE, layout, self._run_blocks, cache)
            final_ND = layout.pack(final_BTD)
            final_MD = final_ND if select_all else final_ND.index_select(0, self._batch.select_M.to(final_ND.device))
        if self._batch.training:
            self._final_MD = final_MD
        return final_MD.detach()

    def _run_blocks(self, calls: Sequence[BlockCall], hidden_BTD: Tensor) -> Tensor:
        """Return the last block's output; called by the decoder's own forward through its last stub."""
        for index, call in enumerate(calls):
            if index:
                self._between_segments()
            needs_graph = self._batch.training and self._lowest is not None and index >= self._lowest.block
            segment = self._run_block(index, call, hidden_BTD.detach(), needs_graph=needs_graph and not self._recompute)
            hidden_BTD = segment.end_BTD
            if needs_graph:
                self._segments.append(segment.without_graph(call) if self._recompute else segment)
        self._last_leaf = hidden_BTD.detach().requires_grad_(self._batch.training)
        return self._last_leaf

    def _run_block(
        self,
        index: int,
        call: BlockCall,
        start_BTD: Tensor,
        *,
        needs_graph: bool,
        answers: Mapping[SiteId, Tensor] | None = None,
    ) -> _Segment:
        """Run a block; at its sites take the answers, if it has run before, or ask for them."""
        # The lowest segment's input needs no gradient: nothing below it is trained.
        is_lowest = self._lowest is not None and index == self._lowest.block
        start_BTD.requires_grad_(needs_graph and not is_lowest)
        self._current = segment = _Segment(start_BTD, start_BTD, answers=dict(answers or {}))
        with torch.set_grad_enabled(needs_graph):
            segment.end_BTD = visiting(self, call, start_BTD)
        self._current = None
        self._check_reached(index, [cut.site for cut in segment.cuts])
        return segment

    def _check_reached(self, index: int, reached: list[SiteId]) -> None:
        """Refuse a block that does not reach each active site once and in order: the device would wait for one."""
        expected = sorted(site for site in self._batch.active if site.block == index)
        if reached != expected:
            msg = (
                f"Block {index}: expected it to reach the sites {[site.name for site in expected]} in this order, got "
                f"{[site.name for site in reached]}. This architecture, or this setting of it, has no module there."
            )
            raise ModelError(msg)

    def enter_site(self, site: SiteId, x_BTD: Tensor) -> Tensor:
        """Ask for the answer when the first projection of an active site is reached; see `SiteVisitor`."""
        segment = self._current
        if segment is None or site not in self._batch.active:
            return x_BTD
        cut = segment.cut_at(site) or self._ask(segment, site, x_BTD)
        if x_BTD is not cut.input_BTD:
            msg = (
                f"Site {site.name}: expected its projections to read one and the same input, got different ones. This "
                "attention cannot be a site."
            )
            raise ModelError(msg)
        return x_BTD if self._batch.frames else cut.after_BTD

    def leave_projection(self, site: SiteId, projection: str, y_BTW: Tensor) -> Tensor:
        """Add the device's answer to a projection; see `SiteVisitor`."""
        cut = None if self._current is None else self._current.cut_at(site)
        targets = self._batch.active.get(site, ())
        if cut is None or projection not in targets:
            return y_BTW
        index, frames = targets.index(projection), self._batch.frames
        if frames:
            (_, b_WR), *_ = self._cut.frames.at(site, (projection,), frames)
            part_NW = cut.answer_NW.split(frames.rank, dim=1)[index] @ b_WR.T
        else:
            widths = {p.name: p.width for p in self._cut.geometry.sites[site].projections}
            part_NW = cut.answer_NW.split([widths[name] for name in targets], dim=1)[index]
        return y_BTW + unpack(part_NW, self._indices_N, self._shape_BT)

    def leave_output(self, site: SiteId, y_BTD: Tensor) -> Tensor:
        """Add the device's answer to an output; see `SiteVisitor`."""
        segment = self._current
        if segment is None or site not in self._batch.active:
            return y_BTD
        # Some blocks flatten rows and positions into one axis there.
        cut = self._ask(segment, site, y_BTD.view(*self._shape_BT, -1))
        return (cut.after_BTD + unpack(cut.answer_NW, self._indices_N, self._shape_BT)).view_as(y_BTD)

    def _ask(self, segment: _Segment, site: SiteId, x_BTD: Tensor) -> _Cut:
        """Cut the graph at a site, and have the device answer there."""
        input_BTD = x_BTD
        if self._batch.frames:
            frames = self._cut.frames.at(site, self._batch.active[site], self._batch.frames)
            x_BTD = torch.cat([x_BTD @ a_RD.T for a_RD, _ in frames], dim=-1)
        after_BTD = x_BTD.detach().requires_grad_(torch.is_grad_enabled() and site != self._lowest)
        answer_NW = segment.answers.get(site)
        if answer_NW is None:
            answer_NW = self._sites.forward(site, pack(after_BTD.detach(), self._indices_N)).to(x_BTD)
        answer_NW.requires_grad_(torch.is_grad_enabled())
        cut = _Cut(site, input_BTD, x_BTD, after_BTD, answer_NW)
        segment.cuts.append(cut)
        return cut

    def backward(self, grad_MD: Tensor) -> None:
        """Walk back over the segments, handing every active site its gradient.

        Args:
            grad_MD: Gradient of what `forward` returned.
        """
        if self._final_MD is None or self._last_leaf is None or self._lowest is None:
            return
        grad_MD = grad_MD.to(self._final_MD.device, self._final_MD.dtype)
        (grad_BTD,) = torch.autograd.grad(self._final_MD, [self._last_leaf], grad_MD)
        self._final_MD = self._last_leaf = None
        for block in range(self._cut.geometry.num_blocks - 1, self._lowest.block - 1, -1):
            self._between_segments()
            segment = self._segments.pop()
            if segment.call is not None:
                call, start_BTD = segment.call, segment.start_BTD
                segment = self._run_block(block, call, start_BTD, needs_graph=True, answers=segment.answers)
            grad_BTD = self._back_through(segment, grad_BTD)

    def _back_through(self, segment: _Segment, grad_BTD: Tensor) -> Tensor:
        """Return the gradient of a segment's input, given that of its output; of no use for the lowest segment's."""
        sums: dict[int, Tensor] = {}
        output_BTD = segment.end_BTD
        for number, cut in reversed(list(enumerate(segment.cuts))):
            need_input = cut.site != self._lowest
            # From the output, or the site above, down to the leaves of this site, of those below it, and of the input.
            leaves = [leaf for below in segment.cuts[: number + 1] for leaf in (below.answer_NW, below.after_BTD)]
            _add_gradients(sums, output_BTD, [*leaves, segment.start_BTD], grad_BTD, retain_graph=need_input)
            grad_NW = sums.pop(id(cut.answer_NW))
            grad_x_ND = self._sites.backward(cut.site, grad_NW, need_input=need_input)
            if not need_input or grad_x_ND is None:
                return grad_BTD
            grad_BTD = unpack(grad_x_ND.to(cut.after_BTD), self._indices_N, self._shape_BT)
            if id(cut.after_BTD) in sums:  # between frames, what a module reads goes nowhere else
                grad_BTD = sums.pop(id(cut.after_BTD)) + grad_BTD
            output_BTD = cut.before_BTD
        _add_gradients(sums, output_BTD, [segment.start_BTD], grad_BTD, retain_graph=False)
        return sums.pop(id(segment.start_BTD))


def _add_gradients(
    sums: dict[int, Tensor], output: Tensor, leaves: Sequence[Tensor], grad: Tensor, *, retain_graph: bool
) -> None:
    """Add an output's part of the gradients of some leaves to their sums, which are kept by the leaf's id.

    A part of a block may be walked through twice: the norm before a site, which some families (Phi, BLOOM's post-norm)
    also read elsewhere in the block. Its graph must stay until the last time.
    """
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not output.requires_grad:
        return
    # Where attention and MLP read the same input, what one gives does not depend on the other.
    grads = torch.autograd.grad(output, wanted, grad, retain_graph=retain_graph, allow_unused=True)
    for leaf, part in zip(wanted, grads, strict=True):
        if part is not None:
            sums[id(leaf)] = sums[id(leaf)] + part if id(leaf) in sums else part
