"""Kill and Revive against training all modules, and against choosing modules without it: quality, bytes, seconds.

One device, which is this process, and one cloud, a second process on this machine, over TLS. On a classification task,
with the settings of the DLoRA paper (arXiv 2404.05182): LoRA of rank 8 on query, key and value projections, batches of
16, AdamW at 3e-4 with a cosine, one warm-up epoch and four main ones. For each seed, all variants one after another;
bytes and seconds are those of a mean main epoch, and ratios are to `full` with the same seed.

    python benchmarks/kill_revive.py --data ../shared/data
    python benchmarks/kill_revive.py --data ../shared/data --task qnli --seeds 0 1 2 3 4
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed

import tidelock
from tidelock.data.batch import Collator
from tidelock.device.bank import BankPass
from tidelock.model.smollm2 import fetch_smollm2
from tidelock.run.cloud_process import LoopbackCloud, loopback_cloud
from tidelock.wire.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tidelock.device.kill_revive import PeriodReport
    from tidelock.device.model import DeviceModel

RESULTS = Path(__file__).parent / "results"
LORA: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "k_proj", "v_proj"],
}
# Prompt and the word for each label; each word is one token.
TASKS = {
    "sst2": ("Review: {text_a}\nSentiment:", (" negative", " positive")),
    "mrpc": ("First: {text_a}\nSecond: {text_b}\nSame meaning:", (" no", " yes")),
    "qnli": ("Question: {text_a}\nText: {text_b}\nAnswered:", (" yes", " no")),
}


def main() -> None:
    """Run every variant with every seed, print a table, write the JSON after each run."""
    options = _options()
    torch.set_num_threads(1)  # as a weak device; the cloud has the others
    model = options.model or str(fetch_smollm2(on_progress=print))
    task = Task(options, model)
    runs: list[dict[str, Any]] = []
    with loopback_cloud(model, "--threads", str(options.threads), "--dtype", "bf16") as cloud:
        for seed in options.seeds:
            for variant in variants(options.budgets, seed):
                runs.append({"variant": variant.name, "seed": seed, **_run(variant, seed, task, cloud, options)})
                print(_line(runs[-1]), flush=True)
                _write(options, model, task, runs)
    print(_table(_summary(runs)))


def variants(budgets: Sequence[int], seed: int) -> list[Variant]:
    """Return what is compared: `full`, the schedules at each budget, and the smallest budget with int8.

    `early-kill` at a budget decides as `fixed` does (tests/unit/schedule), and so is one row with it.
    """
    chosen = [Variant("full", tidelock.Schedule())]
    chosen.extend(
        Variant(f"{name} B={budget}", tidelock.Schedule(name, budget=budget, seed=seed))
        for budget in budgets
        for name in ("kill-revive", "fixed", "random")
    )
    smallest = min(budgets)
    int8 = tidelock.Schedule("kill-revive", budget=smallest)
    return [*chosen, Variant(f"kill-revive B={smallest} int8", int8, codec="int8")]


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: As shown.
        schedule: Which modules are active when.
        codec: How numbers cross.
    """

    name: str
    schedule: tidelock.Schedule
    codec: str = "fp32"


class Task:
    """A classification task as causal language modelling: the word of the label follows the prompt.

    Args:
        options: The command's.
        model: Folder of the model, for its tokenizer.
    """

    def __init__(self, options: argparse.Namespace, model: str) -> None:
        prompt, words = TASKS[options.task]
        tokenizer = AutoTokenizer.from_pretrained(model)
        ids = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
        if any(len(word_ids) != 1 for word_ids in ids):
            msg = f"{options.task}: expected words of one token, got {ids}."
            raise SystemExit(msg)
        self.word_ids = [word_ids[0] for word_ids in ids]

        def encode(row: dict[str, Any]) -> dict[str, list[int]]:
            prompt_ids = tokenizer(prompt.format(**row), add_special_tokens=False).input_ids
            word_id = self.word_ids[row["label"]]
            return {"input_ids": [*prompt_ids, word_id], "labels": [-100] * len(prompt_ids) + [word_id]}

        rows = list(_read(options.data / options.task / "train.jsonl.gz"))
        # One draw for all seeds and variants: what differs between runs is the training, not the data.
        random.Random(0).shuffle(rows)
        self.train = [encode(row) for row in rows[: options.examples]]
        test = [encode(row) for row in _read(options.data / options.task / "test.jsonl.gz")][: options.tests]
        self.test = sorted(test, key=lambda row: len(row["input_ids"]))

    def measure(self, model: DeviceModel) -> dict[str, float]:
        """Return the share of test examples whose label's word is the likeliest of the words, and the mean loss."""
        model.eval()
        right, losses = 0, []
        collate = Collator(0)
        with torch.no_grad():
            for first in range(0, len(self.test), 64):
                rows = self.test[first : first + 64]
                logits_BTV = model(**collate(rows)).logits
                for row, logits_TV in zip(rows, logits_BTV, strict=True):
                    logits_V, word_id = logits_TV[len(row["input_ids"]) - 2], row["input_ids"][-1]
                    right += self.word_ids[int(logits_V[self.word_ids].argmax())] == word_id
                    losses.append(-float(logits_V.log_softmax(0)[word_id]))
        return {"accuracy": right / len(self.test), "loss": statistics.fmean(losses)}


