"""A model's own architecture at a fraction of its width: the configuration, and the decoder made from it.

The number of heads stays (PAC's side blocks keep them too); hidden, feed-forward and head widths shrink. A family's
own class does the rest: it makes masks, positions and rotary embeddings for the widths that it is given.

May import errors, `model` and libraries.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tidelock.errors import ModelError
from tidelock.model.call import call_decoder
from tidelock.model.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    from tidelock.model.families import Family
    from tidelock.model.seq2seq import EncoderDecoderFamily

# What configurations call their widths, besides hidden_size, which every family answers to. A family has some of them;
# one that keeps a width under a name of its own is found out when its blocks do not fit.
_FEED_FORWARD = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim")
_HEAD = ("head_dim", "d_kv")  # families without one share the hidden width among their heads
_DECODER_BLOCKS = ("num_decoder_layers", "decoder_layers")
# There is no vocabulary that they could be of.
_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_eos_token_id")
_SAME_AS_HIDDEN = ("word_embed_proj_dim",)
_LIKE_HEAD = ("query_pre_attn_scalar",)  # Gemma divides attention scores by the root of this, not of head_dim
_PER_BLOCK = ("layer_types", "no_rope_layers")
_ROPE_FACTORS = ("short_factor", "long_factor")  # LongRoPE: one for each pair of a head's rotary channels


def reduced_config(
    config: PretrainedConfig,
    reduction: int,
    blocks: Sequence[int],
    decoder_blocks: Sequence[int] = (),
    *,
    dropout: float = 0.0,
) -> PretrainedConfig:
    """Return a copy of a model's configuration with every width divided by `reduction`.

    Widths are rounded up: a head's to an even number of rotary channels, the hidden one to a multiple of the heads.

    Args:
        config: The model's text configuration.
        reduction: k of the papers.
        blocks: The blocks that the copy has; what a family states for each block follows them.
        decoder_blocks: Those of the decoder, where `blocks` are the encoder's.
        dropout: Wherever the family has any.

    Raises:
        ModelError: The family's configuration does not take the widths.
    """
    facts = config.to_dict()
    heads, head = config.num_attention_heads, next((facts[name] for name in _HEAD if facts.get(name)), None)
    # In families that share the hidden width among their heads the head decides, else both are free.
    full_head = head or config.hidden_size // heads
    small_head = _even_head(full_head, reduction, _rotary_shares(facts))
    hidden = heads * (math.ceil(math.ceil(config.hidden_size / reduction) / heads) if head else small_head)
    rules: dict[str, Callable[[Any], Any]] = {
        **dict.fromkeys(_FEED_FORWARD, lambda width: math.ceil(width / reduction)),
        **dict.fromkeys(_HEAD, lambda _: small_head),
        **dict.fromkeys(_SAME_AS_HIDDEN, lambda _: hidden),
        **dict.fromkeys(_LIKE_HEAD, lambda scale: max(1, round(scale * small_head / full_head))),
        "rope_parameters": lambda rope: _reduced_rope(rope, small_head),
    }
    dropouts = {name: dropout for name, value in facts.items() if _is_dropout(name, value)}
    changes = {"hidden_size": hidden, **dropouts, **_apply(rules, facts), **_of_blocks(facts, blocks, decoder_blocks)}
    try:
        return _changed(config, changes)
    except (StrictDataclassError, AttributeError, TypeError, ValueError) as error:
        raise _refused(config.model_type, hidden, error) from error


def _is_dropout(name: str, value: object) -> bool:
    return ("dropout" in name or name.endswith("pdrop")) and isinstance(value, int | float)


def part_config(
    config: PretrainedConfig, blocks: Sequence[int], decoder_blocks: Sequence[int] = ()
) -> PretrainedConfig:
    """Return a copy of a model's configuration with these blocks only, at their full width, and no vocabulary.

    Args:
        config: The model's text configuration.
        blocks: The blocks that the copy has.
        decoder_blocks: Those of the decoder, where `blocks` are the encoder's.
    """
    return _changed(config, _of_blocks(config.to_dict(), blocks, decoder_blocks))


def _of_blocks(facts: dict[str, Any], blocks: Sequence[int], decoder_blocks: Sequence[int]) -> dict[str, Any]:
    """Return what changes in a configuration when there are only these blocks, and no vocabulary."""
    rules: dict[str, Callable[[Any], Any]] = {
        **dict.fromkeys(_DECODER_BLOCKS, lambda _: len(decoder_blocks)),
        **dict.fromkeys(_PER_BLOCK, lambda values: [values[block] for block in blocks]),
        **dict.fromkeys(_IDS, lambda _: None),
    }
    return {
        "num_hidden_layers": len(blocks),
        "vocab_size": 1,
        "tie_word_embeddings": False,
        **_apply(rules, facts),
    }


def _apply(rules: Mapping[str, Callable[[Any], Any]], facts: dict[str, Any]) -> dict[str, Any]:
    return {name: rules[name](value) for name, value in facts.items() if name in rules and value is not None}


def _changed(config: PretrainedConfig, changes: Mapping[str, Any]) -> PretrainedConfig:
    # `attribute_map` leads names such as hidden_size to a family's own; a copy keeps what it has no field for.
    own = getattr(config, "attribute_map", {})
    return type(config).from_dict({**config.to_dict(), **{own.get(name, name): v for name, v in changes.items()}})


def reduced_decoder(config: PretrainedConfig, family: Family) -> PreTrainedModel:
    """Return a decoder of a reduced configuration, with random weights in fp32 and no word embedding.

    Raises:
        ModelError: The family's class does not take the widths.
    """
    with _refusing(config):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        decoder = _without_embedding(model, family.decoder)
        _try(decoder, config)
    return decoder


def reduced_encoder_decoder(
    config: PretrainedConfig, family: EncoderDecoderFamily
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return an encoder and a decoder of a reduced configuration, as `reduced_decoder` does.

    Raises:
        ModelError: The family's class does not take the widths.
    """
    with _refusing(config):
        model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        encoder, decoder = (_without_embedding(model, path) for path in (family.encoder, family.decoder))
        _try(decoder, config, {"encoder_hidden_states": _try(encoder, config)})
    return encoder, decoder


