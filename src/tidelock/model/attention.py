"""Attention for rows that are joined end to end, so that no part of a block computes padding.

Norms, linears and activations treat each token alone: only attention need know where a row ends. A decoder whose
attention is the one registered here takes all rows of a batch as a single one, with each token's position in its own
row, and in the place of a mask the rows' lengths. That attention cuts the rows apart again, those of about the same
length together, and calls the `sdpa` attention of transformers for each such group. Called with an ordinary mask, or
none, it is that attention.

Shapes: R rows, T positions of the longest of a group, N tokens in all, H heads, W numbers of a head.
May import `model` and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, final

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from tidelock.model.families import Family

_NAME = "tidelock_joined_rows"
# Rows are in one group down to this share of its longest one: fewer calls, against padding that is computed.
_LEAST_SHARE = 0.75


def join_rows(model: PreTrainedModel, family: Family) -> bool:
    """Have a decoder take joined rows, and return whether it can.

    It cannot where the family's attention is code of its own, or is not `sdpa` for this model.

    Args:
        model: The decoder, or the model that has it.
        family: What is known of it.
    """
    config = model.config.get_text_config()
    # What GPT-2 reorders is not what is registered.
    if not family.joins_rows or config._attn_implementation != "sdpa" or getattr(config, "reorder_and_upcast_attn", 0):  # noqa: SLF001
        return False
    model.set_attn_implementation(_NAME)
    return True


def lengths_mask(lengths: tuple[int, ...]) -> Tensor:
    """Return what a decoder is given for a mask when rows are joined, int64 of shape (1, 1, 1, R), in main memory.

    Of four axes, as masks are that decoders hand to their blocks as they are.
    """
    return torch.tensor(lengths).view(1, 1, 1, -1)


@final
@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that are computed together: for each of R x T positions its token, or at padding the row's last one."""

    tokens: Tensor
    rows: int
    width: int


@lru_cache(maxsize=32)
def _groups(lengths: tuple[int, ...], device: torch.device) -> tuple[list[_Group], Tensor]:
    """Return the groups of some rows, and where each of the N tokens is in what they give, one after another."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    ranked = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    groups: list[_Group] = []
    places = torch.empty(int(starts[-1]), dtype=torch.long)
    computed = 0
    while ranked:
        width = lengths[ranked[0]]
        inside = [row for row in ranked if lengths[row] >= _LEAST_SHARE * width]
        ranked = ranked[len(inside) :]
        last_R = torch.tensor([lengths[row] - 1 for row in inside])
        tokens_RT = starts[inside][:, None] + torch.minimum(torch.arange(width), last_R[:, None])
        for number, row in enumerate(inside):
            first = computed + number * width
            places[starts[row] : starts[row + 1]] = torch.arange(first, first + lengths[row])
        groups.append(_Group(tokens_RT.flatten().to(device), len(inside), width))
        computed += len(inside) * width
    return groups, places.to(device)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return what `sdpa_attention_forward` does, of shape (1, N, H, W) for joined rows; see `AttentionInterface`."""
    if attention_mask is None or attention_mask.dtype != torch.long:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    groups, places_N = _groups(tuple(attention_mask.flatten().tolist()), query.device)
    given = [states_1HNW[0].transpose(0, 1) for states_1HNW in (query, key, value)]
    results = []
    for group in groups:
        # Padding comes after all real tokens of its row, and what it gives is left behind: causality hides it.
        query, key, value = (
            states_NHW.index_select(0, group.tokens).unflatten(0, (group.rows, group.width)).transpose(1, 2)
            for states_NHW in given
        )
        window_TT = _window(group.width, kwargs.get("sliding_window"), query.device)
        result_RTHW, _ = sdpa_attention_forward(module, query, key, value, window_TT, **kwargs)
        results.append(result_RTHW.flatten(0, 1))
    return torch.cat(results).index_select(0, places_N)[None], None


def _window(width: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return the causal mask (1, 1, T, T) of a window that is narrower than the rows; None where causality is all."""
    if window is None or width <= window:
        return None
    distance_TT = torch.arange(width, device=device)[:, None] - torch.arange(width, device=device)
    return ((distance_TT >= 0) & (distance_TT < window))[None, None]


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)
