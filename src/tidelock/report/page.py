"""One self-contained HTML page about a run: numbers, plots, configuration and versions. It loads nothing.

Needs the extra `tidelock[report]`. May import `report`, `units` and libraries.
"""

from __future__ import annotations

import base64
from importlib.resources import files
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined

from tidelock.report.plots import DARK, LIGHT, as_svg
from tidelock.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tidelock.report.plots import Plot
    from tidelock.report.record import RunRecord

# Files that the cloud gave; no codec and no schedule makes them smaller.
_FETCHED = "model"


def page_of(record: RunRecord, plots: Iterable[Plot]) -> str:
    """Return the page's HTML."""
    template = files("tidelock.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(template).render(
        record=record,
        summary=_summary(record),
        tiles=_tiles(record),
        plots=[
            {
                "title": plot.title,
                "caption": plot.caption,
                "light": _as_url(as_svg(plot.figure(record, LIGHT))),
                "dark": _as_url(as_svg(plot.figure(record, DARK))),
            }
            for plot in plots
        ],
        tables=_tables(record),
    )


def _summary(record: RunRecord) -> str:
    model, options = record.facts.model, record.options
    where = "in a cloud" if options["backbone"] == "cloud" else "in this device's process"
    if record.pool is not None:
        where = f"in a pool ({record.pool.layout})"
    is_full = options["method"] == "full"
    blocks, frozen = (model.num_blocks, "") if is_full else (len(model.blocks), "frozen ")
    schedule = "" if is_full or options["method"] == "side" else f"schedule {options['schedule']}; "
    return (
        f"{options['method']} on {blocks} of {model.num_blocks} blocks of a "
        f"{model.family} model, {model.trained_parameters:,} trained parameters; {frozen}blocks "
        f"{where}; {schedule}"
        f"{record.facts.train.examples:,} examples."
    )


def _tiles(record: RunRecord) -> list[tuple[str, str]]:
    tiles = _progress(record)
    for title, name in (
        ("Training loss", "loss"),
        ("Evaluation loss", "eval_loss"),
        ("Evaluation loss, killed modules too", "eval_all_modules_loss"),
    ):
        value = record.last(name)
        if value is not None:
            tiles.append((title, f"{value:.4f}"))
    tiles += [("Time per step", _seconds(sum(mean.seconds.values()))) for mean in record.step_times(1)]
    kinds = record.kinds()
    if kinds:
        tiles.append(("Crossed the wire", format_bytes(sum(kinds.values()))))
    full = sum(epoch.full_fp32_bytes for epoch in record.traffic())
    if full:
        share = sum(size for kind, size in kinds.items() if kind != _FETCHED) / full
        tiles.append(("Against all modules in fp32", f"{share:.1%}"))
    return tiles


def _progress(record: RunRecord) -> list[tuple[str, str]]:
    """Return how far the run is; one without Trainer's summary is going on, or was ended from outside."""
    max_steps, epochs = record.options.get("max_steps"), record.options["epochs"]
    so_far = "" if record.has_ended else " so far"
    return [
        (f"Steps{so_far}", f"{record.steps:,}" + (f" of {max_steps:,}" if max_steps else "")),
        (f"Epochs{so_far}", f"{round(record.epochs_done, 2):g}" + ("" if max_steps else f" of {epochs:g}")),
    ]


def _seconds(seconds: float) -> str:
    return format_seconds(seconds) if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _tables(record: RunRecord) -> list[tuple[str, list[tuple[str, str]]]]:
    facts, kinds = record.facts, record.kinds()
    sizes = [
        (f"{title} data", f"{size.examples:,} examples, {size.tokens:,} tokens, {size.labelled:,} with a loss")
        for title, size in (("training", facts.train), ("evaluation", facts.evaluation))
        if size.examples
    ]
    tables = [("Configuration", [(name.replace("_", "-"), _shown(value)) for name, value in record.options.items()])]
    if kinds:
        by_size = sorted(kinds.items(), key=lambda item: -item[1])
        tables.append(("Traffic by kind", [(kind.replace("_", " "), format_bytes(size)) for kind, size in by_size]))
    tables.append(("Data, machine and versions", [*sizes, ("machine", facts.machine), *facts.versions.items()]))
    return tables


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _as_url(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
