"""Consecutive blocks of a frozen encoder-decoder, without the rest of the model: what one device of a pool holds.

Blocks are numbered over both stacks, the encoder's first. A part has some of the encoder's, some of the decoder's, or
both. T5's table of relative positions, which the first block of a stack has for all of them, is in every part.

Shapes: N real tokens of a stack, B rows, T positions, D hidden width. May import errors, `model` and libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM

from tidelock.errors import ModelError
from tidelock.model.call import call_decoder
from tidelock.model.channels import ENCODER_RESIDUAL, Heads, axes_of
from tidelock.model.ends import read_as, read_config, stored_name
from tidelock.model.reduced import part_config
from tidelock.model.seq2seq import encoder_decoder_family
from tidelock.model.sizes import sizes_of
from tidelock.model.watch import reading, watch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    from tidelock.model.checkpoint import TensorSource
    from tidelock.model.rows import Layout
    from tidelock.model.seq2seq import EncoderDecoderFamily


@final
class Seq2SeqPart:
    """Consecutive blocks of an encoder-decoder in fp32.

    Args:
        source: The model's stored tensors; only those of the part are read.
        blocks: Numbers of the blocks, consecutive.

    Attributes:
        blocks: As given.
        is_first: Whether the part begins with the model's first block.
        is_last: Whether it ends with the model's last one.
        family: Where the model's parts are.
        sizes: Of the whole model.
        encoder: The part's blocks of the encoder, or None.
        decoder: And of the decoder.
        config: Its configuration.

    Raises:
        ModelError: A tensor is missing or has the wrong shape, or the family is not known.
    """

    def __init__(self, source: TensorSource, blocks: range) -> None:
        config = read_config(source.folder)
        self.family = encoder_decoder_family(config)
        self.sizes = sizes_of(config)
        if not 0 <= blocks.start < blocks.stop <= self.sizes.num_blocks:
            msg = (
                f"Part of a model: expected blocks of 0 to {self.sizes.num_blocks - 1}, got {blocks.start} to "
                f"{blocks.stop - 1}. Choose blocks that the model has."
            )
            raise ModelError(msg)
        self.blocks = blocks
        self.is_first = blocks.start == 0
        self.is_last = blocks.stop == self.sizes.num_blocks
        of_encoder, of_decoder = self.sizes.split(blocks)
        model = AutoModelForSeq2SeqLM.from_config(
            part_config(config, of_encoder, of_decoder), dtype=torch.float32, trust_remote_code=False
        )
        counts = self.sizes.of_stacks
        self.encoder = StackPart.read(model, source, self.family.encoder, of_encoder, counts[0])
        self.decoder = StackPart.read(model, source, self.family.decoder, of_decoder, counts[1])
        self.config: PretrainedConfig = model.config

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield all weights of the part."""
        for stack in (self.encoder, self.decoder):
            if stack is not None:
                yield from stack.module.parameters()

    @property
    def working_widths(self) -> tuple[int, int]:
        """How many numbers are there while a block is computed: for each token of the source, and of the target.

        What the linears of all its blocks give, all at once.
        """
        of_source, of_target = 0, 0
        heads = Heads.of(self.config)
        for stack in (self.encoder, self.decoder):
            for block in () if stack is None else stack.listed:
                for name, axes in axes_of(block, heads).items():
                    outputs = block.get_parameter(name).shape[0] if len(axes) > 1 else 0
                    if stack is self.encoder or (ENCODER_RESIDUAL,) in axes:
                        of_source += outputs
                    else:
                        of_target += outputs
        return of_source, of_target


@final
class StackPart:
    """Consecutive blocks of one stack.

    Args:
        module: The stack, with these blocks only.
        listed: They.
        is_first: Whether they begin with the stack's first one.
        is_last: Whether they end with its last one.

    Attributes:
        module: As given.
        listed: As given.
        is_first: As given.
        is_last: As given.
    """

    def __init__(self, module: nn.Module, listed: nn.ModuleList, *, is_first: bool, is_last: bool) -> None:
        self.module = module
        self.listed = listed
        self.is_first = is_first
        self.is_last = is_last
        self._given_BTD: Tensor | None = None
        watch(listed)
        listed[0].register_forward_pre_hook(self._give, with_kwargs=True)

    @classmethod
    def read(
        cls, model: PreTrainedModel, source: TensorSource, path: str, blocks: range, count: int
    ) -> StackPart | None:
        """Return a stack's blocks with their weights; None where there are none.

        Args:
            model: The part, with no weights yet.
            source: The whole model's tensors.
            path: From the model to the stack.
            blocks: Numbers of the blocks, counted from the stack's first.
            count: How many the stack has in the whole model.

        Raises:
            ModelError: A tensor is missing or has the wrong shape.
        """
        if not blocks:
            return None
        family = encoder_decoder_family(model.config)
        stack = cast("PreTrainedModel", model.get_submodule(path))
        stack.set_input_embeddings(nn.Identity())  # that of a vocabulary which is not there
        stack.eval().requires_grad_(requires_grad=False)
        for name, parameter in stack.named_parameters():
            whole = f"{path}.{whole_name(name, family, blocks.start)}"
            parameter.data.copy_(read_as(source, stored_name(whole, model.base_model_prefix, source), parameter.shape))
        listed = cast("nn.ModuleList", stack.get_submodule(family.blocks))
        return cls(stack, listed, is_first=blocks.start == 0, is_last=blocks.stop == count)

    @torch.no_grad()
    def forward(
        self, state_ND: Tensor, layout: Layout, more: Mapping[str, Tensor] | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Return the output of each block at the real tokens, and what the stack makes of the last one, each (N, D).

        No graph is kept. One thread at a time may call this.

        Args:
            state_ND: Word embeddings where the part is the stack's first, else the output of the block before.
            layout: How these tokens lie in the padded batch.
            more: What else the stack takes.
        """
        given_BTD = layout.unpack(state_ND)
        self._given_BTD = None if self.is_first else given_BTD
        with reading() as read:
            final_BTD = call_decoder(self.module, given_BTD, layout, more=more)
        self._given_BTD = None
        return [layout.pack(read[number]) for number in range(len(self.listed))], layout.pack(final_BTD)

    def _give(
        self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Have the first block read what the block before it gave, not what the stack makes of embeddings."""
        if self._given_BTD is None:
            return args, kwargs
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": self._given_BTD}
        return (self._given_BTD, *args[1:]), kwargs


def whole_name(name: str, family: EncoderDecoderFamily, first: int) -> str:
    """Return the name that a parameter of a stack's part has in the whole stack.

    Args:
        name: In the part, where blocks are counted from its first.
        family: The model's.
        first: The number of that block.
    """
    prefix = f"{family.blocks}."
    if not name.startswith(prefix):
        return name
    number, _, rest = name.removeprefix(prefix).partition(".")
    return name if rest == family.shared else f"{prefix}{first + int(number)}.{rest}"
