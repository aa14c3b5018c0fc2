"""Blocks in 8 and 4 bits give what `peft` gives on the same quantised model, and not what they give in fp32."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.support.parity import copy_adapter, named_lora, randomise_adapter, relative_error, token_batch, trained
from tidelock.backbone.local import LocalBackbone
from tidelock.device.model import DeviceModel
from tidelock.errors import ConfigError
from tidelock.model.checkpoint import Checkpoint
from tidelock.model.ends import Ends, read_config
from tidelock.model.load import ModelChoice, load_cut_model
from tidelock.peft.core import CoreConfig

_CONFIG = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"])
_QUANTISED = {
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
}


def _device(folder: Path, dtype: str, config: LoraConfig | CoreConfig = _CONFIG) -> DeviceModel:
    checkpoint = Checkpoint.open(str(folder))
    cut = load_cut_model(checkpoint, ModelChoice(str(folder), dtype))
    model = DeviceModel(Ends(read_config(folder), checkpoint), LocalBackbone(cut), config)
    randomise_adapter(model)
    return model


def _pass(model: torch.nn.Module, parameters: dict[str, torch.nn.Parameter]) -> tuple[float, dict[str, Tensor]]:
    loss = model(**token_batch("right").arguments()).loss
    loss.backward()
    return loss.item(), {name: weight.grad.float() for name, weight in parameters.items() if weight.grad is not None}


@pytest.mark.parametrize("dtype", _QUANTISED)
def test_a_quantised_backbone_is_peft_s(dtype: str, tiny_models: Path) -> None:
    folder = tiny_models / "llama"
    ours = _device(folder, dtype)
    plain = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=_QUANTISED[dtype], dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    for module in plain.modules():
        module.__dict__["support_avx512bf16_for_cpu"] = False  # see tidelock.model.load
    oracle = cast("PeftModel", get_peft_model(plain, _CONFIG))
    copy_adapter(ours, oracle)
    loss, gradients = _pass(ours, named_lora(ours))
    expected_loss, expected = _pass(oracle, trained(oracle))
    exact_loss, exact = _pass(whole := _device(folder, "fp32"), named_lora(whole))
    # Both compute in bf16, of which ours rounds at each site once more.
    assert loss == pytest.approx(expected_loss, rel=1e-2)
    assert gradients.keys() == expected.keys() == exact.keys()
    for name in exact:
        assert relative_error(gradients[name], expected[name]) < 0.1, name
    # And it is the quantised weights that it was computed with.
    assert loss != exact_loss
    errors = [relative_error(gradients[name], exact[name]) for name in exact]
    assert max(errors) > {"int8": 0.01, "nf4": 0.1}[dtype]


def test_it_takes_less_memory(tiny_models: Path) -> None:
    folder = tiny_models / "llama"
    sizes = {}
    for dtype in ("fp32", "bf16", *_QUANTISED):
        cut = load_cut_model(Checkpoint.open(str(folder)), ModelChoice(str(folder), dtype))
        assert cut.dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)
        blocks = [weight for block in cut._blocks for weight in block.parameters()]
        sizes[dtype] = sum(weight.numel() * weight.itemsize for weight in blocks)
    assert sizes["nf4"] < sizes["int8"] < sizes["bf16"] < sizes["fp32"]
    assert sizes["nf4"] < sizes["fp32"] / 6


def test_without_its_package_it_is_refused(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_models / "llama"
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("tidelock.model.load.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"expected bitsandbytes for nf4, got no such package\. Run: pip install"):
        load_cut_model(Checkpoint.open(str(folder)), ModelChoice(str(folder), "nf4"))


@pytest.mark.parametrize("dtype", _QUANTISED)
def test_frames_of_the_svd_are_of_the_stored_weights_or_refused(dtype: str, tiny_models: Path) -> None:
    with pytest.raises(ConfigError, match=r"Frames of the SVD: expected blocks whose weights are as they are stored"):
        _pass(_device(tiny_models / "llama", dtype, CoreConfig(rank=4, frames="svd")), {})
    loss, _ = _pass(_device(tiny_models / "llama", dtype, CoreConfig(rank=4)), {})
    assert loss > 0
