"""A tiny random llama with a byte-level tokenizer and a ChatML template: all that `tidelock train` needs of a model."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.support.tiny_models import randomise

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LINES = ["the old house by the lake", "user\n", "assistant\n", "system\n", "where is the key of the house?"]
VOCABULARY = 320
POSITIONS = 160
END_ID = 2


def save_chat_model(folder: Path, *, seed: int = 0) -> Path:
    """Write the model with its tokenizer; another seed gives other weights and the same of everything else."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        bos_token_id=0,
        eos_token_id=END_ID,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        randomise(model)
    model.save_pretrained(folder)
    make_chat_tokenizer().save_pretrained(folder)
    return folder


def make_chat_tokenizer() -> PreTrainedTokenizerFast:
    """Return a fast tokenizer with at most `VOCABULARY` tokens."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    backend.post_processor = ByteLevelProcessor(trim_offsets=False)
    backend.train_from_iterator(
        _LINES,
        BpeTrainer(
            vocab_size=VOCABULARY,
            initial_alphabet=ByteLevel.alphabet(),
            special_tokens=["<s>", "<|im_start|>", "<|im_end|>"],
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", chat_template=CHATML
    )
