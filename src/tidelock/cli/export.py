"""`tidelock export RUN --to peft|adapter|merged DIR`: a run's adapter for use elsewhere."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tidelock.cli.output import Output
from tidelock.run.folder import RunFolder
from tidelock.units import format_bytes

if TYPE_CHECKING:
    from tidelock.run.config import RunConfig

_HOW_TO_LOAD = {
    "peft": 'peft.PeftModel.from_pretrained({model}.from_pretrained(MODEL{labels}), "{folder}")',
    "adapter": 'tidelock.attach_adapter({model}.from_pretrained(MODEL{labels}), "{folder}")',
    "merged": 'transformers.{model}.from_pretrained("{folder}")',
}


def command(
    run: Annotated[Path, typer.Argument(help="Run folder.", metavar="RUN", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to write.", metavar="DIR", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            "--to", help="peft: LoRA alone; adapter: a serial adapter; merged: a plain model with LoRA inside."
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
    """Write a run's adapter for use elsewhere: in PEFT's format, or merged into a plain model (fp32)."""
    output = Output(json=json)
    # Loads torch, which --help must not wait for.
    exporting = import_module("tidelock.run.export")
    output.quiet_libraries()
    files: list[Path] = exporting.export(exporting.ExportOrder(run, to, out, model, force, all_modules), output.say)
    size = sum(path.stat().st_size for path in files)
    output.result(
        {"event": "exported", "form": to, "folder": str(out), "files": [str(path) for path in files], "bytes": size},
        f"Wrote {len(files)} files, {format_bytes(size)}, to {out}. Load it with:\n"
        f"  {_how_to_load(to, out, RunFolder.open(run).config())}",
    )


def _how_to_load(form: str, folder: Path, config: RunConfig) -> str:
    if config.task == "causal-lm":
        return _HOW_TO_LOAD[form].format(folder=folder, model="AutoModelForCausalLM", labels="")
    labels = f", num_labels={config.num_labels or 1}"
    return _HOW_TO_LOAD[form].format(folder=folder, model="AutoModelForSequenceClassification", labels=labels)
