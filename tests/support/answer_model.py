"""A tiny random T5 with the chat model's tokenizer: all that `tidelock train --task text-to-text` needs of a model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from tests.support.chat_model import END_ID, VOCABULARY, make_chat_tokenizer
from tests.support.tiny_models import randomise


def save_answer_model(folder: Path) -> Path:
    """Write the model with its tokenizer."""
    config = AutoConfig.for_model(
        "t5",
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=END_ID,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSeq2SeqLM.from_config(config)
        randomise(model)
    model.save_pretrained(folder)
    make_chat_tokenizer().save_pretrained(folder)
    return folder
