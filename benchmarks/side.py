"""Side networks, with and without the activation cache, against full fine-tuning, LoRA and serial adapters.

Same model, data, batches and threads; each variant is a process of its own, whose memory is sampled while it trains.
SmolLM2 learns a real task with a head for whole texts. T5-Base and BART-Large are their geometry with random weights,
which serve for time and memory. The bytes are those of a real cloud, a second process on this machine.

    python benchmarks/side.py --data ../shared/data
    python benchmarks/side.py --data ../shared/data --models smollm2 --examples 2048 --seeds 0 1 2
    python benchmarks/side.py --data ../shared/data --examples 64 --tests 0 --pairs 8 --crossing 32  # what is kept
    python benchmarks/side.py --show        # the tables of the last results, measuring nothing
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
    set_seed,
)

import tidelock
from tidelock.data.batch import Collator
from tidelock.data.encode_sequence import SequenceEncoder
from tidelock.data.source import read_examples
from tidelock.model.smollm2 import fetch_smollm2
from tidelock.run.cloud_process import loopback_cloud
from tidelock.run.connect_side import connect_side
from tidelock.wire.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tidelock.device.beside_blocks import BesideBlocks

RESULTS = Path(__file__).parent / "results" / "side.json"
VARIANTS = ("full", "lora", "adapter", "side", "side, cached")
# Of decoders LoRA is on the attention, as everywhere here; of T5 and BART too, in both stacks.
_LORA_TARGETS = {"smollm2": ["q_proj", "k_proj", "v_proj"], "t5-base": ["q", "k", "v"]}
_LORA_TARGETS["bart-large"] = _LORA_TARGETS["smollm2"]
# By variant: full fine-tuning moves weights that know something already.
_RATES = {"full": 3e-5, "lora": 1e-3, "adapter": 1e-3, "side": 3e-3, "side, cached": 3e-3}
_T5 = {"decoder_start_token_id": 0}
_GEOMETRIES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5-base": ("t5", {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12, **_T5}),
    "bart-large": ("bart", {}),  # its defaults are those of BART-Large
    # For the test of this file.
    "tiny-t5": ("t5", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64, **_T5}),
}
_LORA_TARGETS["tiny-t5"] = _LORA_TARGETS["t5-base"]


def main() -> None:
    """Run every variant of every model and write the JSON; print the tables."""
    options = _options()
    if options.worker is not None:
        print(json.dumps(asdict(_work(Order(**json.loads(options.worker))))))
        return
    if options.show:
        print(tables(json.loads(options.out.read_text())))
        return
    result = _setting(options)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: _folder_of(name, options, Path(scratch)) for name in options.models}
        for name, folder in folders.items():
            for seed in options.seeds if name == "smollm2" else options.seeds[:1]:
                for variant in options.variants:
                    if variant == "adapter" and name != "smollm2":
                        continue  # tidelock's serial adapters are for decoders
                    order = Order(name, variant, seed, str(folder), *_sizes(name, options), options.threads)
                    run = _in_a_process(order)
                    result["runs"].append({"model": name, "variant": variant, "seed": seed, **run})
                    print(_line(result["runs"][-1]), flush=True)
                    _write(options.out, result)
        if "smollm2" in folders and options.crossing:
            result["bytes"] = _bytes(str(folders["smollm2"]), options)
    _write(options.out, result)
    print(tables(json.loads(options.out.read_text())))


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result, **summarise(result)}) + "\n")


@dataclass(frozen=True)
class Order:
    """One run, as its process is told of it.

    Attributes:
        model: Name of the model.
        variant: What is trained.
        seed: Of all draws.
        folder: Of the model.
        data: Folder of the task; "" for random tokens.
        examples: To learn from.
        tests: To measure on.
        batch_size: Examples in a step.
        epochs: Passes over them.
        threads: CPU threads.
    """

    model: str
    variant: str
    seed: int
    folder: str
    data: str
    examples: int
    tests: int
    batch_size: int
    epochs: int
    threads: int


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        seconds: Of each epoch.
        rss_bytes: The process's largest resident memory in each epoch.
        gpu_bytes: Likewise allocated by torch on the GPU, where everything then is; none without one.
        import_bytes: Its resident memory before the model was loaded.
        trained: Parameters that learn.
        accuracy: Share of the test examples that are right; None for random weights.
    """

    seconds: list[float]
    rss_bytes: list[int]
    gpu_bytes: list[int]
    import_bytes: int
    trained: int
    accuracy: float | None