@dataclass
class Meter:
    """What one epoch cost, from the end of the one before.

    Attributes:
        ledger: The run's.
        spent: CPU seconds of each call of the PEFT modules; a list, which several threads can add to.
        epochs: What each epoch cost.
    """

    ledger: Ledger
    spent: list[float] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    _before: tuple[float, float, float, dict[str, int]] = (0.0, 0.0, 0.0, {})

    def start(self) -> None:
        """Begin the first epoch."""
        self._before = self._now()

    def on_period(self, report: PeriodReport) -> None:
        """Note an epoch."""
        now, before = self._now(), self._before
        self.epochs.append(
            {
                "seconds": now[0] - before[0],
                "device_cpu_seconds": now[1] - before[1],
                "peft_cpu_seconds": now[2] - before[2],
                "bytes": {kind: size - before[3].get(kind, 0) for kind, size in now[3].items()},
                "active": [module.block for module in report.table.modules if module.active],
                "scores": {module.block: module.score for module in report.table.modules},
            }
        )
        self._before = now

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose CPU time is counted as the PEFT modules'."""

        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  (as the function has it)
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent.append(time.thread_time() - began)

        return call

    def _now(self) -> tuple[float, float, float, dict[str, int]]:
        kinds: dict[str, int] = {}
        for sizes in self.ledger.totals().values():
            for kind, size_bytes in sizes.items():
                kinds[kind] = kinds.get(kind, 0) + size_bytes
        return time.perf_counter(), time.process_time(), sum(self.spent), kinds


