"""A small fast tokenizer, made here so that no test needs a download."""

from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.processors import Sequence, TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LINES = ["a story about our dog", "the story of the house", "user\n", "assistant\n", "system\n", "\n\n", "2 + 2 = 4"]


@pytest.fixture
def make_tokenizer():
    """Return a function that makes a tokenizer; with `adds_bos`, one that begins each text with ``<s>``."""

    def make(*, adds_bos=False, trims_offsets=False, eos="<|im_end|>", chat_template=CHATML):
        backend = Tokenizer(BPE())
        backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
        backend.decoder = ByteLevelDecoder()
        backend.train_from_iterator(
            LINES,
            BpeTrainer(
                vocab_size=330,
                initial_alphabet=ByteLevel.alphabet(),
                special_tokens=["<s>", "<|im_start|>", "<|im_end|>"],
                show_progress=False,
            ),
        )
        steps: list[Any] = [ByteLevelProcessor(trim_offsets=trims_offsets)]
        if adds_bos:
            steps.append(TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]))
        backend.post_processor = Sequence(steps)
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token=eos, chat_template=chat_template
        )

    return make
