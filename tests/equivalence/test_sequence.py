"""Classification and regression give what `peft` gives on `AutoModelForSequenceClassification`, with every family."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from tests.equivalence.conftest import Connect
from tests.support.cloud_process import TOKEN, CloudProcess
from tests.support.parity import (
    LOSS_TOLERANCE,
    TokenBatch,
    adapter_of,
    assert_same_sequence_pass,
    gradients_of,
    joined_oracle,
    largest_error,
    plain_model,
    plain_peft,
    randomise_adapter,
    relative_error,
    sequence_batch,
)
from tests.support.tiny_models import ALL_MODELS, TINY_MODELS
from tidelock.device.model import DeviceModel
from tidelock.errors import CheckpointError
from tidelock.peft.adapter import AdapterConfig
from tidelock.peft.attach import attach_adapter
from tidelock.peft.core import CoreConfig
from tidelock.peft.export import load_adapter
from tidelock.run.connect import connect
from tidelock.wire.ledger import Ledger

PADDINGS = ("right", "left", "none")
STEPS, ACCUMULATE = 20, 2
HOULSBY = AdapterConfig(bottleneck=5, places=("attn-out", "mlp"))
_FUSED = {"phi3": ["qkv_proj"], "bloom": ["query_key_value"], "gpt_neox": ["query_key_value"], "gpt2": ["c_attn"]}


def lora(name: str, **changes: Any) -> LoraConfig:
    model_type = ALL_MODELS[name][0]
    targets = _FUSED.get(model_type, ["q_proj", "k_proj", "v_proj"])
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": targets}
    return LoraConfig(**{**settings, "fan_in_fan_out": model_type == "gpt2", **changes})


def task_of(num_labels: int) -> dict[str, Any]:
    if num_labels == 1:
        return {"task": "regression"}
    return {"task": "classification", "num_labels": num_labels}


@pytest.mark.parametrize("num_labels", [1, 3], ids=["regression", "classification"])
@pytest.mark.parametrize("name", ALL_MODELS)
def test_a_pass_equals_peft(name: str, num_labels: int, join: Connect, tiny_models: Path) -> None:
    config = lora(name)
    device = join(name, config, **task_of(num_labels))
    oracle = joined_oracle(device, tiny_models / name, config)
    for seed, padding in enumerate(PADDINGS):
        assert_same_sequence_pass(device, oracle, sequence_batch(padding, num_labels, seed=seed))


@pytest.mark.parametrize("name", ["llama", "opt_projected", "gpt2"])
def test_evaluation_without_labels_equals_peft(name: str, join: Connect, tiny_models: Path) -> None:
    device = join(name, lora(name), **task_of(3)).eval()
    oracle = joined_oracle(device, tiny_models / name, lora(name)).eval()
    batch = sequence_batch("left", 3)
    with torch.no_grad():
        ours, theirs = (m(input_ids=batch.input_ids, attention_mask=batch.attention_mask) for m in (device, oracle))
    assert ours.loss is None
    assert relative_error(ours.logits, theirs.logits) <= LOSS_TOLERANCE


def test_in_the_cloud_as_here_bit_for_bit_dropout_included(cloud: CloudProcess, tiny_models: Path) -> None:
    results: list[tuple[Tensor, dict[str, Tensor]]] = []
    for where, token in (("local", None), (cloud.url("qwen3"), TOKEN)):
        torch.manual_seed(5)
        config = lora("qwen3", lora_dropout=0.3)
        device = connect(
            where, model=tiny_models / "qwen3", peft_config=config, token=token, micro_batches=2, **task_of(3)
        )
        torch.manual_seed(6)
        loss = device(**sequence_batch("right", 3).arguments()).loss
        loss.backward()
        results.append((loss, gradients_of(device)))
        device.close()
    (loss, here), (cloud_loss, there) = results
    assert torch.equal(loss, cloud_loss)
    assert "base_model.model.score.modules_to_save.default.weight" in here
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_only_the_last_real_tokens_state_crosses(cloud: CloudProcess, tiny_models: Path) -> None:
    ledger = Ledger()
    device = connect(
        cloud.url("llama"), model=tiny_models / "llama", token=TOKEN, ledger=ledger, in_flight=1, **task_of(2)
    )
    batch = sequence_batch("right", 2)
    device(**batch.arguments()).loss.backward()
    rows, width = len(batch.labels), device.ends.geometry.final_width
    for way, kind in (("received", "final_state"), ("sent", "final_gradient")):
        assert 4 * rows * width < ledger.totals()[way][kind] < 4 * rows * width + 40
    device.close()


def steps(model: DeviceModel | PeftModel, batches: list[TokenBatch]) -> list[float]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    losses = []
    for number, batch in enumerate(batches, start=1):
        loss = model(**batch.arguments()).loss
        (loss / ACCUMULATE).backward()
        losses.append(loss.item())
        if number % ACCUMULATE == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses


@pytest.mark.parametrize(("name", "num_labels"), [("llama", 3), ("gemma2", 1), ("opt_projected", 2), ("bloom", 3)])
def test_twenty_steps_equal_peft(name: str, num_labels: int, cloud: CloudProcess, tiny_models: Path) -> None:
    config = lora(name)
    folder = tiny_models / name
    device = connect(cloud.url(name), model=folder, peft_config=config, token=TOKEN, **task_of(num_labels))
    oracle = joined_oracle(device, folder, config)
    start = adapter_of(device)
    batches = [sequence_batch(PADDINGS[i % 3], num_labels, seed=i % 4) for i in range(STEPS * ACCUMULATE)]
    ours, theirs = steps(device, batches), steps(oracle, batches)
    assert ours == pytest.approx(theirs, rel=10 * LOSS_TOLERANCE, abs=1e-6)
    assert theirs[-1] < theirs[0], "nothing was learned"
    assert largest_error(adapter_of(device), adapter_of(oracle), start) <= 1e-4
    device.close()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_saved_one_computes_the_same_in_peft(name: str, tiny_models: Path, tmp_path: Path) -> None:
    device = connect("local", model=tiny_models / name, peft_config=lora(name), **task_of(3)).eval()
    randomise_adapter(device)
    device.save_adapter(tmp_path)
    batch = sequence_batch("left", 3)
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, pad_token_id=0, dtype=torch.float32
    )
    joined = PeftModel.from_pretrained(plain_model(tiny_models / name, 3), str(tmp_path))
    with torch.no_grad():
        ours = device(**batch.arguments()).logits
        for model in (loaded.eval(), joined.eval()):
            assert relative_error(model(**batch.arguments()).logits, ours) <= LOSS_TOLERANCE


def test_one_that_peft_saved_goes_on_here(tiny_models: Path, tmp_path: Path) -> None:
    oracle = plain_peft(tiny_models / "llama", lora("llama"), 3)
    with torch.no_grad():
        for parameter in (p for p in oracle.parameters() if p.requires_grad):
            parameter.normal_(std=0.3)
    oracle.save_pretrained(str(tmp_path))
    adapter = load_adapter(tmp_path)
    assert adapter.num_labels == 3
    device = connect("local", model=tiny_models / "llama", peft_config=adapter.config, **task_of(3))
    device.load_adapter(adapter)
    assert_same_sequence_pass(device, oracle, sequence_batch("right", 3))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt_projected", "gpt_neox", "bloom", "gemma3_text"])
def test_a_serial_adapter_computes_the_same_on_a_plain_model(
    name: str, join: Connect, tiny_models: Path, tmp_path: Path
) -> None:
    device = join(name, HOULSBY, **task_of(3)).eval()
    randomise_adapter(device)
    device.save_adapter(tmp_path)
    plain = plain_model(tiny_models / name, 3)
    attach_adapter(plain, tmp_path)
    again = connect("local", model=tiny_models / name, peft_config=HOULSBY, **task_of(3)).eval()
    again.load_adapter(load_adapter(tmp_path))
    batch = sequence_batch("right", 3)
    with torch.no_grad():
        ours, loaded, theirs = (model(**batch.arguments()).logits for model in (device, again, plain))
    assert relative_error(ours, theirs) <= LOSS_TOLERANCE
    assert relative_error(loaded, theirs) <= LOSS_TOLERANCE
    assert load_file(tmp_path / "adapter_model.safetensors")["head.weight"].shape == (
        3,
        device.ends.geometry.final_width,
    )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_core_is_read_by_peft_with_its_head(name: str, join: Connect, tiny_models: Path, tmp_path: Path) -> None:
    config = CoreConfig(rank=4)
    device = join(name, config, **task_of(3)).eval()
    randomise_adapter(device)
    device.save_adapter(tmp_path)
    theirs = PeftModel.from_pretrained(plain_model(tiny_models / name, 3), str(tmp_path)).eval()
    adapter = load_adapter(tmp_path)
    assert adapter.num_labels == 3
    again = connect("local", model=tiny_models / name, peft_config=adapter.config, **task_of(3)).eval()
    again.load_adapter(adapter)
    batch = sequence_batch("right", 3)
    with torch.no_grad():
        ours, loaded, its = (model(**batch.arguments()).logits for model in (device, again, theirs))
    assert relative_error(ours, its) <= LOSS_TOLERANCE
    assert relative_error(loaded, its) <= LOSS_TOLERANCE


def test_a_serial_adapters_gradients_equal_those_of_the_plain_model(join: Connect, tiny_models: Path, tmp_path: Path):
    device = join("qwen2", HOULSBY, **task_of(1))
    randomise_adapter(device)
    device.save_adapter(tmp_path)
    plain = plain_model(tiny_models / "qwen2", 1)
    adapters = attach_adapter(plain, tmp_path)
    batch = sequence_batch("left", 1)
    device(**batch.arguments()).loss.backward()
    plain(**batch.arguments()).loss.backward()
    pairs: list[tuple[Any, Any]] = [(device.head, plain.get_submodule("score"))]
    pairs += [
        (getattr(device.bank.at(site), half), getattr(adapters[site.name.replace(".", "_")], half))
        for site in device.bank.targets
        for half in ("down", "up")
    ]
    assert len(pairs) == 1 + 2 * 2 * 4
    for ours, theirs in pairs:
        grads = [linear.weight.grad for linear in (ours, theirs)]
        assert float(grads[1].norm()) > 1e-7
        assert relative_error(*grads) <= 1e-4


@pytest.mark.parametrize("save_labels", [None, 3])
def test_an_adapter_for_another_task_or_head_is_refused(
    tiny_models: Path, tmp_path: Path, save_labels: int | None
) -> None:
    def make(config: Any, num_labels: int | None) -> DeviceModel:
        settings = {} if num_labels is None else task_of(num_labels)
        return connect("local", model=tiny_models / "llama", peft_config=copy.deepcopy(config), **settings)

    for number, config in enumerate((lora("llama"), HOULSBY, CoreConfig(rank=4))):
        make(config, save_labels).save_adapter(tmp_path / str(number))
        adapter = load_adapter(tmp_path / str(number))
        assert adapter.num_labels == save_labels
        for other in {None, 2, 3} - {save_labels}:
            with pytest.raises(CheckpointError, match="Adapter weight"):
                make(adapter.config, other).load_adapter(adapter)


def test_a_plain_model_without_that_head_is_refused(tiny_models: Path, tmp_path: Path) -> None:
    connect("local", model=tiny_models / "llama", peft_config=HOULSBY, **task_of(3)).save_adapter(tmp_path)
    with pytest.raises(CheckpointError, match=r"got 1 unexpected \(head\.weight\)"):
        attach_adapter(plain_model(tiny_models / "llama"), tmp_path)
    with pytest.raises(CheckpointError, match=r"'head\.weight': expected floating-point numbers of shape \(2, "):
        attach_adapter(AutoModelForSequenceClassification.from_pretrained(tiny_models / "llama"), tmp_path)
