"""A stage of the side method for encoder-decoders: frozen blocks of one stack or of both, with the side blocks.

Blocks are numbered over both stacks, the encoder's first. Forward from a stage that ends within the encoder goes what a
decoder's stage sends (`pool.side_stage`): a block's output and the side state, of the source. After the encoder these
are its final state and that of the encoder side; every later stage reads them in its cross-attentions and sends them
on, beside the target's output and side state. The gradient of the encoder side's final state is summed up on the way
back.

Shapes: N real tokens of the source, K of the target, D hidden width, S side width, P numbers of a message.
May import `pool`, `device`, `peft`, `model`, errors and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, final

import torch

from tidelock.device.loss import causal_loss
from tidelock.model.ends import read_config
from tidelock.model.part_seq2seq import Seq2SeqPart
from tidelock.model.rows import Rows
from tidelock.model.seq2seq import Seq2SeqEnds
from tidelock.peft.side_seq2seq_part import SideSeq2SeqPart
from tidelock.pool.example import Boundary, Width
from tidelock.pool.pipeline import Kept
from tidelock.pool.side_stage import back_through

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from tidelock.model.checkpoint import TensorSource
    from tidelock.model.part_seq2seq import StackPart
    from tidelock.model.rows import Layout
    from tidelock.peft.side import SideConfig
    from tidelock.pool.example import Example
    from tidelock.pool.side_stage import OnOutputs


@final
class Seq2SeqStage:
    """One peer's blocks of an encoder-decoder, and its part of the side network.

    Args:
        part: The blocks.
        side: What is beside them.
        ends: The embedding, for the stages with the first block of a stack, and the head, for the last one; else None.
        on_outputs: Told of each block's outputs for each of the rows, and of the final states in the last stage.
    """

    def __init__(
        self,
        part: Seq2SeqPart,
        side: SideSeq2SeqPart,
        ends: Seq2SeqEnds | None = None,
        on_outputs: OnOutputs | None = None,
    ) -> None:
        self.part = part
        self.side = side
        self.tied: Mapping[str, Collection[int]] = side.tied
        self.slices: Mapping[str, slice] = side.slices
        self._ends = ends
        self._on_outputs = on_outputs
        self._widths = part.sizes.block_width, side.side_width
        self.before, self.after = (self._boundary(block) for block in (part.blocks.start, part.blocks.stop))

    @classmethod
    def load(
        cls, source: TensorSource, config: SideConfig, blocks: range, on_outputs: OnOutputs | None = None
    ) -> Seq2SeqStage:
        """Return a stage of a stored model's blocks, with a fresh part of a side network.

        Args:
            source: The model's stored tensors.
            config: What the side network is like.
            blocks: Numbers of the blocks over both stacks, consecutive.
            on_outputs: As for the class.

        Raises:
            ConfigError: The configuration chooses or narrows taps.
            ModelError: A tensor is missing or has the wrong shape, or the family is not known or does not take the
                reduced widths.
        """
        model_config = read_config(source.folder)
        part = Seq2SeqPart(source, blocks)
        side = SideSeq2SeqPart(config, model_config, part.sizes, blocks)
        begins = any(stack is not None and stack.is_first for stack in (part.encoder, part.decoder))
        return cls(part, side, Seq2SeqEnds.read(model_config, source) if begins or part.is_last else None, on_outputs)

    def residual_scores(self) -> Tensor:
        """Return the scores of the residual channels in this part; see `SideSeq2SeqPart.residual_scores`."""
        return self.side.residual_scores(self.part, None if self._ends is None else self._ends.embedding)

    def start_from(self, scores: Tensor) -> None:
        """Begin by the weights' magnitude, given the sum of all stages' scores; see `SideSeq2SeqPart.start_from`."""
        self.side.start_from(self.part, scores)

    def load_whole(self, state: Mapping[str, Tensor]) -> None:
        """Take this stage's parameters out of those of the whole network."""
        self.side.load_whole(state)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the stage's parameters, by their names in the whole network."""
        return self.side.trained()

    def own_of(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is this stage's of tensors that are shaped as the whole network's parameters, by their names."""
        return self.side.own_of(whole)

    def weights(self) -> Iterator[Tensor]:
        """Yield all weights that a pass reads, trained or not."""
        yield from self.trained().values()
        yield from self.part.parameters()
        if self._ends is not None:
            yield from self._ends.weights()

    def forward(
        self,
        examples: Sequence[Example],
        received_P: Tensor | None,
        num_labels: int,
        dropout_seeds: Sequence[int] | None = None,  # noqa: ARG002  (a pool's side networks have no dropout)
    ) -> tuple[Kept, Tensor]:
        """Return what the backward needs, and what goes to the next stage, or the loss; see `StageCompute`."""
        batch = _Batch.of(examples)
        state_in_P, source, target = self._unpack(batch, received_P)
        outputs: list[tuple[Tensor, ...]] = []
        if self.part.encoder is not None:
            source, found = self._encode(batch, source)
            outputs += [output_ND.split(batch.sources) for output_ND in found]
        if self.part.decoder is not None:
            target, found = self._decode(batch, cast("_States", source), target)
            outputs += [output_KD.split(batch.targets) for output_KD in found]
        if self._on_outputs is not None:
            final_KD = cast("_States", target).hidden if self.part.is_last else None
            self._on_outputs(examples, outputs, final_KD)
        if self.side.head is not None and target is not None:
            labels_K = torch.tensor(
                [label for example in examples for label in cast("tuple[int, ...]", example.labels)]
            )
            logits_KV = cast("Seq2SeqEnds", self._ends).logits(self.side.head(target.side, target.hidden))
            loss = causal_loss(logits_KV, labels_K, num_labels)
            return Kept(state_in_P, loss), loss.detach()
        crossing = [states for states in (source, target) if states is not None]
        message_P = batch.pack(*((states.hidden, states.side.detach()) for states in crossing))
        return Kept(state_in_P, batch.pack(*((states.side,) for states in crossing))), message_P

    def backward(self, kept: Kept, received_P: Tensor | None) -> Tensor | None:
        """Return the gradient for the stage before; see `StageCompute`."""
        return back_through(kept, received_P)

    def _boundary(self, block: int) -> Boundary:
        """Return what crosses before a block."""
        both, side = sum(self._widths), self._widths[1]
        if block <= self.part.sizes.num_encoder_blocks:
            return Boundary(Width(both), Width(side))
        return Boundary(Width(both, both), Width(side, side))

    def _unpack(self, batch: _Batch, received_P: Tensor | None) -> tuple[Tensor | None, _States | None, _States | None]:
        """Return the side states that came in, as one leaf, and the states of source and target, as far as they came.

        The latter's side states are made of that leaf.
        """
        if received_P is None:
            return None, None, None
        count = 2 if self.before.forward.target else 1
        came = batch.unpack(received_P, self._widths, count)
        state_in_P = batch.pack(*((side,) for _, side in came)).requires_grad_()
        sides = batch.unpack(state_in_P, self._widths[1:], count)
        source, *others = (_States(hidden, side) for (hidden, _), (side,) in zip(came, sides, strict=True))
        return state_in_P, source, others[0] if others else None

    def _encode(self, batch: _Batch, source: _States | None) -> tuple[_States, list[Tensor]]:
        """Return the source's states after this stage's blocks of the encoder, and what each of the blocks gave."""
        stack, layout = cast("StackPart", self.part.encoder), batch.source
        source = source or self._begin(batch.source_ids)
        outputs_ND, final_ND = stack.forward(source.hidden, layout)
        state_NS, side_final_NS = self.side.encode(source.side, outputs_ND, layout)
        if stack.is_last:
            return _States(final_ND, side_final_NS), outputs_ND
        return _States(outputs_ND[-1], state_NS), outputs_ND

    def _decode(self, batch: _Batch, source: _States, target: _States | None) -> tuple[_States, list[Tensor]]:
        """Return the target's states after this stage's blocks of the decoder, and what each of the blocks gave."""
        stack, layout = cast("StackPart", self.part.decoder), batch.target
        target = target or self._begin(batch.target_ids)
        more = {
            "encoder_hidden_states": batch.source.unpack(source.hidden),
            "encoder_attention_mask": batch.source.mask,
        }
        outputs_KD, final_KD = stack.forward(target.hidden, layout, more)
        state_KS, side_final_KS = self.side.decode(target.side, outputs_KD, layout, (source.side, batch.source))
        if stack.is_last:
            return _States(final_KD, side_final_KS), outputs_KD
        return _States(outputs_KD[-1], state_KS), outputs_KD

    def _begin(self, ids: Tensor) -> _States:
        """Return what the first block of a stack is given, and the side blocks beside it: word embeddings."""
        embeddings = cast("Seq2SeqEnds", self._ends).embed(ids)
        return _States(embeddings, embeddings)


@final
@dataclass(frozen=True, slots=True)
class _States:
    """A stack's states between two blocks, at the real tokens: the frozen block's output, and the side state."""

    hidden: Tensor
    side: Tensor


@final
@dataclass(frozen=True, slots=True)
class _Batch:
    """Examples as both stacks are given them.

    Attributes:
        sources: Lengths of the sources.
        targets: And of the targets.
        source: How the sources lie in their padded batch.
        target: And the targets.
        source_ids: Ids of the sources, one after the other.
        target_ids: What the decoder is given, likewise.
    """

    sources: list[int]
    targets: list[int]
    source: Layout
    target: Layout
    source_ids: Tensor
    target_ids: Tensor

    @classmethod
    def of(cls, examples: Sequence[Example]) -> _Batch:
        """Return examples as a batch that is padded at the right."""
        texts, given = [each.input_ids for each in examples], [each.decoder_ids for each in examples]
        sources, targets = list(map(len, texts)), list(map(len, given))
        return cls(sources, targets, _layout(sources), _layout(targets), _joined(texts), _joined(given))

    def pack(self, *stacks: Sequence[Tensor]) -> Tensor:
        """Return tensors of the source, and those of the target if there are any, as a message (P,).

        Args:
            stacks: For each, tensors (N, W) or (K, W) of any width.
        """
        split = [
            tensor.split(lengths)
            for tensors, lengths in zip(stacks, (self.sources, self.targets), strict=False)
            for tensor in tensors
        ]
        return torch.cat([part.flatten() for of_example in zip(*split, strict=True) for part in of_example])

    def unpack(self, message_P: Tensor, widths: Sequence[int], count: int) -> list[list[Tensor]]:
        """Return what `pack` was given; differentiable.

        Args:
            message_P: The message.
            widths: Of a stack's tensors.
            count: Of how many stacks there is something.
        """
        stacks = (self.sources, self.targets)[:count]
        sizes = [length * width for lengths in zip(*stacks, strict=True) for length in lengths for width in widths]
        parts, step = message_P.split(sizes), count * len(widths)
        tensors = [torch.cat(parts[number::step]).view(-1, widths[number % len(widths)]) for number in range(step)]
        return [tensors[first : first + len(widths)] for first in range(0, step, len(widths))]


def _layout(lengths: Sequence[int]) -> Layout:
    return Rows((0,) * len(lengths), tuple(lengths), max(lengths)).layout(torch.device("cpu"))


def _joined(ids: Sequence[tuple[int, ...]]) -> Tensor:
    return torch.tensor([token for each in ids for token in each])
