"""What the last stage of a pool makes a loss with: the model's own head, or a trained one for whole texts.

Shapes: N real tokens, M tokens with a label, B rows, F width of the final state, C classes (1 for a number). May import
`device`, `peft`, `model` and libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast, final

import torch

from tidelock.device.causal_lm import fresh_head
from tidelock.device.loss import causal_loss, labelled_tokens, last_tokens, sequence_loss
from tidelock.model.ends import Ends, empty_model, read_config
from tidelock.model.geometry import geometry_of
from tidelock.peft.adapter_files import HEAD

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from tidelock.model.checkpoint import TensorSource
    from tidelock.model.part import ModelPart
    from tidelock.model.rows import Rows


@final
class LossHead:
    """What is after the last block, on the device.

    Args:
        ends: The model's, whose head says what the next token is; not read where there is a head for whole texts.
        texts: The trained head for whole texts, F to C, or None.
    """

    def __init__(self, ends: Ends | None, texts: nn.Linear | None) -> None:
        self._ends = ends
        self._texts = texts

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what is trained of it, by its name among all that is."""
        return {} if self._texts is None else {HEAD: cast("nn.Parameter", self._texts.weight)}

    @torch.no_grad()
    def load_whole(self, state: Mapping[str, Tensor]) -> None:
        """Take what is trained of it out of all that is."""
        for name, parameter in self.trained().items():
            parameter.copy_(state[name])

    def select(self, batch: Mapping[str, Tensor], rows: Rows) -> tuple[Tensor, Tensor]:
        """Return which of the packed tokens predict a label, int64 of shape (M,), and those labels.

        Args:
            batch: As `padded` gives it.
            rows: Where its real tokens are.

        Raises:
            ConfigError: There is no label.
        """
        if self._texts is None:
            return labelled_tokens(batch["labels"], rows)
        return last_tokens(rows), batch["labels"]

    def loss(self, final_MF: Tensor, targets_M: Tensor, num_labels: int) -> tuple[Tensor, Tensor | None]:
        """Return the loss of the final states that `select` names, and what a head for whole texts gave, (B, C).

        Args:
            final_MF: Those states.
            targets_M: Their labels.
            num_labels: What the sum is divided by.

        Raises:
            NonFiniteError: It is infinite or not a number.
        """
        if self._texts is None:
            return causal_loss(cast("Ends", self._ends).logits(final_MF), targets_M, num_labels), None
        logits_BC = self._texts(final_MF.to(self._texts.weight)).float()
        return sequence_loss(logits_BC, targets_M, num_labels), logits_BC.detach()


def load_ends(source: TensorSource, part: ModelPart, num_labels: int | None) -> tuple[Ends | None, nn.Linear | None]:
    """Return what is before the first block and after the last one, as far as a part needs it.

    Args:
        source: The model's stored tensors.
        part: The blocks.
        num_labels: Classes of whole texts, 1 for a number; None models language.

    Returns:
        The model's own ends, for its first part and to model language for its last one; and for the last one a fresh
        head for whole texts.

    Raises:
        ModelError: A tensor is missing or has the wrong shape.
    """
    config = read_config(source.folder)
    needs_ends = part.is_first or (part.is_last and num_labels is None)
    ends = Ends(config, source) if needs_ends else None
    if not part.is_last or num_labels is None:
        return ends, None
    return ends, fresh_head(config, geometry_of(empty_model(config)), num_labels)
