"""The plots of a run, each drawn for a light and for a dark page.

Needs the extra `tidelock[report]`. May import `report` and libraries.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from matplotlib.axes import Axes

    from tidelock.report.record import EpochTraffic, RunRecord

# Okabe and Ito's colours, told apart with any colour vision, on white and on black.
_BLUE, _ORANGE, _GREEN, _PINK, _SKY, _RED, _YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442",
)  # fmt: skip
_KINDS = {
    "embedding": _BLUE,
    "site_input": _SKY,
    "site_output": _GREEN,
    "tap": "#7B68C8",
    "final_state": _YELLOW,
    "final_gradient": "#B8860B",
    "site_gradient": _ORANGE,
    "input_gradient": _RED,
    "norms": _PINK,
    "control": "#B0A89F",
    "model": "#7E6BB5",
}
_OTHER = "#8C8C8C"
_PLACES = {"device": _BLUE, "cloud": _GREEN, "wire": _ORANGE, "waiting": _OTHER}
_WORK = {
    "forward": _BLUE,
    "backward": _GREEN,
    "all-reduce": _PINK,
    "wait-forward": _OTHER,
    "wait-backward": "#BDBDBD",
}
_WORDS = {
    "wait-forward": "waits for the stage before",
    "wait-backward": "waits for the next stage",
    "all-reduce": "sums gradients",
}
# Kinds that are less of all traffic than this share are drawn as one.
_SMALL_SHARE = 0.01
_MOST_BARS = 40
# Inches. As wide as text is still read on a phone when the plot is shrunk to it.
_WIDTH, _HEIGHT, _MOST_HEIGHT = 5.0, 3.3, 7.0
# Of the heat map, so that they do not run into each other.
_MOST_COLUMN_TICKS, _MOST_ROW_TICKS = 10, 30


@final
@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of a page.

    Attributes:
        text: Of text and lines.
        page: Behind a plot.
        faint: Of what is in the background.
        line: Of a thin line.
        heat: Matplotlib's name of a colour map that begins near the page's colour.
    """

    text: str
    page: str
    faint: str
    line: str
    heat: str


LIGHT = Theme("#1f2328", "#ffffff", "#c9ced6", _BLUE, "Blues")
DARK = Theme("#e6e9ee", "#14171c", "#454c57", _SKY, "Blues_r")


