"""A training run, from examples to adapter: reads like the sentence that describes it.

May import everything below `run`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

import torch
from transformers import TrainingArguments, set_seed

from tidelock.data.batch import Collator
from tidelock.device.beside_blocks import BesideBlocks
from tidelock.device.kill_revive import KillRevive
from tidelock.device.model import DeviceModel
from tidelock.device.side_model import SideModel
from tidelock.model.ends import Ends
from tidelock.run.codecs import describe_codecs, describe_tap_codec
from tidelock.run.examples import encode_examples, read_run_examples, with_classes_counted
from tidelock.run.facts import facts_of
from tidelock.run.folder import RunFolder
from tidelock.run.metrics import sequence_metrics
from tidelock.run.open_model import load_tokenizer, open_model
from tidelock.run.side import AnnouncingCollator, LetGo, begin, describe_cache
from tidelock.run.trackers import check_trackers, keep_events_in
from tidelock.run.trainer import Journal, Observer, RunTrainer, StopFlag
from tidelock.wire.codec import Codecs
from tidelock.wire.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import EvalPrediction, TrainerCallback

    from tidelock.device.device_lm import DeviceLM
    from tidelock.run.config import RunConfig
    from tidelock.run.examples import EncodedRows

_ALL_MODULES_LOSS = "eval_all_modules_loss"


@final
@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run came to.

    Attributes:
        adapter: Folder of the trained adapter.
        adapter_all: Likewise, with killed modules too; None where the schedule kills none.
        steps: Optimizer steps done in all.
        loss: The last logged training loss, or None when none was logged.
        eval_loss: The last evaluation's loss, or None.
        eval_metrics: What else it measured; see `sequence_metrics`.
        eval_loss_all_modules: Likewise, with killed modules too; None without any.
        active: Blocks whose modules are in the adapter.
        seconds: How long this part of the run took.
        traffic_bytes: Bytes that crossed, by direction and kind.
        codec_error: What rounding on the wire took in this part of the run; see `Distortion.totals`.
        interrupted: Whether Ctrl-C ended it early.
    """

    adapter: Path
    adapter_all: Path | None
    steps: int
    loss: float | None
    eval_loss: float | None
    eval_metrics: dict[str, float]
    eval_loss_all_modules: float | None
    active: tuple[int, ...]
    seconds: float
    traffic_bytes: dict[str, dict[str, int]]
    codec_error: dict[str, dict[str, float]]
    interrupted: bool


def train(config: RunConfig, observer: Observer, *, resume: bool = False) -> TrainResult:
    """Train an adapter on private examples; return what it came to.

    Args:
        config: The run.
        observer: Told how it gets on.
        resume: Go on from the newest complete checkpoint of the run folder.

    Raises:
        TidelockError: Any of its kinds; a run that had finished steps has saved them first.
    """
    began = time.monotonic()
    check_trackers(config.report_to or [])
    folder = RunFolder.open(Path(config.out)) if resume else RunFolder.new(Path(config.out))
    checkpoint = folder.latest_checkpoint() if resume else None
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    set_seed(config.seed)
    ledger = Ledger()
    examples, eval_examples = read_run_examples(config)
    config = with_classes_counted(config, [*examples, *eval_examples])
    model = open_model(config, ledger, None if config.no_cache else Path(config.cache or folder.cache))
    try:
        observer.say(f"Model: {_describe(model)}.")
        _say_codecs(config, model, observer)
        tokenizer = load_tokenizer(model.ends.folder)
        rows, eval_rows = (encode_examples(config, model, tokenizer, found) for found in (examples, eval_examples))
        observer.say(f"Data: {len(rows)} examples to learn from, {len(eval_rows)} to measure on.")
        if resume:
            ledger.add(folder.read_ledger().epochs())
            folder.keep_until(0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2]))
            observer.say(f"Going on from {checkpoint or 'the beginning: there is no whole checkpoint yet'}.")
        else:
            # Only now: a mistake in the options or in the data leaves nothing that is in the way of the next try.
            folder.write_config(config)
        if isinstance(model, BesideBlocks) and checkpoint is None and config.adapter is None:
            begin(config, model, rows)
        folder.write_facts(facts_of(model, rows, eval_rows).model_dump_json(indent=2))
        stop = StopFlag(observer.say)
        journal = Journal(folder, ledger, observer, stop)
        callbacks, collate = _method_parts(config, model, [*rows, *eval_rows], journal)
        trainer = RunTrainer(
            folder=folder,
            journal=journal,
            callbacks=callbacks,
            keep=config.keep,
            model=model,
            args=training_arguments(config, folder.checkpoints, len(rows), evaluates=bool(eval_rows)),
            train_dataset=rows,
            eval_dataset=eval_rows or None,
            data_collator=collate,
            compute_metrics=None if model.num_labels is None else _sequence_metrics,
        )
        keep_events_in(folder.tensorboard, trainer)
        with stop.on_interrupt():
            trainer.train_or_save(checkpoint)
        interrupted = stop.is_set and trainer.state.global_step < trainer.state.max_steps
        return _finish(config, folder, model, trainer, ledger, interrupted=interrupted, began=began)
    finally:
        model.close()


def _method_parts(
    config: RunConfig, model: DeviceLM, rows: EncodedRows, journal: Journal
) -> tuple[list[TrainerCallback], Callable[[Sequence[Mapping[str, object]]], dict[str, Tensor]]]:
    """Return what a method brings to Trainer: its callbacks, and what makes batches.

    Raises:
        StorageError: There is no room for what the run would cache.
    """
    if not isinstance(model, BesideBlocks):
        return [KillRevive(config.to_schedule(), journal.on_period)], Collator(0)
    journal.observer.say(describe_cache(model, rows))
    return [LetGo(model, rows, journal.observer.say)], AnnouncingCollator(Collator(0), model)


