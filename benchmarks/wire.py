"""Split training over shaped links, each saving added in turn, against `peft` in one process with no network.

A cloud, a device and `peft` are three processes on this machine; between device and cloud is a proxy that delays and
limits bandwidth (tests/support/link.py). SmolLM2 learns to go on with real texts of PIQA, in batches of their real
lengths. Before each variant `peft` takes the same batches, so that what else the machine does hits both; the ratio is
of their times a real token. Of like length are the batches that sorting four times as many texts gives, taken evenly
from the short to the long ones. Bytes are those of the ledger, per real token that is learned from.

    python benchmarks/wire.py --data ../shared/data
    python benchmarks/wire.py --data ../shared/data --links loopback 50/100 --variants naive "core, int8"
    python benchmarks/wire.py --data ../shared/data --links --seconds 30     # only many devices at one cloud
    python benchmarks/wire.py --data ../shared/data --more --seconds 0       # what the last run did not come to
    python benchmarks/wire.py --show        # the tables and the plot of the last results, measuring nothing

What is naive: the whole batch as one pass that waits for every answer, in fp32, with padding as if it were tokens and
the final state of each. One thing is always saved and not measured here: the input gradient of the lowest site. One is
never saved here: what all texts begin with, which benchmarks/prefix.py measures.
Kill and Revive is measured as it is between two decisions, with every fourth module active: 8 of 30, and the lowest,
which is the dearest of all choices. On links of 100 Mbit/s and less the first three variants take one batch only, on
links of 10 Mbit/s and less none.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.support: the same links as in the tests

from tests.support.link import Link
from tests.support.proxy import LinkProxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results" / "wire.json"
SHARED_CORES = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}
TARGETS = ["q_proj", "k_proj", "v_proj"]
LINKS = ("loopback", "20/1000", "50/100", "100/10")
_STRIDE = 4
# So many times as many examples as are learned from, so that there are some of like length.
_POOL = 4
# Of many devices: a model whose ends and modules are so small that 32 devices fit on a machine, and whose blocks are so
# much larger that one device keeps the cloud busy.
_SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4}
_SMALL |= {"num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 128}


@dataclass(frozen=True)
class Variant:
    """What a device does and leaves out.

    Attributes:
        method: `lora`, `core` or `side`.
        codec: Of all tensors.
        padding: Whether padding crosses.
        all_positions: Whether the final states of all tokens cross.
        few: Whether few modules are active.
        rank: Of the cores.
        blocking: One micro-batch a batch; else as many, and as many in flight, as tidelock chooses.
        grouped: Batches of examples of like length.
    """

    method: str = "lora"
    codec: str = "fp32"
    padding: bool = False
    all_positions: bool = False
    few: bool = False
    rank: int = 32
    blocking: bool = True
    grouped: bool = False


VARIANTS: dict[str, Variant] = {
    "naive": Variant(padding=True, all_positions=True),
    "+ no padding": Variant(all_positions=True),
    "+ labelled positions": Variant(),
    "+ bf16": Variant(codec="bf16"),
    "+ int8": Variant(codec="int8"),
    "+ 8 of 30 modules": Variant(codec="int8", few=True),
    "+ in flight": Variant(codec="int8", few=True, blocking=False),
    "+ length-grouped": Variant(codec="int8", few=True, blocking=False, grouped=True),
    "8 of 30 modules, bf16": Variant(codec="bf16", few=True, blocking=False),
    "core, int8": Variant(method="core", codec="int8", blocking=False),
    "core, int8, rank 24": Variant(method="core", codec="int8", rank=24, blocking=False),
    "core, int8, 8 of 30 modules": Variant(method="core", codec="int8", few=True, blocking=False),
    "side, bf16, first epoch": Variant(method="side", codec="bf16", blocking=False),
}
LATER = "side, later epochs"


def main() -> None:
    """Run every variant on every link and write the JSON; print the tables and draw the plot."""
    options = _options()
    if options.worker:
        _work(options)
        return
    if not options.show:
        os.environ.update(SHARED_CORES)
        result = json.loads(options.out.read_text()) if options.more else _setting(options)
        if options.seconds:
            result["tenants"] = _measure_tenants(options)
            _write(options.out, result)
        if options.links:
            _measure_links(options, result)
    result = json.loads(options.out.read_text())
    print(tables(result))
    if result["summary"]:
        draw(result, options.out.with_suffix(".png"))


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result, **summarise(result)}, indent=1) + "\n")


def _measure_links(options: argparse.Namespace, result: dict[str, Any]) -> None:
    # Here and not above: the workers and --show need none of it.
    from tidelock.model.smollm2 import fetch_smollm2  # noqa: PLC0415
    from tidelock.run.cloud_process import loopback_cloud  # noqa: PLC0415

    model = options.model or str(fetch_smollm2(on_progress=print))
    with ExitStack() as stack:
        cloud = stack.enter_context(loopback_cloud(model, "--threads", str(options.threads)))
        access = {"token": cloud.token_file.read_text().strip(), "ca": str(cloud.certificate)}
        peft = stack.enter_context(_Worker("peft", model, options))
        device = stack.enter_context(_Worker("device", model, options))
        peft.ask({"steps": 1})  # warms up
        done = {(run["link"], run["variant"], run["round"]) for run in result["runs"]}
        port = int(cloud.address.rpartition(":")[2])
        for round_ in range(options.rounds):
            for name in options.links:
                link = parse_link(name)
                with nullcontext() if link is None else LinkProxy(port, link=link) as proxy:
                    address = f"grpcs://127.0.0.1:{port if proxy is None else proxy.port}"
                    for title in options.variants:
                        variant = VARIANTS[title]
                        steps = steps_of(variant, link, options.steps)
                        if not steps or (name, title, round_) in done:
                            continue
                        reference = peft.ask({"steps": steps})
                        order = {"steps": steps, "address": address, **access, **asdict(variant)}
                        for taken in device.ask(order)["rows"]:
                            run = {"link": name, "variant": taken.pop("title") or title, "round": round_, **taken}
                            result["runs"].append({**run, "peft": reference})
                            print(_line(result["runs"][-1]), flush=True)
                        _write(options.out, result)


def parse_link(name: str) -> Link | None:
    """Return the link of a name such as 50/100: milliseconds there and back, Mbit/s each way; None is no proxy."""
    if name == "loopback":
        return None
    milliseconds, mbit = (float(part) for part in name.split("/"))
    return Link(delay_seconds=milliseconds / 2000, mbit_per_second=mbit)


def steps_of(variant: Variant, link: Link | None, steps: int) -> int:
    """Return how many batches a variant takes on a link; whole states of all modules in fp32 are fewer on slow ones."""
    mbit = None if link is None else link.mbit_per_second
    if mbit is None or mbit > 100 or variant.codec != "fp32":
        return steps
    return min(steps, 1) if mbit > 10 else 0


class _Worker:
    """A process that takes orders, one a line, and answers each."""

    def __init__(self, worker: str, model: str, options: argparse.Namespace) -> None:
        names = ("data", "task", "batch", "steps", "threads")
        shared = [part for name in names for part in (f"--{name}", str(getattr(options, name)))]
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", worker, "--model", model, *shared],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to an order."""
        stdin, stdout = cast("IO[str]", self._process.stdin), cast("IO[str]", self._process.stdout)
        stdin.write(json.dumps(order) + "\n")
        stdin.flush()
        # A worker that ended early has told why on stderr; its empty line is no JSON.
        answer: dict[str, Any] = json.loads(stdout.readline())
        return answer


