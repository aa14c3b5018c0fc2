"""What every model on the device has in common: a causal language model between its own embedding and its own head.

Ids, mask and labels are checked, the states that the head reads come from whoever a subclass asks, and head and loss
are computed here, only where there is a label.

Shapes: B rows, T positions, N real tokens, M tokens whose final state is wanted, D width of that state, V vocabulary.
May import `backbone`, `model`, `device` and libraries.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from tidelock.device.generate import GenerationSettings, generate
from tidelock.errors import ConfigError, NonFiniteError
from tidelock.model.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PretrainedConfig

    from tidelock.backbone.protocol import Generation
    from tidelock.model.ends import Ends

logger = logging.getLogger(__name__)

_IGNORED = -100
# Arguments of Hugging Face models that change nothing here, or ask for what is so anyway.
_HARMLESS = frozenset({"use_cache", "return_dict", "output_attentions", "output_hidden_states", "logits_to_keep"})


class DeviceCausalLM(nn.Module, ABC):
    """A causal language model whose parameters are what is trained, and nothing else.

    Args:
        ends: The model's embedding and head.

    Attributes:
        config: The model's Hugging Face configuration.
        generation_config: How the model's makers would have it generate.
        ends: As given.
    """

    # Read by `transformers.Trainer`: our loss divides by `num_items_in_batch`, as its own models' do.
    accepts_loss_kwargs = True
    base_model_prefix = "base_model"

    def __init__(self, ends: Ends) -> None:
        super().__init__()
        self.config: PretrainedConfig = ends.config
        self.generation_config = GenerationConfig.from_model_config(ends.config)
        self.ends = ends

    @abstractmethod
    def final_states(self, ids_BT: Tensor, rows: Rows, select_M: Tensor) -> Tensor:
        """Return the states that the head reads at the selected tokens, shape (M, D), on this model's device."""
        ...

    @abstractmethod
    def open_generation(self, ids_BT: Tensor, rows: Rows, select_B: Tensor) -> Generation:
        """Run prompts padded at the left; `select_B` says which of the N tokens are the rows' last."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the trained parameters, the embedding and the head are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the trained parameters."""
        return next(self.parameters()).dtype

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Return the loss, if there are labels, and the logits.

        Args:
            input_ids: Token ids, int64 of shape (B, T).
            attention_mask: 1 at real tokens, shape (B, T); None means that all are real.
            labels: Target ids of shape (B, T), not shifted, -100 where there is no loss.
            num_items_in_batch: What the summed loss is divided by; None means the number of labelled tokens.
            **kwargs: Arguments of Hugging Face models that change nothing here (`use_cache=False`, ...).

        Returns:
            `logits` of shape (B, T, V), fp32. With labels they are computed only where there is one, and are zero
            elsewhere; without labels, at every real token.

        Raises:
            ConfigError: The batch has padding in the middle of a row or labels at padding, or an argument is unknown.
            NonFiniteError: The loss is infinite or not a number.
            WireError, CloudUnreachable, ...: The backbone cannot be reached or does not answer as it should.
        """
        ids_BT, rows = self._read_batch(input_ids, attention_mask, kwargs)
        if labels is None:
            select_N = torch.arange(rows.num_tokens)
            final_MD = self.final_states(ids_BT, rows, select_N)
            return CausalLMOutput(logits=self._spread(self.ends.logits(final_MD), rows, select_N, ids_BT.shape[1]))
        _check_shapes(ids_BT, labels=labels)
        select_M, targets_M = _labelled(labels, rows)
        logits_MV = self.ends.logits(self.final_states(ids_BT, rows, select_M))
        loss = ForCausalLMLoss(
            logits_MV,
            None,
            self.ends.geometry.vocab_size,
            num_items_in_batch=_as_tensor(num_items_in_batch, logits_MV),
            shift_labels=targets_M.to(logits_MV.device),
        )
        if not torch.isfinite(loss):
            msg = (
                f"Loss: expected a finite number, got {loss.item()}. The optimizer was not moved. Lower the learning "
                "rate, clip gradients, or look for damaged examples."
            )
            raise NonFiniteError(msg)
        return CausalLMOutput(loss=loss, logits=self._spread(logits_MV, rows, select_M, ids_BT.shape[1]))

    def base_model(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        """Return the decoder's final state at every token, shape (B, T, D), zero at padding.

        This and `get_output_embeddings` are what TRL's fused language-model head asks of a model.
        """
        ids_BT, rows = self._read_batch(input_ids, attention_mask, kwargs)
        select_N = torch.arange(rows.num_tokens)
        final_ND = self.final_states(ids_BT, rows, select_N)
        return BaseModelOutput(last_hidden_state=self._spread(final_ND, rows, select_N, ids_BT.shape[1]))

    def get_output_embeddings(self) -> nn.Linear:
        """Return the frozen head."""
        return self.ends.head

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, settings: GenerationSettings | None = None
    ) -> Tensor:
        """Return the prompts with their continuations, int64 of shape (B, T + new tokens).

        Args:
            input_ids: Prompts, shape (B, T), padded at the left.
            attention_mask: 1 at real tokens; None means that all are real.
            settings: How tokens are chosen and when to stop. A finished row repeats its stop id.
        """
        columns = [token_B[:, None] for token_B in self.stream(input_ids, attention_mask, settings)]
        return torch.cat([input_ids.to(self.device), *columns], dim=1)

    def stream(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, settings: GenerationSettings | None = None
    ) -> Iterator[Tensor]:
        """Yield the continuations token by token, each int64 of shape (B,); arguments as for `generate`."""
        ids_BT, rows = self._read_batch(input_ids, attention_mask, {})
        return generate(self, ids_BT, rows, settings or GenerationSettings())

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Take the tags that TRL gives to models for their model cards; a device model has none, so they are let go."""
        logger.debug("Model tags %s are not kept: a device model has no model card.", tags)

    def activation_checkpointing_enable(self, **_kwargs: Any) -> None:
        """Say that there is nothing to recompute here; TRL's default settings ask for it."""
        logger.info("Activation checkpointing has no effect: the frozen blocks' activations are not on this device.")

    gradient_checkpointing_enable = activation_checkpointing_enable

    def _read_batch(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Rows]:
        unknown = sorted(name for name, value in kwargs.items() if name not in _HARMLESS and value is not None)
        if unknown or input_ids is None:
            got = f"the arguments {unknown}" if unknown else "no input_ids"
            msg = (
                f"Calling the device's model: expected input_ids, attention_mask and labels, got {got}. Leave out what "
                "it does not know (position_ids and inputs_embeds among them)."
            )
            raise ConfigError(msg)
        _check_shapes(input_ids, attention_mask=attention_mask)
        self.ends.to(self.device)
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = Rows.from_mask(mask_BT)
        limit = self.ends.geometry.max_positions
        if limit is not None and rows.width > limit:
            msg = (
                f"Batch: expected at most {limit} tokens a row, as the model was made for, got {rows.width}. Shorten "
                "or truncate the examples."
            )
            raise ConfigError(msg)
        return input_ids.to(self.device), rows

    def _spread(self, x_MD: Tensor, rows: Rows, select_M: Tensor, width: int) -> Tensor:
        """Return states or logits of selected tokens at their places, shape (B, `width`, D), zero elsewhere."""
        indices_N = rows.indices()
        row_M = indices_N[select_M] // rows.width
        column_M = indices_N[select_M] % rows.width
        places_M = (row_M * width + column_M).to(x_MD.device)
        count = len(rows.lengths)
        return _zeros(x_MD, count * width).index_copy_(0, places_M, x_MD).view(count, width, -1)


