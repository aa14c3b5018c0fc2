"""Cores give what `peft` gives with the LoRA that they are, with every family, backbone and schedule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.equivalence.conftest import Connect
from tests.support.cloud_process import TOKEN, CloudProcess
from tests.support.parity import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    plain_model,
    plain_peft,
    relative_error,
    token_batch,
    trained,
)
from tests.support.tiny_models import ALL_MODELS, BLOCKS
from tidelock.device.generate import GenerationSettings
from tidelock.device.model import DeviceModel
from tidelock.model.frames import draw_frames
from tidelock.peft.core import CoreConfig, CoreModule
from tidelock.peft.export import load_adapter
from tidelock.run.connect import connect
from tidelock.run.exportable import readable_by_peft
from tidelock.wire.ledger import Ledger

_CONFIG = CoreConfig(rank=6, scaling=3.0, frames="seeded")
_OF_SVD = replace(_CONFIG, frames="svd")


@torch.no_grad()
def _randomise(device: DeviceModel) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter in device.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def _oracle(
    device: DeviceModel, folder: Path, config: CoreConfig
) -> tuple[PeftModel, dict[str, tuple[Tensor, Tensor]]]:
    """Return `peft`'s model with the device's cores written out as LoRA, and each projection's B and core."""
    geometry = device.ends.geometry
    family = geometry.family
    plain = plain_model(folder)
    model = plain_peft(
        folder,
        LoraConfig(
            r=config.rank,
            lora_alpha=config.rank,
            target_modules=list(config.targets or family.projections),
            layers_to_transform=None if config.layers is None else list(config.layers),
            fan_in_fan_out=family.name == "gpt2",
            task_type="CAUSAL_LM",
        ),
    )
    parameters, cores = trained(model), {}
    with torch.no_grad():
        for site, names in device.bank.targets.items():
            whole = geometry.sites[site]
            for name in names:
                path = geometry.projection_path(site.block, name)
                if config.frames == "svd":
                    a_RD, b_WR = _singular_vectors(plain.get_submodule(path), config.rank)
                else:
                    a_RD, b_WR = draw_frames(path, whole.width, whole.output_width((name,)), config.rank)
                core = cast("CoreModule", device.bank.at(site)).core(name).weight
                parameters[f"base_model.model.{path}.lora_A.default.weight"].copy_(a_RD)
                parameters[f"base_model.model.{path}.lora_B.default.weight"].copy_(config.scaling * b_WR @ core)
                cores[f"base_model.model.{path}.lora_B.default.weight"] = (b_WR, core)
    assert len(cores) * 2 == len(parameters)
    return model, cores


def _singular_vectors(linear: nn.Module, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B by a library's SVD, the longest entry of each of the shorter vectors made positive."""
    weight = cast("Tensor", linear.weight)
    weight_WD = (weight.T if isinstance(linear, Conv1D) else weight).bfloat16().double()
    left, _, right = torch.linalg.svd(weight_WD, full_matrices=False)
    short = right.T if len(weight_WD) >= weight_WD.shape[1] else left
    signs = short.gather(0, short.abs().argmax(0, keepdim=True)).sign()[0, :rank]
    return (right[:rank] * signs[:, None]).float(), (left[:, :rank] * signs).float()


@pytest.mark.parametrize("config", [_CONFIG, _OF_SVD], ids=["seeded", "svd"])
@pytest.mark.parametrize("name", ALL_MODELS)
def test_a_pass_equals_the_same_lora_in_peft(name: str, config: CoreConfig, join: Connect, tiny_models: Path) -> None:
    device = join(name, config)
    _randomise(device)
    oracle, cores = _oracle(device, tiny_models / name, config)
    for seed, padding in enumerate(("right", "left", "none")):
        batch = token_batch(padding, seed=seed)
        device.zero_grad()
        oracle.zero_grad()
        ours, theirs = device(**batch.arguments()), oracle(**batch.arguments())
        ours.loss.backward()
        theirs.loss.backward()
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=LOSS_TOLERANCE, atol=0)
        parameters = trained(oracle)
        for path, (b_WR, core) in cores.items():
            grad = parameters[path].grad
            assert grad is not None
            assert core.grad is not None
            # B = s F R, so that the core's gradient is s F' times that of B.
            expected = _CONFIG.scaling * b_WR.T @ grad
            assert float(expected.norm()) > 1e-7
            assert relative_error(core.grad, expected) <= GRADIENT_TOLERANCE, path


