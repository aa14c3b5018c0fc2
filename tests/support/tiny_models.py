"""Tiny random models of every family that tidelock cuts, made with the real `transformers` classes.

Every weight is random, biases and norms included: left at their 0 and 1, a forgotten one would change nothing.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()

VOCAB = 97
BLOCKS = 4
POSITIONS = 64
WINDOW = 4  # smaller than the sequences of the tests
_D = 32
_SLIDING, _FULL = "sliding_attention", "full_attention"
_ALTERNATING = [_SLIDING, _FULL, _SLIDING, _FULL]
_NO_SPECIAL_IDS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
_LLAMA_LIKE: dict[str, Any] = {
    **_NO_SPECIAL_IDS,
    "vocab_size": VOCAB,
    "hidden_size": _D,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
_GEMMA_LIKE = {**_LLAMA_LIKE, "head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": WINDOW}
_OPT: dict[str, Any] = {
    **_NO_SPECIAL_IDS,
    "vocab_size": VOCAB,
    "hidden_size": _D,
    "ffn_dim": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
_GPT_NEOX = {
    **_LLAMA_LIKE,
    "num_key_value_heads": None,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}

# Name of the shape: (model type, configuration).
TINY_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_LLAMA_LIKE, "tie_word_embeddings": False}),
    "llama_tied": ("llama", {**_LLAMA_LIKE, "tie_word_embeddings": True, "attention_bias": True}),
    "mistral": ("mistral", {**_LLAMA_LIKE, "sliding_window": WINDOW}),
    "qwen2": ("qwen2", _LLAMA_LIKE),
    "qwen3": (
        "qwen3",
        {
            **_LLAMA_LIKE,
            "head_dim": 12,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING,
        },
    ),
    "gemma": ("gemma", {**_LLAMA_LIKE, "head_dim": 16}),
    "gemma2": (
        "gemma2",
        {**_GEMMA_LIKE, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "layer_types": _ALTERNATING},
    ),
    "gemma3_text": ("gemma3_text", {**_GEMMA_LIKE, "layer_types": _ALTERNATING}),
    "olmo2": ("olmo2", _LLAMA_LIKE),
    "smollm3": ("smollm3", {**_LLAMA_LIKE, "no_rope_layers": [1, 0, 1, 0]}),
    "phi3": ("phi3", _LLAMA_LIKE),
    "phi3_sliding": ("phi3", {**_LLAMA_LIKE, "sliding_window": WINDOW}),
    "opt": ("opt", {**_OPT, "word_embed_proj_dim": _D, "do_layer_norm_before": True}),
    "opt_projected": ("opt", {**_OPT, "word_embed_proj_dim": 20, "do_layer_norm_before": False}),
    "bloom": (
        "bloom",
        {
            **_NO_SPECIAL_IDS,
            "vocab_size": VOCAB,
            "hidden_size": _D,
            "n_layer": BLOCKS,
            "n_head": 4,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    "gpt2": (
        "gpt2",
        {
            **_NO_SPECIAL_IDS,
            "vocab_size": VOCAB,
            "n_embd": _D,
            "n_layer": BLOCKS,
            "n_head": 4,
            "n_positions": POSITIONS,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "gpt_neox": ("gpt_neox", {**_GPT_NEOX, "use_parallel_residual": True}),
    "gpt_neox_serial": ("gpt_neox", {**_GPT_NEOX, "use_parallel_residual": False}),
}
# In BLOOM's post-norm variant the residual is taken after the site's norm.
TINY_MODELS["bloom_post_norm"] = (
    "bloom",
    {**TINY_MODELS["bloom"][1], "apply_residual_connection_post_layernorm": True},
)

# Of no family that tidelock knows; cut by structure. `phi` has one norm for attention and MLP.
UNVERIFIED_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "stablelm": ("stablelm", {**_LLAMA_LIKE, "use_parallel_residual": False, "use_qkv_bias": True}),
    "phi": ("phi", {**_LLAMA_LIKE, "num_key_value_heads": 4}),
}

# Decoders, or not, that cannot be cut: no list of blocks, other projections, blocks without attention, a head that
# reads more than the final state.
REFUSED_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", {"vocab_size": VOCAB, "d_model": _D, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_LLAMA_LIKE,
            "num_key_value_heads": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "first_k_dense_replace": BLOCKS,
        },
    ),
    "lfm2": ("lfm2", {**_LLAMA_LIKE, "layer_types": [_FULL, "conv", _FULL, _FULL]}),
    "mixtral": ("mixtral", {**_LLAMA_LIKE, "num_local_experts": 2}),
}

ALL_MODELS = {**TINY_MODELS, **UNVERIFIED_MODELS}

# Whose attention is code of its own, or not the one that torch has: their rows are not joined.
PADDED_MODELS = {"bloom", "bloom_post_norm", "gemma2", *UNVERIFIED_MODELS}
JOINED_MODELS = [name for name in ALL_MODELS if name not in PADDED_MODELS]


def save_tiny_model(name: str, folder: Path) -> Path:
    """Return `folder / name`, where a model of `ALL_MODELS` now is; the same weights every time."""
    model_type, settings = ALL_MODELS[name]
    config = AutoConfig.for_model(model_type, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomise(model)
    model.save_pretrained(folder / name)
    return folder / name


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Make every parameter random, at a size that keeps all parts of a block about equally important."""
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.add_(torch.randn(parameter.shape) * 0.3)
        else:
            parameter.copy_(torch.randn(parameter.shape) * (1.5 / parameter.shape[-1] ** 0.5))
