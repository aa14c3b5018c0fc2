"""The blocks in this process: what was kept is freed, and only once used."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.sites import attn
from tests.unit.hand_device import WIDTH
from tidelock.backbone.local import LocalBackbone
from tidelock.model.cut import CutModel
from tidelock.model.rows import Rows
from tidelock.model.walk import Batch


class OneSite:
    """Adds nothing, and counts the gradients that it is given."""

    def __init__(self):
        self.gradients = 0

    def begin(self):
        return self

    def forward(self, block, x_ND):
        return torch.zeros(len(x_ND), 16)

    def backward(self, block, grad_NW, *, need_input):
        self.gradients += 1
        assert not need_input
        assert grad_NW.abs().sum() > 0


@pytest.fixture(scope="module")
def model(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def backbone(model):
    backbone = LocalBackbone(CutModel(model))
    yield backbone
    backbone.close()


def a_batch(**changes):
    values = {
        "embeddings_NE": torch.ones(4, WIDTH),
        "rows": Rows((0,), (4,), 4),
        "select_M": torch.tensor([3]),
        "active": {attn(1): ("v_proj",)},
        "training": True,
    }
    return Batch(**{**values, **changes})


def test_backward_is_walked_once(backbone):
    sites = OneSite()
    run = backbone.forward(a_batch(), sites)
    assert not run.final_MD.requires_grad
    run.backward(torch.ones(1, WIDTH))
    run.backward(torch.ones(1, WIDTH))
    assert sites.gradients == 1


def test_a_closed_pass_has_nothing_to_walk(backbone):
    sites = OneSite()
    run = backbone.forward(a_batch(), sites)
    run.close()
    run.close()
    run.backward(torch.ones(1, WIDTH))
    assert sites.gradients == 0


def test_an_evaluating_pass_has_no_backward(backbone):
    sites = OneSite()
    backbone.forward(a_batch(training=False), sites).backward(torch.ones(1, WIDTH))
    assert sites.gradients == 0


def test_generation_is_the_models_own(model, backbone):
    embed = model.get_input_embeddings()
    run = backbone.generate(a_batch(embeddings_NE=embed(torch.tensor([5, 6, 7, 8])), training=False), OneSite())
    states = [run.final_BD, run.extend(embed(torch.tensor([9]))), run.extend(embed(torch.tensor([10])))]
    assert torch.equal(run.final_BD, states[-1])
    run.close()
    whole = model.model(torch.tensor([[5, 6, 7, 8, 9, 10]])).last_hidden_state[0]
    assert torch.allclose(torch.cat(states), whole[3:], atol=1e-5)
    assert backbone.geometry.num_blocks == 3
