"""`tidelock export RUN --to peft|adapter|merged DIR`: a run's adapter for use elsewhere."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from tidelock.cli.output import Output
from tidelock.units import format_bytes


def command(
    run: Annotated[Path, typer.Argument(help="Run folder.", metavar="RUN", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to write.", metavar="DIR", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="peft: LoRA, or cores as LoRA; adapter: a serial adapter or side network; merged: a plain model with "
            "either of the first two inside.",
        ),
    ],
    *,
    model: Annotated[
        str | None,
        typer.Option(help="Model folder or hub name, if not the run's own; peft: checks that the adapter fits it."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write into a folder that is not empty; its weights are replaced.")
    ] = False,
    all_modules: Annotated[
        bool, typer.Option("--all-modules", help="Also the modules that a schedule has killed.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON objects only.")] = False,
) -> None:
    """Write a run's adapter for use elsewhere: alone, or merged into a plain model (fp32)."""
    output = Output(json=json)
    # Loads torch, which --help must not wait for.
    exporting = import_module("tidelock.run.export")
    output.quiet_libraries()
    order = exporting.ExportOrder(run, to, out, model, force, all_modules)
    files: list[Path] = exporting.export(order, output.say)
    size = sum(path.stat().st_size for path in files)
    output.result(
        {"event": "exported", "form": to, "folder": str(out), "files": [str(path) for path in files], "bytes": size},
        f"Wrote {len(files)} files, {format_bytes(size)}, to {out}. Load it with:\n  {exporting.how_to_load(order)}",
    )