@final
@dataclass(frozen=True, slots=True)
class Plot:
    """One plot.

    Attributes:
        name: Of its file.
        title: Above it.
        caption: What it shows, in a sentence.
        draw: Draws it.
        height: In inches.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[RunRecord, Axes, Theme], None]
    height: float = _HEIGHT

    def figure(self, record: RunRecord, theme: Theme) -> Figure:
        """Return the drawn plot."""
        with mpl.rc_context(_style(theme)):
            figure = Figure(figsize=(_WIDTH, self.height), layout="constrained")
            self.draw(record, figure.subplots(), theme)
        return figure


def plots_of(record: RunRecord) -> list[Plot]:
    """Return the plots that there is something to show in: of a run that has logged a step, its loss at least."""
    plots = [Plot("loss", "Loss", "Of each logged step, and of each evaluation if there were any.", _draw_loss)]
    if record.periods:
        caption = (
            "The score of each block's module in each period in which it learned, as a share of the most in that "
            "period; a dot marks those that were active."
        )
        height = min(max(_HEIGHT, 0.6 + 0.145 * len(record.facts.model.blocks)), _MOST_HEIGHT)
        plots.append(Plot("activity", "Module activity", caption, _draw_activity, height))
    if record.traffic():
        caption = (
            "Bytes that crossed in each epoch, both directions, evaluations included. The line is what the tensors of "
            "the same passes would have taken in fp32 with all modules active."
        )
        plots.append(Plot("traffic", "Traffic", caption, _draw_traffic, 1.15 * _HEIGHT))
    if record.step_times(_MOST_BARS):
        caption = (
            "A mean step's seconds by where they went: computing here, computing in the cloud, bytes on their way, and "
            "waiting in the cloud's line. Evaluations are left out."
        )
        plots.append(Plot("time", "Time per step", caption, _draw_time))
    if record.pool is not None and record.pool.rows:
        caption = (
            "One step of the first epoch: what each peer did when, below what its stage was planned to do where there "
            "is a plan. What is empty in a planned row is waiting too."
        )
        height = min(1.6 + 0.3 * len(record.pool.rows), _MOST_HEIGHT)
        plots.append(Plot("pipeline", "A step of the pipeline", caption, _draw_pipeline, height))
    return plots


def as_png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    return _saved(figure, "png", dpi=160)


def as_svg(figure: Figure) -> bytes:
    """Return a figure as an SVG file; the same for the same figure."""
    with mpl.rc_context({"svg.hashsalt": "tidelock", "svg.fonttype": "path"}):
        return _saved(figure, "svg", metadata={"Date": None})


def _saved(figure: Figure, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=form, **options)  # type: ignore[arg-type]
    return file.getvalue()


def _style(theme: Theme) -> dict[Any, Any]:
    coloured = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(coloured, theme.text),
        "figure.facecolor": theme.page,
        "axes.facecolor": theme.page,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "font.size": 10,
        "legend.fontsize": 9,
    }


def _draw_loss(record: RunRecord, axes: Axes, theme: Theme) -> None:
    axes.plot(*zip(*record.series("loss"), strict=True), color=theme.line, linewidth=1.2, label="training")
    if evaluated := record.series("eval_loss"):
        axes.plot(*zip(*evaluated, strict=True), color=_RED, marker="o", linewidth=1.6, label="evaluation")
    if every := record.series("eval_all_modules_loss"):
        label = "evaluation, killed modules too"
        axes.plot(*zip(*every, strict=True), color=_GREEN, marker="D", linestyle="none", label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per labelled token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=theme.faint, linewidth=0.5)
    _legend(axes, 2)


def _draw_activity(record: RunRecord, axes: Axes, theme: Theme) -> None:
    blocks, periods = record.facts.model.blocks, record.periods
    shares = [[float("nan")] * len(periods) for _ in blocks]
    marks = []
    for column, period in enumerate(periods):
        scores = {block: period["scores"][str(block)] for block in period["active"]}
        most = max(scores.values(), default=0.0) or 1.0
        for row, block in enumerate(blocks):
            if block in scores:
                shares[row][column] = scores[block] / most
                marks.append((column, row))
    scale: dict[str, Any] = {"cmap": theme.heat, "vmin": 0.0, "vmax": 1.0}
    image = axes.imshow(shares, aspect="auto", origin="lower", interpolation="nearest", **scale)
    dot: dict[str, Any] = {
        "markersize": 3.2,
        "markeredgewidth": 0.5,
        "color": theme.page,
        "markeredgecolor": theme.text,
    }
    axes.plot([column for column, _ in marks], [row for _, row in marks], "o", **dot)
    columns = range(0, len(periods), math.ceil(len(periods) / _MOST_COLUMN_TICKS))
    axes.set_xticks(columns, [f"{round(periods[column]['epoch'], 2):g}" for column in columns])
    rows = range(0, len(blocks), math.ceil(len(blocks) / _MOST_ROW_TICKS))
    axes.set_yticks(rows, [str(blocks[row]) for row in rows])
    axes.set_xlabel("epochs done at the end of the period")
    axes.set_ylabel("block")
    bar = image.figure.colorbar(image, ax=axes, label="share of the most in the period", fraction=0.05, aspect=40)
    bar.outline.set_visible(False)


def _draw_traffic(record: RunRecord, axes: Axes, theme: Theme) -> None:
    epochs = record.traffic()
    numbers = [epoch.epoch for epoch in epochs]
    small = _small_kinds(epochs)
    rest = f"others, each under {_SMALL_SHARE:.0%}"
    rows = [{**epoch.kinds, rest: sum(epoch.kinds.get(kind, 0) for kind in small)} for epoch in epochs]
    kinds = {**{kind: colour for kind, colour in _KINDS.items() if kind not in small}, rest: _OTHER}
    _stack(axes, numbers, rows, kinds, [0.7] * len(epochs))
    full = [(epoch.epoch, epoch.full_fp32_bytes) for epoch in epochs if epoch.full_fp32_bytes]
    if full:
        axes.hlines(
            [size for _, size in full],
            [number - 0.45 for number, _ in full],
            [number + 0.45 for number, _ in full],
            color=theme.text,
            linewidth=1.8,
            label="all modules, fp32",
        )
    axes.set_xlabel("epoch (0: before the first)" if 0 in numbers else "epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(EngFormatter("B"))
    axes.set_ylim(bottom=0)
    _legend(axes, 3)


def _small_kinds(epochs: Sequence[EpochTraffic]) -> set[str]:
    """Return the kinds that would hardly be seen."""
    totals = Counter[str]()
    for epoch in epochs:
        totals.update(epoch.kinds)
    return {kind for kind, size in totals.items() if size < _SMALL_SHARE * totals.total()}


def _draw_time(record: RunRecord, axes: Axes, theme: Theme) -> None:
    times = record.step_times(_MOST_BARS)
    # A bar covers its steps, step n from n - 0.5 to n + 0.5.
    middles = [(group.first + group.last + 1) / 2 for group in times]
    widths = [0.9 * (group.last - group.first) for group in times]
    _stack(axes, middles, [group.seconds for group in times], _PLACES, widths)
    axes.set_xlabel("step")
    axes.set_ylabel("seconds per step")
    axes.set_xlim(times[0].first + 0.5, times[-1].last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=theme.faint, linewidth=0.5)
    axes.set_axisbelow(True)
    _legend(axes, 4)


def _draw_pipeline(record: RunRecord, axes: Axes, theme: Theme) -> None:
    rows = record.pool.rows if record.pool is not None else ()
    seen = {work for row in rows for work, _, _ in row.bars}
    for work, colour in _WORK.items():
        for place, row in enumerate(rows):
            spans = [(begin, end - begin) for name, begin, end in row.bars if name == work]
            hatch: dict[str, Any] = {"alpha": 0.55, "hatch": "////"} if row.is_planned else {}
            axes.broken_barh(spans, (place - 0.4, 0.8), color=colour, edgecolor=theme.page, **hatch)
        if work in seen:
            axes.plot([], [], "s", color=colour, label=_WORDS.get(work, work))  # for the legend
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds since the step began")
    axes.grid(axis="x", color=theme.faint, linewidth=0.5)
    axes.set_axisbelow(True)
    _legend(axes, 2)


def _legend(axes: Axes, columns: int) -> None:
    """Put the legend below the plot, where it hides nothing."""
    axes.figure.legend(*axes.get_legend_handles_labels(), ncols=columns, loc="outside lower center")


def _stack(
    axes: Axes,
    places: Sequence[float],
    rows: Sequence[Mapping[str, float]],
    colours: Mapping[str, str],
    widths: Sequence[float],
) -> None:
    """Draw bars of parts on top of each other; parts that are nowhere are left out of the legend."""
    bottoms = [0.0] * len(rows)
    for name, colour in colours.items():
        heights = [float(row.get(name, 0)) for row in rows]
        if any(heights):
            axes.bar(places, heights, widths, bottom=bottoms, color=colour, label=name.replace("_", " "))
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