def _in_a_process(order: Order) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", json.dumps(asdict(order))]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


class PeakMemory:
    """Samples this process's resident memory in a thread; Linux's own high-water mark cannot be set back."""

    def __init__(self) -> None:
        self._peak = 0
        self._process = psutil.Process()
        threading.Thread(target=self._watch, daemon=True).start()

    def take(self) -> int:
        """Return the largest size since the last call, in bytes."""
        peak, self._peak = max(self._peak, self._size()), 0
        return peak

    def _watch(self) -> None:
        while True:
            self._peak = max(self._peak, self._size())
            time.sleep(0.02)

    def _size(self) -> int:
        return int(self._process.memory_info().rss)


def _work(order: Order) -> Outcome:
    torch.set_num_threads(order.threads)
    memory = PeakMemory()
    import_bytes = memory.take()
    set_seed(order.seed)
    rows, tests = _rows(order)
    with tempfile.TemporaryDirectory() as scratch:
        model = _model(order, Path(scratch))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=_RATES[order.variant], weight_decay=0.0, fused=True)
        steps = order.epochs * -(-len(rows) // order.batch_size)
        schedule = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
        seconds, rss, gpu = [], [], []
        draw = random.Random(order.seed)
        for _ in range(order.epochs):
            draw.shuffle(rows)
            memory.take()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            model.train()
            for batch in _batches(rows, order.batch_size, model):
                loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
                loss.backward()
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()
                gpu.append(torch.cuda.max_memory_allocated())
            seconds.append(time.perf_counter() - began)
            rss.append(memory.take())
            if order.variant == "side, cached":
                model.source.release()
        count = sum(parameter.numel() for parameter in trained)
        return Outcome(seconds, rss, gpu, import_bytes, count, _accuracy(model, tests, device) if tests else None)


def _batches(rows: list[dict[str, Any]], size: int, model: Any) -> Iterator[dict[str, Tensor]]:  # noqa: ANN401
    """Yield batches; the next one is announced to a model that reads taps ahead while this one is learned from."""
    batches = [Collator(0)(rows[first : first + size]) for first in range(0, len(rows), size)]
    for number, batch in enumerate(batches):
        if hasattr(model, "announce") and number + 1 < len(batches):
            model.announce(batches[number + 1])
        yield batch


def _accuracy(model: Any, rows: list[dict[str, Any]], device: str) -> float:  # noqa: ANN401  (of several kinds)
    model.eval()
    right = 0
    with torch.no_grad():
        for first in range(0, len(rows), 32):
            batch = Collator(0)(rows[first : first + 32])
            logits_BC = model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits
            right += int((logits_BC.argmax(1).cpu() == batch["labels"]).sum())
    return right / len(rows)


def _model(order: Order, scratch: Path) -> Any:  # noqa: ANN401  (of several kinds)
    """Return what is trained: a model that takes a batch and returns a loss."""
    is_decoder = order.model == "smollm2"
    shared: dict[str, Any] = {"model": order.folder, "task": "text-to-text"}
    if is_decoder:
        shared |= {"task": "classification", "num_labels": 2}
    if order.variant.startswith("side"):
        return _side(order, shared, scratch)
    if order.variant == "adapter":
        return tidelock.connect("local", peft_config=tidelock.AdapterConfig(bottleneck=128), **shared)
    if is_decoder:
        plain = AutoModelForSequenceClassification.from_pretrained(
            order.folder, num_labels=2, pad_token_id=0, dtype=torch.float32
        )
    else:
        plain = AutoModelForSeq2SeqLM.from_pretrained(order.folder, dtype=torch.float32)
    if order.variant == "full":
        return plain
    task = "SEQ_CLS" if is_decoder else "SEQ_2_SEQ_LM"
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=_LORA_TARGETS[order.model], task_type=task)
    return get_peft_model(plain, lora)


