"""Attention for rows that are joined end to end, so that no part of a block computes padding.

Norms, linears and activations treat each token alone: only attention need know where a row ends. A decoder whose
attention is the one registered here takes all rows of a batch as a single one, with each token's position in its own
row, and in the place of a mask the rows' lengths. That attention cuts the rows apart again, those of about the same
length together, gives each the keys and values of the tokens that all rows share, and calls the `sdpa` attention of
transformers for each such group. Called with an ordinary mask, or none, it is that attention.

Shapes: R rows of a group, T own positions of the longest, P shared ones, N tokens in all, H heads, W numbers of a head.
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


_NAME = "tidelock_joined_rows"
# Rows are in one group down to this share of its longest one: fewer calls, against padding that is computed.
_LEAST_SHARE = 0.75


def can_join_rows(model: PreTrainedModel) -> bool:
    """Return whether a model's attention is the one that is replaced here, as it is by default in most families.

    Args:
        model: The decoder, or the model that has it; its parameters may be on the meta device.
    """
    config = model.config.get_text_config()
    # GPT-2 has code of its own where it reorders.
    own = getattr(config, "reorder_and_upcast_attn", False)
    return config._attn_implementation in {"sdpa", _NAME} and not own  # noqa: SLF001


def join_rows(model: PreTrainedModel) -> None:
    """Have a decoder take joined rows, of a family that can.

    Args:
        model: The decoder, or the model that has it.
    """
    model.set_attn_implementation(_NAME)


def rows_mask(lengths: tuple[int, ...], shared: int = 0) -> Tensor:
    """Return what a decoder is given for a mask when rows are joined, int64 of shape (1, 1, 1, 1 + R), in main memory.

    Of four axes, as masks are that decoders hand to their blocks as they are.

    Args:
        lengths: Of each row.
        shared: Tokens that all rows begin with, and that come once, before all that is a row's own.
    """
    return torch.tensor([shared, *lengths]).view(1, 1, 1, -1)


@final
@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that are computed together, by the tokens that they are made of; at padding it is the row's last one.

    Attributes:
        queries: For each of R x T positions.
        keys: For each of R x (P + T), the shared ones among them.
        rows: R.
    """

    queries: Tensor
    keys: Tensor
    rows: int


@lru_cache(maxsize=32)
def _groups(lengths: tuple[int, ...], shared: int, device: torch.device) -> tuple[list[_Group], Tensor]:
    """Return the groups of some rows, and where each of the N tokens is in what they give, one after another."""
    own = [length - shared for length in lengths]
    prefix = torch.arange(shared)
    groups = [_Group(prefix.to(device), prefix.to(device), 1)] if shared else []
    starts = shared + torch.tensor([0, *own]).cumsum(0)
    places = torch.arange(int(starts[-1]))
    computed = shared
    ranked = sorted(range(len(own)), key=lambda row: (-own[row], row))
    while ranked:
        width = own[ranked[0]]
        inside = [row for row in ranked if own[row] >= _LEAST_SHARE * width]
        ranked = ranked[len(inside) :]
        last_R = torch.tensor([own[row] - 1 for row in inside])
        queries_RT = starts[inside][:, None] + torch.minimum(torch.arange(width), last_R[:, None])
        keys_RK = torch.cat([prefix.expand(len(inside), -1), queries_RT], dim=1)
        for number, row in enumerate(inside):
            first = computed + number * width
            places[starts[row] : starts[row + 1]] = torch.arange(first, first + own[row])
        groups.append(_Group(queries_RT.flatten().to(device), keys_RK.flatten().to(device), len(inside)))
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
    shared, *lengths = attention_mask.flatten().tolist()
    groups, places_N = _groups(tuple(lengths), shared, query.device)
    given = [states_1HNW[0].transpose(0, 1) for states_1HNW in (query, key, value)]
    results = []
    for group in groups:
        query, key, value = (
            states_NHW.index_select(0, tokens).unflatten(0, (group.rows, -1)).transpose(1, 2)
            for states_NHW, tokens in zip(given, (group.queries, group.keys, group.keys), strict=True)
        )
        mask = _mask(query.shape[2], key.shape[2], kwargs.get("sliding_window"), query.device)
        result_RTHW, _ = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        results.append(result_RTHW.flatten(0, 1))
    return torch.cat(results).index_select(0, places_N)[None], None


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return which keys each query, the last ones of a row, may attend to, bool of shape (1, 1, T, P + T).

    Padding needs no place in it: it comes after all real tokens of its row, and what it gives is left behind. None is
    for as many keys and plain causality, which is there without a mask.
    """
    if keys == queries and (window is None or keys <= window):
        return None
    distance_TK = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    seen_TK = distance_TK >= 0
    return (seen_TK if window is None else seen_TK & (distance_TK < window))[None, None]


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)
