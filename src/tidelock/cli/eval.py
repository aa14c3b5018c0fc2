"""`tidelock eval RUN --data F`: measure a trained model."""

from __future__ import annotations

import functools
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tidelock.cli.output import Output
from tidelock.run.folder import RunFolder

if TYPE_CHECKING:
    from tidelock.run.evaluate import Evaluation


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)],
    *,
    data: Annotated[
        str, typer.Option(help="Examples: a .jsonl, .csv or .parquet file, or a hub data set.", show_default=False)
    ],
    split: Annotated[
        str | None, typer.Option(help="Only rows whose 'split' is this (of a hub data set: its split).")
    ] = None,
    cloud: Annotated[str | None, typer.Option(help="Another address than the run's, grpcs://HOST:PORT.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with the token for it.")] = None,
    ca: Annotated[Path | None, typer.Option(help="PEM file with the authority to trust.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON objects only.")] = False,
) -> None:
    """Measure a trained model: loss and perplexity, or what GLUE measures of classes and numbers."""
    output = Output(json=json)
    folder = RunFolder.open(run)
    config = folder.config().elsewhere(cloud, token_file, ca)
    # Loads torch, which --help must not wait for.
    module = import_module("tidelock.run.evaluate")
    output.quiet_libraries()
    track = functools.partial(output.progress, "Example")
    result: Evaluation = module.evaluate(folder, config, data, split, track)
    values = {"event": "evaluated", "task": config.task, "examples": result.examples, "labels": result.labels}
    output.result({**values, "metrics": result.metrics}, _table(result, data if split is None else f"{data} ({split})"))


def _table(result: Evaluation, data: str) -> str:
    values = {name.replace("_", " "): value for name, value in result.metrics.items()}
    width = max(map(len, values))
    lines = [f"  {name:<{width}}  {value:.4f}" for name, value in values.items()]
    return "\n".join([f"{data}: {result.examples} examples", *lines])
