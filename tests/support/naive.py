"""Split training without what tidelock leaves out: padding and states that nobody reads cross too."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tidelock.device.loss import causal_loss, labelled_tokens
from tidelock.device.model import DeviceModel
from tidelock.model.rows import Rows


def naive_loss(model: DeviceModel, batch: Mapping[str, Tensor], *, padding: bool, all_positions: bool) -> Tensor:
    """Return the loss that the model itself would, with more bytes on the wire.

    Args:
        model: Models language.
        batch: Token ids padded at the right, their mask and labels, each of shape (B, T).
        padding: Have padding cross as if it were tokens. No token reads what comes after it, so no result changes.
        all_positions: Have the final state of every token cross, and a gradient for each: zero where there is no label.
    """
    ids_BT, mask_BT, labels_BT = batch["input_ids"], batch["attention_mask"], batch["labels"]
    rows = Rows.from_mask(torch.ones_like(mask_BT) if padding else mask_BT)
    select_M, targets_M = labelled_tokens(labels_BT, rows)
    if all_positions:
        final_MD = model.final_states(ids_BT, rows, torch.arange(rows.num_tokens))[select_M]
    else:
        final_MD = model.final_states(ids_BT, rows, select_M)
    return causal_loss(model.ends.logits(final_MD), targets_M, None)
