"""Kill and Revive in a Trainer: what is killed does not move or cross, and a resumed run changes no bit."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from tests.equivalence.conftest import Connect
from tests.support.cloud_process import TOKEN, CloudProcess
from tests.support.http2 import message_sizes
from tests.support.parity import IGNORED, adapter_of, assert_bit_equal, randomise_adapter
from tests.support.proxy import LinkProxy
from tests.support.tiny_models import VOCAB
from tidelock.backbone.protocol import AttemptSites, Pass
from tidelock.data.batch import Collator
from tidelock.device.in_flight import PassSettings
from tidelock.device.kill_revive import KillRevive, PeriodReport
from tidelock.device.model import DeviceModel
from tidelock.errors import ConfigError
from tidelock.model.walk import Batch
from tidelock.run.connect import connect
from tidelock.schedule.schedule import Decision, Schedule
from tidelock.wire.ledger import Ledger

_MODEL = "llama"
_CONFIG = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "k_proj", "v_proj"])
_EPOCHS, _STEPS_AN_EPOCH = 4, 3


def _rows() -> Dataset:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, VOCAB, (9,), generator=generator).tolist() for _ in range(2 * _STEPS_AN_EPOCH)]
    return Dataset.from_list([{"input_ids": ids, "labels": [IGNORED] * 2 + ids[2:]} for ids in rows])


def _trainer(model: DeviceModel, folder: Path, *callbacks: KillRevive, save_steps: int = 100) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=_EPOCHS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_strategy="steps",
        save_steps=save_steps,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=7,
    )
    return Trainer(model, arguments, train_dataset=_rows(), data_collator=Collator(0), callbacks=list(callbacks))


def _join(join: Connect) -> DeviceModel:
    torch.manual_seed(3)
    model = join(_MODEL, _CONFIG)
    randomise_adapter(model)
    return model


def _train(model: DeviceModel, folder: Path, schedule: Schedule | None) -> list[PeriodReport]:
    periods: list[PeriodReport] = []
    _trainer(model, folder, *([] if schedule is None else [KillRevive(schedule, periods.append)])).train()
    return periods


def test_a_budget_of_all_equals_full_bit_for_bit(join: Connect, tmp_path: Path) -> None:
    plain, full, everything = _join(join), _join(join), _join(join)
    assert _train(plain, tmp_path / "plain", None) == []
    _train(full, tmp_path / "full", Schedule())
    _train(everything, tmp_path / "all", Schedule("kill-revive", budget=len(everything.bank.numbers)))
    assert_bit_equal(adapter_of(full), adapter_of(plain))
    assert_bit_equal(adapter_of(everything), adapter_of(plain))


@pytest.mark.parametrize("killed", ["bypass", "frozen"])
def test_here_and_in_the_cloud_alike(cloud: CloudProcess, tiny_models: Path, tmp_path: Path, killed: str) -> None:
    schedule = Schedule("kill-revive", budget=1, killed=killed)
    adapters: list[dict[str, torch.Tensor]] = []
    decisions: list[list[Decision]] = []
    for where in ("local", cloud.url(_MODEL)):
        torch.manual_seed(3)
        # As the cloud does by default, so that gradients are summed alike.
        model = connect(where, model=tiny_models / _MODEL, peft_config=_CONFIG, token=TOKEN, in_flight=1)
        randomise_adapter(model)
        periods = _train(model, tmp_path / str(len(adapters)), schedule)
        decisions.append([period.decision for period in periods])
        adapters.append(adapter_of(model))
        model.close()
    assert decisions[0] == decisions[1]
    assert_bit_equal(adapters[1], adapters[0])


def test_a_killed_module_does_not_move(join: Connect, tmp_path: Path) -> None:
    model = _join(join)
    seen: list[tuple[PeriodReport, dict[int, torch.Tensor]]] = []

    def look(report: PeriodReport) -> None:
        weights = {
            block: torch.cat([p.detach().flatten().clone() for p in model.bank.module(block).parameters()])
            for block in model.bank.numbers
        }
        seen.append((report, weights))

    _trainer(model, tmp_path, KillRevive(Schedule("kill-revive", budget=1), look)).train()
    assert [len(report.decision.active) for report, _ in seen] == [1] * _EPOCHS
    assert any(report.decision.revived for report, _ in seen)
    for (report, before), (_, after) in itertools.pairwise(seen):
        for block in model.bank.numbers:
            assert torch.equal(before[block], after[block]) == (block not in report.decision.active)


@pytest.mark.parametrize("moments", ["reset", "keep"])
def test_moments_are_reset_or_kept(join: Connect, tmp_path: Path, moments: str) -> None:
    model = _join(join)
    trainer = _trainer(model, tmp_path)
    steps: list[dict[int, float]] = []

    def look(_report: PeriodReport) -> None:
        assert trainer.optimizer is not None
        state = trainer.optimizer.state
        first = {block: next(model.bank.module(block).parameters()) for block in model.bank.numbers}
        steps.append({block: float(state[p]["step"]) for block, p in first.items() if p in state})

    callback = KillRevive(Schedule("kill-revive", budget=1, moments=moments), look)
    trainer.add_callback(callback)
    callback.on_init_end(trainer.args, trainer.state, trainer.control, model=model)
    trainer.train()
    everything = len(model.bank.numbers)
    assert len(steps[0]) == (1 if moments == "reset" else everything)
    # After the last period: those that were active in it counted its steps, from zero when reset.
    largest = max(steps[-1].values())
    assert largest < _EPOCHS * _STEPS_AN_EPOCH
    if moments == "keep":
        assert sum(steps[-1].values()) == (everything + _EPOCHS - 1) * _STEPS_AN_EPOCH


@pytest.mark.parametrize("norm", ["difference", "saliency"])
@pytest.mark.parametrize("step", [2, 4, 6])  # in the middle of the warm-up and of a period, and at the decision
def test_resumed_within_a_schedule_bit_for_bit(join: Connect, tmp_path: Path, step: int, norm: str) -> None:
    schedule = Schedule("kill-revive", budget=1, norm=norm, per_learning_rate=True)
    whole, periods = _join(join), list[PeriodReport]()
    _trainer(whole, tmp_path, KillRevive(schedule, periods.append), save_steps=2).train()
    resumed, later = _join(join), list[PeriodReport]()
    _trainer(resumed, tmp_path, KillRevive(schedule, later.append), save_steps=2).train(
        resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}")
    )
    assert later == [period for period in periods if period.step > step]
    assert_bit_equal(adapter_of(resumed), adapter_of(whole))


def test_nothing_crosses_for_a_killed_module(cloud: CloudProcess, tiny_models: Path, tmp_path: Path) -> None:
    ledger = Ledger()
    model = connect(cloud.url(_MODEL), model=tiny_models / _MODEL, peft_config=_CONFIG, token=TOKEN, ledger=ledger)
    totals: list[dict[str, dict[str, int]]] = []
    reports: list[PeriodReport] = []

    def look(report: PeriodReport) -> None:
        reports.append(report)
        totals.append(ledger.totals())

    _trainer(model, tmp_path, KillRevive(Schedule("fixed", budget=1), look)).train()
    model.close()

    def crossed(period: int, direction: str, kind: str) -> int:
        before = totals[period - 1][direction].get(kind, 0) if period else 0
        return totals[period][direction].get(kind, 0) - before

    modules = len(reports[0].table.modules)
    for direction, kind in (("received", "site_input"), ("sent", "site_output"), ("received", "site_gradient")):
        # Rows of one length: every module costs the same.
        assert crossed(1, direction, kind) * modules == pytest.approx(crossed(0, direction, kind), rel=0.02)
    assert crossed(0, "sent", "input_gradient") > 0
    assert crossed(1, "sent", "input_gradient") == 0  # nothing learns below the only module


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_the_ledger_is_what_a_proxy_counts(cloud: CloudProcess, tiny_models: Path, tmp_path: Path, codec: str) -> None:
    ledger = Ledger()
    with LinkProxy(cloud.port(_MODEL), record=True) as proxy:
        where = f"grpc://127.0.0.1:{proxy.port}"
        model = connect(where, model=tiny_models / _MODEL, peft_config=_CONFIG, token=TOKEN, codec=codec, ledger=ledger)
        _trainer(model, tmp_path, KillRevive(Schedule("kill-revive", budget=1))).train()
        model.close()
        assert proxy.connections == 1
        sent, received = message_sizes(proxy.sent), message_sizes(proxy.received)
    totals = ledger.totals()
    assert sum(sent) == sum(totals["sent"].values())
    assert sum(received) == sum(totals["received"].values())
    assert totals["sent"].keys() == {
        "embedding", "site_output", "final_gradient", "input_gradient", "norms", "control",
    }  # fmt: skip


def test_a_warm_up_by_turns_has_few_active_at_once(join: Connect, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = join(_MODEL, _CONFIG)
    model.settings = PassSettings(in_flight=1)
    active: list[int] = []
    forward = model.backbone.forward

    def count(batch: Batch, sites: AttemptSites) -> Pass:
        active.append(len(batch.active))
        return forward(batch, sites)

    model.backbone.forward = count  # type: ignore[method-assign]
    periods = _train(model, tmp_path, Schedule("kill-revive", budget=1, warm_up_active=2, norm="difference"))
    # Four modules in two turns, and then the budget.
    assert active[:_STEPS_AN_EPOCH] == [2] * _STEPS_AN_EPOCH
    assert set(active[_STEPS_AN_EPOCH:]) == {1}
    assert all(module.score > 0 for module in periods[0].table.modules)


def test_the_adapter_holds_what_was_trained_together(join: Connect, tmp_path: Path) -> None:
    model = _join(join)
    periods = _train(model, tmp_path, Schedule("fixed", budget=1))
    model.save_adapter(tmp_path / "active")
    model.save_adapter(tmp_path / "all", killed=True)
    active = load_file(tmp_path / "active" / "adapter_model.safetensors")
    everything = load_file(tmp_path / "all" / "adapter_model.safetensors")
    (block,) = periods[-1].decision.active
    assert set(active) == {name for name in everything if f".{block}." in name}
    assert len(everything) == len(active) * len(model.bank.numbers)


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a model from tidelock\.connect, got Linear"):
        Trainer(
            torch.nn.Linear(2, 2),
            TrainingArguments(str(tmp_path), report_to="none", use_cpu=True),
            callbacks=[KillRevive(Schedule())],
        )


def test_an_operator_limits_the_modules_that_are_active(cloud: CloudProcess, tiny_models: Path, tmp_path: Path) -> None:
    def join(where: str) -> DeviceModel:
        torch.manual_seed(3)
        model = connect(where, model=tiny_models / _MODEL, peft_config=_CONFIG, token=TOKEN, in_flight=1)
        randomise_adapter(model)
        return model

    limited, here = join(cloud.url(f"{_MODEL}_limited")), join("local")
    num_modules = len(limited.bank.numbers)
    assert (limited.backbone.max_active, here.backbone.max_active, num_modules > 2) == (2, None, True)
    for schedule in (Schedule(), Schedule("kill-revive", budget=1, killed="frozen")):
        with pytest.raises(ConfigError, match="expected at most 2 modules to be asked in a pass"):
            _train(limited, tmp_path / "refused", schedule)
    # More than it may have: the same as with what it may have.
    periods = _train(limited, tmp_path / "limited", Schedule("kill-revive", budget=num_modules))
    assert [len(period.decision.active) for period in periods] == [2] * _EPOCHS
    _train(here, tmp_path / "here", Schedule("kill-revive", budget=2, warm_up_active=2))
    assert_bit_equal(adapter_of(limited), adapter_of(here))
    limited.close()
