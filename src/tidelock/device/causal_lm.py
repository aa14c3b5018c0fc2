"""What every decoder's model on the device has in common: a language model, or a classifier, between its own two ends.

Ids, mask and labels are checked, the states that the head reads come from whoever a subclass asks, and head and loss
are computed here, only where there is a label. For whole texts the head is a new one, which is trained.

Shapes: B rows, T positions, N real tokens, M tokens whose final state is wanted, D width of that state, V vocabulary,
C classes.
May import `backbone`, `peft`, `model`, `device` and libraries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, SequenceClassifierOutput

from tidelock.device.device_lm import DeviceLM
from tidelock.device.generate import GenerationSettings, generate
from tidelock.device.loss import causal_loss, labelled_tokens, last_tokens
from tidelock.errors import ConfigError
from tidelock.model.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PretrainedConfig

    from tidelock.backbone.protocol import Generation
    from tidelock.model.ends import Ends
    from tidelock.model.geometry import Geometry

# Of a head, where the configuration has no `initializer_range` (OPT: `init_std`, the same).
_INIT_STD = 0.02
# Arguments of Hugging Face models that change nothing here, or ask for what is so anyway.
_HARMLESS = frozenset({"use_cache", "return_dict", "output_attentions", "output_hidden_states", "logits_to_keep"})


class DeviceCausalLM(DeviceLM, ABC):
    """A decoder's language model or classifier.

    Args:
        ends: The model's embedding and head.
        num_labels: As for `DeviceLM`; the head is a linear without bias, as in `LlamaForSequenceClassification`.
    """

    base_model_prefix = "base_model"

    ends: Ends
    head: nn.Linear | None

    def __init__(self, ends: Ends, num_labels: int | None = None) -> None:
        super().__init__(ends, num_labels)

    @abstractmethod
    def final_states(self, ids_BT: Tensor, rows: Rows, select_M: Tensor) -> Tensor:
        """Return the states that the head reads at the selected tokens, shape (M, D), on this model's device."""
        ...

    @abstractmethod
    def open_generation(self, ids_BT: Tensor, rows: Rows, select_B: Tensor) -> Generation:
        """Run prompts padded at the left; `select_B` says which of the N tokens are the rows' last."""
        ...

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | SequenceClassifierOutput:
        """Return the loss, if there are labels, and the logits.

        Args:
            input_ids: Token ids, int64 of shape (B, T).
            attention_mask: 1 at real tokens, shape (B, T); None means that all are real.
            labels: Target ids of shape (B, T), not shifted, -100 where there is no loss. With a head for whole texts
                one class or number a row, shape (B,).
            num_items_in_batch: What the summed loss is divided by; None means the number of labels.
            **kwargs: Arguments of Hugging Face models that change nothing here (`use_cache=False`, ...).

        Returns:
            `logits` of shape (B, T, V), fp32. With labels they are computed only where there is one, and are zero
            elsewhere; without labels, at every real token. With a head for whole texts, of shape (B, C): from the
            state of each row's last real token, the only one that is asked for.

        Raises:
            ConfigError: The batch has padding in the middle of a row, labels at padding or of a wrong shape, or an
                argument is unknown.
            NonFiniteError: The loss is infinite or not a number.
            WireError, CloudUnreachable, ...: The backbone cannot be reached or does not answer as it should.
        """
        ids_BT, rows = self._read_batch(input_ids, attention_mask, kwargs)
        if self.head is not None:
            final_BD = self.final_states(ids_BT, rows, last_tokens(rows))
            return self._texts_output(self.head, final_BD, labels, num_items_in_batch)
        if labels is None:
            select_N = torch.arange(rows.num_tokens)
            final_MD = self.final_states(ids_BT, rows, select_N)
            return CausalLMOutput(logits=spread(self.ends.logits(final_MD), rows, select_N, ids_BT.shape[1]))
        _check_shapes(ids_BT, labels=labels)
        select_M, targets_M = labelled_tokens(labels, rows)
        logits_MV = self.ends.logits(self.final_states(ids_BT, rows, select_M))
        loss = causal_loss(logits_MV, targets_M, num_items_in_batch)
        return CausalLMOutput(loss=loss, logits=spread(logits_MV, rows, select_M, ids_BT.shape[1]))

    def selection(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Rows, Tensor]:
        """Return the ids of a batch's real tokens, shape (N,), where these are, and whose final states are wanted.

        Args:
            batch: What `forward` takes.

        Raises:
            ConfigError: As `forward`.
        """
        ids_BT, rows = self._read_batch(batch["input_ids"], batch.get("attention_mask"), {})
        labels = batch.get("labels")
        if self.head is not None:
            select_M = last_tokens(rows)
        elif labels is None:
            select_M = torch.arange(rows.num_tokens)
        else:
            select_M, _ = labelled_tokens(labels, rows)
        return packed_ids(ids_BT, rows), rows, select_M

    def targets_of(self, labels: Tensor) -> Tensor:
        """Return the labels that have a loss: all but each row's first, which no token comes before to predict it."""
        return labels if self.head is not None else labels[:, 1:]

    def base_model(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        """Return the decoder's final state at every token, shape (B, T, D), zero at padding.

        This and `get_output_embeddings` are what TRL's fused language-model head asks of a model.
        """
        ids_BT, rows = self._read_batch(input_ids, attention_mask, kwargs)
        select_N = torch.arange(rows.num_tokens)
        final_ND = self.final_states(ids_BT, rows, select_N)
        return BaseModelOutput(last_hidden_state=spread(final_ND, rows, select_N, ids_BT.shape[1]))

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

    def _read_batch(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Rows]:
        rows = read_rows(input_ids, attention_mask, kwargs, self.ends.geometry.max_positions)
        self.ends.to(self.device)
        return cast("Tensor", input_ids).to(self.device), rows


def read_rows(
    input_ids: Tensor | None, attention_mask: Tensor | None, others: dict[str, Any], limit: int | None
) -> Rows:
    """Return where the real tokens of a batch are, once its arguments are checked.

    Args:
        input_ids: Token ids, int64 of shape (B, T).
        attention_mask: 1 at real tokens, shape (B, T); None means that all are real.
        others: Further arguments; refused unless they change nothing.
        limit: Most positions that the model was made for, or None.

    Raises:
        ConfigError: An argument is missing, unknown or of a wrong shape, a row has padding inside or is too long.
    """
    unknown = sorted(name for name, value in others.items() if name not in _HARMLESS and value is not None)
    if unknown or input_ids is None:
        got = f"the arguments {unknown}" if unknown else "no input_ids"
        msg = (
            f"Calling the device's model: expected input_ids, attention_mask and labels, got {got}. Leave out what "
            "it does not know (position_ids and inputs_embeds among them)."
        )
        raise ConfigError(msg)
    _check_shapes(input_ids, attention_mask=attention_mask)
    rows = Rows.from_mask(torch.ones_like(input_ids) if attention_mask is None else attention_mask)
    if limit is not None and rows.width > limit:
        msg = (
            f"Batch: expected at most {limit} tokens a row, as the model was made for, got {rows.width}. Shorten "
            "or truncate the examples."
        )
        raise ConfigError(msg)
    return rows


def spread(x_MD: Tensor, rows: Rows, select_M: Tensor, width: int) -> Tensor:
    """Return states or logits of selected tokens at their places, shape (B, `width`, D), zero elsewhere."""
    indices_N = rows.indices()
    row_M = indices_N[select_M] // rows.width
    column_M = indices_N[select_M] % rows.width
    places_M = (row_M * width + column_M).to(x_MD.device)
    count = len(rows.lengths)
    return _zeros(x_MD, count * width).index_copy_(0, places_M, x_MD).view(count, width, -1)


def fresh_head(config: PretrainedConfig, geometry: Geometry, num_labels: int) -> nn.Linear:
    """Return a new head for whole texts: a linear without bias, weight (C, D), begun as `transformers` begins it."""
    head = nn.Linear(geometry.final_width, num_labels, bias=False)
    nn.init.normal_(head.weight, std=getattr(config, "initializer_range", _INIT_STD))
    return head


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
