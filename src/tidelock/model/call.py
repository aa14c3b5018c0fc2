"""Calls a decoder or an encoder with word embeddings, whatever its version of `transformers` calls the arguments.

May import `model` and libraries.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn
    from transformers import Cache

    from tidelock.model.rows import Layout


def call_decoder(
    decoder: nn.Module,
    embeddings_BTE: Tensor,
    layout: Layout,
    *,
    cache: Cache | None = None,
    more: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Return the final state of a decoder, or of an encoder, shape (B, T, D).

    Args:
        decoder: The module whose `forward` loops over the blocks.
        embeddings_BTE: Word embeddings, as the model's own embedding module gives them.
        layout: How they are laid out, over the cached positions too when there is a cache.
        cache: Keys and values of earlier tokens, extended in place.
        more: What else this decoder takes, such as an encoder's states.
    """
    names = inspect.signature(decoder.forward).parameters
    # Transformers 5.24 renamed `past_key_values`; encoders have neither, and families without positions take none.
    offered: dict[str, Any] = {
        "cache": cache,
        "use_cache": cache is not None,
        "position_ids": layout.positions_BT,
    }
    if "cache" not in names:
        offered["past_key_values"] = offered.pop("cache")
    kwargs = {name: value for name, value in offered.items() if name in names and value is not None}
    output = decoder(
        inputs_embeds=embeddings_BTE, attention_mask=layout.mask, return_dict=True, **kwargs, **(more or {})
    )
    return cast("Tensor", output.last_hidden_state)
