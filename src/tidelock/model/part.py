"""Consecutive blocks of a frozen decoder, without the rest of the model: what one device of a pool holds.

Shapes: N real tokens, B rows, T positions, E embedding width, D hidden width. May import errors, `model` and libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast, final

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tidelock.errors import ModelError
from tidelock.model.cut import CutModel, visiting
from tidelock.model.ends import read_as, read_config, stored_name
from tidelock.model.families import family_of
from tidelock.model.reduced import part_config
from tidelock.model.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    from tidelock.model.checkpoint import TensorSource
    from tidelock.model.cut import BlockCall, SiteVisitor
    from tidelock.model.rows import Layout


@final
class ModelPart:
    """Blocks `first` to `end - 1` of a decoder in fp32.

    Args:
        source: The model's stored tensors; only those of the part are read.
        blocks: Numbers of the blocks, consecutive.

    Attributes:
        blocks: As given.
        is_first: Whether the part begins with the model's first block, and so reads word embeddings.
        is_last: Whether it ends with the model's last one.
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
        self._whole_names = _read_weights(model, source, blocks.start)
        self.blocks = blocks
        self.is_first = blocks.start == 0
        self.is_last = blocks.stop == config.num_hidden_layers
        self.cut = CutModel(model)
        model.set_input_embeddings(nn.Identity())  # that of a vocabulary which is not there
        self.decoder = model.get_submodule(self.cut.geometry.family.decoder)
        self.config: PretrainedConfig = model.config

    @property
    def working_widths(self) -> tuple[int, int]:
        """How many numbers a token takes while a block is computed: what linears give, all at once; 0 of a target."""
        return sum(parameter.shape[0] for parameter in self.cut.parameters() if parameter.ndim == 2), 0

    def learn(self) -> dict[str, nn.Parameter]:
        """Have all weights learn that the outcome of `through` depends on; return them by their names in the model."""
        layout = Rows((0,), (2,), 2).layout(self.cut.device)
        width = self.cut.geometry.embedding_width if self.is_first else self.cut.geometry.block_width
        parameters = self._whole_names
        for parameter in parameters.values():
            parameter.requires_grad_()
        with torch.enable_grad():
            outcome_ND = self.through(torch.zeros(2, width), layout, None)
            found = torch.autograd.grad(outcome_ND.sum(), list(parameters.values()), allow_unused=True)
        for parameter, gradient in zip(parameters.values(), found, strict=True):
            parameter.requires_grad_(gradient is not None)
        return {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}

    @torch.no_grad()
    def forward(self, state_NW: Tensor, layout: Layout) -> tuple[list[Tensor], Tensor]:
        """Return the output of each block at the real tokens, each (N, D), and the last one after the final norm.

        No graph is kept.

        Args:
            state_NW: Word embeddings (N, E) where the part is the first, else the output of the block before (N, D).
            layout: How these tokens lie in the padded batch.
        """
        outputs: list[Tensor] = []

        def run_block(call: BlockCall, hidden_BTD: Tensor) -> Tensor:
            hidden_BTD = call(hidden_BTD)
            outputs.append(layout.pack(hidden_BTD))
            return hidden_BTD

        final_ND = self._run(state_NW, layout, run_block)
        return outputs, final_ND

    def through(self, state_NW: Tensor, layout: Layout, visitor: SiteVisitor | None) -> Tensor:
        """Return the last block's output at the real tokens, (N, D); of the model's last part after the final norm.

        Args:
            state_NW: As for `forward`; the result is differentiable in it, and in all that learns in the part.
            layout: As for `forward`.
            visitor: Told when a block reaches a site, which is counted from the part's first block.
        """
        end_BTD: Tensor | None = None

        def run_block(call: BlockCall, hidden_BTD: Tensor) -> Tensor:
            nonlocal end_BTD
            end_BTD = call(hidden_BTD) if visitor is None else visiting(visitor, call, hidden_BTD)
            return end_BTD

        final_ND = self._run(state_NW, layout, run_block)
        return final_ND if self.is_last else layout.pack(cast("Tensor", end_BTD))

    def _run(self, state_NW: Tensor, layout: Layout, run_block: Callable[[BlockCall, Tensor], Tensor]) -> Tensor:
        """Return the final state, with each block run by `run_block`."""
        given_BTW = layout.unpack(state_NW.to(self.cut.device, self.cut.dtype))

        def run_blocks(calls: Sequence[BlockCall], hidden_BTD: Tensor) -> Tensor:
            if not self.is_first:
                hidden_BTD = given_BTW
            for call in calls:
                hidden_BTD = run_block(call, hidden_BTD)
            return hidden_BTD

        width = self.cut.geometry.embedding_width
        embeddings_BTE = given_BTW if self.is_first else given_BTW.new_zeros(*layout.shape_BT, width)
        final_BTD = self.cut.run(embeddings_BTE, layout, run_blocks)
        return layout.pack(final_BTD)


def _read_weights(model: PreTrainedModel, source: TensorSource, first: int) -> dict[str, nn.Parameter]:
    """Read all weights of a part's decoder but the word embedding, whose blocks are counted from `first`.

    Returns:
        The weights by their names in the whole model.
    """
    found: dict[str, nn.Parameter] = {}
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
        found[whole] = parameter
    return found
