"""The side network of an encoder-decoder: a stack of side blocks beside each of its stacks.

As `peft.side` has it, twice. The decoder side's cross-attention reads the encoder side's output, at the side width; the
output goes through the frozen head (PAC's T5 adds nothing of the backbone's last state: `output="alone"`).

Shapes: N real tokens of the source, K of the target, M selected ones, B rows, T positions, S side width, D hidden
width. May import errors, `model`, `peft` and libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from tidelock.errors import ConfigError
from tidelock.model.reduced import reduced_config, reduced_encoder_decoder
from tidelock.model.seq2seq import encoder_decoder_family
from tidelock.peft.prune import Stack
from tidelock.peft.side_stack import SideHead, SideStack, start_scores

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from transformers import Cache, PretrainedConfig, PreTrainedModel

    from tidelock.model.rows import Layout
    from tidelock.model.taps import Taps
    from tidelock.peft.side import SideConfig


@final
class SideSeq2Seq(nn.Module):
    """The side network of an encoder-decoder; its parameters are all that the side method trains.

    Args:
        config: What it is like. Its taps are those of both stacks.
        model_config: The backbone's configuration.
        num_blocks: How many blocks the backbone's encoder and decoder have.

    Attributes:
        config: As given.
        encoder_blocks: The tapped blocks of the encoder, by number.
        decoder_blocks: And of the decoder.
        family: Where the backbone's parts are.
        side_width: S.
        encoder: The side blocks beside the encoder.
        decoder: And beside the decoder.
        head: From the decoder side's state to the state that the frozen head reads.

    Raises:
        ConfigError: The configuration names blocks that a stack does not have, or projects taps.
        ModelError: The family is not known, or its class does not take the reduced widths.
    """

    def __init__(self, config: SideConfig, model_config: PretrainedConfig, num_blocks: tuple[int, int]) -> None:
        super().__init__()
        if config.tap_width is not None:
            msg = (
                f"SideConfig.tap_width: expected None beside an encoder-decoder, got {config.tap_width}. Only a "
                "decoder's taps are projected; leave it out."
            )
            raise ConfigError(msg)
        self.config = config
        self.encoder_blocks, self.decoder_blocks = (config.blocks(count) for count in num_blocks)
        self.family = encoder_decoder_family(model_config)
        self._backbone_config = model_config
        small = reduced_config(
            model_config, config.reduction, self.encoder_blocks, self.decoder_blocks, dropout=config.dropout
        )
        width, self.side_width = model_config.hidden_size, small.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            stacks = reduced_encoder_decoder(small, self.family)
            self.encoder, self.decoder = (
                SideStack(Stack(stack, self.family.blocks, small), (width, width, self.side_width), config.temperature)
                for stack in stacks
            )
            self.head = SideHead(self.side_width, width, config)

    def start(self, model: PreTrainedModel, examples: Iterable[Mapping[str, Tensor]] | None = None) -> None:
        """Begin as `config.init` says.

        Args:
            model: The whole model, with its weights, in eval mode; for Fisher scores in fp32.
            examples: For Fisher scores: what the model is called with, labels among it; one example each.

        Raises:
            ConfigError: Fisher scores without examples.
            ModelError: The family's blocks are not understood.
        """
        family = self.family
        encoder, decoder = model.get_submodule(family.encoder), model.get_submodule(family.decoder)
        scores = start_scores(self.config.init, model, [encoder, decoder], examples)
        if scores is not None:
            stacks = [Stack(stack, family.blocks, self._backbone_config) for stack in (encoder, decoder)]
            residual_S = self.encoder.start_from(stacks[0], self.encoder_blocks, scores)
            self.decoder.start_from(stacks[1], self.decoder_blocks, scores, residual_S)

    def new_cache(self) -> EncoderDecoderCache:
        """Return an empty cache for the keys and values of the decoder side's blocks."""
        return EncoderDecoderCache(DynamicCache(), DynamicCache())

    def encode(self, embeddings_NE: Tensor, taps_ND: Sequence[Tensor], layout: Layout) -> Tensor:
        """Return the encoder side's final state, shape (B, T, S).

        Args:
            embeddings_NE: Word embeddings of the source.
            taps_ND: What the encoder's tapped blocks gave for them.
            layout: How these tokens lie in the padded batch.
        """
        state_BTS: Tensor = self.encoder(embeddings_NE, taps_ND, layout)
        return state_BTS

    def decode(
        self,
        embeddings_KE: Tensor,
        taps: Taps,
        layout: Layout,
        source: tuple[Tensor, Layout],
        select_M: Tensor,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the states that the head reads at the selected target tokens, shape (M, D).

        Args:
            embeddings_KE: Word embeddings of the decoder's inputs.
            taps: What the decoder's blocks gave for them, and its final states at the selected tokens.
            layout: How these tokens lie in the padded batch.
            source: What `encode` returned, and the layout of the source.
            select_M: Which of the K tokens are wanted, int64.
            cache: The decoder side's keys and values of earlier targets and of the source, extended in place.
        """
        source_BTS, source_layout = source
        more = {"encoder_hidden_states": source_BTS, "encoder_attention_mask": source_layout.mask}
        state_BTS: Tensor = self.decoder(embeddings_KE, taps.blocks, layout, cache, more)
        state_MS = layout.pack(state_BTS).index_select(0, select_M.to(state_BTS.device))
        final_MD: Tensor = self.head(state_MS, taps.final_MD)
        return final_MD
