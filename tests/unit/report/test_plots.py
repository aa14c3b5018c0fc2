from __future__ import annotations

import io
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.image import imread

from tests.unit.report.conftest import EPOCHS, METRICS, OPTIONS
from tidelock.report.plots import _KINDS, DARK, LIGHT, as_png, as_svg, plots_of
from tidelock.report.record import PoolRecord, PoolRow
from tidelock.wire.ledger import Kind


def axes_of(record, name: str):
    """Return the axes of a run's plot."""
    (plot,) = [plot for plot in plots_of(record) if plot.name == name]
    return plot.figure(record, LIGHT).axes[0]


def legend_of(axes) -> list[str]:
    (legend,) = axes.figure.legends
    return [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_files_are_of_their_kind(make_record, theme) -> None:
    record = make_record()
    plots = plots_of(record)
    assert [plot.name for plot in plots] == ["loss", "activity", "traffic", "time"]
    for plot in plots:
        image = imread(io.BytesIO(as_png(plot.figure(record, theme))), format="png")
        assert image.shape[1] == 800
        # More than a page of one colour.
        assert len(np.unique(image.reshape(-1, 4), axis=0)) > 20
        svg = as_svg(plot.figure(record, theme))
        assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"  # noqa: S314  (our own file)
        assert svg == as_svg(plot.figure(record, theme))


def test_what_there_is_nothing_of_is_not_drawn(make_record) -> None:
    local = make_record(periods=(), epochs=(), metrics=METRICS[:1])
    assert [plot.name for plot in plots_of(local)] == ["loss", "time"]
    # Steps of an older part of a run, before anything was timed.
    assert [
        plot.name for plot in plots_of(make_record(periods=(), epochs=(), metrics=({"step": 1, "loss": 2.0},)))
    ] == ["loss"]


def test_curves(make_record) -> None:
    axes = axes_of(make_record(), "loss")
    training, evaluation, every = axes.lines
    assert training.get_xydata().tolist() == [[1, 3.0], [2, 2.0], [4, 1.0]]
    assert evaluation.get_xydata().tolist() == [[2, 2.5], [4, 1.5]]
    assert every.get_xydata().tolist() == [[4, 1.25]]
    assert legend_of(axes) == ["training", "evaluation", "evaluation, killed modules too"]
    assert legend_of(axes_of(make_record(metrics=METRICS[:2]), "loss")) == ["training"]


def test_the_heat_map_has_a_row_for_each_module_and_marks_the_active_ones(make_record) -> None:
    axes = axes_of(make_record(), "activity")
    (image,) = axes.images
    shares = image.get_array().filled(np.nan)
    np.testing.assert_array_equal(shares, [[0.25, np.nan], [1.0, 1.0], [0.5, np.nan]])
    (dots,) = axes.lines
    assert dots.get_xydata().tolist() == [[0, 0], [0, 1], [0, 2], [1, 1]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2"]


def test_modules_that_have_not_moved_can_be_drawn(make_record) -> None:
    still = {"period": 0, "epoch": 1.0, "step": 2, "active": [0, 1], "scores": {"0": 0.0, "1": 0.0, "2": 0.0}}
    (image,) = axes_of(make_record(periods=(still,)), "activity").images
    assert image.get_array()[:2].tolist() == [[0.0], [0.0]]


def test_many_modules_and_periods_have_few_ticks(make_record) -> None:
    record = make_record()
    sites = [record.facts.model.sites[0].model_copy(update={"block": block}) for block in range(80)]
    model = record.facts.model.model_copy(update={"sites": tuple(sites)})
    scores = {str(block): 1.0 for block in range(80)}
    periods = [{"epoch": n / 10, "active": [3], "scores": scores} for n in range(1, 101)]
    axes = axes_of(make_record(facts=record.facts.model_copy(update={"model": model}), periods=periods), "activity")
    assert [label.get_text() for label in axes.get_xticklabels()] == [str(n + 0.1) for n in range(10)]
    assert [label.get_text() for label in axes.get_yticklabels()] == [str(block) for block in range(0, 80, 3)]


def test_bars_of_traffic_add_up_to_what_crossed(make_record) -> None:
    record = make_record()
    axes = axes_of(record, "traffic")
    tops = {
        epoch: max(b.get_y() + b.get_height() for b in axes.patches if b.get_x() < epoch < b.get_x() + 0.7)
        for epoch in (1, 2)
    }
    assert tops == {epoch.epoch: sum(epoch.kinds.values()) for epoch in record.traffic()}
    (line,) = axes.collections
    assert [segment[0][1] for segment in line.get_segments()] == [e.full_fp32_bytes for e in record.traffic()]
    assert legend_of(axes) == ["all modules, fp32", "embedding", "site input", "others, each under 1%"]


def test_the_epoch_before_the_first_is_explained(make_record) -> None:
    fetched = {"epoch": 0, "sent": {}, "received": {"model": 10**6}, "tokens": {}}
    axes = axes_of(make_record(epochs=(fetched, *EPOCHS[1:])), "traffic")
    assert axes.get_xlabel() == "epoch (0: before the first)"
    (line,) = axes.collections
    assert len(line.get_segments()) == 2
    only_fetched = axes_of(make_record(epochs=(fetched,)), "traffic")
    assert (legend_of(only_fetched), len(only_fetched.collections)) == (["model"], 0)


def test_every_kind_of_the_ledger_has_its_colour() -> None:
    assert list(_KINDS) == [kind.value for kind in Kind]
    assert len(set(_KINDS.values())) == len(_KINDS)


def test_bars_of_time_add_up_to_a_step(make_record) -> None:
    axes = axes_of(make_record(), "time")
    tops = {
        b.get_x(): max(o.get_y() + o.get_height() for o in axes.patches if o.get_x() == b.get_x()) for b in axes.patches
    }
    assert sorted(tops.values()) == [2.0, 4.0, 4.0]
    # No step has waited: no such colour in the legend.
    assert legend_of(axes) == ["device", "cloud", "wire"]
    assert axes.get_xlim() == (0.5, 4.5)


def test_a_step_of_a_pool_has_a_row_for_each_stage_and_peer(make_record) -> None:
    rows = (
        PoolRow("stage 1, planned", is_planned=True, bars=[("forward", 0.0, 1.0), ("send-forward", 1.0, 1.5)]),
        PoolRow("peer 0", is_planned=False, bars=[("forward", 0.0, 2.0), ("wait-backward", 2.0, 3.0)]),
    )
    plot = {p.name: p for p in plots_of(make_record(pool=PoolRecord("blocks 0 to 2 on peers 0", rows)))}["pipeline"]
    (axes,) = plot.figure(make_record(pool=PoolRecord("", rows)), LIGHT).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["stage 1, planned", "peer 0"]
    # What crosses a link is no row's own work.
    widths = [path.get_extents().width for drawn in axes.collections for path in drawn.get_paths()]
    assert widths == [1.0, 2.0, 1.0]
    assert axes.get_legend_handles_labels()[1] == ["forward", "waits for the next stage"]
    assert "pipeline" not in [plot.name for plot in plots_of(make_record(pool=PoolRecord("", ())))]


def test_a_plot_leaves_matplotlibs_settings_as_they_were(make_record) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    for plot in plots_of(make_record(options=OPTIONS)):
        plot.figure(make_record(), DARK)
    assert dict(mpl.rcParams) == before
