"""Trains LoRA with `transformers.Trainer`, which needs to know nothing of tidelock.

Start a cloud with `tidelock cloud smollm2`, write the token that it shows into tidelock.token, then in another shell:

    python examples/with_trainer.py grpc://127.0.0.1:7777 tidelock.token

With `local` instead of an address, and a model folder or hub name as --model, the frozen blocks run in this process.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed

import tidelock
from tidelock.data.batch import Collator
from tidelock.data.encode import Encoder, encode_all
from tidelock.data.source import read_examples

HOUSEHOLD = Path(__file__).with_name("household.jsonl")


def main() -> None:
    """Train on the household facts and measure the loss on the phrasings that were held out."""
    parser = argparse.ArgumentParser(description="transformers.Trainer on a device's model.")
    parser.add_argument("cloud", help="grpcs://HOST:PORT, grpc:// on this machine, or local")
    parser.add_argument("token_file", type=Path, nargs="?", help="not needed with local")
    parser.add_argument("--ca", type=Path, help="certificate to trust, with grpcs://")
    parser.add_argument("--model", help="model folder or hub name; left out, the cloud's own model")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/with-trainer"))
    options = parser.parse_args()

    set_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"])
    token = options.token_file.read_text().strip() if options.token_file else None
    model = tidelock.connect(options.cloud, model=options.model, token=token, ca=options.ca, peft_config=lora)
    encoder = Encoder(AutoTokenizer.from_pretrained(model.ends.folder), max_length=256, truncate=False)
    train, held_out = (
        Dataset.from_list(list(encode_all(encoder, read_examples(str(HOUSEHOLD), split=split))))
        for split in ("train", "held_out")
    )
    args = TrainingArguments(
        str(options.out),
        max_steps=options.steps,
        learning_rate=4e-3,
        per_device_train_batch_size=4,
        logging_steps=5,
        eval_strategy="no",
        report_to="none",
    )
    trainer = Trainer(model, args, train_dataset=train, eval_dataset=held_out, data_collator=Collator(0))
    trainer.train()
    print(trainer.evaluate())
    model.close()


if __name__ == "__main__":
    main()
