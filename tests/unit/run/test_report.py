"""Reports of real runs: of a tiny model, here and in a cloud, whole, half done, resumed and damaged."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread

from tests.unit.hand_device import TOKEN
from tests.unit.run.conftest import Notes
from tests.unit.run.test_trainer import interrupt
from tidelock.cloud.server import CloudServer, Listener
from tidelock.cloud.tenants import Tenants
from tidelock.errors import CheckpointError, ConfigError, StorageError
from tidelock.model.load import ModelChoice
from tidelock.run.config import RunConfig
from tidelock.run.folder import RunFolder, read_rows
from tidelock.run.report import _read, write_report
from tidelock.run.train import train
from tidelock.wire.address import parse_listen

# What protobuf adds to a tensor in one part: tags, lengths, the block, the shape.
FRAMING_BYTES = 24


@pytest.fixture
def cloud(chat_model: Path) -> Iterator[str]:
    server = CloudServer(
        ModelChoice(str(chat_model)), Tenants({"anna": TOKEN}), Listener(parse_listen("127.0.0.1:0", tls=False))
    )
    yield server.start().url
    server.stop(0)


@pytest.fixture
def make_cloud_config(make_config, cloud: str, tmp_path: Path):
    """Return a function that makes the configuration of a short run against a cloud."""
    token = tmp_path / "anna.token"
    token.write_text(TOKEN)

    def make(**knobs: object) -> RunConfig:
        config: RunConfig = make_config(backbone="cloud", cloud=cloud, token_file=str(token), **knobs)
        return config

    return make


def path_of(config: RunConfig) -> Path:
    return Path(config.out)


def tensor_bytes(config: RunConfig) -> dict[int, int]:
    """Return the bytes of all tensors that crossed, by epoch, framing included."""
    sums = {}
    for row in RunFolder(path_of(config)).read_ledger().epochs():
        kinds = [*row["sent"].items(), *row["received"].items()]
        sums[row["epoch"]] = sum(size for kind, size in kinds if kind not in {"control", "norms", "model"})
    return sums


@pytest.mark.parametrize(("micro_batches", "max_steps"), [(1, None), (2, None), (1, 3)])
def test_all_modules_in_fp32_cost_what_the_ledger_counted_but_for_framing(
    make_cloud_config, notes: Notes, micro_batches: int, max_steps: int | None
) -> None:
    config = make_cloud_config(micro_batches=micro_batches, max_steps=max_steps, epochs=2)
    train(config, notes)
    record = _read(RunFolder(path_of(config)))
    crossed = tensor_bytes(config)
    assert [epoch.epoch for epoch in record.traffic()] == [1, 2]
    for epoch in record.traffic():
        # Batches of two: two of them an epoch, and as many in an evaluation; the second epoch may be cut off.
        steps = 1 if epoch.epoch == 2 and max_steps else 2
        # Up: embedding, input and answer at three sites, final state. Down: its gradient, two a site but the lowest.
        messages = micro_batches * (steps * (8 + 6) + 2 * 8)
        framing = crossed[epoch.epoch] - epoch.full_fp32_bytes
        assert 0 < framing <= FRAMING_BYTES * messages


def test_fewer_bytes_by_codec_and_schedule_are_measured_against_the_same_passes(
    make_cloud_config, notes: Notes
) -> None:
    knobs = {"schedule": "kill-revive", "budget": 1, "epochs": 3}
    config = make_cloud_config(codec="int8", **knobs)
    train(config, notes)
    record = _read(RunFolder(path_of(config)))
    first, *_, last = record.traffic()
    # A quarter for int8, and its scales and framing; the evaluation at its end is with one module already.
    assert 0.15 < tensor_bytes(config)[1] / first.full_fp32_bytes < 0.3
    # The last epoch has one evaluation more, with all modules.
    assert first.full_fp32_bytes < last.full_fp32_bytes
    assert tensor_bytes(config)[3] < tensor_bytes(config)[1]
    page, *images = write_report(path_of(config))
    assert page == path_of(config) / "report.html"
    assert [path.name for path in images] == ["loss.png", "activity.png", "traffic.png", "time.png"]
    assert all(imread(path).shape[1] == 800 for path in images)


def test_nothing_of_where_this_persons_things_are_is_on_the_page(
    make_cloud_config, notes: Notes, tmp_path: Path
) -> None:
    config = make_cloud_config(max_steps=1)
    train(config, notes)
    page = write_report(path_of(config))[0].read_text()
    assert str(tmp_path) not in page
    assert TOKEN not in page
    assert "anna.token" not in page
    assert str(config.cloud).partition("//")[2] not in page
    assert "…/facts.jsonl" in page


def test_a_local_run_without_evaluation(make_config, notes: Notes) -> None:
    config = replace(make_config(), eval_data=None)
    train(config, notes)
    page, *images = write_report(path_of(config))
    # The schedule `full` has periods too: how much each module moved.
    assert [path.name for path in images] == ["loss.png", "activity.png", "time.png"]
    assert "Crossed the wire" not in page.read_text()
    assert "Evaluation loss" not in page.read_text()


def test_while_a_run_is_going_on_and_after_it_was_resumed(make_cloud_config, notes: Notes) -> None:
    config = make_cloud_config(epochs=2)
    going_on: list[str] = []

    def look(step: int) -> None:
        if step == 2:
            going_on.append(write_report(path_of(config))[0].read_text())
            interrupt()

    notes.at_step = look
    assert train(config, notes).interrupted
    (page,) = going_on
    assert "Steps so far" in page
    notes.at_step = lambda _step: None
    train(config, notes, resume=True)
    record = _read(RunFolder(path_of(config)))
    assert (record.steps, record.has_ended) == (4, True)
    assert [step for step, _ in record.series("loss")] == [1, 2, 3, 4]
    assert [(group.first, group.last) for group in record.step_times(40)] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    # Every batch once, whichever part of the run it was in.
    totals = RunFolder(path_of(config)).read_ledger().tokens()
    assert totals["trained"] == 2 * record.facts.train.tokens
    assert totals["trained_selected"] == 2 * record.facts.train.labelled
    assert totals["evaluated"] == 2 * record.facts.evaluation.tokens
    assert "Steps so far" not in write_report(path_of(config))[0].read_text()


def test_a_run_killed_after_its_last_ledger_counts_from_its_metrics(make_cloud_config, notes: Notes) -> None:
    config = make_cloud_config(epochs=1)
    train(config, notes)
    whole = RunFolder(path_of(config)).read_ledger()
    (path_of(config) / "ledger.json").unlink()
    again = RunFolder(path_of(config)).read_ledger()
    assert (again.totals(), again.tokens()) == (whole.totals(), whole.tokens())
    assert read_rows(path_of(config) / "metrics.jsonl")[-1]["tokens"] == whole.tokens()


@pytest.fixture
def finished(make_config, notes: Notes) -> Path:
    config = make_config(max_steps=2)
    train(config, notes)
    return path_of(config)


@pytest.mark.parametrize("damage", ["", "{", '{"versions": 3}', "\x00\xff"])
def test_damaged_facts_are_named(finished: Path, damage: str) -> None:
    (finished / "facts.json").write_bytes(damage.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"expected the facts of the run, got none or damaged ones .*--resume"):
        write_report(finished)
    (finished / "facts.json").unlink()
    with pytest.raises(CheckpointError, match="got none or damaged ones"):
        write_report(finished)


def test_resuming_writes_the_facts_again(make_config, notes: Notes) -> None:
    config = make_config()
    train(config, notes)
    (path_of(config) / "facts.json").unlink()
    train(config, notes, resume=True)
    assert write_report(path_of(config))[0].is_file()


def test_a_run_before_its_first_step_has_nothing_to_draw(finished: Path) -> None:
    (finished / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match="expected a run that has logged a step, got none"):
        write_report(finished)
    with pytest.raises(CheckpointError, match=r"expected one with a run\.toml, got none"):
        write_report(finished / "elsewhere")


def test_an_earlier_report_is_replaced(finished: Path) -> None:
    first = write_report(finished)
    (finished / "report" / "traffic.png").write_bytes(b"of another time")
    (finished / "schedule.jsonl").unlink()
    assert write_report(finished) == [path for path in first if path.name != "activity.png"]
    assert {path.name for path in (finished / "report").iterdir()} == {"loss.png", "time.png"}


def test_a_disk_that_refuses(finished: Path) -> None:
    (finished / "report").write_text("no folder")
    with pytest.raises(StorageError, match="Writing the report's plots: expected the disk to take it, got File exists"):
        write_report(finished)


def test_without_matplotlib_it_says_how_to_get_it(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("tidelock.report.page", "tidelock.report.plots"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(
        ConfigError, match=r"expected matplotlib, got no such package\. Run: pip install 'tidelock\[report\]'"
    ):
        write_report(finished)
    assert not (finished / "report.html").exists()


def test_a_run_folder_can_be_moved(finished: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved run"
    shutil.move(finished, moved)
    assert "<h1>moved run</h1>" in write_report(moved)[0].read_text()
