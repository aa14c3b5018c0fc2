"""`tidelock report RUN`: a page and plots about a run."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from tidelock.cli.output import Output


def command(
    run: Annotated[Path, typer.Argument(help="Run folder.", metavar="RUN", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print JSON objects only.")] = False,
) -> None:
    """Draw a run: loss, module activity, traffic, time, as one HTML page and as PNG files in its folder."""
    output = Output(json=json)
    # Loads what --help must not wait for.
    page, *images = import_module("tidelock.run.report").write_report(run)
    output.result(
        {"event": "reported", "page": str(page), "images": [str(path) for path in images]},
        f"Wrote {page}, to be opened in a browser, and {len(images)} plots as PNG files in {images[0].parent}.",
    )
