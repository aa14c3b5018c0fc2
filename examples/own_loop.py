"""Trains LoRA with a loop of one's own; the frozen blocks run in a cloud, everything in this file runs here.

Start a cloud with `tidelock cloud smollm2`, write the token that it shows into tidelock.token, then in another shell:

    python examples/own_loop.py grpc://127.0.0.1:7777 tidelock.token
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoTokenizer

import tidelock

TEXTS = ["Our dog is called Marlowe.", "The spare key hangs behind the barometer.", "We met on a ferry to Texel."]


def main() -> None:
    """Train on three sentences, let the model go on with the first, and save the adapter."""
    parser = argparse.ArgumentParser(description="A training loop of one's own.")
    parser.add_argument("cloud", help="grpcs://HOST:PORT, or grpc:// on this machine")
    parser.add_argument("token_file", type=Path)
    parser.add_argument("--ca", type=Path, help="certificate to trust, with grpcs://")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/own-loop"))
    options = parser.parse_args()

    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"])
    token, ledger = options.token_file.read_text().strip(), tidelock.Ledger()
    model = tidelock.connect(options.cloud, token=token, ca=options.ca, peft_config=lora, ledger=ledger)
    tokenizer = AutoTokenizer.from_pretrained(model.ends.folder)

    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100)  # not shifted; the model shifts them
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(options.steps):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}")

    prompt = tokenizer("Our dog is called", return_tensors="pt")["input_ids"]
    answer = model.eval().generate(prompt, settings=tidelock.GenerationSettings(max_new_tokens=6))
    print(tokenizer.decode(answer[0]))
    print("Bytes that crossed:", ledger.totals())
    model.save_adapter(options.out)
    model.close()


if __name__ == "__main__":
    main()
