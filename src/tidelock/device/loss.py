"""The losses, computed on the device, and which tokens' final states they are computed from.

Both are `transformers`' own: a next token's cross entropy, or for whole texts the cross entropy over classes or the
mean squared error of one number.

Shapes: B rows, T positions, N real tokens, M tokens with a label, V vocabulary, C classes (1 for a number).
May import errors, `model` and libraries.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from transformers.loss.loss_utils import ForCausalLMLoss, fixed_cross_entropy

from tidelock.errors import ConfigError, NonFiniteError
from tidelock.model.rows import Rows

_IGNORED = -100


def labelled_tokens(labels_BT: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return which of the packed tokens predict a label, shape (M,), and those labels.

    Raises:
        ConfigError: A label is at padding, or there is none.
    """
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


def last_tokens(rows: Rows) -> Tensor:
    """Return which of the packed tokens is the last of each row, shape (B,)."""
    return torch.tensor(rows.lengths).cumsum(0) - 1


def causal_loss(logits_MV: Tensor, targets_M: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Return the cross entropy of next tokens, divided by the number of items, or by M.

    Raises:
        NonFiniteError: It is infinite or not a number.
    """
    loss: Tensor = ForCausalLMLoss(
        logits_MV,
        None,
        logits_MV.shape[-1],
        num_items_in_batch=_as_tensor(num_items_in_batch, logits_MV),
        shift_labels=targets_M.to(logits_MV.device),
    )
    return _finite(loss)


def sequence_loss(logits_BC: Tensor, labels_B: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Return the cross entropy of classes, or the squared error where C is 1, divided by the number of items, or by B.

    Raises:
        ConfigError: The labels are not one class or number for each row.
        NonFiniteError: The loss is infinite or not a number.
    """
    num_labels = logits_BC.shape[-1]
    expected = f"one class from 0 to {num_labels - 1}" if num_labels > 1 else "one number"
    if labels_B.shape != logits_BC.shape[:1]:
        msg = (
            f"Labels: expected {expected} for each of {len(logits_BC)} rows, got labels of shape "
            f"{tuple(labels_B.shape)}. For a label a token, connect with task='causal-lm'."
        )
        raise ConfigError(msg)
    labels_B, num_items = labels_B.to(logits_BC.device), _as_tensor(num_items_in_batch, logits_BC)
    if num_labels == 1:
        error = mse_loss(logits_BC[:, 0], labels_B.to(logits_BC), reduction="sum")
        return _finite(error / (len(labels_B) if num_items is None else num_items))
    if labels_B.is_floating_point() or bool(((labels_B < 0) | (labels_B >= num_labels)).any()):
        got = str(labels_B.dtype) if labels_B.is_floating_point() else "another number"
        msg = f"Labels: expected {expected} for each row, got {got}. Mend the labels, or connect with more num_labels."
        raise ConfigError(msg)
    return _finite(fixed_cross_entropy(logits_BC, labels_B.long(), num_items))


def _finite(loss: Tensor) -> Tensor:
    if not torch.isfinite(loss):
        msg = (
            f"Loss: expected a finite number, got {loss.item()}. The optimizer was not moved. Lower the learning "
            "rate, clip gradients, or look for damaged examples."
        )
        raise NonFiniteError(msg)
    return loss


def _as_tensor(count: Tensor | int | None, like: Tensor) -> Tensor | None:
    if count is None:
        return None
    return torch.as_tensor(count, device=like.device)
