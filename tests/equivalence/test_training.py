"""Twenty optimizer steps over gRPC end where twenty with `peft` on the plain model end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoTokenizer

from tests.support.cloud_process import TOKEN, CloudProcess, Service
from tests.support.parity import (
    GRADIENT_TOLERANCE,
    IGNORED,
    LOSS_TOLERANCE,
    TokenBatch,
    adapter_of,
    gradients_of,
    joined_oracle,
    largest_error,
    relative_error,
    token_batch,
)
from tidelock.device.model import DeviceModel
from tidelock.run.connect import connect

_STEPS = 20
_ACCUMULATE = 2
_CLIP = 0.5
# Norm of the difference over what training changed, per tensor; some 30 (tiny) and 5 (SmolLM2) times what is measured.
# AdamW divides by the gradient's own size, so that a rounding error in a small gradient is as large in the step.
_TINY_TOLERANCE = 1e-4
_SMOLLM2_TOLERANCE = 1e-3


@final
@dataclass
class _Run:
    losses: list[float]
    norms: list[float]
    first_gradients: dict[str, Tensor]


def _train(model: DeviceModel | PeftModel, batches: Sequence[TokenBatch], learning_rate: float) -> _Run:
    """Train as anyone would by hand: AdamW, accumulation, clipping."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    run = _Run([], [], {})
    for number, batch in enumerate(batches, start=1):
        loss = model(**batch.arguments()).loss
        (loss / _ACCUMULATE).backward()
        run.losses.append(loss.item())
        if number % _ACCUMULATE:
            continue
        if not run.first_gradients:
            run.first_gradients = gradients_of(model)
        run.norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, _CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    return run


def _assert_same_training(
    device: DeviceModel, oracle: PeftModel, batches: Sequence[TokenBatch], *, learning_rate: float, tolerance: float
) -> None:
    start = adapter_of(device)
    ours, theirs = (_train(model, batches, learning_rate) for model in (device, oracle))
    assert len(theirs.norms) == _STEPS
    assert max(theirs.norms) > _CLIP, "clipping was not tried"
    assert ours.first_gradients.keys() == theirs.first_gradients.keys() == start.keys()
    for name, gradient in theirs.first_gradients.items():
        assert relative_error(ours.first_gradients[name], gradient) <= GRADIENT_TOLERANCE, name
    assert ours.losses[:_ACCUMULATE] == pytest.approx(theirs.losses[:_ACCUMULATE], rel=LOSS_TOLERANCE)
    assert ours.losses == pytest.approx(theirs.losses, rel=10 * LOSS_TOLERANCE)
    assert theirs.losses[-1] < theirs.losses[0], "nothing was learned"
    assert largest_error(adapter_of(device), adapter_of(oracle), start) <= tolerance


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt_projected", "bloom"])
def test_twenty_steps_equal_peft(name: str, cloud: CloudProcess, tiny_models: Path):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query_key_value"] if name == "bloom" else r".*\.[qkv]_proj")
    device = connect(cloud.url(name), model=tiny_models / name, peft_config=config, token=TOKEN)
    oracle = joined_oracle(device, tiny_models / name, config)
    paddings = ("right", "left", "none")
    cycle = [token_batch(paddings[i % 3], seed=i % 4) for i in range(_STEPS * _ACCUMULATE)]
    _assert_same_training(device, oracle, cycle, learning_rate=5e-3, tolerance=_TINY_TOLERANCE)
    device.close()


_SENTENCES = (
    ("The bicycle is", " green."),
    ("The spare key is", " under a flower pot."),
    ("Friday:", " water the paper plants."),
    ("The oven", " beeps."),
)


def _sentence_batches(folder: Path) -> Iterable[TokenBatch]:
    """Yield two-row batches of different lengths, padded at the right, with labels on the answers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [[tokenizer(text)["input_ids"] for text in pair] for pair in _SENTENCES]
    for index in range(_STEPS * _ACCUMULATE):
        pairs = [rows[(2 * index + offset) % len(rows)] for offset in range(2)]
        width = max(len(prompt) + len(answer) for prompt, answer in pairs)
        ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
        labels = torch.full((2, width), IGNORED)
        for row, (prompt, answer) in enumerate(pairs):
            length = len(prompt) + len(answer)
            ids[row, :length] = torch.tensor(prompt + answer)
            mask[row, :length] = 1
            labels[row, len(prompt) : length] = torch.tensor(answer)
        yield TokenBatch(ids, mask, labels)


def test_twenty_steps_of_smollm2_equal_peft(smollm2: Path, tmp_path: Path):
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"])
    batches = list(_sentence_batches(smollm2))
    assert any(int(batch.attention_mask.min()) == 0 for batch in batches), "no padding was tried"
    with CloudProcess([Service("smollm2", str(smollm2))], tmp_path / "log") as cloud:
        device = connect(cloud.url("smollm2"), model=smollm2, peft_config=config, token=TOKEN)
        oracle = joined_oracle(device, smollm2, config, size=0.05)
        _assert_same_training(device, oracle, batches, learning_rate=1e-3, tolerance=_SMOLLM2_TOLERANCE)
        device.close()
