from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tests.support.chat_model import make_chat_tokenizer
from tests.support.run_folder import new_run_folder
from tests.unit.run.conftest import Notes
from tidelock.device.generate import GenerationSettings
from tidelock.device.model import DeviceModel
from tidelock.errors import CheckpointError, ConfigError
from tidelock.run.folder import RunFolder
from tidelock.run.generate import chat_prompt, complete, open_trained, raw_prompt, stream
from tidelock.run.train import train

TOKENIZER = make_chat_tokenizer()
SETTINGS = GenerationSettings(max_new_tokens=6)


class Says:
    """Stands for a model that says the same whatever it is asked, one token at a time."""

    padding_side = "left"

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.asked: list[tuple[list[list[int]], list[list[int]]]] = []

    def stream(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, _settings: object) -> Iterator[torch.Tensor]:
        self.asked.append((ids_BT.tolist(), mask_BT.tolist()))
        for token in self.ids:
            yield torch.tensor([token])


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return ids


def test_a_question_is_written_as_the_template_has_it() -> None:
    text = TOKENIZER.decode(chat_prompt(TOKENIZER, "where?"))
    assert text == "<|im_start|>user\nwhere?<|im_end|>\n<|im_start|>assistant\n"


def test_without_a_template_there_is_only_raw_text() -> None:
    tokenizer = make_chat_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="Use --raw to continue plain text"):
        chat_prompt(tokenizer, "where?")
    assert TOKENIZER.decode(raw_prompt(tokenizer, "where?")) == "where?"
    with pytest.raises(ConfigError, match="expected at least one token to continue, got none"):
        raw_prompt(tokenizer, "")


def test_pieces_make_the_text_and_no_letter_is_shown_in_part() -> None:
    says = Says([*ids_of("caf\u00e9 \u2615!"), *TOKENIZER("<|im_end|>", add_special_tokens=False)["input_ids"]])
    pieces = list(stream(cast("DeviceModel", says), cast("Any", TOKENIZER), [7, 8], SETTINGS))
    assert "".join(pieces) == "caf\u00e9 \u2615!"
    assert "\u2615" in pieces
    assert says.asked == [([[7, 8]], [[1, 1]])]


def test_prompts_of_different_lengths_are_answered_as_each_alone(make_config, notes: Notes) -> None:
    config = make_config()
    train(config, notes)
    model = open_trained(RunFolder.open(Path(config.out)), config)
    prompts = [ids_of("where is key 1? "), ids_of("so ")]
    alone = [complete(model, cast("Any", TOKENIZER), [prompt], SETTINGS)[0] for prompt in prompts]
    assert complete(model, cast("Any", TOKENIZER), prompts, SETTINGS) == alone
    assert alone[0] != alone[1]


def test_a_trained_run_is_opened_with_its_adapter(make_config, notes: Notes) -> None:
    config = make_config()
    folder = new_run_folder(config)
    with pytest.raises(CheckpointError, match="expected a trained adapter in it, got none"):
        open_trained(folder, config)
    config = replace(config, out=str(folder.path.parent / "finished"))
    train(config, notes)
    model = open_trained(RunFolder.open(Path(config.out)), config)
    assert any(bool(parameter.any()) for name, parameter in model.named_parameters() if "lora_B" in name)
