"""The oracle: rows come out of the encoder as they come out of TRL's SFTTrainer."""

from typing import Any

import pytest

from tidelock.data.encode import Encoder, encode_all
from tidelock.data.example import parse_row

pytestmark = [
    # What TRL and the libraries below it say of their own future is not ours to mend.
    pytest.mark.filterwarnings("ignore"),
]

PROMPT_COMPLETION = [
    {"prompt": prompt, "completion": completion}
    for prompt, completion in [
        ("2 + 2 =", " 4"),
        ("a st", "ory"),
        ("", "a dog"),
        ("x\n", "\ny<|im_end|>"),
        ("a ", " é 日本 🎉"),
    ]
]
TEXT = [{"text": text} for text in ["a dog", "the house<|im_end|>", "é 日本 🎉\n\n"]]
CHAT = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    for question, answer in [("our dog?", "Marlowe"), ("", " 日本 🎉 \n")]
]


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("rows", [PROMPT_COMPLETION, TEXT, CHAT], ids=["prompt-completion", "text", "chat"])
def test_tokens_and_labels_are_those_of_trl(make_tokenizer, tmp_path, rows, adds_bos):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(adds_bos=adds_bos)
    shape: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **shape))
    if rows is CHAT:
        # TRL learns only the answers where the questions come as a prompt.
        theirs = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in rows]
    else:
        theirs = rows
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_length=512),
        train_dataset=Dataset.from_list(theirs),
        processing_class=tokenizer,
    )
    encoder = Encoder(tokenizer, max_length=512, truncate=False)
    ours = list(encode_all(encoder, [parse_row(row, source="x", line=line) for line, row in enumerate(rows, 1)]))
    assert ours == [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in trainer.train_dataset]