def _finish(  # noqa: PLR0913  (what a run is made of)
    config: RunConfig,
    folder: RunFolder,
    model: DeviceLM,
    trainer: RunTrainer,
    ledger: Ledger,
    *,
    interrupted: bool,
    began: float,
) -> TrainResult:
    """Write what the run came to, and return it."""
    step, history = trainer.state.global_step, trainer.state.log_history
    model.save_adapter(folder.adapter, config.model)
    active = model.bank.active_numbers if isinstance(model, DeviceModel) else ()
    has_killed = config.to_schedule().changes
    if isinstance(model, DeviceModel) and has_killed:
        model.save_adapter(folder.adapter_all, config.model, killed=True)
        if trainer.eval_dataset and not interrupted and folder.metric(step, _ALL_MODULES_LOSS) is None:
            # A killed module has learned all the same.
            model.bank.activate(model.bank.numbers)
            trainer.evaluate(metric_key_prefix=_ALL_MODULES_LOSS.removesuffix("_loss"))
    folder.write_ledger(ledger)
    return TrainResult(
        adapter=folder.adapter,
        adapter_all=folder.adapter_all if has_killed else None,
        steps=step,
        loss=_last(history, "loss"),
        eval_loss=_last(history, "eval_loss"),
        eval_metrics=_last_metrics(history),
        eval_loss_all_modules=folder.metric(step, _ALL_MODULES_LOSS),
        active=active,
        seconds=time.monotonic() - began,
        traffic_bytes=ledger.totals(),
        codec_error=_record_distortion(folder, ledger, step),
        interrupted=interrupted,
    )


def _say_codecs(config: RunConfig, model: DeviceLM, observer: Observer) -> None:
    """Tell what the codecs save and what they may cost, where anything crosses."""
    if config.cloud is not None and isinstance(model, DeviceModel):
        codecs = Codecs.named(config.codec, config.gradient_codec, stochastic_rounding=config.stochastic_rounding)
        observer.say(f"{describe_codecs(codecs, model.ends.geometry, model.bank.targets, model.bank.frames)}.")
    elif config.cloud is not None and isinstance(model, SideModel):
        geometry, taps = model.ends.geometry, [model.network.tap_width] * len(model.tapped)
        codec = Codecs.named(config.codec).activation
        observer.say(f"{describe_tap_codec(codec, geometry.embedding_width, taps, geometry.final_width)}.")


def _record_distortion(folder: RunFolder, ledger: Ledger, step: int) -> dict[str, dict[str, float]]:
    """Write what rounding on the wire took, if anything was rounded, and return it."""
    error = ledger.distortion.totals()
    if error:
        folder.append_metrics({"step": step, "codec_error": error})
    return error


def _sequence_metrics(prediction: EvalPrediction) -> dict[str, float]:
    outputs_NC, labels_N = prediction.predictions, prediction.label_ids
    return sequence_metrics(cast("NDArray[np.float32]", outputs_NC), cast("NDArray[np.float32]", labels_N))


# Trainer's own sampler; the first releases of transformers 5 have a switch for it.
_BY_LENGTH: dict[str, Any] = (
    {"train_sampling_strategy": "group_by_length"}
    if hasattr(TrainingArguments, "train_sampling_strategy")
    else {"group_by_length": True}
)


def training_arguments(
    config: RunConfig, checkpoints: Path, num_rows: int, *, evaluates: bool = False
) -> TrainingArguments:
    """Return what Trainer is told of a run.

    Args:
        config: The run.
        checkpoints: Folder for them.
        num_rows: How many examples there are to learn from.
        evaluates: Whether there are others to measure on.
    """
    return TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip,
        seed=config.seed,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_every,
        # In steps, even once an epoch: what belongs to a step is then done before that step's checkpoint.
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.eval_every or math.ceil(math.ceil(num_rows / config.batch_size) / config.accumulate),
        prediction_loss_only=config.task in {"causal-lm", "text-to-text"},
        optim="adamw_torch",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to=config.report_to or "none",
        log_level="error",
        **(_BY_LENGTH if config.length_grouped else {}),
    )


def _describe(model: DeviceLM) -> str:
    ends, verified = model.ends, ""
    if isinstance(ends, Ends):
        blocks = str(ends.geometry.num_blocks)
        verified = "" if ends.geometry.family.verified else " (unverified: cut by structure)"
    else:
        blocks = " and ".join(map(str, ends.num_blocks))
    trained = sum(parameter.numel() for parameter in model.parameters())
    head = "" if model.num_labels is None else f" and a head of {model.num_labels}"
    where = ""
    if isinstance(model, DeviceModel):
        where = f"{len(model.bank.numbers)} PEFT modules"
    elif isinstance(model, BesideBlocks):
        where = f"a side network beside {len(model.tapped)} of them"
    return (
        f"{model.config.model_type}{verified}, {blocks} blocks, {trained:,} trained parameters in {where}{head} on "
        "this device"
    )


def _last(history: list[dict[str, float]], name: str) -> float | None:
    return next((row[name] for row in reversed(history) if name in row), None)


def _last_metrics(history: list[dict[str, float]]) -> dict[str, float]:
    """Return what the last evaluation measured beside the loss, without Trainer's own figures."""
    row: dict[str, float] = next((row for row in reversed(history) if "eval_loss" in row), {})
    own = {"loss", "runtime", "samples_per_second", "steps_per_second"}
    measured = {name.removeprefix("eval_"): value for name, value in row.items() if name.startswith("eval_")}
    return {name: value for name, value in measured.items() if name not in own}
