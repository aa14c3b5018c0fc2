"""The device's model with a head for whole texts."""

from __future__ import annotations

import pytest
import torch

from tests.unit.hand_device import VOCABULARY, WIDTH
from tidelock.errors import ConfigError


def a_batch():
    """Return ids and mask of two rows, of 7 and of 4 real tokens."""
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_a_head_is_one_parameter_more_and_no_part_of_the_bank(make_model):
    plain, model = make_model(), make_model(num_labels=3)
    names = {name for name, _ in plain.named_parameters()}
    assert {name for name, _ in model.named_parameters()} == set(model.state_dict()) == names | {"head.weight"}
    assert {f"bank.{name}" for name, _ in model.bank.named_parameters()} == names
    assert model.head.weight.shape == (3, WIDTH)
    # As transformers begins it, from the configuration's initializer_range.
    assert 0.2 < model.head.weight.std() < 0.4


def test_a_classifier_gives_one_row_of_logits_for_each_text(make_model):
    model, batch = make_model(num_labels=3), a_batch()
    output = model(**batch, labels=torch.tensor([0, 2]))
    output.loss.backward()
    assert output.logits.shape == (2, 3)
    assert all(bool(grad.any()) for grad in gradients(model).values())
    with pytest.raises(ConfigError, match="one class from 0 to 2 for each of 2 rows"):
        model(**batch, labels=batch["input_ids"])
    with pytest.raises(ConfigError, match="expected labels of two axes"):
        make_model()(**batch, labels=torch.tensor([0, 2]))


def test_a_classifier_in_bf16_has_logits_and_loss_in_fp32(make_model):
    model = make_model(num_labels=1).to(torch.bfloat16)
    output = model(**a_batch(), labels=torch.tensor([0.5, 2.0]))
    output.loss.backward()
    assert output.logits.dtype == output.loss.dtype == torch.float32
    assert all(grad.dtype == torch.bfloat16 for grad in gradients(model).values())
