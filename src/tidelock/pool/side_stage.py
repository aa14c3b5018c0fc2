"""A stage of the side method: frozen blocks run without a graph, and the side blocks beside them.

Shapes: N real tokens, M tokens with a label, D hidden width, S side width, P numbers of a message.
May import `pool`, `device`, `peft`, `model`, errors and libraries.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeAlias, cast, final

import torch
from torch.nn.utils.rnn import pad_sequence

from tidelock.device.causal_lm import packed_ids
from tidelock.model.ends import Ends, empty_model, read_config
from tidelock.model.geometry import geometry_of
from tidelock.model.part import ModelPart
from tidelock.model.rows import Rows
from tidelock.peft.side_part import SidePart
from tidelock.pool.example import IGNORED, Boundary, Example, Width
from tidelock.pool.loss_head import LossHead, load_ends
from tidelock.pool.pipeline import Kept

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from tidelock.model.checkpoint import TensorSource
    from tidelock.peft.side import SideConfig

# Told of examples, of each block's outputs for each of them, and of the final states at all their labelled tokens.
OnOutputs: TypeAlias = "Callable[[Sequence[Example], list[tuple[Tensor, ...]], Tensor | None], None]"


@final
class SideStage:
    """One peer's blocks, and its part of the side network.

    Args:
        part: The blocks.
        side: What is beside them.
        ends: The embedding, for the first stage, and the head, for the last one; None between.
        texts: The head for whole texts instead, for the last stage.
        on_outputs: Told of each block's outputs for each of the rows, and of the final states at labelled tokens in the
            last stage.
    """

    def __init__(
        self,
        part: ModelPart,
        side: SidePart,
        ends: Ends | None = None,
        texts: nn.Linear | None = None,
        on_outputs: OnOutputs | None = None,
    ) -> None:
        self.part = part
        self.side = side
        self.tied: Mapping[str, Collection[int]] = {}
        self.slices: Mapping[str, slice] = side.slices
        self._ends = ends
        self._head = LossHead(ends, texts)
        self._on_outputs = on_outputs
        self._widths = part.cut.geometry.block_width, side.network.side.start.out_features
        self.before = self.after = Boundary(Width(sum(self._widths)), Width(self._widths[1]))

    @classmethod
    def load(
        cls,
        source: TensorSource,
        config: SideConfig,
        blocks: range,
        num_labels: int | None = None,
        on_outputs: OnOutputs | None = None,
    ) -> SideStage:
        """Return a stage of a stored model's blocks, with a fresh part of a side network, and of a head.

        Args:
            source: The model's stored tensors.
            config: What the side network is like.
            blocks: Numbers of the blocks, consecutive.
            num_labels: Classes of whole texts, 1 for a number; None models language.
            on_outputs: As for the class.

        Raises:
            ConfigError: The configuration chooses or narrows taps.
            ModelError: A tensor is missing or has the wrong shape, or the family does not take the reduced widths.
        """
        model_config = read_config(source.folder)
        side = SidePart(config, model_config, geometry_of(empty_model(model_config)), blocks)
        part = ModelPart(source, blocks)
        return cls(part, side, *load_ends(source, part, num_labels), on_outputs)

    def residual_scores(self) -> Tensor:
        """Return the scores of the residual channels in this part; see `SidePart.residual_scores`."""
        return self.side.residual_scores(self.part, None if self._ends is None else self._ends.embedding)

    def start_from(self, scores: Tensor) -> None:
        """Begin by the weights' magnitude, given the sum of all stages' scores; see `SidePart.start_from`."""
        self.side.start_from(self.part, scores)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the stage's parameters, by their names in the whole network, and the head's."""
        return self.side.trained() | self._head.trained()

    def load_whole(self, state: Mapping[str, Tensor]) -> None:
        """Take this stage's parameters out of those of the whole."""
        self.side.load_whole(state)
        self._head.load_whole(state)

    def own_of(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is this stage's of tensors that are shaped as the whole's parameters, by their names."""
        return self.side.own_of(whole) | {name: whole[name] for name in self._head.trained()}

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
        dropout_seeds: Sequence[int] | None = None,  # noqa: ARG002  (a pool's side networks have no dropout)
    ) -> tuple[Kept, Tensor]:
        """Return what the backward needs, and what goes to the next stage, or the loss; see `StageCompute`."""
        batch = padded(examples)
        rows = Rows.from_mask(batch["attention_mask"])
        layout = self.part.cut.layout(rows)
        if received_P is None:
            embeddings_NE = cast("Ends", self._ends).embed(packed_ids(batch["input_ids"], rows))
            hidden_NW, state_in_NS = embeddings_NE, None
            state_NS = self.side.begin(embeddings_NE, layout)
        else:
            hidden_NW, state_in_NS = received_P.view(-1, sum(self._widths)).split(self._widths, 1)
            state_NS = state_in_NS = state_in_NS.clone().requires_grad_()
        outputs_ND, final_ND = self.part.forward(hidden_NW, layout)
        state_NS, side_final_NS = self.side(state_NS, outputs_ND, layout)
        if not self.side.is_last:
            self._tell(examples, outputs_ND, None)
            message_NW = torch.cat([outputs_ND[-1].float(), state_NS.detach()], 1)
            return Kept(state_in_NS, state_NS), message_NW
        select_M, targets_M = self._head.select(batch, rows)
        self._tell(examples, outputs_ND, final_ND[select_M])
        final_MF = self.side.network.head(side_final_NS[select_M], final_ND[select_M])
        loss, outputs_BC = self._head.loss(final_MF, targets_M, num_labels)
        return Kept(state_in_NS, loss, outputs_BC), loss.detach()

    def backward(self, kept: Kept, received_P: Tensor | None) -> Tensor | None:
        """Return the gradient for the stage before; see `StageCompute`."""
        return back_through(kept, received_P)

    def _tell(self, examples: Sequence[Example], outputs_ND: list[Tensor], final_MF: Tensor | None) -> None:
        if self._on_outputs is not None:
            lengths = [len(example.input_ids) for example in examples]
            self._on_outputs(examples, [output_ND.split(lengths) for output_ND in outputs_ND], final_MF)


def back_through(kept: Kept, received_P: Tensor | None) -> Tensor | None:
    """Compute the gradients of a stage, given that of its result or None of a loss; return that of what came in."""
    gradient = None if received_P is None else received_P.view_as(kept.result)
    torch.autograd.backward(kept.result, gradient)
    return None if kept.state_in is None else kept.state_in.grad


def padded(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Return examples as a batch that is padded at the right: `input_ids`, `attention_mask`, `labels`, each (B, T).

    Where each text has one label, `labels` is of shape (B,), int64 for classes and fp32 for numbers.
    """
    pad = partial(pad_sequence, batch_first=True)
    labels = [torch.tensor(example.labels) for example in examples]
    return {
        "input_ids": pad([torch.tensor(example.input_ids) for example in examples]),
        "attention_mask": pad([torch.ones(len(example.input_ids), dtype=torch.long) for example in examples]),
        "labels": pad(labels, padding_value=IGNORED) if labels[0].dim() else torch.stack(labels),
    }
