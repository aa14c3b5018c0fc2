"""Consecutive blocks of a frozen decoder, without the rest of the model: what one device of a pool holds.

Shapes: N real tokens, B rows, T positions, E embedding width, D hidden width. May import errors, `model` and libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast, final

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tidelock.errors import ModelError
from tidelock.model.cut import CutModel
from tidelock.model.ends import read_as, read_config, stored_name
from tidelock.model.families import family_of
from tidelock.model.reduced import part_config

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    from tidelock.model.checkpoint import TensorSource
    from tidelock.model.cut import BlockCall
    from tidelock.model.rows import Layout


@final
class ModelPart:
    """Blocks `first` to `end - 1` of a decoder in fp32, run without a graph.

    Args:
        source: The model's stored tensors; only those of the part are read.
        blocks: Numbers of the blocks, consecutive.

    Attributes:
        blocks: As given.
        is_first: Whether the part begins with the model's first block, and so reads word embeddings.
        cut: The part, as a decoder of its own.
        decoder: Its module.
        config: Its configuration.

    Raises:
        ModelError: A tensor is missing or has the wrong shape, or the architecture cannot be cut.
    """

    def __init__(self, source: TensorSource, blocks: range) -> None:
        config = read_config(source.folder).get_text_config()
        if not 0 <= blocks.start < blocks.stop <= config.num_hidden_layers:
            msg = (
                f"Part of a model: expected blocks of 0 to {config.num_hidden_layers - 1}, got {blocks.start} to "
                f"{blocks.stop - 1}. Choose blocks that the model has."
            )
            raise ModelError(msg)
        model = AutoModelForCausalLM.from_config(
            part_config(config, blocks), dtype=torch.float32, trust_remote_code=False
        )
        _read_weights(model, source, blocks.start)
        self.blocks = blocks
        self.is_first = blocks.start == 0
        self.cut = CutModel(model)
        model.set_input_embeddings(nn.Identity())  # that of a vocabulary which is not there
        self.decoder = model.get_submodule(self.cut.geometry.family.decoder)
        self.config: PretrainedConfig = model.config

    @torch.no_grad()
    def forward(self, state_NW: Tensor, layout: Layout) -> tuple[list[Tensor], Tensor]:
        """Return the output of each block at the real tokens, each (N, D), and the last one after the final norm.

        Args:
            state_NW: Word embeddings (N, E) where the part is the first, else the output of the block before (N, D).
            layout: How these tokens lie in the padded batch.
        """
        outputs: list[Tensor] = []
        given_BTW = layout.unpack(state_NW.to(self.cut.device, self.cut.dtype))

        def run_blocks(calls: Sequence[BlockCall], hidden_BTD: Tensor) -> Tensor:
            if not self.is_first:
                hidden_BTD = given_BTW
            for call in calls:
                hidden_BTD = call(hidden_BTD)
                outputs.append(layout.pack(hidden_BTD))
            return hidden_BTD

        width = self.cut.geometry.embedding_width
        embeddings_BTE = given_BTW if self.is_first else given_BTW.new_zeros(*layout.shape_BT, width)
        final_BTD = self.cut.run(embeddings_BTE, layout.mask_BT, run_blocks, positions_BT=layout.positions_BT)
        return outputs, layout.pack(final_BTD)


def _read_weights(model: PreTrainedModel, source: TensorSource, first: int) -> None:
    """Read all weights of a part's decoder but the word embedding, whose blocks are counted from `first`."""
    family = family_of(model)
    blocks = f"{family.decoder}.{family.blocks}."
    ends = {id(parameter) for end in (model.get_input_embeddings(), model.get_output_embeddings())
            for parameter in cast("nn.Module", end).parameters()}  # fmt: skip
    for path, parameter in model.named_parameters():
        if id(parameter) in ends:
            continue
        whole = path
        if path.startswith(blocks):
            number, _, rest = path.removeprefix(blocks).partition(".")
            whole = f"{blocks}{first + int(number)}.{rest}"
        parameter.data.copy_(read_as(source, stored_name(whole, model.base_model_prefix, source), parameter.shape))
