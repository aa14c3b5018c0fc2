"""The oracle: the same adapter on the plain `transformers` model with `peft`, and how the two are compared."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, final

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from tests.support.tiny_models import VOCAB
from tidelock.device.model import DeviceModel
from tidelock.peft.lora import LoraModule

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
IGNORED = -100
_HEAD = "base_model.model.score.modules_to_save.default.weight"


@final
@dataclass(frozen=True)
class TokenBatch:
    """What a training loop hands to a model."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def arguments(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "labels": self.labels}


def token_batch(
    padding: str, *, seed: int = 0, lengths: tuple[int, ...] = (11, 7, 9), vocab: int = VOCAB, prefix: int = 0
) -> TokenBatch:
    """Return a batch padded `right`, `left` or not at all (`none`), with labels on a part of each row.

    All rows begin with the same `prefix` tokens, and differ in the next one.

    No row's first token has a label: what `transformers` predicts it from is a padding token, when it is padded at the
    left.
    """
    generator = torch.Generator().manual_seed(seed)
    if padding == "none":
        lengths = (max(lengths),) * len(lengths)
    shape = (len(lengths), max(lengths))
    ids = torch.randint(1, vocab, shape, generator=generator)
    mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED)
    for row, length in enumerate(lengths):
        start = shape[1] - length if padding == "left" else 0
        if prefix:
            ids[row, start : start + prefix] = ids[0, shape[1] - lengths[0] if padding == "left" else 0 :][:prefix]
            ids[row, start + prefix] = 1 + row
        mask[row, start : start + length] = 1
        labelled = slice(start + 2 + row, start + length)
        labels[row, labelled] = ids[row, labelled]
    return TokenBatch(ids * mask, mask, labels)


def sequence_batch(padding: str, num_labels: int, *, seed: int = 0, vocab: int = VOCAB) -> TokenBatch:
    """Return a batch as `token_batch` does, with one class a row, or one number when there is one label."""
    batch = token_batch(padding, seed=seed, lengths=(11, 7, 9, 5), vocab=vocab)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randn(4, generator=generator) if num_labels == 1 else torch.arange(4).add(seed) % num_labels
    return replace(batch, labels=labels)


def plain_model(folder: Path, num_labels: int | None = None) -> PreTrainedModel:
    """Return the causal model, or with a number of labels the one with a head for whole texts."""
    model: PreTrainedModel
    if num_labels is None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        # It finds the last real token by the padding's id.
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, num_labels=num_labels, pad_token_id=0
        )
    model.eval()
    return model


def plain_peft(folder: Path, config: LoraConfig, num_labels: int | None = None) -> PeftModel:
    """Return the oracle, in training mode, with its own random adapter."""
    config = copy.deepcopy(config)
    if num_labels is not None:
        config.task_type = "SEQ_CLS"
    model = get_peft_model(plain_model(folder, num_labels), config)
    assert isinstance(model, PeftModel)
    return model.train()


@torch.no_grad()
def randomise_adapter(model: DeviceModel, seed: int = 1, *, size: float = 0.5) -> None:
    """Make every A and B random and large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * (size / parameter.shape[1] ** 0.5))


def named_lora(model: DeviceModel) -> dict[str, nn.Parameter]:
    """Return the device's parameters, a head included, under the names that `peft` gives them."""
    geometry = model.ends.geometry
    head: dict[str, nn.Parameter] = {} if model.head is None else {_HEAD: cast("nn.Parameter", model.head.weight)}
    return head | {
        f"base_model.model.{geometry.projection_path(site.block, name)}.lora_{half}.default.weight": getattr(
            cast("LoraModule", model.bank.at(site)).branches[name], f"lora_{half}"
        ).weight
        for site, names in model.bank.targets.items()
        for name in names
        for half in "AB"
    }


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def copy_adapter(source: DeviceModel, target: PeftModel) -> None:
    """Give the oracle the device's weights; both must train exactly the same tensors."""
    theirs, ours = trained(target), named_lora(source)
    assert theirs.keys() == ours.keys()
    assert len(list(source.parameters())) == len(ours)
    for name, parameter in theirs.items():
        assert parameter.shape == ours[name].shape, name
        parameter.copy_(ours[name])


def joined_oracle(device: DeviceModel, folder: Path, config: LoraConfig, *, size: float = 0.5) -> PeftModel:
    """Return the oracle for a device's model, after giving both one random adapter, and one head if there is one."""
    randomise_adapter(device, size=size)
    oracle = plain_peft(folder, config, None if device.head is None else device.head.out_features)
    copy_adapter(device, oracle)
    return oracle


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Return the norm of the difference over the norm of the oracle's."""
    with torch.no_grad():
        return float((ours - theirs).norm() / theirs.norm())


def assert_same_pass(device: DeviceModel, oracle: PeftModel, batch: TokenBatch) -> None:
    """Compare loss, logits at labelled positions and every gradient of one forward and backward pass."""
    device.zero_grad()
    oracle.zero_grad()
    ours, theirs = device(**batch.arguments()), oracle(**batch.arguments())
    ours.loss.backward()
    theirs.loss.backward()
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=LOSS_TOLERANCE, atol=0)
    predicts = torch.zeros_like(batch.labels, dtype=torch.bool)
    predicts[:, :-1] = batch.labels[:, 1:] != IGNORED
    assert ours.logits.shape == theirs.logits.shape
    assert relative_error(ours.logits[predicts], theirs.logits[predicts]) <= LOSS_TOLERANCE
    assert_same_gradients(device, oracle)


def assert_same_sequence_pass(device: DeviceModel, oracle: PeftModel, batch: TokenBatch) -> None:
    """Compare loss, logits and every gradient, the head's included, of one forward and backward pass."""
    device.zero_grad()
    oracle.zero_grad()
    ours, theirs = device(**batch.arguments()), oracle(**batch.arguments())
    ours.loss.backward()
    theirs.loss.backward()
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=LOSS_TOLERANCE, atol=0)
    assert ours.logits.shape == theirs.logits.shape
    assert relative_error(ours.logits, theirs.logits) <= LOSS_TOLERANCE
    assert_same_gradients(device, oracle)


def assert_same_gradients(device: DeviceModel, oracle: PeftModel) -> None:
    ours = named_lora(device)
    for name, parameter in trained(oracle).items():
        grad = ours[name].grad
        assert grad is not None, name
        assert parameter.grad is not None, name
        assert float(parameter.grad.norm()) > 1e-7, f"{name}: a gradient of zero compares nothing"
        assert relative_error(grad, parameter.grad) <= GRADIENT_TOLERANCE, name


def adapter_of(model: DeviceModel | PeftModel) -> dict[str, Tensor]:
    """Return a copy of the adapter's tensors, under the names that `peft` gives them."""
    named = named_lora(model) if isinstance(model, DeviceModel) else trained(model)
    return {name: parameter.detach().clone() for name, parameter in named.items()}


def gradients_of(model: DeviceModel | PeftModel) -> dict[str, Tensor]:
    """Return a copy of the adapter's gradients, under the names that `peft` gives them."""
    named = named_lora(model) if isinstance(model, DeviceModel) else trained(model)
    return {name: parameter.grad.clone() for name, parameter in named.items() if parameter.grad is not None}


def assert_bit_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


def largest_error(ours: dict[str, Tensor], theirs: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """Return the largest norm of a tensor's difference over the norm of what training changed in it."""
    assert ours.keys() == theirs.keys() == start.keys()
    return max(float((ours[n] - theirs[n]).norm() / (theirs[n] - start[n]).norm()) for n in ours)