def _work(options: argparse.Namespace) -> None:
    """Be a worker."""
    import torch  # noqa: PLC0415

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = _rows(options)
    if options.worker == "peft":
        from peft import LoraConfig, get_peft_model  # noqa: PLC0415
        from transformers import AutoModelForCausalLM  # noqa: PLC0415

        plain = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        model: nn.Module = get_peft_model(plain, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
        step = _stepper(model, lambda batch: model(**batch).loss)
    for line in sys.stdin:
        order = json.loads(line)
        if options.worker == "peft":
            batches = _batches(rows, options.batch, order["steps"], grouped=False)
            tokens = [int(batch["attention_mask"].sum()) for batch in batches]
            print(json.dumps({"seconds": [_timed(step, batch) for batch in batches], "tokens": tokens}), flush=True)
        else:
            print(json.dumps({"rows": list(_split_steps(options, order, rows))}), flush=True)


def _stepper(model: nn.Module, loss_of: Callable[[dict[str, Tensor]], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    """Return a function that takes one optimizer step on a batch."""
    import torch  # noqa: PLC0415

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step(batch: dict[str, Tensor]) -> None:
        loss_of(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _timed(step: Callable[[dict[str, Tensor]], None], batch: dict[str, Tensor]) -> float:
    began = time.perf_counter()
    step(batch)
    return time.perf_counter() - began


def _split_steps(options: argparse.Namespace, order: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[Any]:
    """Yield what each part of a variant took: its title, if it has one of its own, seconds, bytes and tokens."""
    from tests.support.naive import naive_loss  # noqa: PLC0415
    from tidelock.wire.ledger import Ledger  # noqa: PLC0415

    access = {name: order.pop(name) for name in ("address", "token", "ca")}
    steps, ledger = order.pop("steps"), Ledger()
    variant = Variant(**order)
    batches = _batches(rows, options.batch, steps, grouped=variant.grouped)
    with tempfile.TemporaryDirectory() as scratch:
        model = _device_model(options.model, variant, access, ledger, Path(scratch))
        if variant.padding or variant.all_positions:
            naive = {"padding": variant.padding, "all_positions": variant.all_positions}
            step = _stepper(model, lambda batch: naive_loss(model, batch, **naive))
        else:
            step = _stepper(model, lambda batch: model(**batch).loss)
        # Opens the connection, fills caches, and gives a first measure of the link; with rows from the other end.
        step(_batches(rows[::-1], 4, 1, grouped=False)[0])
        for title in (None, LATER) if variant.method == "side" else (None,):
            before, seconds = _crossed(ledger), [_timed(step, batch) for batch in batches]
            tokens = [int(batch["attention_mask"].sum()) for batch in batches]
            crossed = _crossed(ledger) - before
            yield {"title": title, "seconds": seconds, "tokens": tokens, "bytes": crossed}
            if variant.method == "side":
                model.source.release()
        model.close()


def _crossed(ledger: Any) -> int:  # noqa: ANN401
    totals = ledger.totals()
    return sum(size for way in totals.values() for kind, size in way.items() if kind != "model")


def _device_model(folder: str, variant: Variant, access: dict[str, str], ledger: Any, scratch: Path) -> Any:  # noqa: ANN401
    from peft import LoraConfig  # noqa: PLC0415

    import tidelock  # noqa: PLC0415
    from tidelock.run.connect_side import connect_side  # noqa: PLC0415

    where = access["address"]
    shared: dict[str, Any] = {"model": folder, "codec": variant.codec, "ledger": ledger}
    shared |= {"token": access["token"], "ca": access["ca"]}
    if variant.method == "side":
        cache = tidelock.CacheConfig(scratch / "taps", key=scratch / "key")
        return connect_side(where, side_config=tidelock.SideConfig(init="random"), cache=cache, **shared)
    config: Any = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    if variant.method == "core":
        config = tidelock.CoreConfig(rank=variant.rank)
    if variant.blocking:
        shared |= {"micro_batches": 1, "in_flight": 1}
    model = tidelock.connect(where, peft_config=config, share_prefix=False, **shared)
    if variant.few:
        model.bank.activate(model.bank.numbers[::_STRIDE])
    return model


def _rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the prompts of a task with their right answers as token ids, in a fixed order."""
    from transformers import AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with gzip.open(Path(options.data) / options.task / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        read = [json.loads(line) for line in file]
    random.Random(0).shuffle(read)
    rows = []
    for row in read[: _POOL * options.steps * options.batch]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(" " + str(row["choices"][row["answer"]]))["input_ids"]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return rows


def _batches(rows: list[dict[str, Any]], size: int, count: int, *, grouped: bool) -> list[dict[str, Tensor]]:
    """Return the first batches; grouped, some of those that there are by length, evenly from short to long."""
    from tidelock.data.batch import Collator  # noqa: PLC0415

    if grouped:
        rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    parts = [rows[first : first + size] for first in range(0, len(rows), size)]
    if grouped:
        parts = [parts[len(parts) * (2 * number + 1) // (2 * count)] for number in range(count)]
    return [Collator(0)(part) for part in parts[:count]]


def _measure_tenants(options: argparse.Namespace) -> dict[str, Any]:
    """Return how much one device gets of a cloud, and how much many of them at once, each with a token of its own."""
    import torch  # noqa: PLC0415
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    from tidelock.run.cloud_process import loopback_cloud  # noqa: PLC0415

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder, tokens = str(Path(scratch) / "model"), [secrets.token_hex(24) for _ in range(options.tenants)]
        AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **_SMALL)).save_pretrained(folder)
        known = Path(scratch) / "tokens"
        known.touch(mode=0o600)
        known.write_text("".join(f"tenant-{number} {token}\n" for number, token in enumerate(tokens)))
        places = ("--max-sessions", str(4 * options.tenants), "--threads", "1")
        with loopback_cloud(folder, "--tokens", str(known), *places) as cloud:
            devices = [_Device(cloud.address, token, cloud.certificate, folder) for token in tokens]
            alone = devices[0].steps_in(options.seconds)
            counts = [0] * len(devices)

            def run(number: int) -> None:
                counts[number] = devices[number].steps_in(options.seconds)

            threads = [threading.Thread(target=run, args=(number,)) for number in range(len(devices))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    return {
        "devices": len(devices),
        "seconds": options.seconds,
        "model": (
            f"llama of {_SMALL['num_hidden_layers']} blocks of width {_SMALL['hidden_size']}, modules in every "
            f"{_STRIDE}th"
        ),
        "alone": alone,
        "together": counts,
    }


class _Device:
    """One of many devices of a cloud."""

    def __init__(self, address: str, token: str, certificate: Path, folder: str) -> None:
        import torch  # noqa: PLC0415

        from tidelock.wire.ledger import Ledger  # noqa: PLC0415

        variant = Variant(few=True, blocking=False)
        access = {"address": address, "token": token, "ca": str(certificate)}
        model = _device_model(folder, variant, access, Ledger(), Path())
        ids = torch.randint(1, 512, (8, 16))
        self._batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        self._step = _stepper(model, lambda batch: model(**batch).loss)
        self._step(self._batch)

    def steps_in(self, seconds: float) -> int:
        """Return how many steps were begun in so many seconds."""
        end, count = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            self._step(self._batch)
            count += 1
        return count


def summarise(result: dict[str, Any]) -> dict[str, Any]:
    """Return medians over rounds by link and variant, and each aim with what was reached."""
    grouped: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for run in result["runs"]:
        grouped.setdefault(run["link"], {}).setdefault(run["variant"], []).append(run)
    summary = {link: {name: _row(runs) for name, runs in rows.items()} for link, rows in grouped.items()}
    return {"summary": summary, "aims": _aims(summary, result.get("tenants"))}


def _row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [_a_token(run) / _a_token(run["peft"]) for run in runs]
    return {
        "seconds": statistics.median(statistics.mean(run["seconds"]) for run in runs),
        "peft": statistics.median(statistics.mean(run["peft"]["seconds"]) for run in runs),
        "ratio": statistics.median(ratios),
        "ratios": [min(ratios), max(ratios)],
        "bytes_per_token": statistics.median(run["bytes"] / sum(run["tokens"]) for run in runs),
        "steps": sum(len(run["seconds"]) for run in runs),
    }


def _a_token(run: dict[str, Any]) -> float:
    return float(sum(run["seconds"]) / sum(run["tokens"]))


def _aims(summary: dict[str, Any], tenants: dict[str, Any] | None) -> list[dict[str, Any]]:
    aims: list[dict[str, Any]] = []

    def add(aim: str, wanted: float, reached: float, *, at_most: bool) -> None:
        met = reached <= wanted if at_most else reached >= wanted
        aims.append({"aim": aim, "wanted": wanted, "reached": reached, "at_most": at_most, "met": met})

    few, core = "8 of 30 modules, bf16", "core, int8"
    for link, wanted in (("loopback", 1.1), ("50/100", 1.5)):
        rows = summary.get(link, {})
        for name in (core, few):
            if name in rows:
                add(f"{name}: time to peft's, {link}", wanted, rows[name]["ratio"], at_most=True)
        if link != "loopback" and "naive" in rows:
            add(f"naive: time to peft's, {link}", 20, rows["naive"]["ratio"], at_most=False)
    for name in (core, f"{core}, rank 24"):
        rows = next((rows for rows in summary.values() if {"naive", name} <= rows.keys()), None)
        if rows is not None:
            share = rows["naive"]["bytes_per_token"] / rows[name]["bytes_per_token"]
            add(f"naive's bytes a token over those of {name}", 100, share, at_most=False)
    if tenants is not None:
        add("many devices' steps over one's", 0.9, sum(tenants["together"]) / tenants["alone"], at_most=False)
        slowest, fastest = min(tenants["together"]), max(tenants["together"])
        add("slowest of many devices over the fastest", 0.8, slowest / fastest, at_most=False)
    return aims


def _line(run: dict[str, Any]) -> str:
    row = _row([run])
    return (
        f"{run['link']:<9} {run['variant']:<28} {row['seconds']:7.2f} s/step, peft {row['peft']:.2f}, ratio "
        f"{row['ratio']:.2f}, {row['bytes_per_token'] / 1e3:.1f} kB a token"
    )


def tables(result: dict[str, Any]) -> str:
    """Return the results as the tables of docs/wire.md."""
    shown = []
    for link, rows in result["summary"].items():
        table = [["", "s a step", "to peft's", "kB a token", "steps"]]
        for name, row in rows.items():
            numbers = [f"{row['seconds']:.2f}", f"{row['ratio']:.2f}x", f"{row['bytes_per_token'] / 1e3:.1f}"]
            table.append([name, *numbers, str(row["steps"])])
        shown.append(f"{title_of(link)}:\n\n{_markdown(table)}")
    if tenants := result.get("tenants"):
        counts = tenants["together"]
        shown.append(
            f"{tenants['devices']} devices at one cloud for {tenants['seconds']:.0f} s, a {tenants['model']}: "
            f"{sum(counts)} steps together, {min(counts)} the slowest and {max(counts)} the fastest; one device alone "
            f"{tenants['alone']}."
        )
    aims = [["aim", "wanted", "reached", ""]]
    for aim in result["aims"]:
        sign = "at most" if aim["at_most"] else "at least"
        met = "met" if aim["met"] else "missed"
        aims.append([aim["aim"], f"{sign} {aim['wanted']:g}", f"{aim['reached']:.2f}", met])
    return "\n\n".join([*shown, _markdown(aims)])


def title_of(link: str) -> str:
    """Return a link in words."""
    if link == "loopback":
        return "Loopback"
    milliseconds, mbit = link.split("/")
    return f"{milliseconds} ms round trip, {mbit} Mbit/s"


def _markdown(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw each variant's time to peft's, on a logarithmic scale, for every link."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    summary = result["summary"]
    names = list(dict.fromkeys(name for rows in summary.values() for name in rows))
    figure, axes = plt.subplots(figsize=(8, 0.36 * len(names) + 1.6), layout="constrained")
    height = 0.8 / len(summary)
    for number, (link, rows) in enumerate(summary.items()):
        where = [place + number * height for place, name in enumerate(names) if name in rows]
        axes.barh(where, [rows[name]["ratio"] for name in names if name in rows], height, label=title_of(link))
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_xlabel("time of a step, to that of peft in one process")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _setting(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "benchmark": "wire",
        "task": options.task,
        "batch": options.batch,
        "steps": options.steps,
        "rounds": options.rounds,
        "threads": options.threads,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "grpcio", "tidelock")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0],
        "runs": [],
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Split training over shaped links against peft in one process.")
    parser.add_argument("--data", default=os.environ.get("TIDELOCK_DATA"), help="folder with TASK/train.jsonl.gz")
    parser.add_argument("--task", choices=["piqa", "siqa", "boolq_closed", "obqa", "arc_easy"], default="piqa")
    parser.add_argument("--model", help="folder or hub name in the place of SmolLM2-135M-Instruct")
    parser.add_argument("--links", nargs="*", default=LINKS, help="loopback, or round trip in ms / Mbit/s each way")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=16, help="examples in a step")
    parser.add_argument("--steps", type=int, default=2, help="steps of a variant in a round")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of each process")
    parser.add_argument("--tenants", type=int, default=32, help="devices at one cloud")
    parser.add_argument("--seconds", type=float, default=30.0, help="for which they train; 0 leaves them out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write the JSON, and beside it the plot")
    parser.add_argument("--more", action="store_true", help="measure what --out has not, and add it there")
    parser.add_argument("--show", action="store_true", help="print the tables of --out, and measure nothing")
    parser.add_argument("--worker", choices=("peft", "device"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.data is None and options.links and not options.show:
        parser.error("expected --data or TIDELOCK_DATA with the folder of the tasks, got neither")
    return options


if __name__ == "__main__":
    main()
