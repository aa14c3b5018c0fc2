"""Tokens that all rows of a micro-batch begin with, computed once and sent once.

In a causal decoder what comes after a token does not change its states. So where rows begin with the same tokens, a
system prompt for example, these have the same states in each, and one copy of them is enough. The rows are packed as
one: the prefix, and after it what is each row's own, at the positions that it has there. A token attends to the prefix
and to its own row. Autograd sums what all rows send into the prefix, so that gradients are those of separate rows.

Each micro-batch has a copy of its own, which `Rows.split` counts.

The price is a mask over all pairs of tokens, of other rows too. A prefix is shared only where that is less than what it
saves, as the batch and the width of the model alone decide.

Shapes: B rows, T positions, N packed tokens, P tokens of the prefix, M selected tokens, H heads.
May import `model` and libraries.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tidelock.model.cut import BlockCall
    from tidelock.model.walk import Batch

# Of one pass whose rows share a prefix, so that its mask takes 64 MiB at most.
MOST_TOKENS = 4096
# Shorter ones are not worth a mask.
_LEAST = 8


def share_prefixes(batches: Sequence[Batch], width: int) -> tuple[list[Batch], Tensor]:
    """Return micro-batches in which what all rows of one begin with is packed once, where that pays.

    Args:
        batches: With rows that share nothing yet, and selected tokens in ascending order.
        width: Of the hidden state.

    Returns:
        The micro-batches, and for each token that was selected the number of its final state among those that are
        selected now, of all micro-batches together: a token of a prefix is selected once. Int64.
    """
    shared, numbers, count = [], [], 0
    for batch in batches:
        packed, number_M = _share(batch, _worth_sharing(batch, width))
        shared.append(packed)
        numbers.append(number_M + count)
        count += len(packed.select_M)
    return shared, torch.cat(numbers)


def _share(batch: Batch, prefix: int) -> tuple[Batch, Tensor]:
    """Return a micro-batch with that many tokens of all rows packed once; see `share_prefixes`."""
    if not prefix:
        return batch, torch.arange(len(batch.select_M))
    lengths = torch.tensor(batch.rows.lengths)
    position_N = torch.cat([torch.arange(length) for length in batch.rows.lengths])
    is_first_row = torch.arange(len(position_N)) < lengths[0]
    is_kept = (position_N >= prefix) | is_first_row
    # The prefix is the beginning of the first row, which is packed first.
    number_N = torch.where(position_N < prefix, position_N, is_kept.cumsum(0) - 1)
    select_M, number_M = number_N[batch.select_M.cpu()].unique(return_inverse=True)
    embeddings_NE = batch.embeddings_NE[is_kept.to(batch.embeddings_NE.device)]
    rows = replace(batch.rows, shared=prefix)
    return replace(batch, embeddings_NE=embeddings_NE, rows=rows, select_M=select_M), number_M


def _worth_sharing(batch: Batch, width: int) -> int:
    """Return P, or 0 where sharing a prefix would have the blocks compute more than without."""
    prefix, rows = common_prefix(batch), batch.rows
    tokens, padded = replace(rows, shared=prefix).num_tokens, len(rows.lengths) * rows.width
    if tokens > MOST_TOKENS:
        return 0
    # In a block a token takes about 12 D^2 multiplications and a pair of tokens, in attention, 2 D; the mask and the
    # softmax about as much again.
    further_pairs = tokens * tokens - padded * rows.width
    return prefix if further_pairs < 3 * width * (padded - tokens) else 0


def common_prefix(batch: Batch) -> int:
    """Return how many first tokens all rows have in common, if each keeps one of its own; 0 where they are few.

    Equal tokens are those of equal embeddings: a block knows nothing else of them.
    """
    rows = batch.rows
    if len(rows.lengths) < 2 or any(rows.starts):
        return 0
    first_B = torch.tensor((0, *rows.lengths[:-1])).cumsum(0)
    common, embeddings_NE = min(rows.lengths) - 1, batch.embeddings_NE
    # One number tells nearly all tokens apart; the others are compared where it does not.
    for numbers in (1, embeddings_NE.shape[1]):
        place_BP = first_B[:, None] + torch.arange(common)
        prefix_BPE = embeddings_NE[:, :numbers][place_BP.to(embeddings_NE.device)]
        same_P = (prefix_BPE == prefix_BPE[:1]).all(-1).all(0)
        common = int(same_P.long().cumprod(0).sum())
    return common if common >= _LEAST else 0


def keep_rows_apart(
    calls: Sequence[BlockCall],
    row_calls: Sequence[BlockCall],
    visible_NN: Tensor,
    positions_N: Tensor,
    dtype: torch.dtype,
) -> list[BlockCall]:
    """Return the calls of all blocks with masks for rows that lie one after another in one.

    Args:
        calls: As the decoder made them for that one row.
        row_calls: As it makes them for a single row of T positions. Where its mask lets a position attend to another,
            sliding windows and all, so does the mask here.
        visible_NN: Which tokens each may attend to besides.
        positions_N: Where each token is in its own row, int64.
        dtype: Of the mask, which is added to the scores.
    """
    # Blocks of one kind have one mask.
    masks: dict[int, Tensor] = {}
    apart = []
    for call, row_call in zip(calls, row_calls, strict=True):
        given, of_row = call.named(), row_call.named()
        row_mask = of_row["attention_mask"]
        if id(row_mask) not in masks:
            bias_TT = _bias(row_mask, int(positions_N.max()) + 1, visible_NN.device, dtype)
            bias_NN = bias_TT[positions_N][:, positions_N].masked_fill(~visible_NN, torch.finfo(dtype).min)
            masks[id(row_mask)] = bias_NN[None, None]
        given["attention_mask"] = masks[id(row_mask)]
        if "alibi" in given:  # BLOOM's linear biases, of shape (H, 1, T), stand for positions
            given["alibi"] = of_row["alibi"][..., positions_N]
        apart.append(replace(call, args=(), kwargs=given))
    return apart


def _bias(mask: Tensor | None, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a decoder's mask of one row as numbers to add to scores, shape (T, T); None is a causal mask."""
    allowed_TT = torch.ones(width, width, dtype=torch.bool, device=device).tril() if mask is None else mask[0, 0]
    if allowed_TT.is_floating_point():
        return allowed_TT
    return torch.zeros(width, width, dtype=dtype, device=device).masked_fill(~allowed_TT, torch.finfo(dtype).min)
