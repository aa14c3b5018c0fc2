"""What every model on the device has in common, whatever the family: a model of language, or of whole texts.

May import `backbone`, `peft`, `model`, `device` and libraries.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from tidelock.device.loss import sequence_loss

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PretrainedConfig

    from tidelock.backbone.pass_times import TimeSplit
    from tidelock.device.generate import GenerationSettings
    from tidelock.model.ends import Ends
    from tidelock.model.seq2seq import Seq2SeqEnds
    from tidelock.peft.adapter_files import Adapter

logger = logging.getLogger(__name__)


class DeviceLM(nn.Module, ABC):
    """A model whose parameters are what is trained, and nothing else; any training loop can train it.

    Args:
        ends: The model's embedding and head.
        num_labels: How many classes a whole text may have, or 1 where a number is predicted; None models language.

    Attributes:
        config: The model's Hugging Face configuration.
        generation_config: How the model's makers would have it generate.
        ends: As given.
        num_labels: As given.
        head: The trained head of whole texts, which learns whatever a schedule does. None for a model of language, and
            until a subclass makes one.
    """

    # Read by `transformers.Trainer`: our loss divides by `num_items_in_batch`, as its own models' do.
    accepts_loss_kwargs = True

    head: nn.Module | None
    # On which side the prompts of `stream` are padded.
    padding_side = "left"

    def __init__(self, ends: Ends | Seq2SeqEnds, num_labels: int | None = None) -> None:
        super().__init__()
        self.config: PretrainedConfig = ends.config
        self.generation_config = GenerationConfig.from_model_config(ends.config)
        self.ends = ends
        self.num_labels = num_labels
        self.head = None

    @abstractmethod
    def stream(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, settings: GenerationSettings | None = None
    ) -> Iterator[Tensor]:
        """Yield the answers to prompts token by token, each int64 of shape (B,)."""
        ...

    @abstractmethod
    def targets_of(self, labels: Tensor) -> Tensor:
        """Return those of a batch's labels that `forward` has a loss for; -100 among them has none."""
        ...

    @abstractmethod
    def save_adapter(self, folder: Path, base_model: str | None = None) -> None:
        """Write what is trained as an adapter; see `peft.export`.

        Args:
            folder: Made when it is not there.
            base_model: Folder or hub name of the model, for whoever loads the adapter; None takes where this device
                read it.

        Raises:
            StorageError: The file system refused.
        """
        ...

    @abstractmethod
    def load_adapter(self, adapter: Adapter) -> None:
        """Copy an adapter's weights into this model, which was made from its configuration.

        Raises:
            CheckpointError: Its tensors are not those of this model.
        """
        ...

    @abstractmethod
    def take_times(self) -> TimeSplit:
        """Return what training passes have waited for since the last call, in seconds on the clock."""
        ...

    @abstractmethod
    def close(self) -> None:
        """Let go of whatever runs the frozen blocks."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the trained parameters, the embedding and the head are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the trained parameters."""
        return next(self.parameters()).dtype

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Take the tags that TRL gives to models for their model cards; a device model has none, so they are let go."""
        logger.debug("Model tags %s are not kept: a device model has no model card.", tags)

    def activation_checkpointing_enable(self, **_kwargs: Any) -> None:
        """Say that there is nothing to recompute here; TRL's default settings ask for it."""
        logger.info("Activation checkpointing has no effect: the frozen blocks' activations are not on this device.")

    gradient_checkpointing_enable = activation_checkpointing_enable

    def _texts_output(
        self, head: nn.Module, final_BD: Tensor, labels_B: Tensor | None, num_items_in_batch: Tensor | int | None
    ) -> SequenceClassifierOutput:
        """Return the logits of whole texts, and their loss if there are labels."""
        logits_BC = head(final_BD.to(next(head.parameters()))).float()
        loss = None if labels_B is None else sequence_loss(logits_BC, labels_B, num_items_in_batch)
        return SequenceClassifierOutput(loss=loss, logits=logits_BC)
