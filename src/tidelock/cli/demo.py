"""`tidelock demo`: the whole story on this machine."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tidelock.cli.output import Output
from tidelock.cli.progress import StepProgress
from tidelock.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from tidelock.run.demo import DemoResult

# In a checkout, where the examples are.
_HOUSEHOLD = Path(__file__).parents[3] / "examples" / "household.jsonl"
_SHOWN_ANSWERS = 8
_PRIVACY = (
    "What the cloud could read: text, labels and adapter were never sent, but whoever runs a cloud holds the same "
    "public weights and can look the text up from the embeddings that it gets (99.9 % of the tokens of this model), so "
    "use one that you run or trust (docs/privacy.md)."
)


def command(
    data: Annotated[Path, typer.Option(help="The household facts.")] = _HOUSEHOLD,
    runs: Annotated[Path, typer.Option(help="Folder for the run.")] = Path("runs"),
    *,
    json: Annotated[bool, typer.Option("--json", help="Print JSON objects only.")] = False,
) -> None:
    """Fine-tune a small model on invented facts between a cloud process and this device, and ask it about them."""
    output = Output(json=json)
    with StepProgress(output) as progress:
        # Loads torch, which --help must not wait for.
        run_demo = import_module("tidelock.run.demo").run_demo
        output.quiet_libraries()
        result: DemoResult = run_demo(progress, data, runs)
    before, after = result.exact_match(result.before), result.exact_match(result.after)
    values = {
        "exact_match_before": before,
        "exact_match_after": after,
        "traffic_bytes": result.traffic_bytes,
        "adapter": str(result.adapter),
    }
    output.result(values, _story(result, before, after))


def _story(result: DemoResult, before: float, after: float) -> str:
    lines = ["", "Questions in words that it was not trained on:"]
    for number, question in enumerate(result.questions[:_SHOWN_ANSWERS]):
        lines += [
            f"  {question.text}",
            f"    before  {_one_line(result.before[number])}",
            f"    after   {_one_line(result.after[number])}  ({_verdict(result.after[number], question.answer)})",
        ]
    count = len(result.questions)
    lines += [
        "",
        f"Exact answers to {count} held-out questions: {before * count:.0f} before, {after * count:.0f} after.",
        f"Training: {result.steps} steps in {format_seconds(result.train_seconds)}.",
        "",
        "What crossed the wire in training:",
        *(f"  {kind:<16}{format_bytes(size):>12}" for kind, size in sorted(result.traffic_bytes.items())),
        f"  of it, {format_bytes(result.sent_bytes)} left this device.",
        "",
        f"Adapter: {result.adapter}",
        f"Use it with peft: tidelock export {result.adapter.parent} --to peft DIR",
        "",
        _PRIVACY,
    ]
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


def _verdict(answer: str, right: str) -> str:
    return "right" if answer == right else f"wrong: {right}"
