"""A model's own decoder or encoder, run as it is, without a graph, while its blocks are read.

For models whose own forward calls the stack: `model.taps` calls it itself.

Shapes: B rows, T positions, N = B T, E embedding width, D hidden width. May import `model` and libraries.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import Tensor, nn
from transformers import Cache

from tidelock.model.rows import Layout
from tidelock.model.taps import Taps
from tidelock.model.watch import reading, watch

if TYPE_CHECKING:
    from collections.abc import Sequence


@final
@dataclass(frozen=True, slots=True)
class FrozenRun:
    """What one call of a frozen stack gave; its tokens, padding among them, are packed row by row.

    Attributes:
        embeddings_NE: The word embeddings.
        taps: The tapped blocks' outputs, and the final state.
        layout: How the tokens lie in the batch.
        cache: The stack's, extended already; None without one.
        past: How many positions were in the cache before.
        given: What else the stack was called with.
        output: What it returned.
    """

    embeddings_NE: Tensor
    taps: Taps
    layout: Layout
    cache: Cache | None
    past: int
    given: dict[str, Any]
    output: Any

    def output_with(self, final_ND: Tensor) -> Any:  # noqa: ANN401  (as the stack has it)
        """Return the stack's output with another final state in the place of its own."""
        final_BTD = final_ND.to(self.taps.final_MD).view(*self.layout.shape_BT, -1)
        if isinstance(self.output, tuple):
            return (final_BTD, *self.output[1:])
        self.output.last_hidden_state = final_BTD
        return self.output


@final
class FrozenStack:
    """A model's own decoder or encoder, run as it is while its blocks are read.

    Args:
        stack: The decoder or encoder; made before its forward is wrapped.
        blocks: From it to its list of blocks.
        embedding: The model's word embedding.

    Attributes:
        num_blocks: How many blocks it has.
    """

    def __init__(self, stack: nn.Module, blocks: str, embedding: nn.Module) -> None:
        listed = cast("nn.ModuleList", stack.get_submodule(blocks))
        watch(listed)
        self.num_blocks = len(listed)
        self._stack = stack
        self._forward = stack.forward
        self._signature = inspect.signature(stack.forward)
        self._embedding = embedding

    @torch.no_grad()
    def run(self, blocks: Sequence[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> FrozenRun:
        """Call the stack, without a graph, and return what it gave.

        Args:
            blocks: The tapped ones.
            args: What the stack is called with.
            kwargs: Likewise.
        """
        if self._stack.training:
            self._stack.eval()  # as tidelock's frozen blocks are: nothing is dropped out
        given = self._signature.bind(*args, **kwargs).arguments
        with reading() as read:
            output = self._forward(*args, **kwargs)
        embeddings_BTE = given.get("inputs_embeds")
        if embeddings_BTE is None:
            embeddings_BTE = self._embedding(given["input_ids"])
        values = output if isinstance(output, tuple) else tuple(output.values())
        cache = next((value for value in values if isinstance(value, Cache)), None)
        shape_BT = (int(embeddings_BTE.shape[0]), int(embeddings_BTE.shape[1]))
        past = 0 if cache is None else cache.get_seq_length() - shape_BT[1]
        mask_BT = given.get("attention_mask")
        if mask_BT is None:
            mask_BT = torch.ones(shape_BT[0], past + shape_BT[1], dtype=torch.long, device=embeddings_BTE.device)
        return FrozenRun(
            embeddings_NE=embeddings_BTE.flatten(0, 1),
            taps=Taps(tuple(read[block].flatten(0, 1) for block in blocks), values[0].flatten(0, 1)),
            layout=Layout(mask_BT, given.get("position_ids"), None, shape_BT),
            cache=cache,
            past=past,
            given=given,
            output=output,
        )
