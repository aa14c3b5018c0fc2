"""A system prompt that all examples begin with, computed and sent once a micro-batch, against once an example.

SmolLM2 learns real questions and answers (PIQA) in its own chat format, behind a system prompt such as one for a help
desk. Device and cloud are this one process, over TLS on loopback, so that the work of both is counted. A variant takes
the same batches without and with `share_prefix`, in turns. Bytes are those of the ledger, and exact. Seconds are of the
processor (`time.process_time`), with one thread for each computation: they change little when the machine is busy.

    python benchmarks/prefix.py --data ../shared/data
    python benchmarks/prefix.py --data ../shared/data --batch 4 --rounds 1
    python benchmarks/prefix.py --show        # the table of the last results, measuring nothing
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
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "prefix.json"
TOKEN = "loopback-for-the-benchmark"  # noqa: S105  (of a cloud that ends with this process)
SYSTEM = (
    "You are the assistant of a repair café where volunteers help neighbours to mend and to make things at home. "
    "Answer the question in one short sentence of plain words. Prefer a way that is safe, cheap, and works with what "
    "most people have in the kitchen or in the shed. Never advise anything that could hurt someone, damage the thing "
    "that is to be mended, or break the law; say what else could be done instead. Do not repeat the question, do not "
    "explain why, and do not mention that you are an assistant."
)
# Arguments of `tidelock.connect` by the name in the table.
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA, bf16": {"codec": "bf16"},
    "LoRA, bf16, 1 micro-batch": {"codec": "bf16", "micro_batches": 1},
    "core, int8": {"codec": "int8"},
}


def main() -> None:
    """Run every variant without and with sharing, print the table, write the JSON."""
    options = _options()
    if not options.show:
        result = _measure(options)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**result, "summary": summarise(result)}, indent=1) + "\n")
    print(table(json.loads(options.out.read_text())))


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    # Here and not above: --show needs none of it.
    import torch  # noqa: PLC0415

    from tidelock.cloud.server import CloudServer, Listener  # noqa: PLC0415
    from tidelock.cloud.tenants import Tenants  # noqa: PLC0415
    from tidelock.model.load import ModelChoice  # noqa: PLC0415
    from tidelock.model.smollm2 import fetch_smollm2  # noqa: PLC0415
    from tidelock.run.certificates import make_loopback_certificate  # noqa: PLC0415
    from tidelock.wire.address import parse_listen  # noqa: PLC0415

    torch.set_num_threads(1)
    model = options.model or str(fetch_smollm2(on_progress=print))
    batches, prefix = _batches(options, model)
    result = _setting(options, batches, prefix)
    with ExitStack() as stack:
        certificate, key = make_loopback_certificate(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        listener = Listener(parse_listen("127.0.0.1:0", tls=True), certificate, key)
        server = CloudServer(ModelChoice(model), Tenants({"loopback": TOKEN}), listener)
        access = {"where": server.start().url, "model": model, "token": TOKEN, "ca": certificate}
        stack.callback(server.stop, 0)
        for name, settings in VARIANTS.items():
            core_rank = options.core_rank if name.startswith("core") else None
            sides = {share: _Side({**access, **settings, "share_prefix": share}, core_rank) for share in (False, True)}
            for number in range(options.rounds):
                for share, side in sides.items():
                    taken = side.run(batches, warm_up=not number)
                    result["runs"].append({"variant": name, "shared": share, "round": number, **taken})
                    print(name, "shared" if share else "apart", taken, flush=True)
            for side in sides.values():
                side.model.close()
    return result


class _Side:
    """A device that trains, and what it takes."""

    def __init__(self, settings: dict[str, Any], core_rank: int | None) -> None:
        import torch  # noqa: PLC0415
        from peft import LoraConfig  # noqa: PLC0415

        import tidelock  # noqa: PLC0415
        from tidelock.wire.ledger import Ledger  # noqa: PLC0415

        torch.manual_seed(0)
        config: Any = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"])
        if core_rank is not None:
            config = tidelock.CoreConfig(rank=core_rank)
        self._ledger = Ledger()
        # One pass at a time: the seconds are of the processor.
        self.model = tidelock.connect(**settings, peft_config=config, ledger=self._ledger, in_flight=1)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def run(self, batches: list[dict[str, Tensor]], *, warm_up: bool) -> dict[str, Any]:
        """Take a step on each batch; return the processor's seconds of all, the bytes, the tokens and the losses."""
        if warm_up:
            self._step(batches[0])
        before, crossed, began = self._ledger.tokens(), self._crossed(), time.process_time()
        losses = [self._step(batch) for batch in batches]
        seconds = time.process_time() - began
        tokens = self._ledger.tokens()["trained"] - before.get("trained", 0)
        return {"seconds": seconds, "bytes": self._crossed() - crossed, "tokens": tokens, "losses": losses}

    def _step(self, batch: Mapping[str, Tensor]) -> float:
        loss = self.model(**batch).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())

    def _crossed(self) -> int:
        ways = self._ledger.totals().values()
        return sum(size for way in ways for kind, size in way.items() if kind not in {"control", "model"})


