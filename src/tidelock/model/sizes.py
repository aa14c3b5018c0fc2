"""What a model is like from outside, a decoder's or an encoder-decoder's: how many blocks, how wide, how long.

May import errors, `model` and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from tidelock.model.ends import empty_model
from tidelock.model.geometry import geometry_of
from tidelock.model.seq2seq import encoder_decoder_family, stack_sizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@final
@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Counts and widths of a model.

    Attributes:
        num_blocks: How many blocks there are; those of an encoder are numbered first.
        num_encoder_blocks: How many of them are an encoder's; 0 of a decoder alone.
        embedding_width: Numbers per token of the word embedding.
        block_width: Numbers per token that a block gives.
        final_width: Numbers per token of the state that the head reads.
        max_positions: Longest sequence that the model was made for, or None when it states none.
    """

    num_blocks: int
    num_encoder_blocks: int
    embedding_width: int
    block_width: int
    final_width: int
    max_positions: int | None

    @property
    def of_stacks(self) -> tuple[int, int]:
        """How many blocks an encoder-decoder's encoder has, and its decoder."""
        return self.num_encoder_blocks, self.num_blocks - self.num_encoder_blocks

    def split(self, blocks: range) -> tuple[range, range]:
        """Return which of the encoder's blocks and which of the decoder's these are, each counted from its first."""
        seam = self.num_encoder_blocks
        return (
            range(min(blocks.start, seam), min(blocks.stop, seam)),
            range(max(blocks.start, seam) - seam, max(blocks.stop, seam) - seam),
        )


def sizes_of(config: PretrainedConfig) -> ModelSizes:
    """Return the sizes of a configuration's model.

    Raises:
        ModelError: It is a decoder that cannot be cut, or an encoder-decoder of no known family.
    """
    model = empty_model(config)
    if config.is_encoder_decoder:
        encoder, decoder = stack_sizes(model, encoder_decoder_family(config))
        width, positions = config.hidden_size, getattr(config, "max_position_embeddings", None)
        return ModelSizes(encoder + decoder, encoder, width, width, width, positions)
    found = geometry_of(model)
    widths = found.embedding_width, found.block_width, found.final_width
    return ModelSizes(found.num_blocks, 0, *widths, found.max_positions)