def _side(order: Order, shared: dict[str, Any], scratch: Path) -> BesideBlocks:
    # PAC's T5 adds nothing of the backbone's last state; random weights need no start out of them.
    config = tidelock.SideConfig()
    if order.model != "smollm2":
        config = tidelock.SideConfig(output="alone", zero_upsample=False)
    cache = tidelock.CacheConfig(scratch / "taps", key=scratch / "key") if "cached" in order.variant else None
    return connect_side("local", side_config=config, cache=cache, **shared)


def _rows(order: Order) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the examples to learn from, and those to measure on."""
    if order.data:
        tokenizer = AutoTokenizer.from_pretrained(order.folder)
        limit = AutoConfig.from_pretrained(order.folder).max_position_embeddings
        encoder = SequenceEncoder(tokenizer, max_length=limit, truncate=True, num_labels=2)
        rows, tests = (
            [dict(row) for row in encoder.encode_all(read_examples(str(Path(order.data) / f"{name}.jsonl.gz")))]
            for name in ("train", "test")
        )
        # One draw for all seeds and variants: what differs between runs is the training, not the data.
        random.Random(0).shuffle(rows)
        return rows[: order.examples], tests[: order.tests]
    vocabulary = AutoConfig.from_pretrained(order.folder).vocab_size
    draw = random.Random(0)
    pairs = [
        {
            "input_ids": [draw.randrange(3, vocabulary) for _ in range(128)],
            "labels": [draw.randrange(3, vocabulary) for _ in range(3)],
        }
        for _ in range(order.examples)
    ]
    return pairs, []


def _folder_of(name: str, options: argparse.Namespace, scratch: Path) -> Path:
    """Return a model's folder; a geometry's is made, with random weights."""
    if name == "smollm2":
        return Path(options.model or fetch_smollm2(on_progress=print))
    kind, settings = _GEOMETRIES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(scratch / name)
    return scratch / name


def _sizes(name: str, options: argparse.Namespace) -> tuple[str, int, int, int, int]:
    """Return data, examples, tests, batch size and epochs of a model's runs."""
    if name == "smollm2":
        return str(options.data / options.task), options.examples, options.tests, 16, options.epochs
    return "", options.pairs, 0, 4, options.epochs