def _without_embedding(model: nn.Module, path: str) -> PreTrainedModel:
    stack = cast("PreTrainedModel", model.get_submodule(path))
    stack.set_input_embeddings(nn.Identity())  # it is given embeddings, of a width of its own
    return stack


@torch.no_grad()
def _try(stack: nn.Module, config: PretrainedConfig, more: Mapping[str, Tensor] | None = None) -> Tensor:
    layout = Rows((0,), (2,), 2).layout(torch.device("cpu"))
    return call_decoder(stack, torch.zeros(1, 2, config.hidden_size), layout, more=more)


@contextmanager
def _refusing(config: PretrainedConfig) -> Iterator[None]:
    try:
        yield
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise _refused(config.model_type, config.hidden_size, error) from error


def _refused(model_type: str, hidden: int, error: Exception) -> ModelError:
    return ModelError(
        f"A side network for a model of type {model_type!r}: expected its class to compute with a hidden width of "
        f"{hidden}, got {type(error).__name__}: {error}. Choose another reduction, or another model."
    )


def _even_head(full: int, reduction: int, rotary_shares: Sequence[float]) -> int:
    """Return the smallest head width, of at least 1/k of the full one, that rotary embedding can halve."""
    smallest = math.ceil(full / reduction)
    fits = (
        head
        for head in range(smallest + smallest % 2, full, 2)
        if all(int(head * share) >= 2 and int(head * share) % 2 == 0 for share in rotary_shares)
    )
    return next(fits, full)


def _rotary_shares(facts: dict[str, Any]) -> list[float]:
    """Return which parts of a head rotary embedding turns, one for each kind of block that has any."""
    return [rope.get("partial_rotary_factor", 1.0) for rope in _each_rope(facts.get("rope_parameters"))]


def _each_rope(parameters: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the rotary parameters, which some families have for each kind of block and others once for all."""
    if not parameters:
        return []
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _reduced_rope(parameters: dict[str, Any], head: int) -> dict[str, Any]:
    """Return rotary parameters whose per-channel factors are those of the channels that a small head turns as fast."""

    def reduce(rope: dict[str, Any]) -> dict[str, Any]:
        pairs = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
        factors = {name: rope[name] for name in _ROPE_FACTORS if name in rope}
        return rope | {name: [f[i * len(f) // pairs] for i in range(pairs)] for name, f in factors.items()}

    if any(isinstance(value, dict) for value in parameters.values()):
        return {kind: reduce(rope) if isinstance(rope, dict) else rope for kind, rope in parameters.items()}
    return reduce(parameters)
