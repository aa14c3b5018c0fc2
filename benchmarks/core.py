r"""Cores against LoRA: quality on three tasks, by frames, rank, scale and learning rate.

One process with the blocks in bf16 and the modules in fp32, AdamW with a cosine and no weight decay. AdamW's step does
not grow with the gradient, so that what a core adds after some steps follows from the product of scale and learning
rate: learning rates are LoRA's, and a core's product is what is sought.

- `sst2`: the word for the sentiment follows a review; accuracy among the two words.
- `stsb`: how alike two sentences are, from 0 to 5, by a trained head; Pearson's correlation.
- `arc_easy`: the text of the answer follows a question of school science; accuracy by the likelihood of each choice's
  text, per token.

Runs are those of `SCREEN`, each with seed 0, and those of `FINAL`, with all seeds. The file is written after each run,
and runs that are in it already are not repeated.

    nice -n 19 python benchmarks/core.py --data ../shared/data
    python benchmarks/core.py --show        # the tables of the last results, measuring nothing
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import os
import platform
import random
import statistics
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

import numpy as np
import torch
from peft import LoraConfig
from torch.nn.utils import clip_grad_norm_
from transformers import AutoTokenizer

import tidelock
from tidelock.backbone.local import LocalBackbone
from tidelock.data.batch import Collator
from tidelock.data.encode_sequence import SequenceEncoder
from tidelock.data.example import Example, LabelledText
from tidelock.device.model import DeviceModel
from tidelock.model.checkpoint import Checkpoint
from tidelock.model.ends import Ends, read_config
from tidelock.model.frames import FrameChoice
from tidelock.model.geometry import Place
from tidelock.model.load import ModelChoice, load_cut_model
from tidelock.model.smollm2 import fetch_smollm2
from tidelock.run.metrics import sequence_metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from tidelock.peft.methods import MethodConfig

RESULTS = Path(__file__).parent / "results" / "core.json"
TASKS = ("sst2", "stsb", "arc_easy")
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj"]}
_PROMPT, _WORDS = "Review: {text_a}\nSentiment:", (" negative", " positive")


@final
@dataclass(frozen=True, slots=True)
class Variant:
    """What is trained, and how fast.

    Attributes:
        frames: `seeded` or `svd`; None is LoRA.
        rank: Of the core.
        scale: Of the core.
        learning_rate: Of everything that is trained.
    """

    frames: str | None
    rank: int
    scale: float
    learning_rate: float

    @property
    def name(self) -> str:
        """The name that results use."""
        if self.frames is None:
            return f"lora, lr {self.learning_rate:g}"
        return f"{self.frames}, r {self.rank}, s {self.scale:g}, lr {self.learning_rate:g}"

    def config(self) -> MethodConfig:
        """Return the configuration of the method."""
        if self.frames is None:
            return LoraConfig(**LORA)
        return tidelock.CoreConfig(rank=self.rank, scaling=self.scale, frames=self.frames)


def _lora(learning_rate: float) -> Variant:
    return Variant(None, LORA["r"], LORA["lora_alpha"] / LORA["r"], learning_rate)


SCREEN = (
    *(_lora(rate) for rate in (1e-3, 3e-3)),
    *(Variant(frames, 32, 16.0, 1e-3) for frames in ("seeded", "svd")),
    Variant("seeded", 32, 16.0, 3e-3),
    *(Variant("seeded", 16, scale, 1e-3) for scale in (16.0, 32.0)),
    Variant("seeded", 24, 20.0, 1e-3),
)
FINAL = (_lora(3e-3), *(Variant("seeded", rank, scale, 1e-3) for rank, scale in ((16, 32.0), (24, 20.0), (32, 16.0))))


def main() -> None:
    """Run what is missing and write the JSON after each run; print the tables."""
    options = _options()
    if options.show:
        print(tables(json.loads(options.out.read_text())))
        return
    torch.set_num_threads(options.threads)
    folder = options.model or str(fetch_smollm2(on_progress=print))
    checkpoint = Checkpoint.open(folder)
    # One for all runs: it is frozen.
    backbone = LocalBackbone(load_cut_model(checkpoint, ModelChoice(folder, dtype="bf16")))
    ends = Ends(read_config(checkpoint.folder), checkpoint)
    if options.out.is_file():
        result = json.loads(options.out.read_text())
    else:
        result = {**_setting(options, folder), "svd_cpu_seconds": _svd_cpu_seconds(checkpoint, folder), "runs": []}
    done = {(run["task"], run["variant"], run["seed"]) for run in result["runs"]}
    tasks = {name: _TASK_OF[name](options, AutoTokenizer.from_pretrained(folder)) for name in options.tasks}
    for variant, seed, name in _orders(options):
        if (name, variant.name, seed) not in done:
            run = _run(variant, seed, tasks[name], ends, backbone, options)
            result["runs"].append({"task": name, "variant": variant.name, **asdict(variant), "seed": seed, **run})
            print(_line(result["runs"][-1]), flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps({**result, **summarise(result["runs"])}) + "\n")
    print(tables(json.loads(options.out.read_text())))


def _orders(options: argparse.Namespace) -> Iterator[tuple[Variant, int, str]]:
    """Yield each run: its variant, its seed and its task; those of one seed and task together."""
    first, *others = options.seeds
    for chosen, seed in ((SCREEN, first), *((FINAL, seed) for seed in others)):
        for name, variant in itertools.product(options.tasks, chosen):
            yield variant, seed, name


class Task(ABC):
    """A task: what is learned from, and how good a model is at it.

    Attributes:
        num_labels: As of `tidelock.connect`.
        train: Encoded examples.
        test: What is measured on.
    """

    num_labels: int | None = None
    train: list[dict[str, Any]]
    test: list[dict[str, Any]]

    @abstractmethod
    def measure(self, model: DeviceModel) -> dict[str, float]:
        """Return the `score`, of which more is better, and the `loss`."""


@final
class Words(Task):
    """A review and the word for its sentiment, as causal language modelling."""

    def __init__(self, options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> None:
        self.word_ids = [_ids(tokenizer, word)[0] for word in _WORDS]

        def encode(row: dict[str, Any]) -> dict[str, list[int]]:
            return _continued(_ids(tokenizer, _PROMPT.format(**row)), [self.word_ids[row["label"]]])

        self.train, self.test = _drawn(options, "sst2", encode)

    def measure(self, model: DeviceModel) -> dict[str, float]:
        """Return the share of texts whose label's word is the likeliest of the words, and the mean loss."""
        right, losses = 0, []
        for rows, logits_BTV in _outputs(model, self.test):
            for row, logits_TV in zip(rows, logits_BTV, strict=True):
                logits_V, word_id = logits_TV[len(row["input_ids"]) - 2], row["input_ids"][-1]
                right += self.word_ids[int(logits_V[self.word_ids].argmax())] == word_id
                losses.append(-float(logits_V.log_softmax(0)[word_id]))
        return {"score": right / len(self.test), "loss": statistics.fmean(losses)}