def _bytes(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what crosses for each token: in an epoch of LoRA with all modules, and where each example crosses once."""
    order = Order("smollm2", "lora", 0, folder, *_sizes("smollm2", options), options.threads)
    rows = _rows(order)[0][: options.crossing]
    batches = list(_batches(rows, 16, None))
    crossed: dict[str, Any] = {"tokens": sum(len(row["input_ids"]) for row in rows), "examples": len(rows)}
    shared: dict[str, Any] = {"model": folder, "task": "classification", "num_labels": 2}
    with loopback_cloud(folder, "--threads", str(options.threads)) as cloud:
        access: dict[str, Any] = {"token": cloud.token_file.read_text().strip(), "ca": cloud.certificate}
        ledger = Ledger()
        lora = LoraConfig(r=8, target_modules=_LORA_TARGETS["smollm2"])
        model = tidelock.connect(cloud.address, peft_config=lora, ledger=ledger, **access, **shared)
        for batch in batches:
            model(**batch).loss.backward()
        model.close()
        crossed["lora, fp32"] = _crossed(ledger)
        width = model.ends.geometry.block_width // 8
        for name, codec, tap_width in (
            ("side, fp32", "fp32", None),
            ("side, bf16", "bf16", None),
            ("side, fp32, taps of d/8", "fp32", width),
        ):
            ledger = Ledger()
            config = tidelock.SideConfig(init="random", tap_width=tap_width)
            beside = connect_side(cloud.address, side_config=config, codec=codec, ledger=ledger, **access, **shared)
            for batch in batches:
                beside.read_taps(batch)
            beside.close()
            crossed[name] = _crossed(ledger)
    return crossed


def _crossed(ledger: Ledger) -> dict[str, int]:
    """Return bytes by kind, both ways; what a connection costs once is left out."""
    totals = ledger.totals()
    return {kind: size for way in totals.values() for kind, size in way.items() if kind not in {"control", "model"}}


def summarise(result: dict[str, Any]) -> dict[str, Any]:
    """Return a row for each model and variant, and what became of the aims."""
    rows: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(run["model"] for run in result["runs"]):
        mine = [run for run in result["runs"] if run["model"] == name]
        rows[name] = {
            variant: _row([run for run in mine if run["variant"] == variant])
            for variant in dict.fromkeys(run["variant"] for run in mine)
        }
    return {"summary": rows, "shares": _shares(result), "aims": _aims(rows, _shares(result))}


def _row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means over seeds; an epoch is one after the first, all of them together are `total`."""
    accuracies = [run["accuracy"] for run in runs if run["accuracy"] is not None]
    return {
        "trained": runs[0]["trained"],
        "first_epoch": _mean([run["seconds"][0] for run in runs]),
        "epoch": _mean([_mean(run["seconds"][1:]) for run in runs]),
        "total": _mean([sum(run["seconds"]) for run in runs]),
        "rss": max(max(run["rss_bytes"][1:]) for run in runs),
        "rss_above_import": max(max(run["rss_bytes"][1:]) - run["import_bytes"] for run in runs),
        "gpu": max((max(run["gpu_bytes"][1:]) for run in runs if run["gpu_bytes"]), default=None),
        "accuracy": _mean(accuracies) if accuracies else None,
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _shares(result: dict[str, Any]) -> dict[str, float]:
    """Return bytes over five epochs, each example once against LoRA's in fp32."""
    crossed = result.get("bytes")
    if not crossed:
        return {}
    lora = 5 * sum(crossed["lora, fp32"].values())
    return {name: sum(kinds.values()) / lora for name, kinds in crossed.items() if name.startswith("side")}


def _aims(rows: dict[str, dict[str, Any]], shares: dict[str, float]) -> list[dict[str, Any]]:
    """Return each aim with what was wanted of it and reached, for each model that has the variants."""
    aims: list[dict[str, Any]] = []

    def add(model: str, aim: str, wanted: float, reached: float, *, at_most: bool = False) -> None:
        met = reached <= wanted if at_most else reached >= wanted
        aims.append({"model": model, "aim": aim, "wanted": wanted, "reached": reached, "met": met})

    for name, row in rows.items():
        if not {"full", "lora", "side, cached"} <= row.keys():
            continue
        full, lora, cached = row["full"], row["lora"], row["side, cached"]
        add(name, "a LoRA epoch's time over a cached epoch's", 10, lora["epoch"] / cached["epoch"])
        add(name, "LoRA's time for all epochs over the cached side's", 3, lora["total"] / cached["total"])
        measures = [("rss", "peak memory"), ("rss_above_import", "peak memory above the libraries'")]
        # On a GPU the model is there, and what is left in the process are the libraries.
        for measure, shown in [("gpu", "peak GPU memory")] if cached["gpu"] else measures:
            add(name, f"{shown} of cached epochs, saved of full's", 0.85, 1 - cached[measure] / full[measure])
            add(name, f"{shown} of cached epochs, saved of LoRA's", 0.7, 1 - cached[measure] / lora[measure])
        if cached["accuracy"] is not None:
            add(name, "accuracy, of LoRA's less one point", lora["accuracy"] - 0.01, cached["accuracy"])
    for share, wanted in (("side, bf16", 0.02), ("side, fp32, taps of d/8", 0.006)):
        if share in shares:
            add("smollm2", f"bytes of {share}, of LoRA's over five epochs", wanted, shares[share], at_most=True)
    return aims


def _line(run: dict[str, Any]) -> str:
    accuracy = "" if run["accuracy"] is None else f"  accuracy {run['accuracy']:.4f}"
    seconds = ", ".join(f"{value:.1f}" for value in run["seconds"])
    memory = ", ".join(f"{value / 1e6:.0f}" for value in run["rss_bytes"])
    return f"{run['model']:<11} seed {run['seed']}  {run['variant']:<13} epochs {seconds} s, {memory} MB{accuracy}"


def tables(result: dict[str, Any]) -> str:
    """Return the results as the tables of docs/side.md."""
    shown = []
    for name, rows in result["summary"].items():
        lora = rows.get("lora")
        table = [
            ["", "trained", "first epoch", "later epoch", "all", "peak memory", "above the libraries'", "accuracy"]
        ]
        measures = ["rss", "rss_above_import"]
        if any(row["gpu"] for row in rows.values()):
            table[0].insert(-1, "on the GPU")
            measures.append("gpu")
        for variant, row in rows.items():
            times = [row[measure] / lora[measure] for measure in ("first_epoch", "epoch", "total")] if lora else []
            memory = [f"{row[measure] / 1e6:,.0f} MB" for measure in measures]
            accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.3f}"
            table.append([variant, f"{row['trained']:,}", *(f"{ratio:.3f}" for ratio in times), *memory, accuracy])
        shown.append(f"{name}; times are to LoRA's:\n\n{_markdown(table)}")
    if result["shares"]:
        crossed = result["bytes"]
        tokens = f"{crossed['examples']} texts of {crossed['tokens'] / crossed['examples']:.0f} tokens, each once"
        table = [[tokens, "of LoRA's bytes over five epochs in fp32"]]
        table += [[name, f"{share:.2%}"] for name, share in result["shares"].items()]
        shown.append(_markdown(table))
    aims = [["model", "aim", "wanted", "reached", ""]]
    for aim in result["aims"]:
        digits = 4 if aim["wanted"] < 0.1 else 2
        numbers = [f"{aim[key]:.{digits}f}" for key in ("wanted", "reached")]
        aims.append([aim["model"], aim["aim"], *numbers, "met" if aim["met"] else "missed"])
    return "\n\n".join([*shown, _markdown(aims)])


def _markdown(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |") for cells in lines)


def _setting(options: argparse.Namespace) -> dict[str, Any]:
    names = ("torch", "transformers", "peft", "tidelock")
    return {
        "benchmark": "side",
        "task": options.task,
        "examples": options.examples,
        "tests": options.tests,
        "pairs": options.pairs,
        "epochs": options.epochs,
        "learning_rates": _RATES,
        "threads": options.threads,
        "versions": {name: version(name) for name in names},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "notes": (
            "Each variant in a process of its own. Memory is the largest resident size in the epochs after the first, "
            "sampled every 20 ms; accuracy is of the end. T5-Base and BART-Large have random weights, sources of 128 "
            "tokens and targets of 3. Time is of a machine that others may have used at the same time."
        ),
        "runs": [],
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Side networks against full fine-tuning, LoRA and adapters.")
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("TIDELOCK_DATA"), help="folder with TASK/*.jsonl.gz"
    )
    parser.add_argument("--task", choices=["mrpc", "qnli", "sst2"], default="mrpc")
    parser.add_argument(
        "--models", nargs="+", choices=["smollm2", *_GEOMETRIES], default=["smollm2", "t5-base", "bart-large"]
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--model", help="folder or hub name in the place of SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--examples", type=int, default=512, help="of the task, to learn from")
    parser.add_argument("--tests", type=int, default=512, help="to measure on")
    parser.add_argument("--pairs", type=int, default=16, help="of random tokens, for random weights")
    parser.add_argument("--crossing", type=int, default=64, help="examples whose bytes are counted; 0 counts none")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write the JSON")
    parser.add_argument("--show", action="store_true", help="print the tables of --out, and measure nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.data is None and "smollm2" in options.models and not (options.show or options.worker):
        parser.error("expected --data or TIDELOCK_DATA with the folder of the tasks, got neither")
    options.data = None if options.data is None else Path(options.data)
    return options


if __name__ == "__main__":
    main()