@pytest.mark.parametrize(
    "config",
    [
        CoreConfig(rank=4, layers=(1, 3)),
        CoreConfig(rank=16, targets=("v_proj", "q_proj")),
        CoreConfig(rank=1, layers=(3,), targets=("k_proj",)),
        CoreConfig(rank=16, targets=("v_proj", "q_proj"), frames="svd"),
    ],
    ids=["some blocks", "some projections", "one number", "some projections, svd"],
)
def test_choices_equal_peft(config: CoreConfig, join: Connect, tiny_models: Path) -> None:
    device = join("llama", config)
    _randomise(device)
    oracle, _ = _oracle(device, tiny_models / "llama", config)
    batch = token_batch("right", seed=4)
    torch.testing.assert_close(
        device(**batch.arguments()).loss, oracle(**batch.arguments()).loss, rtol=LOSS_TOLERANCE, atol=0
    )


def test_a_fresh_core_changes_nothing_and_learns(join: Connect, tiny_models: Path) -> None:
    device = join("qwen3", _CONFIG)
    batch = token_batch("right")
    loss = device(**batch.arguments()).loss
    with torch.no_grad():
        expected = plain_model(tiny_models / "qwen3")(**batch.arguments()).loss
    torch.testing.assert_close(loss.detach(), expected, rtol=LOSS_TOLERANCE, atol=0)
    loss.backward()
    assert all(p.grad is not None and float(p.grad.norm()) > 0 for p in device.parameters())


@pytest.mark.parametrize("config", [_CONFIG, _OF_SVD], ids=["seeded", "svd"])
def test_in_the_cloud_as_here_bit_for_bit(config: CoreConfig, cloud: CloudProcess, tiny_models: Path) -> None:
    grads = []
    for where, token in (("local", None), (cloud.url("gemma2"), TOKEN)):
        device = connect(where, model=tiny_models / "gemma2", peft_config=config, token=token, micro_batches=2)
        _randomise(device)
        device(**token_batch("right").arguments()).loss.backward()
        grads.append([parameter.grad for parameter in device.parameters()])
        device.close()
    assert all(torch.equal(here, there) for here, there in zip(*grads, strict=True))


def test_only_rank_numbers_cross_for_each_projection(cloud: CloudProcess, tiny_models: Path) -> None:
    ledger = Ledger()
    device = connect(
        cloud.url("llama"), model=tiny_models / "llama", peft_config=_CONFIG, token=TOKEN, ledger=ledger, in_flight=1
    )
    batch = token_batch("right")
    device(**batch.arguments()).loss.backward()
    totals, sites = ledger.totals(), len(device.bank.targets)
    one = 4 * int(batch.attention_mask.sum()) * 3 * _CONFIG.rank
    for direction, kind, count in (
        ("received", "site_input", sites),
        ("sent", "site_output", sites),
        ("received", "site_gradient", sites),
        ("sent", "input_gradient", sites - 1),
    ):
        assert count * one < totals[direction][kind] < count * (one + 40)
    device.close()


@pytest.mark.parametrize(
    ("name", "config"),
    [("gpt_neox", _CONFIG), ("gpt_neox", _OF_SVD), ("gpt2", _OF_SVD), ("qwen3", _OF_SVD)],
    ids=["seeded", "svd, fused", "svd, transposed", "svd"],
)
def test_it_is_written_as_the_lora_that_it_is_and_as_itself(
    name: str, config: CoreConfig, join: Connect, tiny_models: Path, tmp_path: Path
) -> None:
    device = join(name, config).eval()
    _randomise(device)
    device.save_adapter(tmp_path)
    adapter = load_adapter(tmp_path)
    assert adapter.config == replace(config, layers=tuple(range(BLOCKS)))
    again = join(name, adapter.config).eval()
    again.load_adapter(adapter)
    with readable_by_peft(adapter, str(tiny_models / name), lambda _: None) as readable:
        lora = PeftModel.from_pretrained(plain_model(tiny_models / name), str(readable.folder))
    batch = token_batch("left", seed=9, lengths=(9, 5))
    with torch.no_grad():
        ours, reloaded = (model(**batch.arguments()).loss for model in (device, again))
        theirs = lora(**batch.arguments()).loss
    assert torch.equal(ours, reloaded)
    torch.testing.assert_close(ours, theirs, rtol=LOSS_TOLERANCE, atol=0)
    generated = device.generate(batch.input_ids, batch.attention_mask, GenerationSettings(max_new_tokens=8))
    expected = lora.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
    )
    assert torch.equal(generated, expected)
