"""`Trainer`, TRL's `SFTTrainer` and a plain loop train one and the same adapter, and `peft` with `Trainer` does too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
    set_seed,
)
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from tests.support.cloud_process import TOKEN, CloudProcess
from tests.support.parity import (
    IGNORED,
    adapter_of,
    assert_bit_equal,
    copy_adapter,
    largest_error,
    plain_peft,
    randomise_adapter,
)
from tests.support.tiny_models import VOCAB
from tidelock.data.batch import Collator
from tidelock.device.model import DeviceModel
from tidelock.run.connect import connect

_MODEL = "llama"
_STEPS = 6
_ACCUMULATE = 2
_CLIP = 1.0
_LEARNING_RATE = 5e-3
_EVAL_MARK = VOCAB - 1  # the first token of every evaluation row and of no other
# SFTTrainer's loss is another formula for the same number; Trainer on the plain model runs other kernels.
_TOLERANCE = 1e-4


def _config(dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM"
    )


def _rows(count: int, seed: int, first: int | None = None) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(5, 12, (), generator=generator))
        ids = torch.randint(1, VOCAB - 2, (length,), generator=generator).tolist()
        ids[0] = ids[0] if first is None else first
        rows.append({"input_ids": ids, "labels": [IGNORED] * 2 + ids[2:]})
    return Dataset.from_list(rows)


_TRAIN, _EVAL = _rows(12, seed=1), _rows(5, seed=2, first=_EVAL_MARK)


def _arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": _STEPS,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": _ACCUMULATE,
        "learning_rate": _LEARNING_RATE,
        "max_grad_norm": _CLIP,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 7,
    }


@final
@dataclass
class _Result:
    adapter: dict[str, Tensor]
    eval_losses: list[float]
    gradient_norms: list[float]


@final
@dataclass
class _Recorder:
    """A collator that keeps the training batches, for the plain loop."""

    collator: Collator = field(default_factory=lambda: Collator(0))
    batches: list[dict[str, Tensor]] = field(default_factory=list)

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        batch = self.collator(rows)
        if batch["input_ids"][0, 0] != _EVAL_MARK:
            self.batches.append({name: tensor.clone() for name, tensor in batch.items()})
        return batch


def _result(trainer: Trainer, model: Any) -> _Result:
    trainer.train()
    history = trainer.state.log_history
    return _Result(
        adapter_of(model),
        [entry["eval_loss"] for entry in history if "eval_loss" in entry],
        [float(entry["grad_norm"]) for entry in history if "grad_norm" in entry],
    )


def _join(cloud: CloudProcess, tiny_models: Path, dropout: float = 0.0) -> DeviceModel:
    torch.manual_seed(3)
    return connect(cloud.url(_MODEL), model=tiny_models / _MODEL, peft_config=_config(dropout), token=TOKEN)


def _with_trainer(model: Any, folder: Path, recorder: _Recorder | None = None) -> _Result:
    trainer = Trainer(
        model,
        TrainingArguments(**_arguments(folder)),
        train_dataset=_TRAIN,
        eval_dataset=_EVAL,
        data_collator=recorder or Collator(0),
    )
    return _result(trainer, model)


def _with_sft_trainer(model: Any, folder: Path, **changes: Any) -> _Result:
    words = {str(index): index for index in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")), eos_token="0", pad_token="0"
    )
    trainer = SFTTrainer(
        model,
        SFTConfig(**_arguments(folder), **changes),
        train_dataset=_TRAIN,
        eval_dataset=_EVAL,
        processing_class=tokenizer,
    )
    return _result(trainer, model)


def _with_plain_loop(model: DeviceModel, batches: Sequence[Mapping[str, Tensor]]) -> _Result:
    set_seed(7)  # as Trainer does when it begins
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, _STEPS)
    result = _Result({}, [], [])
    model.train()
    for step in range(_STEPS):
        share = batches[step * _ACCUMULATE : (step + 1) * _ACCUMULATE]
        items = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in share)
        for batch in share:
            model(**batch, num_items_in_batch=items).loss.backward()
        result.gradient_norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    result.adapter = adapter_of(model)
    return result


@pytest.fixture(scope="module")
def recorder() -> _Recorder:
    return _Recorder()


@pytest.fixture(scope="module")
def start(cloud: CloudProcess, tiny_models: Path) -> dict[str, Tensor]:
    return adapter_of(_join(cloud, tiny_models))


@pytest.fixture(scope="module")
def by_trainer(
    cloud: CloudProcess, tiny_models: Path, recorder: _Recorder, tmp_path_factory: pytest.TempPathFactory
) -> _Result:
    """Return what `Trainer` makes of a device's model: what all others are compared with."""
    model = _join(cloud, tiny_models)
    result = _with_trainer(model, tmp_path_factory.mktemp("trainer"), recorder)
    model.close()
    return result