def _batches(options: argparse.Namespace, model: str) -> tuple[list[dict[str, Tensor]], int]:
    """Return batches of a task's questions with their right answers as chats, and how long the system prompt is."""
    from transformers import AutoTokenizer  # noqa: PLC0415

    from tidelock.data.batch import Collator  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(model)
    with gzip.open(Path(options.data) / options.task / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        read = [json.loads(line) for line in file]
    random.Random(0).shuffle(read)
    rows = []
    for row in read[: options.batch * options.steps]:
        asked = [{"role": "system", "content": options.system}, {"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tokenizer(f"{row['choices'][row['answer']]}<|im_end|>\n", add_special_tokens=False)["input_ids"]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    parts = [rows[first : first + options.batch] for first in range(0, len(rows), options.batch)]
    pairs = zip(*(row["input_ids"] for row in rows), strict=False)
    prefix = next(place for place, tokens in enumerate(pairs) if len(set(tokens)) > 1)
    return [Collator(0)(part) for part in parts], prefix


def summarise(result: dict[str, Any]) -> dict[str, Any]:
    """Return for each variant what sharing leaves of bytes, tokens and seconds, and by how much the loss differs."""
    grouped: dict[str, dict[bool, list[dict[str, Any]]]] = {}
    for run in result["runs"]:
        grouped.setdefault(run["variant"], {}).setdefault(run["shared"], []).append(run)
    return {name: _row(sides[False], sides[True]) for name, sides in grouped.items()}


def _row(apart: list[dict[str, Any]], shared: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [ours["seconds"] / theirs["seconds"] for ours, theirs in zip(shared, apart, strict=True)]
    # Of the first step: after it the weights have learned from rounded gradients.
    loss, other = apart[0]["losses"][0], shared[0]["losses"][0]
    return {
        "bytes": shared[0]["bytes"] / apart[0]["bytes"],
        "megabytes": [run["bytes"] / len(run["losses"]) / 1e6 for run in (apart[0], shared[0])],
        "tokens": shared[0]["tokens"] / apart[0]["tokens"],
        "seconds": statistics.median(ratios),
        "seconds_range": [min(ratios), max(ratios)],
        "loss_difference": abs(other - loss) / loss,
    }


def table(result: dict[str, Any]) -> str:
    """Return the results as the table of docs/wire.md."""
    setting = (
        f"SmolLM2-135M, {result['batch']} chats of {result['tokens_of_an_example']:.0f} tokens in the mean a step, of "
        f"which the first {result['prefix']} are the same; one thread, {result['rounds']} rounds:"
    )
    head = "| | MB a step, not shared | shared | ratio | ratio of the processor's time (smallest to largest) |"
    lines = [setting, "", head, "| --- | --- | --- | --- | --- |"]
    for name, row in result["summary"].items():
        apart, shared = row["megabytes"]
        low, high = row["seconds_range"]
        time_ = f"{row['seconds']:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {name} | {apart:.1f} | {shared:.1f} | {row['bytes']:.2f} | {time_} |")
    return "\n".join(lines)


def _setting(options: argparse.Namespace, batches: list[dict[str, Tensor]], prefix: int) -> dict[str, Any]:
    return {
        "benchmark": "prefix",
        "task": options.task,
        "batch": options.batch,
        "steps": options.steps,
        "rounds": options.rounds,
        "threads": 1,
        "prefix": prefix,
        "tokens_of_an_example": statistics.mean(
            float(batch["attention_mask"].sum(1).float().mean()) for batch in batches
        ),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "grpcio", "tidelock")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0],
        "runs": [],
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A system prompt computed and sent once, against once an example.")
    parser.add_argument("--data", default=os.environ.get("TIDELOCK_DATA"), help="folder with TASK/train.jsonl.gz")
    parser.add_argument("--task", choices=["piqa", "siqa", "obqa", "arc_easy"], default="piqa")
    parser.add_argument("--model", help="folder or hub name in the place of SmolLM2-135M-Instruct")
    parser.add_argument("--system", default=SYSTEM, help="what all chats begin with")
    parser.add_argument("--core-rank", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8, help="examples in a step")
    parser.add_argument("--steps", type=int, default=1, help="steps in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write the JSON")
    parser.add_argument("--show", action="store_true", help="print the table of --out, and measure nothing")
    options = parser.parse_args()
    if options.data is None and not options.show:
        parser.error("expected --data or TIDELOCK_DATA with the folder of the tasks, got neither")
    return options


if __name__ == "__main__":
    main()