def _run(variant: Variant, seed: int, task: Task, cloud: LoopbackCloud, options: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one variant."""
    set_seed(seed)
    ledger = Ledger()
    meter = Meter(ledger)
    model = tidelock.connect(
        cloud.address,
        peft_config=LoraConfig(**LORA),
        token=cloud.token_file.read_text().strip(),
        ca=cloud.certificate,
        codec=variant.codec,
        ledger=ledger,
    )
    before = BankPass.forward, BankPass.backward
    try:
        with tempfile.TemporaryDirectory() as scratch:
            arguments = TrainingArguments(
                output_dir=scratch,
                num_train_epochs=options.epochs,
                per_device_train_batch_size=16,
                learning_rate=3e-4,
                lr_scheduler_type="cosine",
                seed=seed,
                train_sampling_strategy="group_by_length",
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            )
            callback = tidelock.KillRevive(variant.schedule, meter.on_period)
            trainer = Trainer(
                model, arguments, train_dataset=task.train, data_collator=Collator(0), callbacks=[callback]
            )
            BankPass.forward, BankPass.backward = meter.timed(before[0]), meter.timed(before[1])  # type: ignore[method-assign]
            meter.start()
            loss = trainer.train().training_loss
        BankPass.forward, BankPass.backward = before  # type: ignore[method-assign]
        active = task.measure(model)
        model.bank.activate(model.bank.numbers)
        every = task.measure(model) if variant.schedule.changes else active
        return {
            **active,
            **{f"{name}_all_modules": value for name, value in every.items()},
            "train_loss": loss,
            "epochs": meter.epochs,
        }
    finally:
        BankPass.forward, BankPass.backward = before  # type: ignore[method-assign]
        model.close()


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _main_epoch(run: dict[str, Any]) -> dict[str, float]:
    """Return what a mean epoch after the warm-up cost."""
    epochs = run["epochs"][1:]
    return {
        "bytes": statistics.fmean(sum(epoch["bytes"].values()) for epoch in epochs),
        **{
            name: statistics.fmean(epoch[name] for epoch in epochs)
            for name in ("seconds", "device_cpu_seconds", "peft_cpu_seconds")
        },
    }


def _summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each variant: means over seeds with their spread, and ratios to `full` of the same seed."""
    full = {run["seed"]: _main_epoch(run) for run in runs if run["variant"] == "full"}
    rows = []
    for name in dict.fromkeys(run["variant"] for run in runs):
        mine = [run for run in runs if run["variant"] == name]
        row: dict[str, Any] = {"variant": name, "seeds": len(mine)}
        for measure in ("accuracy", "accuracy_all_modules", "loss"):
            values = [run[measure] for run in mine]
            row[measure] = {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(mine) > 1 else 0.0}
        for measure in ("bytes", "peft_cpu_seconds", "device_cpu_seconds", "seconds"):
            ratios = [_main_epoch(run)[measure] / full[run["seed"]][measure] for run in mine]
            row[f"{measure}_to_full"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        rows.append(row)
    return rows


def _line(run: dict[str, Any]) -> str:
    cost = _main_epoch(run)
    return (
        f"seed {run['seed']}  {run['variant']:<24} accuracy {run['accuracy']:.4f} "
        f"(all modules {run['accuracy_all_modules']:.4f}), loss {run['loss']:.4f}  "
        f"main epoch: {cost['bytes'] / 1e6:.1f} MB, PEFT {cost['peft_cpu_seconds']:.2f} s CPU, {cost['seconds']:.1f} s"
    )


def _table(rows: list[dict[str, Any]]) -> str:
    titles = f"{'accuracy (sd)':>18}{'loss (sd)':>18}{'all modules':>13}{'bytes':>8}{'PEFT CPU':>10}{'time':>7}"
    lines = [f"\n{'variant':<24}{titles}"]
    for row in rows:
        accuracy = f"{row['accuracy']['mean']:.4f} ({row['accuracy']['sd']:.4f})"
        loss = f"{row['loss']['mean']:.4f} ({row['loss']['sd']:.4f})"
        lines.append(
            f"{row['variant']:<24}{accuracy:>18}{loss:>18}{row['accuracy_all_modules']['mean']:>13.4f}"
            f"{row['bytes_to_full']['median']:>8.3f}{row['peft_cpu_seconds_to_full']['median']:>10.3f}"
            f"{row['seconds_to_full']['median']:>7.2f}"
        )
    return "\n".join(lines)


def _write(options: argparse.Namespace, model: str, task: Task, runs: list[dict[str, Any]]) -> None:
    result = {
        "benchmark": "kill_revive",
        "model": Path(model).name,
        "task": options.task,
        "examples": {"train": len(task.train), "test": len(task.test)},
        "tokens_per_epoch": sum(len(row["input_ids"]) for row in task.train),
        "epochs": options.epochs,
        "lora": LORA,
        "schedules": {variant.name: asdict(variant.schedule) for variant in variants(options.budgets, 0)},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "grpcio", "tidelock")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "summary": _summary(runs),
        "runs": runs,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kill and Revive against full training and against other choices.")
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("TIDELOCK_DATA"), help="folder with TASK/*.jsonl.gz"
    )
    parser.add_argument("--task", choices=sorted(TASKS), default="sst2")
    parser.add_argument("--model", help="model folder or hub name; SmolLM2-135M-Instruct by default")
    parser.add_argument("--budgets", type=int, nargs="+", default=[16, 8, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--examples", type=int, default=384, help="to learn from")
    parser.add_argument("--tests", type=int, default=872, help="to measure on")
    parser.add_argument("--epochs", type=int, default=5, help="of them the first is the warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of the cloud")
    parser.add_argument("--out", type=Path, default=RESULTS / "kill_revive.json", help="where to write the JSON")
    options = parser.parse_args()
    if options.data is None:
        parser.error("expected --data or TIDELOCK_DATA with the folder of the tasks, got neither")
    options.data = Path(options.data)
    return options


if __name__ == "__main__":
    main()
