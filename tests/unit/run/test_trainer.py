from __future__ import annotations

import functools
import os
import random
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.unit.run.conftest import Notes
from tidelock.device.model import DeviceModel
from tidelock.errors import CloudUnreachable, StorageError
from tidelock.peft.adapter_files import WEIGHTS_FILE
from tidelock.run.folder import RunFolder, read_rows
from tidelock.run.train import train
from tidelock.run.trainer import Journal, RunTrainer, StopFlag
from tidelock.wire.ledger import Ledger

CTRL_C = signal.SIGINT


def interrupt() -> None:
    os.kill(os.getpid(), CTRL_C)


def weights(config) -> bytes:
    return (Path(config.out) / "adapter" / "adapter_model.safetensors").read_bytes()


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, count: int, error: BaseException) -> None:
    """Have the `count`-th call of a method fail."""
    original = getattr(owner, method)
    calls = 0

    @functools.wraps(original)  # Trainer looks at what the model's forward takes
    def wrapper(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == count:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, method, wrapper)


def test_ctrl_c_sets_the_flag_and_a_second_one_stops() -> None:
    said: list[str] = []
    flag = StopFlag(said.append)
    before = signal.getsignal(CTRL_C)
    with flag.on_interrupt():
        assert not flag.is_set
        interrupt()
        assert flag.is_set
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(1)
    assert said == ["Stopping after this step; Ctrl-C again stops at once."]
    assert signal.getsignal(CTRL_C) is before


def test_outside_the_main_thread_ctrl_c_is_left_to_others() -> None:
    flag = StopFlag(lambda _text: None)
    before, inside = signal.getsignal(CTRL_C), []

    def enter() -> None:
        with flag.on_interrupt():
            inside.append(signal.getsignal(CTRL_C))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert inside == [before]


def test_random_draws_of_an_unfinished_step_are_undone(tmp_path: Path, notes: Notes) -> None:
    journal = Journal(RunFolder(tmp_path), Ledger(), notes, StopFlag(notes.say))
    unchanged = torch.get_rng_state()
    journal.restore_random_state()
    assert torch.equal(torch.get_rng_state(), unchanged)
    journal.random_state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    draws = [(random.random(), np.random.rand(), torch.rand(1).item())]
    journal.restore_random_state()
    draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def test_interrupted_after_a_step_and_resumed(make_config, notes: Notes) -> None:
    config, other = make_config(), make_config("other")
    train(other, notes)
    notes.at_step = lambda step: interrupt() if step == 2 else None
    stopped = train(config, notes)
    assert (stopped.interrupted, stopped.steps) == (True, 3)
    assert RunFolder(Path(config.out)).latest_checkpoint() == Path(config.out) / "checkpoints" / "checkpoint-3"
    notes.at_step = lambda _step: None
    resumed = train(config, notes, resume=True)
    assert (resumed.interrupted, resumed.steps, notes.began) == (False, 4, (4, 3))
    assert weights(config) == weights(other)


@pytest.mark.parametrize("call", [3, 5], ids=["in an evaluation", "in a step"])
def test_a_fault_saves_the_steps_before_it(
    make_config, notes: Notes, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    config, other = make_config(), make_config("other")
    expected = train(other, notes)
    fail_at(monkeypatch, DeviceModel, "forward", call, CloudUnreachable("Gone."))
    with pytest.raises(CloudUnreachable, match=r"^Gone\.$"):
        train(config, notes)
    assert RunFolder(Path(config.out)).latest_checkpoint() == Path(config.out) / "checkpoints" / "checkpoint-2"
    monkeypatch.undo()
    resumed = train(config, notes, resume=True)
    assert weights(config) == weights(other)
    assert resumed.eval_loss == expected.eval_loss
    assert [RunFolder(Path(config.out)).metric(step, "eval_loss") is None for step in (2, 4)] == [False, False]
    assert notes.finished == 3


def test_a_fault_in_the_last_evaluation_leaves_only_that_to_do(
    make_config, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(eval_every=3)
    fail_at(monkeypatch, RunTrainer, "evaluate", 2, CloudUnreachable("Gone."))
    with pytest.raises(CloudUnreachable):
        train(config, notes)
    monkeypatch.undo()
    notes.steps.clear()
    resumed = train(config, notes, resume=True)
    assert notes.steps == []
    assert resumed.eval_loss is not None
    assert RunFolder(Path(config.out)).metric(4, "eval_loss") is not None


def test_a_fault_before_the_first_step_saves_nothing(
    make_config, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    fail_at(monkeypatch, DeviceModel, "forward", 1, CloudUnreachable("Gone."))
    with pytest.raises(CloudUnreachable):
        train(config, notes)
    assert list((Path(config.out) / "checkpoints").iterdir()) == []


def test_weights_on_their_way_to_the_next_step_are_not_saved_as_those_of_one(
    make_config, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    fail_at(monkeypatch, torch.optim.lr_scheduler.LambdaLR, "step", 4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(config, notes)
    assert list((Path(config.out) / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("unexpected pos")],
    ids=["from the system", "from a library"],
)
def test_a_checkpoint_that_cannot_be_written_is_removed(
    make_config, notes: Notes, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    config = make_config(save_every=2)
    fail_at(monkeypatch, RunTrainer, "_save_rng_state", 2, error)
    with pytest.raises(StorageError, match=r"^Writing a checkpoint: expected the disk to take it"):
        train(config, notes)
    assert [path.name for path in (Path(config.out) / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_a_schedule_is_written_down_and_both_adapters_kept(make_config, notes: Notes) -> None:
    config = make_config(schedule="kill-revive", budget=1, epochs=4)
    result = train(config, notes)
    folder = RunFolder(Path(config.out))
    rows = read_rows(folder.schedule)
    assert [len(row["active"]) for row in rows] == [3, 1, 1, 1]
    assert [row["next_active"] for row in rows[:-1]] == [row["active"] for row in rows[1:]]
    assert all(row["killed"] for row in rows[:-1])
    assert not rows[-1]["killed"]  # what was trained together stays together
    assert result.active == tuple(rows[-1]["active"])
    assert result.adapter_all == folder.adapter_all
    blocks = {name.split(".layers.")[1].split(".")[0] for name in load_file(folder.adapter / WEIGHTS_FILE)}
    assert blocks == {str(block) for block in result.active}
    every = {name.split(".layers.")[1].split(".")[0] for name in load_file(folder.adapter_all / WEIGHTS_FILE)}
    assert len(every) == 3
    assert result.eval_loss is not None
    assert result.eval_loss_all_modules is not None
    assert result.eval_loss_all_modules != result.eval_loss
    # Done: nothing is trained or measured again.
    again = train(config, notes, resume=True)
    assert (again.eval_loss_all_modules, again.active) == (result.eval_loss_all_modules, result.active)
    assert read_rows(folder.schedule) == rows


def test_a_run_resumed_within_a_schedule_writes_what_the_whole_run_writes(make_config, notes: Notes) -> None:
    settings = {"schedule": "kill-revive", "budget": 1, "period": 1, "norm": "difference", "per_learning_rate": True}
    config, other = make_config(**settings), make_config("other", **settings)
    train(other, notes)
    notes.at_step = lambda step: interrupt() if step == 2 else None
    assert train(config, notes).interrupted
    notes.at_step = lambda _step: None
    train(config, notes, resume=True)
    assert weights(config) == weights(other)
    assert read_rows(RunFolder(Path(config.out)).schedule) == read_rows(RunFolder(Path(other.out)).schedule)
