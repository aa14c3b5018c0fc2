"""Every family and shape gives what `peft` gives on the plain model, with its blocks here and in another process."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoConfig

from tests.equivalence.conftest import TLS_MODEL, Connect
from tests.support.certs import Certificates
from tests.support.cloud_process import TOKEN, CloudProcess
from tests.support.parity import (
    IGNORED,
    LOSS_TOLERANCE,
    assert_same_pass,
    joined_oracle,
    plain_peft,
    relative_error,
    token_batch,
)
from tests.support.sites import attn
from tests.support.tiny_models import ALL_MODELS, BLOCKS, REFUSED_MODELS, TINY_MODELS, UNVERIFIED_MODELS, VOCAB
from tidelock.backbone.local import LocalBackbone
from tidelock.device.generate import GenerationSettings
from tidelock.errors import ModelError
from tidelock.model.families import FAMILIES
from tidelock.run.connect import connect

_FUSED = {"phi3": ["qkv_proj"], "bloom": ["query_key_value"], "gpt_neox": ["query_key_value"], "gpt2": ["c_attn"]}


def _targets(name: str) -> list[str]:
    return _FUSED.get(ALL_MODELS[name][0], ["q_proj", "k_proj", "v_proj"])


def _config(name: str, **changes: Any) -> LoraConfig:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": _targets(name), "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**settings, "fan_in_fan_out": ALL_MODELS[name][0] == "gpt2", **changes})


def test_every_verified_family_has_a_tiny_model():
    verified = {family.name for family in FAMILIES.values() if family.verified}
    assert verified == {model_type for model_type, _ in TINY_MODELS.values()}


@pytest.mark.parametrize("name", ALL_MODELS)
def test_a_pass_equals_peft(name: str, join: Connect, tiny_models: Path):
    config = _config(name)
    device = join(name, config)
    oracle = joined_oracle(device, tiny_models / name, config)
    for seed, padding in enumerate(("right", "left", "none")):
        assert_same_pass(device, oracle, token_batch(padding, seed=seed))


def test_a_pass_over_tls_with_ends_from_the_cloud_equals_peft(
    cloud: CloudProcess, certificates: Certificates, tiny_models: Path
):
    config = _config(TLS_MODEL)
    url = cloud.url(f"{TLS_MODEL}_tls")
    assert url.startswith("grpcs://")
    device = connect(url, peft_config=config, token=TOKEN, ca=certificates.ca)
    oracle = joined_oracle(device, tiny_models / TLS_MODEL, config)
    assert_same_pass(device, oracle, token_batch("right"))
    device.close()


@pytest.mark.parametrize("name", ALL_MODELS)
def test_evaluation_without_labels_equals_peft(name: str, join: Connect, tiny_models: Path):
    config = _config(name)
    device = join(name, config).eval()
    oracle = joined_oracle(device, tiny_models / name, config).eval()
    batch = token_batch("right", seed=5)
    real = batch.attention_mask.bool()
    with torch.no_grad():
        ours = device(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        theirs = oracle(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        loss, their_loss = device(**batch.arguments()).loss, oracle(**batch.arguments()).loss
    assert ours.loss is None
    assert not ours.logits.requires_grad
    assert relative_error(ours.logits[real], theirs.logits[real]) <= LOSS_TOLERANCE
    assert not ours.logits[~real].any()
    torch.testing.assert_close(loss, their_loss, rtol=LOSS_TOLERANCE, atol=0)


@pytest.mark.parametrize("name", ALL_MODELS)
def test_greedy_generation_equals_peft(name: str, join: Connect, tiny_models: Path):
    config = _config(name)
    device = join(name, config).eval()
    oracle = joined_oracle(device, tiny_models / name, config).eval()
    batch = token_batch("left", seed=9, lengths=(9, 5))
    ours = device.generate(batch.input_ids, batch.attention_mask, GenerationSettings(max_new_tokens=12))
    theirs = oracle.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
    )
    assert ours.shape == (2, 9 + 12)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_generation_stops_where_peft_stops(join: Connect, tiny_models: Path):
    config = _config("llama")
    device = join("llama", config).eval()
    oracle = joined_oracle(device, tiny_models / "llama", config).eval()
    batch = token_batch("left", seed=9, lengths=(9, 5))
    free = device.generate(batch.input_ids, batch.attention_mask, GenerationSettings(max_new_tokens=12))
    stop = int(free[0, 9 + 4])
    ours = device.generate(
        batch.input_ids, batch.attention_mask, GenerationSettings(max_new_tokens=12, stop_ids=frozenset([stop]))
    )
    theirs = oracle.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=stop,
    )
    assert (ours[0, 9:] == stop).any()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


LORA_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "rslora": ("llama", {"use_rslora": True}),
    "gaussian": ("llama", {"init_lora_weights": "gaussian"}),
    "rank and alpha by pattern": (
        "llama",
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "v_proj": 6}, "alpha_pattern": {"k_proj": 3, "q_proj": 40}},
    ),
    "patterns with rslora": (
        "qwen3",
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}},
    ),
    "upper blocks": ("llama", {"layers_to_transform": [2, 3]}),
    "blocks with gaps": ("gemma2", {"layers_to_transform": [0, 2]}),
    "one block": ("llama", {"layers_to_transform": [1]}),
    "the last block": ("opt", {"layers_to_transform": BLOCKS - 1}),
    "one block of post-norm": ("opt_projected", {"layers_to_transform": [1], "target_modules": ["v_proj"]}),
    "one fused block": ("gpt2", {"layers_to_transform": [2]}),
    "blocks of a named pattern": ("llama", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "q and v": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "v only": ("olmo2", {"target_modules": ["v_proj"]}),
    "named in another order": ("mistral", {"target_modules": ["v_proj", "q_proj", "k_proj"]}),
    "pattern": ("llama", {"target_modules": r".*layers\.[13]\.self_attn\.(q|k)_proj"}),
    "without some": ("llama", {"exclude_modules": r".*layers\.0\..*"}),
}


@pytest.mark.parametrize("option", LORA_OPTIONS)
def test_lora_options_equal_peft(option: str, join: Connect, tiny_models: Path):
    name, changes = LORA_OPTIONS[option]
    config = _config(name, **changes)
    device = join(name, config)
    oracle = joined_oracle(device, tiny_models / name, config)
    assert_same_pass(device, oracle, token_batch("right", seed=3))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gemma3_text", "opt", "bloom", "gpt2", "gpt_neox"])
def test_targets_left_to_peft_are_those_of_peft(name: str, tiny_models: Path):
    config = _config(name, target_modules=None)
    device = connect("local", model=tiny_models / name, peft_config=config)
    oracle = joined_oracle(device, tiny_models / name, config)
    assert_same_pass(device, oracle, token_batch("right"))


@pytest.mark.parametrize("name", ["olmo2", "phi3", "smollm3"])
def test_targets_left_open_where_peft_has_none_are_all_projections(name: str, tiny_models: Path):
    config = _config(name, target_modules=None)
    with pytest.raises(ValueError, match="target_modules"):
        plain_peft(tiny_models / name, config)
    device = connect("local", model=tiny_models / name, peft_config=config)
    assert device.bank.targets == dict.fromkeys(map(attn, range(BLOCKS)), tuple(_targets(name)))


def test_no_configuration_means_all_projections(tiny_models: Path):
    device = connect("local", model=tiny_models / "llama")
    oracle = joined_oracle(device, tiny_models / "llama", _config("llama", r=8, lora_alpha=8))
    assert device.bank.targets == dict.fromkeys(map(attn, range(BLOCKS)), ("q_proj", "k_proj", "v_proj"))
    assert_same_pass(device, oracle, token_batch("left"))


def test_a_fresh_adapter_changes_nothing(join: Connect, tiny_models: Path):
    config = _config("llama")
    device = join("llama", config)
    oracle = plain_peft(tiny_models / "llama", config)
    batch = token_batch("right")
    with torch.no_grad(), oracle.disable_adapter():
        expected = oracle(**batch.arguments()).loss
        torch.testing.assert_close(device(**batch.arguments()).loss, expected, rtol=LOSS_TOLERANCE, atol=0)


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "opt_projected"])
def test_frozen_weights_get_no_gradient_and_do_not_change(name: str, tiny_models: Path):
    config = _config(name)
    device = connect("local", model=tiny_models / name, peft_config=config)
    joined_oracle(device, tiny_models / name, config)
    assert isinstance(device.backbone, LocalBackbone)
    frozen = [
        *device.backbone._cut.parameters(),
        *device.ends._head_model.parameters(),
        *device.ends._embedding.parameters(),
    ]
    before = [parameter.clone() for parameter in frozen]
    optimizer = torch.optim.AdamW(device.parameters(), lr=0.1)
    for _ in range(2):
        device(**token_batch("right").arguments()).loss.backward()
        optimizer.step()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen)
    assert all(torch.equal(old, new) for old, new in zip(before, frozen, strict=True))


def test_a_frozen_half_of_the_adapter_stays_and_the_other_trains(join: Connect, tiny_models: Path):
    config = _config("llama")
    device = join("llama", config)
    oracle = joined_oracle(device, tiny_models / "llama", config)
    for model in (device, oracle):
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad = False
    assert_same_pass(device, oracle, token_batch("right"))
    assert all(p.grad is None for name, p in device.named_parameters() if "lora_A" in name)


def test_no_mask_means_that_all_tokens_are_real(join: Connect, tiny_models: Path):
    config = _config("bloom")
    device = join("bloom", config)
    oracle = joined_oracle(device, tiny_models / "bloom", config)
    batch = token_batch("none")
    with torch.no_grad():
        ours = device(input_ids=batch.input_ids, labels=batch.labels).loss
        theirs = oracle(input_ids=batch.input_ids, labels=batch.labels).loss
    torch.testing.assert_close(ours, theirs, rtol=LOSS_TOLERANCE, atol=0)


def test_a_given_number_of_items_divides_the_loss(join: Connect, tiny_models: Path):
    config = _config("gemma2")
    device = join("gemma2", config)
    oracle = joined_oracle(device, tiny_models / "gemma2", config)
    batch = token_batch("right")
    items = torch.tensor(37)
    ours = device(**batch.arguments(), num_items_in_batch=items).loss
    theirs = oracle(**batch.arguments(), num_items_in_batch=items).loss
    plain = device(**batch.arguments()).loss
    torch.testing.assert_close(ours, theirs, rtol=LOSS_TOLERANCE, atol=0)
    labelled = int((batch.labels != IGNORED).sum())
    torch.testing.assert_close(ours * 37, plain * labelled, rtol=LOSS_TOLERANCE, atol=0)


@pytest.mark.parametrize("name", UNVERIFIED_MODELS)
def test_an_unknown_family_is_said_to_be_unverified(name: str, tiny_models: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, logger="tidelock"):
        device = connect("local", model=tiny_models / name, peft_config=_config(name))
    assert not device.ends.geometry.family.verified
    assert any(name in record.message and "unverified" in record.message for record in caplog.records)


@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_a_model_that_cannot_be_cut_is_refused(name: str, tmp_path: Path):
    model_type, settings = REFUSED_MODELS[name]
    config = AutoConfig.for_model(model_type, **settings)
    config.save_pretrained(tmp_path)
    ends = {f"{name}.weight": torch.zeros(VOCAB, config.hidden_size) for name in ("model.embed_tokens", "lm_head")}
    save_file(ends, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"^(Model type|Cutting) .*: expected .*, got .*\."):
        connect("local", model=tmp_path)
