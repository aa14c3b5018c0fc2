"""`tidelock plan PROFILE`: which devices of a pool hold which blocks, and what a step takes."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tidelock.cli.output import Output

if TYPE_CHECKING:
    from tidelock.plan.plan import Plan


def command(
    profile: Annotated[Path, typer.Argument(help="Profile of a pool (JSON).", metavar="PROFILE", show_default=False)],
    *,
    batch_rows: Annotated[int, typer.Option("--batch-rows", help="Rows of a batch, which is a step.")] = 16,
    micro_batches: Annotated[
        int | None,
        typer.Option(
            "--micro-batches",
            help="Equal parts of a batch that go through the stages one after another; all numbers are tried if not "
            "given.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON objects only.")] = False,
) -> None:
    """Say how a pool's devices would share a model: stages, time, memory, bytes, and why not otherwise."""
    # Loads pydantic, which --help need not wait for.
    inputs, planning, words = (import_module(f"tidelock.plan.{name}") for name in ("inputs", "plan", "words"))
    plan: Plan = planning.make_plan(inputs.read_profile(profile), batch_rows, micro_batches)
    Output(json=json).result(words.plan_values(plan), words.plan_text(plan))