def test_trainer_accumulates_clips_and_evaluates(by_trainer: _Result, recorder: _Recorder, start: dict[str, Tensor]):
    assert len(by_trainer.gradient_norms) == _STEPS
    assert max(by_trainer.gradient_norms) > _CLIP, "clipping was not tried"
    assert len(by_trainer.eval_losses) == 2
    assert len(recorder.batches) >= _STEPS * _ACCUMULATE
    assert any(int(batch["attention_mask"].min()) == 0 for batch in recorder.batches), "no padding was tried"
    assert all(not torch.equal(by_trainer.adapter[name], start[name]) for name in start)


def test_the_same_seed_gives_the_same_adapter(
    by_trainer: _Result, cloud: CloudProcess, tiny_models: Path, tmp_path: Path
):
    again = _with_trainer(_join(cloud, tiny_models), tmp_path)
    assert_bit_equal(again.adapter, by_trainer.adapter)
    assert again.eval_losses == by_trainer.eval_losses


def test_a_plain_loop_gives_trainers_adapter(
    by_trainer: _Result, recorder: _Recorder, cloud: CloudProcess, tiny_models: Path
):
    plain = _with_plain_loop(_join(cloud, tiny_models), recorder.batches)
    assert plain.gradient_norms == by_trainer.gradient_norms
    assert_bit_equal(plain.adapter, by_trainer.adapter)


def test_a_local_backbone_gives_the_clouds_adapter(by_trainer: _Result, tiny_models: Path, tmp_path: Path):
    torch.manual_seed(3)
    local = _with_trainer(connect("local", model=tiny_models / _MODEL, peft_config=_config()), tmp_path)
    assert_bit_equal(local.adapter, by_trainer.adapter)
    assert local.eval_losses == by_trainer.eval_losses


def test_sft_trainer_gives_trainers_adapter(
    by_trainer: _Result, cloud: CloudProcess, tiny_models: Path, tmp_path: Path, start: dict[str, Tensor]
):
    sft = _with_sft_trainer(_join(cloud, tiny_models), tmp_path, bf16=False)
    assert sft.eval_losses == pytest.approx(by_trainer.eval_losses, rel=1e-5)
    assert sft.gradient_norms == pytest.approx(by_trainer.gradient_norms, rel=1e-4)
    assert largest_error(sft.adapter, by_trainer.adapter, start) <= _TOLERANCE


def test_sft_trainer_as_it_comes_computes_in_bf16(
    by_trainer: _Result, cloud: CloudProcess, tiny_models: Path, tmp_path: Path, start: dict[str, Tensor]
):
    sft = _with_sft_trainer(_join(cloud, tiny_models), tmp_path)
    assert sft.eval_losses == pytest.approx(by_trainer.eval_losses, rel=1e-2)
    assert largest_error(sft.adapter, by_trainer.adapter, start) > _TOLERANCE, "bf16 changed nothing"


def test_trainer_on_the_plain_peft_model_gives_the_same_adapter(
    by_trainer: _Result, cloud: CloudProcess, tiny_models: Path, tmp_path: Path, start: dict[str, Tensor]
):
    oracle = plain_peft(tiny_models / _MODEL, _config())
    copy_adapter(_join(cloud, tiny_models), oracle)
    plain = _with_trainer(oracle, tmp_path)
    assert plain.eval_losses == pytest.approx(by_trainer.eval_losses, rel=1e-5)
    assert plain.gradient_norms == pytest.approx(by_trainer.gradient_norms, rel=1e-4)
    assert largest_error(plain.adapter, by_trainer.adapter, start) <= _TOLERANCE


def test_sft_trainer_on_the_plain_peft_model_gives_the_same_adapter(
    by_trainer: _Result, cloud: CloudProcess, tiny_models: Path, tmp_path: Path, start: dict[str, Tensor]
):
    oracle = plain_peft(tiny_models / _MODEL, _config())
    copy_adapter(_join(cloud, tiny_models), oracle)
    plain = _with_sft_trainer(oracle, tmp_path, bf16=False)
    assert largest_error(plain.adapter, by_trainer.adapter, start) <= _TOLERANCE


def test_lora_dropout_is_drawn_from_the_seed_and_not_in_evaluation(
    by_trainer: _Result, recorder: _Recorder, cloud: CloudProcess, tiny_models: Path, tmp_path: Path
):
    first = _with_trainer(_join(cloud, tiny_models, dropout=0.3), tmp_path / "1")
    second = _with_trainer(_join(cloud, tiny_models, dropout=0.3), tmp_path / "2")
    assert_bit_equal(first.adapter, second.adapter)
    assert first.eval_losses == second.eval_losses
    assert any(not torch.equal(first.adapter[name], by_trainer.adapter[name]) for name in first.adapter)
    losses = []
    for dropout in (0.3, 0.0):
        model = _join(cloud, tiny_models, dropout).eval()
        randomise_adapter(model)
        with torch.no_grad():
            losses.append(model(**recorder.batches[0]).loss.item())
    assert losses[0] == losses[1]
