"""A stage whose gradient goes through the blocks: to LoRA and serial adapters at their sites, or to all weights.

Forward sends a block's output, and back comes its gradient, as wide: what PAC's baselines do (arXiv 2408.10746, section
6.1), and what a side network saves.

Shapes: N real tokens, M tokens with a label, D hidden width, P numbers of a message. May import `pool`, `device`,
`peft`, `model`, errors and libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast, final

from tidelock.device.causal_lm import packed_ids
from tidelock.model.ends import Ends, empty_model, read_config
from tidelock.model.geometry import geometry_of
from tidelock.model.part import ModelPart
from tidelock.model.rows import Rows
from tidelock.peft.site_part import SitePart
from tidelock.pool.example import Boundary, Width
from tidelock.pool.full_part import FullConfig, FullPart
from tidelock.pool.loss_head import LossHead, load_ends
from tidelock.pool.pipeline import Kept
from tidelock.pool.side_stage import back_through, padded

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from tidelock.model.checkpoint import TensorSource
    from tidelock.model.cut import SiteVisitor
    from tidelock.model.rows import Layout
    from tidelock.peft.methods import ModuleConfig
    from tidelock.pool.example import Example


class Learning(Protocol):
    """What learns in a part of the blocks: a `SitePart`, or a `FullPart`."""

    learns_before: bool
    learns_until: bool

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters, by their names in the whole."""
        ...

    def load_whole(self, state: Mapping[str, Tensor]) -> None:
        """Take the part's parameters out of those of the whole."""
        ...

    def visitor(self, layout: Layout, drops: Sequence[tuple[int, int]] | None) -> SiteVisitor | None:
        """Return who is told when a block reaches a site, if anybody is; see `SitePart.visitor`."""
        ...


@final
class BlockStage:
    """One peer's blocks, and what learns in them.

    Args:
        part: The blocks.
        learning: The modules at their sites, or all weights.
        ends: The embedding, for the first stage, and the head, for the last one; None between.
        texts: The head for whole texts instead, for the last stage.
    """

    def __init__(
        self, part: ModelPart, learning: Learning, ends: Ends | None = None, texts: nn.Linear | None = None
    ) -> None:
        self.part = part
        self.tied: Mapping[str, Collection[int]] = learning.tied if isinstance(learning, FullPart) else {}
        self.slices: Mapping[str, slice] = {}
        self._learning = learning
        self._ends = ends
        self._head = LossHead(ends, texts)
        width = Width(part.cut.geometry.block_width)
        self.before = Boundary(width, width if learning.learns_before else None)
        self.after = Boundary(width, width if learning.learns_until else None)

    @classmethod
    def load(
        cls, source: TensorSource, config: ModuleConfig | FullConfig, blocks: range, num_labels: int | None = None
    ) -> BlockStage:
        """Return a stage of a stored model's blocks; modules at their sites, and a head for whole texts, are fresh.

        Args:
            source: The model's stored tensors.
            config: What learns.
            blocks: Numbers of the blocks, consecutive.
            num_labels: Classes of whole texts, 1 for a number; None models language.

        Raises:
            ConfigError: The configuration targets nothing, or something that is not a site.
            ModelError: A tensor is missing or has the wrong shape.
        """
        part = ModelPart(source, blocks)
        ends, texts = load_ends(source, part, num_labels)
        if isinstance(config, FullConfig):
            return cls(part, FullPart(part, ends, with_own_head=num_labels is None), ends, texts)
        geometry = geometry_of(empty_model(read_config(source.folder)))
        return cls(part, SitePart(config, geometry, blocks), ends, texts)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the stage's parameters, by their names in the whole."""
        return self._learning.trained() | self._head.trained()

    def load_whole(self, state: Mapping[str, Tensor]) -> None:
        """Take this stage's parameters out of those of the whole."""
        self._learning.load_whole(state)
        self._head.load_whole(state)

    def own_of(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is this stage's of tensors that are shaped as the whole's parameters, by their names."""
        return {name: whole[name] for name in self.trained()}

    def weights(self) -> Iterator[Tensor]:
        """Yield all weights that a pass reads, trained or not."""
        yield from self.trained().values()
        yield from self.part.cut.parameters()
        if self._ends is not None:
            yield self._ends.embedding
            yield from self._ends.head.parameters()

    def forward(
        self,
        examples: Sequence[Example],
        received_P: Tensor | None,
        num_labels: int,
        dropout_seeds: Sequence[int] | None = None,
    ) -> tuple[Kept, Tensor]:
        """Return what the backward needs, and what goes to the next stage, or the loss; see `StageCompute`."""
        batch = padded(examples)
        rows = Rows.from_mask(batch["attention_mask"])
        layout = self.part.cut.layout(rows)
        state_in_ND = None
        if received_P is None:
            given_NW = cast("Ends", self._ends).embed(packed_ids(batch["input_ids"], rows))
        else:
            given_NW = state_in_ND = received_P.view(-1, self.before.forward.text)
            state_in_ND.requires_grad_(self._learning.learns_before)
        drops = None if dropout_seeds is None else list(zip(rows.lengths, dropout_seeds, strict=True))
        state_ND = self.part.through(given_NW, layout, self._learning.visitor(layout, drops))
        if not self.part.is_last:
            return Kept(state_in_ND, state_ND), state_ND.detach()
        select_M, targets_M = self._head.select(batch, rows)
        loss, outputs_BC = self._head.loss(state_ND[select_M], targets_M, num_labels)
        return Kept(state_in_ND, loss, outputs_BC), loss.detach()

    def backward(self, kept: Kept, received_P: Tensor | None) -> Tensor | None:
        """Return the gradient for the stage before; see `StageCompute`."""
        return back_through(kept, received_P) if kept.result.requires_grad else None
