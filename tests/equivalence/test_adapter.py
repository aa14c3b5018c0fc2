"""Serial adapters give what plain hooks on the whole model give, with every family, backbone and schedule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.activations import ACT2FN

from tests.equivalence.conftest import Connect
from tests.support.cloud_process import TOKEN, CloudProcess
from tests.support.parity import (
    GRADIENT_TOLERANCE,
    IGNORED,
    LOSS_TOLERANCE,
    TokenBatch,
    plain_model,
    relative_error,
    token_batch,
)
from tests.support.tiny_models import TINY_MODELS, UNVERIFIED_MODELS
from tidelock.data.batch import Collator
from tidelock.device.generate import GenerationSettings
from tidelock.device.kill_revive import KillRevive, PeriodReport
from tidelock.device.model import DeviceModel
from tidelock.errors import ConfigError
from tidelock.model.geometry import Place
from tidelock.peft.adapter import AdapterConfig
from tidelock.peft.attach import attach_adapter
from tidelock.peft.export import load_adapter
from tidelock.run.connect import connect
from tidelock.schedule.schedule import Schedule
from tidelock.wire.ledger import Ledger

# The module whose output an adapter follows, from the block; by hand, so that the table of families is tested too.
_OUTPUTS = {
    "opt": ("self_attn.out_proj", "fc2"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
}
_LLAMA_OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")
_BLOCKS = {
    "opt": "model.decoder.layers",
    "bloom": "transformer.h",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
}
_HOULSBY = AdapterConfig(bottleneck=5, places=("attn-out", "mlp"), activation="gelu", scaling=0.7)


class PlainAdapter(nn.Module):
    """Written here once more, from the formula."""

    def __init__(self, width: int, config: AdapterConfig) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(config.bottleneck, width))
        self.up = nn.Parameter(torch.zeros(width, config.bottleneck))
        self.activation = ACT2FN[config.activation]
        self.scaling = config.scaling

    def forward(self, h: Tensor) -> Tensor:
        bent: Tensor = self.activation(h @ self.down.T)
        return h + self.scaling * bent @ self.up.T


class Oracle(nn.Module):
    """The whole model with hooks, in one graph."""

    def __init__(self, folder: Path, config: AdapterConfig) -> None:
        super().__init__()
        model = plain_model(folder).requires_grad_(requires_grad=False)
        family = model.config.model_type
        self.model: PreTrainedModel = model
        self.adapters = nn.ModuleDict()
        blocks = model.get_submodule(_BLOCKS.get(family, "model.layers"))
        paths = dict(zip(("attn-out", "mlp"), _OUTPUTS.get(family, _LLAMA_OUTPUTS), strict=True))
        for number, block in enumerate(blocks.children()):
            for place in config.places if config.layers is None or number in config.layers else ():
                adapter = PlainAdapter(model.config.hidden_size, config)
                self.adapters[f"{number}_{place}"] = adapter
                block.get_submodule(paths[place]).register_forward_hook(self._hook(adapter))

    @staticmethod
    def _hook(adapter: PlainAdapter) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        return lambda _module, _args, output: cast("Tensor", adapter(output))


def _pairs(device: DeviceModel, oracle: Oracle) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
    pairs = []
    for site in device.bank.targets:
        ours, theirs = device.bank.at(site), oracle.adapters[f"{site.block}_{site.place.label}"]
        pairs += [(f"{site.name}.{half}", getattr(ours, half).weight, getattr(theirs, half)) for half in ("down", "up")]
    assert len(pairs) == len(list(device.parameters())) == len(list(oracle.adapters.parameters()))
    return pairs


def _joined_oracle(device: DeviceModel, folder: Path, config: AdapterConfig) -> Oracle:
    oracle = Oracle(folder, config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, ours, theirs in _pairs(device, oracle):
            ours.copy_(torch.randn(ours.shape, generator=generator) * (0.7 / ours.shape[1] ** 0.5))
            theirs.copy_(ours)
    return oracle


def _assert_same_pass(device: DeviceModel, oracle: Oracle, batch: TokenBatch) -> None:
    device.zero_grad()
    oracle.zero_grad()
    ours, theirs = device(**batch.arguments()), oracle.model(**batch.arguments())
    ours.loss.backward()
    theirs.loss.backward()
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=LOSS_TOLERANCE, atol=0)
    for name, mine, its in _pairs(device, oracle):
        assert mine.grad is not None, name
        assert its.grad is not None, name
        assert float(its.grad.norm()) > 1e-7, f"{name}: a gradient of zero compares nothing"
        assert relative_error(mine.grad, its.grad) <= GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_pass_equals_hooks_on_the_whole_model(name: str, join: Connect, tiny_models: Path) -> None:
    device = join(name, _HOULSBY)
    oracle = _joined_oracle(device, tiny_models / name, _HOULSBY)
    for seed, padding in enumerate(("right", "left", "none")):
        _assert_same_pass(device, oracle, token_batch(padding, seed=seed))


@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(bottleneck=3),
        AdapterConfig(bottleneck=3, places=("attn-out",)),
        AdapterConfig(bottleneck=3, layers=(1, 3)),
        AdapterConfig(bottleneck=3, places=("mlp", "attn-out"), layers=(2,), activation="relu"),
    ],
    ids=["mlp", "attn-out", "some blocks", "one block of two"],
)
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "opt_projected", "bloom_post_norm"])
def test_places_and_layers_equal_hooks(name: str, config: AdapterConfig, join: Connect, tiny_models: Path) -> None:
    device = join(name, config)
    oracle = _joined_oracle(device, tiny_models / name, config)
    _assert_same_pass(device, oracle, token_batch("right", seed=3))


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "gpt_neox"])
def test_generation_and_evaluation_equal_hooks(name: str, join: Connect, tiny_models: Path) -> None:
    device = join(name, _HOULSBY).eval()
    oracle = _joined_oracle(device, tiny_models / name, _HOULSBY)
    batch = token_batch("left", seed=9, lengths=(9, 5))
    ours = device.generate(batch.input_ids, batch.attention_mask, GenerationSettings(max_new_tokens=8))
    theirs = oracle.model.generate(  # type: ignore[operator]
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
    )
    assert torch.equal(ours, theirs)
    with torch.no_grad():
        loss, their_loss = device(**batch.arguments()).loss, oracle.model(**batch.arguments()).loss
    torch.testing.assert_close(loss, their_loss, rtol=LOSS_TOLERANCE, atol=0)


def test_in_the_cloud_as_here_bit_for_bit_dropout_included(cloud: CloudProcess, tiny_models: Path) -> None:
    config = AdapterConfig(bottleneck=4, places=("attn-out", "mlp"), dropout=0.3, init="bert")
    grads = []
    for where, token in (("local", None), (cloud.url("qwen3"), TOKEN)):
        torch.manual_seed(5)
        device = connect(where, model=tiny_models / "qwen3", peft_config=config, token=token, micro_batches=2)
        torch.manual_seed(6)
        device(**token_batch("right").arguments()).loss.backward()
        grads.append([parameter.grad for parameter in device.parameters()])
        device.close()
    assert all(torch.equal(here, there) for here, there in zip(*grads, strict=True))


@pytest.mark.parametrize("init", ["zero", "bert"])
def test_a_fresh_adapter_changes_nothing_unless_it_begins_at_random(init: str, tiny_models: Path) -> None:
    device = connect("local", model=tiny_models / "llama", peft_config=AdapterConfig(init=init))
    batch = token_batch("right")
    with torch.no_grad():
        expected = plain_model(tiny_models / "llama")(**batch.arguments()).loss
        error = abs(float(device(**batch.arguments()).loss - expected)) / float(expected)
    assert (error <= LOSS_TOLERANCE) is (init == "zero")


def test_what_crosses_is_what_the_sites_read_and_give(cloud: CloudProcess, tiny_models: Path) -> None:
    ledger = Ledger()
    device = connect(
        cloud.url("llama"), model=tiny_models / "llama", peft_config=_HOULSBY, token=TOKEN, ledger=ledger, in_flight=1
    )
    batch = token_batch("right")
    device(**batch.arguments()).loss.backward()
    sent, received = ledger.totals()["sent"], ledger.totals()["received"]
    one = 4 * int(batch.attention_mask.sum()) * 32
    sites = len(device.bank.targets)
    for size, count in (
        (received["site_input"], sites),
        (sent["site_output"], sites),
        (received["site_gradient"], sites),
        (sent["input_gradient"], sites - 1),
    ):
        assert count * one < size < count * (one + 40)
    device.close()


def test_saved_and_loaded_on_a_device_and_on_a_plain_model(join: Connect, tiny_models: Path, tmp_path: Path) -> None:
    device = join("gpt2", _HOULSBY).eval()
    oracle = _joined_oracle(device, tiny_models / "gpt2", _HOULSBY)
    device.save_adapter(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    again = join("gpt2", adapter.config).eval()
    again.load_adapter(adapter)
    plain = plain_model(tiny_models / "gpt2")
    attach_adapter(plain, tmp_path / "adapter")
    batch = token_batch("right", seed=8)
    predicts = torch.zeros_like(batch.labels, dtype=torch.bool)
    predicts[:, :-1] = batch.labels[:, 1:] != IGNORED
    with torch.no_grad():
        logits = [model(**batch.arguments()).logits[predicts] for model in (device, again, plain, oracle.model)]
    assert torch.equal(logits[0], logits[1])
    assert relative_error(logits[0], logits[2]) <= LOSS_TOLERANCE
    assert relative_error(logits[2], logits[3]) <= LOSS_TOLERANCE


def test_a_site_that_a_setting_of_the_model_leaves_out_is_refused(tiny_models: Path) -> None:
    device = connect("local", model=tiny_models / "bloom", peft_config=AdapterConfig())
    blocks = device.backbone._cut._blocks  # type: ignore[attr-defined]
    for block in blocks:
        # BLOOM's own way around the linear, which hooks do not see.
        block.mlp.pretraining_tp, block.mlp.slow_but_exact = 2, True
    with pytest.raises(Exception, match=r"Block 0: expected it to reach the sites \['blocks.0.mlp'\] in this order"):
        device(**token_batch("right").arguments())


@pytest.mark.parametrize("name", UNVERIFIED_MODELS)
def test_a_family_whose_outputs_are_not_known_is_refused(name: str, tiny_models: Path) -> None:
    with pytest.raises(ConfigError, match=f"Adapter: expected a model family whose .* got '{name}'"):
        connect("local", model=tiny_models / name, peft_config=AdapterConfig())


def test_sites_are_reached_in_the_order_of_their_numbers(join: Connect) -> None:
    device = join("gpt_neox", _HOULSBY)
    assert [site.number for site in device.bank.targets] == sorted(site.number for site in device.bank.targets)
    assert {site.place for site in device.bank.targets} == {Place.ATTN_OUT, Place.MLP}


def _trained(device: DeviceModel, folder: Path, schedule: Schedule) -> tuple[list[PeriodReport], list[Tensor]]:
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(1, 49).view(6, 8).tolist()]
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    periods: list[PeriodReport] = []
    callback = KillRevive(schedule, periods.append)
    data = Dataset.from_list(rows)
    Trainer(device, arguments, train_dataset=data, data_collator=Collator(0), callbacks=[callback]).train()
    return periods, [parameter.detach().clone() for parameter in device.parameters()]


@pytest.mark.parametrize("killed", ["bypass", "frozen"])
def test_schedules_here_and_in_the_cloud_alike(
    cloud: CloudProcess, tiny_models: Path, tmp_path: Path, killed: str
) -> None:
    schedule = Schedule("kill-revive", budget=2, killed=killed)
    results = []
    for where, token in (("local", None), (cloud.url("llama"), TOKEN)):
        torch.manual_seed(1)
        device = connect(where, model=tiny_models / "llama", peft_config=_HOULSBY, token=token, in_flight=1)
        results.append(_trained(device, tmp_path, schedule))
        asked = {site.block for site in device.bank.active}
        assert len(asked) == (2 if killed == "bypass" else len(device.bank.numbers))
        assert len(device.bank.active) == 2 * len(asked)
        device.close()
    (periods, weights), (cloud_periods, cloud_weights) = results
    assert periods == cloud_periods
    assert [len(report.decision.active) for report in periods] == [2] * 4
    assert any(report.decision.revived for report in periods)
    assert all(torch.equal(here, there) for here, there in zip(weights, cloud_weights, strict=True))
