"""Tokens that all rows of a micro-batch begin with, computed once and sent once.

In a causal decoder what comes after a token does not change its states. So where rows begin with the same tokens, a
system prompt for example, these have the same states in each, and one copy of them is enough. The rows are packed as
one: the prefix, and after it what is each row's own, at the positions that it has there. A token attends to the prefix
and to its own row. Autograd sums what all rows send into the prefix, so that gradients are those of separate rows.

Each micro-batch has a copy of its own, which `Rows.split` counts.

Shapes: B rows, T positions, N packed tokens, P tokens of the prefix, M selected tokens.
May import `model` and libraries.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tidelock.model.walk import Batch

# Of shorter ones copies cost next to nothing.
_LEAST = 8


def share_prefixes(batches: Sequence[Batch]) -> tuple[list[Batch], Tensor]:
    """Return micro-batches in which what all rows of one begin with is packed once.

    Args:
        batches: With rows that share nothing yet, and selected tokens in ascending order.

    Returns:
        The micro-batches, and for each token that was selected the number of its final state among those that are
        selected now, of all micro-batches together: a token of a prefix is selected once. Int64.
    """
    shared, numbers, count = [], [], 0
    for batch in batches:
        packed, number_M = _share(batch, common_prefix(batch))
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
