"""A device's model over blocks in this process, and the whole model that it must agree with."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tidelock.backbone.local import LocalBackbone
from tidelock.device.model import DeviceModel
from tidelock.model.checkpoint import Checkpoint
from tidelock.model.cut import CutModel
from tidelock.model.ends import Ends, read_config


@pytest.fixture(scope="module")
def whole(tiny_folder):
    """The model as transformers has it."""
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def blocks(tiny_folder):
    return LocalBackbone(CutModel(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)))


@pytest.fixture
def make_model(tiny_folder, blocks):
    """Return a function that makes a device's model, with branches that already do something."""

    def make(*, moved=True, num_labels=None, **settings):
        settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], **settings}
        torch.manual_seed(1)
        ends = Ends(read_config(tiny_folder), Checkpoint.open(str(tiny_folder)))
        model = DeviceModel(ends, blocks, LoraConfig(**settings), num_labels=num_labels)
        if moved:
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.3)
        return model

    return make