@final
class Likeness(Task):
    """Two sentences and how alike they are, by a head."""

    num_labels = 1

    def __init__(self, options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> None:
        encoder = SequenceEncoder(tokenizer, max_length=512, truncate=True, num_labels=1)

        def encode(row: dict[str, Any]) -> dict[str, Any]:
            content = LabelledText(row["text_a"], row["text_b"], row["label"])
            return dict(encoder.encode(Example("stsb", 1, content)))

        self.train, self.test = _drawn(options, "stsb", encode)

    def measure(self, model: DeviceModel) -> dict[str, float]:
        """Return Pearson's correlation and the mean squared error."""
        found, labels = [], []
        for rows, outputs_B1 in _outputs(model, self.test):
            found.append(outputs_B1.numpy())
            labels += [row["label"] for row in rows]
        outputs_N1, labels_N = np.concatenate(found), np.array(labels, dtype=np.float32)
        error = float(((outputs_N1[:, 0] - labels_N) ** 2).mean())
        return {"score": sequence_metrics(outputs_N1, labels_N)["pearson"], "loss": error}


@final
class Answers(Task):
    """A question and the text of its answer, as causal language modelling."""

    def __init__(self, options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> None:
        def encode(row: dict[str, Any], choice: int | None = None) -> dict[str, Any]:
            answer = row["choices"][row["answer"] if choice is None else choice]
            return _continued(_ids(tokenizer, row["prompt"]), _ids(tokenizer, f" {answer}"))

        def encode_all(row: dict[str, Any]) -> dict[str, Any]:
            return {"answer": row["answer"], "choices": [encode(row, choice) for choice in range(len(row["choices"]))]}

        self.train, _ = _drawn(options, "arc_easy", encode)
        # Each has several texts to run.
        self.test = _drawn(options, "arc_easy", encode_all)[1][: options.tests // 4]

    def measure(self, model: DeviceModel) -> dict[str, float]:
        """Return how often the right text is the likeliest per token, and the mean loss of a token of it."""
        texts = [(number, row) for number, question in enumerate(self.test) for row in question["choices"]]
        texts.sort(key=lambda text: len(text[1]["input_ids"]))
        losses: dict[int, dict[int, float]] = {}
        numbers = iter(texts)
        for rows, logits_BTV in _outputs(model, [row for _, row in texts]):
            for row, logits_TV in zip(rows, logits_BTV, strict=True):
                labels_T = torch.tensor(row["labels"][1:])
                loss = torch.nn.functional.cross_entropy(logits_TV[: len(labels_T)], labels_T)
                losses.setdefault(next(numbers)[0], {})[id(row)] = float(loss)
        of_choices = [
            [losses[number][id(row)] for row in question["choices"]] for number, question in enumerate(self.test)
        ]
        answers = [question["answer"] for question in self.test]
        right = [
            min(range(len(mine)), key=mine.__getitem__) == answer
            for mine, answer in zip(of_choices, answers, strict=True)
        ]
        return {
            "score": statistics.fmean(right),
            "loss": statistics.fmean(mine[answer] for mine, answer in zip(of_choices, answers, strict=True)),
        }


_TASK_OF: dict[str, Callable[[argparse.Namespace, PreTrainedTokenizerBase], Task]] = {
    "sst2": Words,
    "stsb": Likeness,
    "arc_easy": Answers,
}


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return cast("list[int]", tokenizer(text, add_special_tokens=False).input_ids)


def _continued(prompt_ids: list[int], answer_ids: list[int]) -> dict[str, list[int]]:
    return {"input_ids": [*prompt_ids, *answer_ids], "labels": [-100] * len(prompt_ids) + answer_ids}


def _drawn(options: argparse.Namespace, task: str, encode: Any) -> tuple[list[Any], list[Any]]:  # noqa: ANN401
    """Return encoded examples to learn from and to measure on, of those that are short enough."""
    drawn = []
    for split, count in (("train", options.examples), ("test", options.tests)):
        with gzip.open(options.data / task / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        # One draw for all seeds and variants: what differs between runs is the training, not the data.
        random.Random(0).shuffle(rows)
        encoded = (encode(row) for row in rows)
        drawn.append(list(itertools.islice((row for row in encoded if _length(row) <= options.longest), count)))
    return drawn[0], drawn[1]


def _length(row: dict[str, Any]) -> int:
    """Return the tokens of a text, or of the longest of several."""
    return max(len(one["input_ids"]) for one in row.get("choices", [row]))


def _outputs(model: DeviceModel, rows: Sequence[Any]) -> Iterator[tuple[Sequence[Any], torch.Tensor]]:
    model.eval()
    with torch.no_grad():
        for first in range(0, len(rows), 32):
            batch = rows[first : first + 32]
            yield batch, model(**Collator(0)(batch)).logits.float()


def _batches(rows: list[Any], size: int, draw: random.Random) -> Iterable[list[Any]]:
    """Return the batches of an epoch, of texts about as long as each other."""
    order = sorted(draw.sample(rows, len(rows)), key=lambda row: len(row["input_ids"]))
    batches = [order[first : first + size] for first in range(0, len(order), size)]
    draw.shuffle(batches)
    return batches


def _run(
    variant: Variant,
    seed: int,
    task: Task,
    ends: Ends,
    backbone: LocalBackbone,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Train and measure one variant."""
    began = time.perf_counter()
    torch.manual_seed(seed)
    model = DeviceModel(ends, backbone, variant.config(), num_labels=task.num_labels)
    draw = random.Random(seed)
    steps = options.epochs * math.ceil(len(task.train) / options.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=variant.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    losses: list[float] = []
    for _ in range(options.epochs):
        for rows in _batches(task.train, options.batch_size, draw):
            model.train()
            loss = model(**Collator(0)(rows)).loss
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    trained = time.perf_counter()
    measured = task.measure(model)
    return {
        **measured,
        "train_loss": statistics.fmean(losses[-steps // options.epochs :]),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": trained - began,
    }


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a row for each variant with what each task gave, and what became of the aims.

    An aim is that a core's mean score be at least that of LoRA less one standard deviation of it. It is looked at for
    the variants that ran with as many seeds as any, on the tasks where LoRA ran with as many.
    """
    by_name: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for run in runs:
        by_name.setdefault(run["variant"], {}).setdefault(run["task"], []).append(run)
    rows = {
        name: {
            "frames": next(iter(tasks.values()))[0]["frames"],
            "parameters": min(run["parameters"] for mine in tasks.values() for run in mine),
            "tasks": {task: _row(mine) for task, mine in tasks.items()},
        }
        for name, tasks in by_name.items()
    }
    return {"summary": rows, "aims": _aims(rows)}


def _row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    measures = {measure: _mean([run[measure] for run in runs]) for measure in ("score", "loss", "train_loss")}
    return {"seeds": sorted(run["seed"] for run in runs), **measures}


def _mean(values: list[float]) -> dict[str, float]:
    """Return mean and standard deviation; the spread of one value counts as zero."""
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}


def _aims(rows: dict[str, Any]) -> list[dict[str, Any]]:
    aims: list[dict[str, Any]] = []
    for task in TASKS:
        of_task = {name: row["tasks"][task] for name, row in rows.items() if task in row["tasks"]}
        most = max((len(row["seeds"]) for row in of_task.values()), default=0)
        finalists = {name: row for name, row in of_task.items() if len(row["seeds"]) == most > 1}
        for lora, name in itertools.product(finalists, finalists):
            if rows[lora]["frames"] is None and rows[name]["frames"] is not None:
                wanted = finalists[lora]["score"]["mean"] - finalists[lora]["score"]["sd"]
                reached = finalists[name]["score"]["mean"]
                aim = {"task": task, "variant": name, "against": lora}
                aims.append({**aim, "wanted": wanted, "reached": reached, "met": reached >= wanted})
    return aims


def tables(result: dict[str, Any]) -> str:
    """Return the results as the tables of docs/core.md."""
    shown = [["variant", "trained", *(f"`{task}`" for task in TASKS)]]
    for name, row in result["summary"].items():
        cells = [_cell(row["tasks"][task]) if task in row["tasks"] else "" for task in TASKS]
        shown.append([name, f"{row['parameters']:,}", *cells])
    aims = [["aim: mean score, of LoRA's less one sd", "against", "wanted", "reached", ""]]
    for aim in result["aims"]:
        numbers = [f"{aim[key]:.3f}" for key in ("wanted", "reached")]
        what = [f"`{aim['task']}`, {aim['variant']}", aim["against"]]
        aims.append([*what, *numbers, "met" if aim["met"] else "missed"])
    return "\n\n".join(_markdown(rows) for rows in (shown, aims))


def _cell(row: dict[str, Any]) -> str:
    score, loss = row["score"], row["loss"]
    if len(row["seeds"]) == 1:
        return f"{score['mean']:.3f}, loss {loss['mean']:.3f}"
    spread = (f"{one['mean']:.3f} ({one['sd']:.3f})" for one in (score, loss))
    return f"{', loss '.join(spread)}, {len(row['seeds'])} seeds"


def _markdown(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |") for cells in lines)


def _svd_cpu_seconds(checkpoint: Checkpoint, folder: str) -> float:
    """Return the CPU seconds of all frames of the SVD that the variants have."""
    cut = load_cut_model(checkpoint, ModelChoice(folder, dtype="bf16"))
    began = time.process_time()
    for site in cut.geometry.sites:
        if site.place is Place.ATTN:
            cut.frames.at(site, cut.geometry.family.projections, FrameChoice("svd", 32))
    return time.process_time() - began


def _line(run: dict[str, Any]) -> str:
    return (
        f"{run['task']:<9} seed {run['seed']}  {run['variant']:<32} score {run['score']:.4f}, loss {run['loss']:.4f}, "
        f"training {run['train_loss']:.4f}, {run['seconds']:.0f} s"
    )


def _setting(options: argparse.Namespace, model: str) -> dict[str, Any]:
    return {
        "benchmark": "core",
        "model": Path(model).name,
        "lora": LORA,
        "examples": options.examples,
        "tests": options.tests,
        "longest": options.longest,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "tidelock")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cores against LoRA, by frames, rank, scale and learning rate.")
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("TIDELOCK_DATA"), help="folder with TASK/*.jsonl.gz"
    )
    parser.add_argument("--model", help="folder or hub name in the place of SmolLM2-135M-Instruct")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--examples", type=int, default=192, help="of each task, to learn from")
    parser.add_argument("--tests", type=int, default=256, help="to measure on; a quarter of them of arc_easy")
    parser.add_argument("--longest", type=int, default=32, help="tokens of a text; longer ones are left out")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write the JSON")
    parser.add_argument("--show", action="store_true", help="print the tables of --out, and measure nothing")
    options = parser.parse_args()
    if options.data is None and not options.show:
        parser.error("expected --data or TIDELOCK_DATA with the folder of the tasks, got neither")
    options.data = None if options.data is None else Path(options.data)
    return options


if __name__ == "__main__":
    main()
