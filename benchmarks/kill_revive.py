r"""Kill and Revive against training all modules, and against choosing modules without it: quality, bytes, seconds.

One device, which is this process, and one cloud, a second process on this machine, over TLS. On a classification task,
with the settings of the DLoRA paper (arXiv 2404.05182): LoRA of rank 8 on query, key and value projections, batches of
16, AdamW with a cosine, one warm-up epoch and four main ones. The learning rate is not the paper's 3e-4: so few
examples end before that has learned more than the form of an answer.

For each seed, all variants one after another. All modules are active in the warm-up, whatever the schedule, so it is
trained once for a seed and every other run resumes there, which changes no bit. Costs are those of a mean main epoch.

    python benchmarks/kill_revive.py --data ../shared/data
    python benchmarks/kill_revive.py --data ../shared/data --task qnli --seeds 0 1 2 3 4
    python benchmarks/kill_revive.py --data ../shared/data --budgets 4 --examples 512 \
        --out benchmarks/results/kill_revive_512.json
    python benchmarks/kill_revive.py --show        # the tables of the last results, measuring nothing
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import tidelock
from tidelock.data.batch import Collator
from tidelock.data.source import read_examples
from tidelock.device.bank import BankPass
from tidelock.model.smollm2 import fetch_smollm2
from tidelock.run.cloud_process import LoopbackCloud, loopback_cloud
from tidelock.wire.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import TrainerControl, TrainerState

    from tidelock.data.example import LabelledText
    from tidelock.device.kill_revive import PeriodReport
    from tidelock.device.model import DeviceModel

RESULTS = Path(__file__).parent / "results" / "kill_revive.json"
LORA: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "k_proj", "v_proj"],
}
BATCH_SIZE = 16
FIXED = "fixed = early-kill"
MEASURES = ("bytes", "peft_cpu_seconds", "device_cpu_seconds", "seconds")
# Prompt and the word for each label; each word is one token.
TASKS = {
    "sst2": ("Review: {text_a}\nSentiment:", (" negative", " positive")),
    "mrpc": ("First: {text_a}\nSecond: {text_b}\nSame meaning:", (" no", " yes")),
    "qnli": ("Question: {text_a}\nText: {text_b}\nAnswered:", (" yes", " no")),
}


def main() -> None:
    """Run every variant with every seed and write the JSON after each run; print the tables."""
    options = _options()
    if options.show:
        print(tables(json.loads(options.out.read_text())))
        return
    torch.set_num_threads(1)  # as a weak device; the cloud has the others
    model = options.model or str(fetch_smollm2(on_progress=print))
    task = Task(options, model)
    result = _setting(options, model, task)
    with loopback_cloud(model, "--threads", str(options.threads), "--dtype", "bf16") as cloud:
        untrained = _connect(cloud)
        result["untrained"] = task.measure(untrained)
        untrained.close()
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                for variant in variants(options.budgets, seed):
                    run = _run(variant, seed, task, cloud, Path(folder), options)
                    result["runs"].append({"variant": variant.name, "seed": seed, **run})
                    print(_line(result["runs"][-1]), flush=True)
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(json.dumps({**result, **summarise(result["runs"])}) + "\n")
    print(tables(json.loads(options.out.read_text())))


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


def variants(budgets: Sequence[int], seed: int) -> list[Variant]:
    """Return what is compared; the first trains the warm-up of all.

    `early-kill` with a budget decides as `fixed` does (tests/unit/schedule), and is one row with it.
    """
    chosen = [
        Variant("full", tidelock.Schedule()),
        Variant("early-kill at the mean", tidelock.Schedule("early-kill", threshold=1.0)),
    ]
    for budget in budgets:
        of_budget = partial(tidelock.Schedule, budget=budget)
        chosen += [
            Variant(f"kill-revive, B={budget}", of_budget("kill-revive")),
            Variant(f"{FIXED}, B={budget}", of_budget("fixed")),
            Variant(f"random, B={budget}", of_budget("random", seed=seed)),
        ]
    smallest = min(budgets)
    of_smallest = partial(tidelock.Schedule, budget=smallest)
    return [
        *chosen,
        # The paper's score; the others are by this project's default.
        Variant(f"kill-revive, difference, B={smallest}", of_smallest("kill-revive", norm="difference")),
        Variant(f"{FIXED}, difference, B={smallest}", of_smallest("fixed", norm="difference")),
        Variant(f"kill-revive, B={smallest}, int8", of_smallest("kill-revive"), codec="int8"),
    ]


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

        rows = _read(options.data / options.task / "train.jsonl.gz")
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
                "epoch": report.table.period,
                "seconds": now[0] - before[0],
                "device_cpu_seconds": now[1] - before[1],
                "peft_cpu_seconds": now[2] - before[2],
                "bytes": {kind: size - before[3].get(kind, 0) for kind, size in now[3].items()},
                "active": [module.block for module in report.table.modules if module.active],
                "scores": {module.block: float(f"{module.score:.4g}") for module in report.table.modules},
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


class SaveWarmUp(TrainerCallback):
    """Writes a checkpoint one step before the warm-up ends, and so before the first decision.

    Args:
        step: That step.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Save at the step."""
        control.should_save = state.global_step == self.step


def _connect(cloud: LoopbackCloud, codec: str = "fp32", ledger: Ledger | None = None) -> DeviceModel:
    return tidelock.connect(
        cloud.address,
        peft_config=LoraConfig(**LORA),
        token=cloud.token_file.read_text().strip(),
        ca=cloud.certificate,
        codec=codec,
        ledger=ledger,
    )


def _run(
    variant: Variant, seed: int, task: Task, cloud: LoopbackCloud, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Train and measure one variant; resume from the warm-up in the folder, or leave it there."""
    set_seed(seed)
    ledger = Ledger()
    meter = Meter(ledger)
    model = _connect(cloud, variant.codec, ledger)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        seed=seed,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    callbacks: list[TrainerCallback] = [tidelock.KillRevive(variant.schedule, meter.on_period)]
    warm_up = get_last_checkpoint(folder)
    if warm_up is None:
        callbacks.append(SaveWarmUp(-(-len(task.train) // BATCH_SIZE) - 1))
    before = BankPass.forward, BankPass.backward
    try:
        trainer = Trainer(model, arguments, train_dataset=task.train, data_collator=Collator(0), callbacks=callbacks)
        BankPass.forward, BankPass.backward = meter.timed(before[0]), meter.timed(before[1])  # type: ignore[method-assign]
        meter.start()
        trainer.train(resume_from_checkpoint=warm_up)
        active = task.measure(model)
        model.bank.activate(model.bank.numbers)
        every = task.measure(model) if variant.schedule.changes else active
    finally:
        BankPass.forward, BankPass.backward = before  # type: ignore[method-assign]
        model.close()
    return {**active, **{f"{name}_all_modules": value for name, value in every.items()}, "epochs": meter.epochs}


def _read(path: Path) -> list[dict[str, Any]]:
    return [asdict(cast("LabelledText", example.content)) for example in read_examples(str(path))]


def _main_epoch(run: dict[str, Any]) -> dict[str, float]:
    """Return what a mean epoch after the warm-up cost."""
    epochs = [epoch for epoch in run["epochs"] if epoch["epoch"] > 0]
    costs = {name: statistics.fmean(epoch[name] for epoch in epochs) for name in MEASURES[1:]}
    return {"bytes": statistics.fmean(sum(epoch["bytes"].values()) for epoch in epochs), **costs}


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a row for each variant, and what became of the aims.

    Costs are to those of `full` with the same seed: median, smallest, largest. Differences of loss and accuracy are
    to `random` and to `fixed` by the default score, at the same budget and seed: mean and standard error.
    """
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        by_name.setdefault(run["variant"], {})[run["seed"]] = run
    rows = {name: _row(name, mine, by_name) for name, mine in by_name.items()}
    return {"summary": rows, "aims": _aims(rows)}


def _row(name: str, mine: dict[int, dict[str, Any]], by_name: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    row: dict[str, Any] = {"seeds": sorted(mine)}
    for measure in ("accuracy", "loss", "accuracy_all_modules", "loss_all_modules"):
        row[measure] = _mean([run[measure] for run in mine.values()])
    for measure in MEASURES:
        costs = {seed: _main_epoch(run)[measure] for seed, run in mine.items()}
        full = by_name["full"]
        ratios = [cost / _main_epoch(full[seed])[measure] for seed, cost in costs.items() if seed in full]
        row[measure] = statistics.median(costs.values())
        row[f"{measure}_to_full"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    kinds = [epoch["bytes"] for run in mine.values() for epoch in run["epochs"] if epoch["epoch"] > 0]
    row["bytes_by_kind"] = {kind: statistics.fmean(sizes.get(kind, 0) for sizes in kinds) for kind in sorted(kinds[0])}
    budget = _budget_of(name)
    for other in (f"random, B={budget}", f"{FIXED}, B={budget}"):
        shared = sorted(mine.keys() & by_name.get(other, {}).keys())
        if shared and other != name:
            row[f"to {other}"] = {
                measure: _mean([mine[seed][measure] - by_name[other][seed][measure] for seed in shared])
                for measure in ("accuracy", "loss")
            }
    return row


def _budget_of(name: str) -> str:
    return name.partition("B=")[2].partition(",")[0]


def _mean(values: list[float]) -> dict[str, float]:
    """Return mean, standard deviation and standard error; the spread of one value counts as zero."""
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "sd": sd, "se": sd / len(values) ** 0.5}


def _aims(rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each aim at the smallest budget, with what was wanted of it and reached.

    Better than another schedule is what is so by more than two standard errors.
    """
    int8 = next((name for name in rows if name.endswith(", int8")), None)
    if int8 is None:
        return []
    budget = _budget_of(int8)
    full, aims = rows["full"]["accuracy"], []

    def add(variant: str, aim: str, wanted: float, reached: float, *, se: float = 0.0) -> None:
        is_met = reached - wanted > 2 * se if se else reached >= wanted
        aims.append({"variant": variant, "aim": aim, "wanted": wanted, "reached": reached, "se": se, "met": is_met})

    add(int8, "share of full's bytes saved", 0.96, 1 - rows[int8]["bytes_to_full"]["median"])
    for name in (f"kill-revive, B={budget}", f"kill-revive, difference, B={budget}"):
        add(name, "share of full's bytes saved", 0.866, 1 - rows[name]["bytes_to_full"]["median"])
        saved = 1 - rows[name]["peft_cpu_seconds_to_full"]["median"]
        add(name, "share of full's CPU seconds in PEFT modules saved", 0.8, saved)
        add(name, "accuracy, of full's less one sd", full["mean"] - full["sd"], rows[name]["accuracy"]["mean"])
        for other in (f"random, B={budget}", f"{FIXED}, B={budget}"):
            to_other = rows[name][f"to {other}"]
            accuracy, loss = to_other["accuracy"], to_other["loss"]
            add(name, f"accuracy above that of {other}", 0.0, accuracy["mean"], se=accuracy["se"])
            add(name, f"loss below that of {other}", 0.0, -loss["mean"], se=loss["se"])
    return aims


def _line(run: dict[str, Any]) -> str:
    cost = _main_epoch(run)
    return (
        f"seed {run['seed']}  {run['variant']:<36} accuracy {run['accuracy']:.4f} "
        f"(all modules {run['accuracy_all_modules']:.4f}), loss {run['loss']:.4f}  "
        f"main epoch: {cost['bytes'] / 1e6:.1f} MB, PEFT {cost['peft_cpu_seconds']:.2f} s CPU, {cost['seconds']:.1f} s"
    )


def tables(result: dict[str, Any]) -> str:
    """Return the results as the tables of docs/schedules.md."""
    untrained = result["untrained"]
    quality = [
        ["", "loss (sd)", "accuracy (sd)", "with all modules", "less `random`'s (se)", "less `fixed`'s (se)"],
        ["untrained", f"{untrained['loss']:.3f}", f"{untrained['accuracy']:.3f}", "", "", ""],
    ]
    costs = [["", "MB", "bytes", "PEFT CPU", "device CPU", "time (smallest to largest)"]]
    for name, row in result["summary"].items():
        own = [f"{row[measure]['mean']:.3f} ({row[measure]['sd']:.3f})" for measure in ("loss", "accuracy")]
        every = f"{row['loss_all_modules']['mean']:.3f}, {row['accuracy_all_modules']['mean']:.3f}"
        quality.append([name, *own, every, _paired(row, "to random"), _paired(row, "to fixed")])
        ratios = [
            row[f"{measure}_to_full"]["median"] for measure in ("bytes", "peft_cpu_seconds", "device_cpu_seconds")
        ]
        time_ = row["seconds_to_full"]
        spread = f"{time_['median']:.2f} ({time_['min']:.2f} to {time_['max']:.2f})"
        costs.append([name, f"{row['bytes'] / 1e6:.0f}", *(f"{ratio:.3f}" for ratio in ratios), spread])
    aims = [["aim, in a main epoch", "wanted", "reached (se)", ""]]
    for aim in result["aims"]:
        spread = f" ({aim['se']:.3f})" if aim["se"] else ""
        numbers = [f"{aim['wanted']:.3f}", f"{aim['reached']:.3f}{spread}"]
        aims.append([f"{aim['variant']}: {aim['aim']}", *numbers, "met" if aim["met"] else "missed"])
    return "\n\n".join(_markdown(rows) for rows in (quality, costs, aims))


def _paired(row: dict[str, Any], start: str) -> str:
    differences: dict[str, dict[str, float]] = next((row[key] for key in row if key.startswith(start)), {})
    both = (differences[measure] for measure in ("loss", "accuracy") if differences)
    return ", ".join("{mean:+.3f} ({se:.3f})".format(**difference) for difference in both)


def _markdown(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |") for cells in lines)


def _setting(options: argparse.Namespace, model: str, task: Task) -> dict[str, Any]:
    return {
        "benchmark": "kill_revive",
        "model": Path(model).name,
        "task": options.task,
        "examples": {"train": len(task.train), "test": len(task.test)},
        "tokens_per_epoch": sum(len(row["input_ids"]) for row in task.train),
        "epochs": options.epochs,
        "learning_rate": options.learning_rate,
        "batch_size": BATCH_SIZE,
        "lora": LORA,
        "schedules": {variant.name: asdict(variant.schedule) for variant in variants(options.budgets, 0)},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "grpcio", "tidelock")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "notes": (
            "The warm-up is trained once for a seed, by full; in the other runs epoch 0 holds its last step only. "
            "Costs are of a main epoch. Wall time is of a machine that others may have used at the same time."
        ),
        "runs": [],
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kill and Revive against full training and against other choices.")
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("TIDELOCK_DATA"), help="folder with TASK/*.jsonl.gz"
    )
    parser.add_argument("--task", choices=sorted(TASKS), default="sst2")
    parser.add_argument("--model", help="model folder or hub name; SmolLM2-135M-Instruct by default")
    parser.add_argument("--budgets", type=int, nargs="+", default=[16, 8, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--examples", type=int, default=256, help="to learn from")
    parser.add_argument("--tests", type=int, default=512, help="to measure on")
    parser.add_argument("--epochs", type=int, default=5, help="of them the first is the warm-up")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of the cloud")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write the JSON")
    parser.add_argument("--show", action="store_true", help="print the tables of --out, and measure nothing")
    options = parser.parse_args()
    if options.data is None and not options.show:
        parser.error("expected --data or TIDELOCK_DATA with the folder of the tasks, got neither")
    options.data = None if options.data is None else Path(options.data)
    return options


if __name__ == "__main__":
    main()
