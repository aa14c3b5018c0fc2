"""Full fine-tuning of the consecutive blocks that one device of a pool holds, and of the ends beside them.

All weights learn, as in `transformers`: blocks, embedding, positions, norms and head. Where the head is the embedding
(tied ends), the first and the last stage hold one and the same weight; its gradient is summed over both. With a head
for whole texts the model's own is not read, and stays as it is.

May import `model` and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch

from tidelock.model.ends import empty_model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn
    from transformers import PretrainedConfig

    from tidelock.model.ends import Ends
    from tidelock.model.part import ModelPart
    from tidelock.model.rows import Layout


@final
@dataclass(frozen=True, slots=True)
class FullConfig:
    """All weights are trained; there is nothing to choose."""


@final
class FullPart:
    """The weights of a part and of its ends, which learn from then on.

    Args:
        part: The blocks.
        ends: The model's, where the part is the first one or the last, and reads it.
        with_own_head: Whether the model's own head is read.

    Attributes:
        learns_before: Whether a gradient must go to a part before this one.
        learns_until: Whether something learns in this part or before.
        tied: Of the weight that is embedding and head at once, where another part has it too, the first block and the
            last: the parts with these have it.
    """

    learns_until = True

    def __init__(self, part: ModelPart, ends: Ends | None, *, with_own_head: bool) -> None:
        self.learns_before = not part.is_first
        self._parameters = part.learn()
        self.tied: dict[str, tuple[int, ...]] = {}
        if ends is not None:
            learning = ends.learn(embedding=part.is_first, head=part.is_last and with_own_head)
            self._parameters |= learning
            if with_own_head and ends.is_tied and part.is_first != part.is_last:
                parts = 0, ends.geometry.num_blocks - 1
                self.tied = {name: parts for name, parameter in learning.items() if parameter is ends.embedding}

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters, by their names in the whole model."""
        return self._parameters

    @torch.no_grad()
    def load_whole(self, state: Mapping[str, Tensor]) -> None:
        """Take this part's parameters out of those of the whole model; before the first step, they are as stored."""
        if not state.keys().isdisjoint(self._parameters):
            for name, parameter in self._parameters.items():
                parameter.copy_(state[name])

    def visitor(self, layout: Layout, drops: Sequence[tuple[int, int]] | None) -> None:  # noqa: ARG002  (as `SitePart`)
        """There is no module at any site."""
        return


def learning_weights(config: PretrainedConfig, *, with_own_head: bool) -> dict[str, nn.Parameter]:
    """Return all weights of a model that learn, on the meta device, by their names in it.

    Args:
        config: The model's.
        with_own_head: As for `FullPart`; a head that is the embedding learns as that.
    """
    whole = empty_model(config)
    own_head = set() if with_own_head else {*whole.get_output_embeddings().parameters()}
    own_head -= {*whole.get_input_embeddings().parameters()}
    return {name: parameter for name, parameter in whole.named_parameters() if parameter not in own_head}
