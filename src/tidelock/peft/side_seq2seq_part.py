"""A part of an encoder-decoder's side network: the side blocks beside the consecutive blocks that one device holds.

As `peft.side_part` has it, for `peft.side_seq2seq`. T5's tables of relative positions, one for each stack of side
blocks, are in every part that has blocks of the stack: they are tied, and their gradients are summed over these parts.

Shapes: N real tokens of the source, K of the target, E embedding width, D hidden width, S side width.
May import errors, `model`, `peft` and libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast, final

import torch
from torch import Tensor, nn

from tidelock.model.part_seq2seq import whole_name
from tidelock.model.reduced import reduced_config, reduced_encoder_decoder
from tidelock.model.rows import Rows
from tidelock.model.seq2seq import encoder_decoder_family
from tidelock.peft.network_part import NetworkPart
from tidelock.peft.prune import Stack, highest, magnitude_scores, residual_scores
from tidelock.peft.side_part import require_whole_taps
from tidelock.peft.side_stack import SideHead, SideStack

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PretrainedConfig

    from tidelock.model.part_seq2seq import Seq2SeqPart, StackPart
    from tidelock.model.rows import Layout
    from tidelock.model.sizes import ModelSizes
    from tidelock.peft.side import SideConfig

_ENCODER, _DECODER = "encoder", "decoder"


@final
class SideSeq2SeqPart(NetworkPart):
    """The side blocks beside some of an encoder-decoder's blocks, and what is before the first and after the last one.

    Args:
        config: What the whole network is like; every block is tapped, whole.
        model_config: The backbone's configuration.
        sizes: The whole backbone's.
        blocks: Numbers of the blocks over both stacks, consecutive.

    Attributes:
        encoder: The side blocks beside blocks of the encoder, or None.
        decoder: And beside blocks of the decoder.
        head: What follows the last block, where the part has that.
        side_width: S.
        tied: Of a parameter that other parts have too, the blocks beside which they stand.

    Raises:
        ConfigError: The configuration chooses or narrows taps.
        ModelError: The family is not known, or its class does not take the reduced widths.
    """

    encoder: SideStack | None
    decoder: SideStack | None

    def __init__(self, config: SideConfig, model_config: PretrainedConfig, sizes: ModelSizes, blocks: range) -> None:
        super().__init__()
        require_whole_taps(config)
        self.family = encoder_decoder_family(model_config)
        of_encoder, of_decoder = sizes.split(blocks)
        small = reduced_config(model_config, config.reduction, of_encoder, of_decoder, dropout=config.dropout)
        width, self.side_width = sizes.block_width, small.hidden_size
        widths = (sizes.embedding_width, width, self.side_width)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            stacks = reduced_encoder_decoder(small, self.family)
            self.encoder, self.decoder = (
                SideStack(Stack(stack, self.family.blocks, small), widths, config.temperature) if own else None
                for stack, own in zip(stacks, (of_encoder, of_decoder), strict=True)
            )
            is_last = blocks.stop == sizes.num_blocks
            self.head = SideHead(self.side_width, sizes.final_width, config) if is_last else None
        self._blocks = {_ENCODER: of_encoder, _DECODER: of_decoder}
        self._ends_encoder = bool(of_encoder) and of_encoder.stop == sizes.num_encoder_blocks
        self.names = self.names_in_whole()
        self.slices = {f"{stack}.gates": slice(own.start, own.stop) for stack, own in self._blocks.items() if own}
        self.tied = self._tied(sizes)

    def residual_scores(self, frozen: Seq2SeqPart, embedding_VE: Tensor | None) -> Tensor:
        """Return this part's share of the residual channels' scores by magnitude, shape (2, D); see `start_from`.

        Args:
            frozen: The blocks beside which this part stands.
            embedding_VE: The word embedding's weight; read by the parts with the first block of a stack.
        """
        scores = torch.zeros(2, frozen.sizes.block_width)
        for number, stack in enumerate((frozen.encoder, frozen.decoder)):
            if stack is None:
                continue
            backbone, blocks = self._stack(frozen, stack), range(len(stack.listed))
            scores[number] = residual_scores(backbone, blocks, magnitude_scores(), with_outside=stack.is_first)
            if stack.is_first and embedding_VE is not None:
                scores[number] += embedding_VE.abs().sum(0)
        return scores

    def start_from(self, frozen: Seq2SeqPart, residual: Tensor) -> None:
        """Begin by the weights' magnitude, as the whole network does.

        Args:
            frozen: The blocks beside which this part stands.
            residual: Scores of the residual channels, the encoder's and the decoder's: the sum of all parts' shares.

        Raises:
            ModelError: The family's blocks are not understood.
        """
        of_encoder, of_decoder = residual
        scores = magnitude_scores()
        if self.encoder is not None and frozen.encoder is not None:
            blocks = range(len(frozen.encoder.listed))
            self.encoder.start_from(self._stack(frozen, frozen.encoder), blocks, scores, residual=of_encoder)
        if self.decoder is not None and frozen.decoder is not None:
            blocks = range(len(frozen.decoder.listed))
            kept_S = highest(of_encoder, self.side_width)
            self.decoder.start_from(self._stack(frozen, frozen.decoder), blocks, scores, kept_S, of_decoder)

    def _stack(self, frozen: Seq2SeqPart, stack: StackPart) -> Stack:
        return Stack(stack.module, self.family.blocks, frozen.config)

    def encode(self, state_NW: Tensor, outputs_ND: Sequence[Tensor], layout: Layout) -> tuple[Tensor, Tensor]:
        """Return the encoder's side state for the next part, and after the family's last norm, each (N, S).

        Args:
            state_NW: Word embeddings (N, E) where the part has the encoder's first block, else the side state of the
                part before (N, S).
            outputs_ND: What the part's frozen blocks of the encoder gave.
            layout: How these tokens lie in the padded batch.
        """
        return self._through(_ENCODER, state_NW, outputs_ND, layout)

    def decode(
        self, state_KW: Tensor, outputs_KD: Sequence[Tensor], layout: Layout, source: tuple[Tensor, Layout]
    ) -> tuple[Tensor, Tensor]:
        """Return the decoder's side state for the next part, and after the family's last norm, each (K, S).

        Args:
            state_KW: As for `encode`, of the target.
            outputs_KD: What the part's frozen blocks of the decoder gave.
            layout: How these tokens lie in the padded batch.
            source: The encoder side's final state, (N, S), and how the source lies.
        """
        source_NS, source_layout = source
        more = {
            "encoder_hidden_states": source_layout.unpack(source_NS),
            "encoder_attention_mask": source_layout.mask,
        }
        return self._through(_DECODER, state_KW, outputs_KD, layout, more)

    def _through(
        self,
        which: str,
        state_NW: Tensor,
        outputs_ND: Sequence[Tensor],
        layout: Layout,
        more: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        side: SideStack = getattr(self, which)
        is_first = self._blocks[which].start == 0
        state_BTS = side.begin(state_NW, layout) if is_first else layout.unpack(state_NW)
        state_BTS, final_BTS = side.forward_part(state_BTS, outputs_ND, layout, is_first=is_first, more=more)
        return layout.pack(state_BTS), layout.pack(final_BTS)

    def _tied(self, sizes: ModelSizes) -> dict[str, range]:
        if self.family.shared is None:
            return {}
        seam = sizes.num_encoder_blocks
        everywhere = {_ENCODER: range(seam), _DECODER: range(seam, sizes.num_blocks)}
        return {
            f"{stack}.stack.{self.family.blocks}.0.{self.family.shared}": everywhere[stack]
            for stack, own in self._blocks.items()
            if 0 < len(own) < len(everywhere[stack])
        }

    def whole_name(self, own: str) -> str:
        """Return the name in the whole network: taps and blocks are numbered there from their stack's first on."""
        stack, _, rest = own.partition(".")
        kind, _, name = rest.partition(".")
        first = self._blocks[stack].start if stack in self._blocks else 0
        if kind == "taps":
            number, _, last = name.partition(".")
            rest = f"taps.{first + int(number)}.{last}"
        elif kind == "stack":
            rest = f"stack.{whole_name(name, self.family, first)}"
        return f"{stack}.{rest}"

    def outcome(self) -> Tensor:
        """Return what goes on to the next part, or to the head that the network is before."""
        layout = Rows((0,), (2,), 2).layout(torch.device("cpu"))
        result = torch.zeros(2, self.side_width)
        if self.encoder is not None:
            state_NS, final_NS = self.encode(*self._nothing(_ENCODER, self.encoder), layout)
            result = final_NS if self._ends_encoder else state_NS
        if self.decoder is not None:
            nothing = self._nothing(_DECODER, self.decoder)
            result, final_KS = self.decode(*nothing, layout, (result, layout))
            if self.head is not None:
                result = self.head(final_KS, torch.zeros(2, self.head.up.out_features))
        return result

    def _nothing(self, which: str, side: SideStack) -> tuple[Tensor, list[Tensor]]:
        """Return states and outputs of two tokens that are all zero."""
        width = side.start.in_features if self._blocks[which].start == 0 else self.side_width
        return torch.zeros(2, width), [torch.zeros(2, cast("nn.Linear", tap).in_features) for tap in side.taps]