def packed_ids(ids_BT: Tensor, rows: Rows) -> Tensor:
    """Return the ids of the real tokens, int64 of shape (N,)."""
    return ids_BT[:, : rows.width].flatten().index_select(0, rows.indices().to(ids_BT.device))


def _zeros(like_MD: Tensor, count: int) -> Tensor:
    """Return `count` fresh rows of zeros; on the CPU those that nothing is copied to take no memory and no time."""
    if like_MD.device.type != "cpu" or like_MD.dtype != torch.float32:
        return like_MD.new_zeros(count, like_MD.shape[1])
    # NumPy asks the system for zeroed pages; torch writes every zero itself.
    return torch.from_numpy(np.zeros((count, like_MD.shape[1]), np.float32))


def _check_shapes(ids_BT: Tensor, **others: Tensor | None) -> None:
    """Refuse ids that are not a batch, and masks or labels that are not of their shape."""
    for name, other in (("input_ids", ids_BT), *others.items()):
        if other is not None and (other.dim() != 2 or other.shape != ids_BT.shape):
            msg = (
                f"Calling the device's model: expected {name} of two axes (rows, positions), here "
                f"{tuple(ids_BT.shape)}, got {tuple(other.shape)}. Give one value a token."
            )
            raise ConfigError(msg)


def _labelled(labels_BT: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return which of the packed tokens predict a label, shape (M,), and those labels."""
    labels_BT = labels_BT.cpu()
    mask_BT = rows.mask().bool()
    if bool((labels_BT[:, : rows.width][~mask_BT] != _IGNORED).any()) or bool(
        (labels_BT[:, rows.width :] != _IGNORED).any()
    ):
        msg = (
            f"Labels: expected {_IGNORED} at padding, got other values there. Set labels to {_IGNORED} where "
            "attention_mask is 0, or the loss would count padding."
        )
        raise ConfigError(msg)
    shifted_BT = torch.full_like(labels_BT[:, : rows.width], _IGNORED)
    shifted_BT[:, :-1] = labels_BT[:, 1 : rows.width]
    # A token before a row padded at the left cannot predict that row's first label: it is not there.
    shifted_N = shifted_BT[mask_BT]
    select_M = (shifted_N != _IGNORED).nonzero().squeeze(1)
    if not len(select_M):
        msg = (
            "Labels: expected at least one token with a loss in a batch, got none. Leave examples without a "
            "completion out."
        )
        raise ConfigError(msg)
    return select_M, shifted_N[select_M]


def _as_tensor(count: Tensor | int | None, like: Tensor) -> Tensor | None:
    if count is None or isinstance(count, Tensor):
        return count
    return torch.tensor(count, device=like.device)
