"""The side network: a small trained network beside the frozen blocks, which reads their outputs (PAC, LST).

It is the family's own decoder at 1/k of the width. Before its block i, which stands beside backbone block b:

    s <- mu_i s + (1 - mu_i) (W_i x_b + c_i),    mu_i = sigmoid(alpha_i / T)

with x_b the backbone block's output, alpha_i a trained scalar that starts at 0 and T = 0.1. It starts from
s = W_0 x_0 + c_0, x_0 the word embeddings (PAC, doi 10.1145/3673038.3673043, section 4.1; the gate is that of its
released code and of LST, arXiv 2206.06522, section 3.3). What PAC leaves open for decoders is settled thus: after the
family's own last norm,

    h = f + sigmoid(beta / T) (W s + c)

goes to the frozen head, with f the backbone's final state and beta a trained scalar that starts at 0. With W and c
zero at the start (`zero_upsample`), the first step is the backbone's, as in LoRA. `output="alone"` leaves f out.

Shapes: N real tokens, M selected tokens, B rows, T positions, E embedding width, D hidden width, S side width,
F width of the state that the head reads. May import errors, `model` and libraries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, final, get_args

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tidelock.errors import ConfigError
from tidelock.model.attention import join_rows
from tidelock.model.reduced import reduced_config, reduced_decoder
from tidelock.peft.prune import Stack
from tidelock.peft.side_stack import SideHead, SideStack, start_scores

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from transformers import Cache, PretrainedConfig, PreTrainedModel

    from tidelock.model.geometry import Geometry
    from tidelock.model.rows import Layout
    from tidelock.model.taps import Taps

SideInit = Literal["fisher", "magnitude", "random"]
SideOutput = Literal["add", "alone"]


@final
@dataclass(frozen=True, slots=True)
class SideConfig:
    """What a side network is like and how it starts.

    Attributes:
        reduction: k: every width of the backbone is divided by it.
        taps: The blocks whose outputs are read, by number; None reads every block.
        init: Where the side blocks' weights come from: the backbone's channels of the highest Fisher score
            (`fisher`, needs a sample of data), of the largest weights (`magnitude`), or chance (`random`).
            It is `SideNetwork.start` that reads it: until that is called, every start is by chance.
        zero_upsample: Start with an upsampling of zero, so that the first step's loss is the backbone's.
        output: `add` the side network's output to the backbone's final state, or let it stand `alone`.
        tap_width: W: numbers per token to which each tap is projected before it is read; None leaves it whole. The
            projection is drawn, not trained (`Frames.narrow`), so that taps can be narrow from where they come.
        dropout: Of the side blocks, in training, wherever the family drops out. What it has itself is for its full
            width, and not taken over.
        temperature: T of the gates.
        seed: Fixes the random part of the start.

    Raises:
        ConfigError: A value is out of range.
    """

    reduction: int = 8
    taps: tuple[int, ...] | None = None
    init: SideInit = "magnitude"
    zero_upsample: bool = True
    output: SideOutput = "add"
    tap_width: int | None = None
    dropout: float = 0.0
    temperature: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        taps = self.taps
        rules: tuple[tuple[str, bool, str], ...] = (
            ("reduction", _is_whole(self.reduction) and self.reduction >= 1, "a whole number of at least 1"),
            ("taps", taps is None or (len(taps) > 0 and all(map(_is_whole, taps)) and list(taps) == sorted(set(taps))
             and taps[0] >= 0), "None, or block numbers in ascending order, each once"),
            ("init", self.init in get_args(SideInit), f"one of {get_args(SideInit)}"),
            ("output", self.output in get_args(SideOutput), f"one of {get_args(SideOutput)}"),
            ("tap_width", self.tap_width is None or (_is_whole(self.tap_width) and self.tap_width >= 1),
             "None, or a whole number of at least 1"),
            ("dropout", 0 <= self.dropout < 1, "at least 0 and below 1"),
            ("temperature", 0 < self.temperature < math.inf, "more than 0, and finite"),
            ("seed", _is_whole(self.seed), "a whole number"),
            ("zero_upsample", isinstance(self.zero_upsample, bool), "True or False"),
            ("zero_upsample", not (self.zero_upsample and self.output == "alone"),
             "False with output 'alone', which would be zero"),
        )  # fmt: skip
        for name, kept, rule in rules:
            if not kept:
                msg = f"SideConfig.{name}: expected {rule}, got {getattr(self, name)!r}. Change it."
                raise ConfigError(msg)

    def blocks(self, num_blocks: int) -> tuple[int, ...]:
        """Return the tapped blocks of a backbone.

        Raises:
            ConfigError: It has fewer blocks than the configuration names.
        """
        taps = tuple(range(num_blocks)) if self.taps is None else self.taps
        if taps[-1] >= num_blocks:
            msg = (
                f"SideConfig.taps: expected blocks 0 to {num_blocks - 1}, as the model has, got {taps[-1]}. Leave out "
                "what it does not have."
            )
            raise ConfigError(msg)
        return taps


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@final
class SideNetwork(nn.Module):
    """The side network of a decoder; its parameters are all that the side method trains.

    Args:
        config: What it is like.
        model_config: The backbone's configuration.
        geometry: The backbone's widths and family.

    Attributes:
        config: As given.
        blocks: The tapped blocks of the backbone, by number.
        tap_width: Numbers per token of each tap.
        family: Where the backbone's parts are.
        side: The stack of side blocks.
        head: From the side state to the state that the frozen head reads.

    Raises:
        ConfigError: The configuration names blocks that the model does not have.
        ModelError: The family's class does not take the reduced widths.
    """

    def __init__(self, config: SideConfig, model_config: PretrainedConfig, geometry: Geometry) -> None:
        super().__init__()
        text_config = model_config.get_text_config()
        self.config = config
        self.blocks = config.blocks(geometry.num_blocks)
        self.family = geometry.family
        self._backbone_config = text_config
        self.tap_width = config.tap_width or text_config.hidden_size
        if self.tap_width > text_config.hidden_size:
            msg = (
                f"SideConfig.tap_width: expected at most {text_config.hidden_size}, which is what a block gives, got "
                f"{self.tap_width}. Leave it out, or choose a smaller one."
            )
            raise ConfigError(msg)
        small = reduced_config(text_config, config.reduction, self.blocks, dropout=config.dropout)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            stack = reduced_decoder(small, geometry.family)
            if geometry.family.joins_rows:
                join_rows(stack)
            widths = (geometry.embedding_width, self.tap_width, small.hidden_size)
            self.side = SideStack(Stack(stack, geometry.family.blocks, small), widths, config.temperature)
            self.head = SideHead(small.hidden_size, geometry.final_width, config)

    def start(self, model: PreTrainedModel, examples: Iterable[Mapping[str, Tensor]] | None = None) -> None:
        """Begin as `config.init` says.

        Args:
            model: The whole causal model, with its weights, in eval mode; for Fisher scores in fp32.
            examples: For Fisher scores: what the model is called with, labels among it; one example each.

        Raises:
            ConfigError: Fisher scores without examples.
            ModelError: The family's blocks are not understood.
        """
        decoder = model.get_submodule(self.family.decoder)
        scores = start_scores(self.config.init, model, [decoder], examples)
        if scores is not None:
            self.side.start_from(Stack(decoder, self.family.blocks, self._backbone_config), self.blocks, scores)

    def new_cache(self) -> Cache:
        """Return an empty cache for the side blocks' keys and values."""
        return DynamicCache(config=cast("Any", self.side.stack).config)

    def forward(
        self, embeddings_NE: Tensor, taps: Taps, layout: Layout, select_M: Tensor, cache: Cache | None = None
    ) -> Tensor:
        """Return the states that the head reads, shape (M, F), at the tokens that the taps' final states are of.

        Args:
            embeddings_NE: Word embeddings of the real tokens.
            taps: What the frozen blocks gave for them.
            layout: How these tokens lie in the padded batch.
            select_M: Which of the N tokens are wanted, int64.
            cache: The side blocks' keys and values of earlier tokens, extended in place.
        """
        state_BTS = self.side(embeddings_NE, taps.blocks, layout, cache)
        state_MS = layout.pack(state_BTS).index_select(0, select_M.to(state_BTS.device))
        final_MF: Tensor = self.head(state_MS, taps.final_MD)
        return final_MF
