"""`transformers.Trainer` trains a classifier unchanged: whatever the method, the backbone and the schedule."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import Trainer, TrainingArguments

from tests.equivalence.conftest import Connect
from tests.support.cloud_process import TOKEN, CloudProcess
from tests.support.parity import (
    TokenBatch,
    adapter_of,
    copy_adapter,
    largest_error,
    plain_peft,
    randomise_adapter,
    sequence_batch,
)
from tests.support.tiny_models import VOCAB
from tidelock.data.batch import Collator
from tidelock.data.encode_sequence import SequenceRow
from tidelock.device.kill_revive import KillRevive, PeriodReport
from tidelock.device.model import DeviceModel
from tidelock.peft.adapter import AdapterConfig
from tidelock.peft.core import CoreConfig
from tidelock.peft.methods import MethodConfig
from tidelock.run.connect import connect
from tidelock.schedule.schedule import SCHEDULES, Schedule

MODEL, EPOCHS, ROWS = "llama", 4, 7
LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
METHODS: dict[str, MethodConfig] = {
    "lora": LORA,
    "adapter": AdapterConfig(bottleneck=3),
    "core": CoreConfig(rank=4),
}
CLASSES: dict[str, Any] = {"task": "classification", "num_labels": 3}


def rows(*, of_numbers: bool = False) -> list[SequenceRow]:
    generator = torch.Generator().manual_seed(2)
    lengths = [5, 9, 6, 11, 7, 5, 8]
    return [
        {
            "input_ids": torch.randint(1, VOCAB, (length,), generator=generator).tolist(),
            "label": length / 10 if of_numbers else number % 3,
        }
        for number, length in enumerate(lengths)
    ]


def trainer(
    model: DeviceModel | PeftModel, folder: Path, *callbacks: KillRevive, of_numbers: bool = False, **changes: Any
) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 100,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
    }
    data: Any = rows(of_numbers=of_numbers)
    arguments = TrainingArguments(**{**settings, **changes})
    return Trainer(model, arguments, train_dataset=data, data_collator=Collator(0), callbacks=list(callbacks))


def joined(join: Connect, config: MethodConfig, **task: Any) -> DeviceModel:
    torch.manual_seed(3)
    model = join(MODEL, config, **(task or CLASSES))
    randomise_adapter(model)
    return model


def state(model: DeviceModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("task", [CLASSES, {"task": "regression"}], ids=["classification", "regression"])
def test_trainer_with_peft_ends_the_same(
    join: Connect, tiny_models: Path, tmp_path: Path, task: dict[str, Any]
) -> None:
    device = joined(join, LORA, **task)
    oracle = plain_peft(tiny_models / MODEL, LORA, task.get("num_labels", 1))
    copy_adapter(device, oracle)
    start, of_numbers = adapter_of(device), task["task"] == "regression"
    for model in (device, oracle):
        trainer(model, tmp_path, of_numbers=of_numbers, max_grad_norm=0.5).train()
    assert largest_error(adapter_of(device), adapter_of(oracle), start) <= 1e-4


@pytest.mark.parametrize("num_labels", [1, 3])
def test_the_loss_is_divided_by_all_rows_of_a_step(join: Connect, num_labels: int) -> None:
    task = {"task": "regression"} if num_labels == 1 else CLASSES
    model = joined(join, LORA, **task)
    batch = sequence_batch("right", num_labels)
    model(**batch.arguments()).loss.backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    # Three rows and one, as Trainer does with --accumulate.
    for part in (slice(0, 3), slice(3, 4)):
        some = TokenBatch(batch.input_ids[part], batch.attention_mask[part], batch.labels[part])
        model(**some.arguments(), num_items_in_batch=torch.tensor(4)).loss.backward()
    assert len(whole) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-6)


def test_trainer_tells_the_model_how_many_rows_a_step_has(join: Connect, tmp_path: Path) -> None:
    model = joined(join, LORA)
    counts: list[int] = []
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: counts.append(int(kwargs["num_items_in_batch"])), with_kwargs=True
    )
    trainer(model, tmp_path, gradient_accumulation_steps=2, num_train_epochs=1).train()
    assert counts == [4, 4, 3, 3]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_schedule_here_and_in_the_cloud_alike(
    cloud: CloudProcess, tiny_models: Path, tmp_path: Path, method: str, schedule: str
) -> None:
    results: list[tuple[list[PeriodReport], dict[str, Tensor]]] = []
    for where in ("local", cloud.url(MODEL)):
        torch.manual_seed(3)
        model = connect(
            where, model=tiny_models / MODEL, peft_config=METHODS[method], token=TOKEN, in_flight=1, **CLASSES
        )
        periods: list[PeriodReport] = []
        budget = {} if schedule == "full" else {"budget": 2}
        trainer(model, tmp_path, KillRevive(Schedule(schedule, **budget), periods.append)).train()  # type: ignore[arg-type]
        results.append((periods, state(model)))
        model.close()
    (periods, here), (cloud_periods, there) = results
    assert periods == cloud_periods
    assert len(periods[-1].decision.active) == (4 if schedule == "full" else 2)
    assert all(torch.equal(here[name], there[name]) for name in here)


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_module_stays_and_the_head_learns(join: Connect, tmp_path: Path, method: str) -> None:
    model = joined(join, METHODS[method])
    seen: list[tuple[PeriodReport, dict[str, Tensor]]] = []
    schedule = Schedule("kill-revive", budget=1)
    trainer(model, tmp_path, KillRevive(schedule, lambda report: seen.append((report, state(model))))).train()
    assert any(report.decision.killed for report, _ in seen)
    for (report, before), (_, after) in itertools.pairwise(seen):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert "head.weight" in moved
        blocks = {int(name.split(".")[2]) for name in moved - {"head.weight"}}
        assert blocks == set(report.decision.active)
    # What a schedule scores and counts is the modules only.
    assert [module.block for module in seen[0][0].table.modules] == [0, 1, 2, 3]


@pytest.mark.parametrize("step", [6, 8])  # in the middle of a period, and at the decision
@pytest.mark.parametrize("method", METHODS)
def test_resumed_within_a_schedule_bit_for_bit(join: Connect, tmp_path: Path, method: str, step: int) -> None:
    schedule = Schedule("kill-revive", budget=1)
    whole, resumed = joined(join, METHODS[method]), joined(join, METHODS[method])
    trainer(whole, tmp_path, KillRevive(schedule), save_steps=2).train()
    with torch.no_grad():
        assert resumed.head is not None
        resumed.head.weight.zero_()
    trainer(resumed, tmp_path, KillRevive(schedule), save_steps=2).train(
        resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}")
    )
    ours, theirs = state(resumed), state(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_head_alone_can_learn(join: Connect, tmp_path: Path) -> None:
    model = joined(join, LORA)
    model.bank.requires_grad_(requires_grad=False)
    before = state(model)
    trainer(model, tmp_path).train()
    after = state(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"head.weight"}
