"""Answers from a run: its model, its adapter, its backbone.

May import everything below `run`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from tidelock.errors import CheckpointError, ConfigError
from tidelock.model.checkpoint import Checkpoint
from tidelock.peft.export import holds_adapter
from tidelock.pool.trained import SCORE
from tidelock.run.open_model import open_model
from tidelock.wire.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from tidelock.device.device_lm import DeviceLM
    from tidelock.device.generate import GenerationSettings
    from tidelock.peft.export import holds_adapter
    from tidelock.run.config import RunConfig
from tidelock.run.folder import RunFolder


def open_trained(folder: RunFolder, config: RunConfig, ledger: Ledger | None = None) -> DeviceLM:
    """Return a run's model with the adapter that it trained, or the whole model that it trained.

    Args:
        folder: The run.
        config: Its configuration, with another cloud perhaps.
        ledger: Counts what crosses; None counts for nobody.

    Raises:
        CheckpointError: The run has not trained one yet.
        TidelockError: As `connect`.
    """
    is_whole = config.method == "full"
    trained = folder.model if is_whole else folder.adapter
    if not ((trained / "config.json").is_file() if is_whole else holds_adapter(trained)):
        what, how = ("model", "pool resume") if is_whole else ("adapter", "train --resume")
        msg = f"Run: expected a trained {what} in it, got none ({trained}). Finish the run first: tidelock {how}."
        raise CheckpointError(msg)
    if is_whole:
        # A fresh LoRA adds zero, exactly.
        model = open_model(replace(config, method="lora", model=str(trained)), ledger or Ledger())
        if model.head is not None:
            model.head.load_state_dict({"weight": Checkpoint.open(str(trained)).read(f"{SCORE}.weight")})
        return model
    return open_model(replace(config, adapter=str(folder.adapter)), ledger or Ledger())


def chat_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Return a question as the model's chat template writes it, up to where the answer begins.

    Raises:
        ConfigError: The tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        msg = "Prompt: expected a tokenizer with a chat template, got one without. Use --raw to continue plain text."
        raise ConfigError(msg)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def raw_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return plain text as token ids, as it would begin a training text.

    Raises:
        ConfigError: There is not one token.
    """
    ids: list[int] = tokenizer(text)["input_ids"]
    if not ids:
        msg = "Prompt: expected at least one token to continue, got none. Give --prompt some text."
        raise ConfigError(msg)
    return ids


def complete(
    model: DeviceLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
) -> list[str]:
    """Return the continuation of every prompt, stripped, without special tokens."""
    ids_BT, mask_BT = _pad(prompts, model.padding_side)
    new_BT = torch.stack(list(model.stream(ids_BT, mask_BT, settings)), 1)
    return [_text(tokenizer, row.tolist()).strip() for row in new_BT]


def stream(
    model: DeviceLM, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], settings: GenerationSettings
) -> Iterator[str]:
    """Yield the continuation of one prompt piece by piece."""
    ids_BT, mask_BT = _pad([prompt], model.padding_side)
    ids: list[int] = []
    shown = ""
    for token_B in model.stream(ids_BT, mask_BT, settings):
        ids.append(int(token_B[0]))
        text = _text(tokenizer, ids)
        # A letter of several bytes may take several tokens: wait until it is whole.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text


def _pad(prompts: Sequence[Sequence[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids_BT = torch.zeros(len(prompts), width, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        start = width - len(prompt) if side == "left" else 0
        ids_BT[row, start : start + len(prompt)] = torch.tensor(prompt)
        mask_BT[row, start : start + len(prompt)] = 1
    return ids_BT, mask_BT


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
