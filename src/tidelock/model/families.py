"""What must be known of a model family to cut it: where its decoder, its blocks and the linears at its sites are.

One row per family; everything else about a family is left to its own, unchanged `transformers` class. A model of no
known family is looked at structurally, and the result says that it is unverified.

May import errors, `model` and libraries.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, final

from torch import nn

from tidelock.errors import ModelError
from tidelock.model.attention import can_join_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_SEPARATE = ("q_proj", "k_proj", "v_proj")
# Names under which the attention of some family keeps its query, key and value projections.
_KNOWN_PROJECTIONS: tuple[tuple[str, ...], ...] = (
    _SEPARATE,
    ("query_key_value",),
    ("qkv_proj",),
    ("c_attn",),
    ("Wqkv",),
    ("query", "key", "value"),
)


@final
@dataclass(frozen=True, slots=True)
class Family:
    """Where the parts of a decoder are, as attribute paths.

    Attributes:
        name: `config.model_type`.
        decoder: From the causal model to the module whose `forward` loops over the blocks.
        blocks: From the decoder to its `ModuleList` of blocks.
        attention: From a block to its attention module.
        projections: Names, in the attention module, of the linears that make q, k and v (one name when fused).
        outputs: From a block to the last linear of its attention (`attn-out`) and of its MLP (`mlp`), whose outputs the
            block adds up; empty where they are not known.
        verified: Whether tests compare this family with `peft`, gradient by gradient.
        joins_rows: Whether its decoder takes rows that are joined end to end (see `model.attention`).
    """

    name: str
    decoder: str
    blocks: str
    attention: str
    projections: tuple[str, ...]
    outputs: Mapping[str, str] = field(default_factory=dict)
    verified: bool = True
    joins_rows: bool = True


def _outputs(attention: str, mlp: str) -> dict[str, str]:
    return {"attn-out": attention, "mlp": mlp}


def _llama_like(name: str, projections: tuple[str, ...] = _SEPARATE) -> Family:
    return Family(name, "model", "layers", "self_attn", projections, _outputs("self_attn.o_proj", "mlp.down_proj"))


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _llama_like("llama"),  # SmolLM and SmolLM2 are of this family
        _llama_like("mistral"),
        _llama_like("qwen2"),
        _llama_like("qwen3"),
        _llama_like("gemma"),
        _llama_like("gemma2"),
        _llama_like("gemma3_text"),
        _llama_like("olmo2"),
        _llama_like("smollm3"),
        _llama_like("phi3", ("qkv_proj",)),
        Family("opt", "model.decoder", "layers", "self_attn", _SEPARATE, _outputs("self_attn.out_proj", "fc2")),
        Family(
            "bloom",
            "transformer",
            "h",
            "self_attention",
            ("query_key_value",),
            _outputs("self_attention.dense", "mlp.dense_4h_to_h"),
            joins_rows=False,  # what is far off weighs less by its place in the row, which it counts by the mask
        ),
        Family("gpt2", "transformer", "h", "attn", ("c_attn",), _outputs("attn.c_proj", "mlp.c_proj")),
        Family(
            "gpt_neox",
            "gpt_neox",
            "layers",
            "attention",
            ("query_key_value",),
            _outputs("attention.dense", "mlp.dense_4h_to_h"),
        ),
    )
}


def family_of(model: PreTrainedModel) -> Family:
    """Return the facts about a causal language model's family, from the table or from its structure.

    Args:
        model: The whole causal model; its parameters may be on the meta device.

    Raises:
        ModelError: The architecture is not a decoder whose blocks and projections can be found.
    """
    if model.config.is_encoder_decoder:
        msg = (
            f"Cutting {type(model).__name__}: expected a decoder, got an encoder-decoder. Beside one of those there "
            "can be a side network (--method side); use a decoder for other methods."
        )
        raise ModelError(msg)
    known = FAMILIES.get(model.config.model_type)
    if known is not None:
        return replace(known, joins_rows=known.joins_rows and can_join_rows(model))
    family = _by_structure(model)
    logger.warning(
        "Model family %r is unverified: its blocks were found by structure (%s.%s, sites at %s). "
        "Compare a few steps with peft before you trust it.",
        family.name,
        family.decoder,
        family.blocks,
        family.attention,
    )
    return family


def _by_structure(model: PreTrainedModel) -> Family:
    """Return the only list of equal blocks that has attention with projections of known names."""
    found: list[Family] = []
    count = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if not (isinstance(module, nn.ModuleList) and len(module) == count and path):
            continue
        decoder, _, blocks = path.rpartition(".")
        found += [
            Family(model.config.model_type, decoder, blocks, child, names, verified=False, joins_rows=False)
            for child, names in _attentions(module[0])
        ]
    if len(found) != 1:
        msg = (
            f"Cutting a model of type {model.config.model_type!r}: expected a decoder with one list of {count} blocks, "
            f"each with one attention whose projections are named like {_SEPARATE}, got {len(found)} such lists "
            f"({type(model).__name__}). Use one of the families {', '.join(sorted(FAMILIES))}."
        )
        raise ModelError(msg)
    return found[0]


def _attentions(block: nn.Module) -> list[tuple[str, tuple[str, ...]]]:
    """Return (path, projection names) of every child of a block that looks like an attention."""
    return [
        (name, names)
        for name, child in block.named_modules()
        for names in _KNOWN_PROJECTIONS
        if all(isinstance(getattr(child, projection, None), nn.Module) for projection in names)
    ]
