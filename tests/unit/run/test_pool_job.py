"""What every peer is given: the examples, whatever their labels are, and what a run begins with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import set_seed

from tests.support.pool import all_of, in_pool
from tests.support.tiny_models import save_tiny_model
from tidelock.device.device_lm import DeviceLM
from tidelock.model.checkpoint import Checkpoint
from tidelock.pool.example import Example
from tidelock.run.config import RunConfig
from tidelock.run.open_model import open_model
from tidelock.run.pool_checkpoint import shared_begin
from tidelock.run.pool_job import PoolData, shared_data
from tidelock.wire.ledger import Ledger

EXAMPLES = {
    "a label a token": [Example((5, 6, 7), (-100, 6, 7)), Example((8, 9), (-100, 9))],
    "a class": [Example((5, 6, 7), 1), Example((8, 200_000_000_001), 0)],
    "a number": [Example((5, 6, 7), -0.1), Example((8, 9), 1.0), Example((1,), 3.4e38)],
}


@pytest.mark.parametrize("labels", EXAMPLES)
def test_examples_come_as_they_are(labels):
    given = PoolData(EXAMPLES[labels], EXAMPLES[labels][:1])

    def work(peers):
        return shared_data(peers, given if peers.peer == 0 else None)

    for found in all_of(in_pool(3, work)):
        assert found == given
        # 1 and 1.0 are equal, and of unlike tasks.
        kinds = [type(example.labels) for example in found.examples]
        assert kinds == [type(example.labels) for example in given.examples]
    assert all_of(in_pool(2, lambda peers: shared_data(peers, PoolData([], []) if peers.peer == 0 else None)))[1] == (
        PoolData([], [])
    )


def begun(config: RunConfig) -> dict[str, torch.Tensor]:
    """Return what a pool of one peer begins with."""
    checkpoint = Checkpoint.open(str(config.model))
    (begin,) = all_of(in_pool(1, lambda peers: shared_begin(peers, config, checkpoint, None)))
    return dict(begin.parameters)


@pytest.mark.parametrize("method", ["lora", "adapter", "side"])
@pytest.mark.parametrize("task", ["causal-lm", "classification", "regression"])
def test_a_run_begins_as_on_one_device(method: str, task: str, tmp_path: Path) -> None:
    """A head for whole texts among it, which is drawn like the modules, or after them."""
    folder = save_tiny_model("llama", tmp_path / "model")
    num_labels = 3 if task == "classification" else None
    config = RunConfig(data="", out="", model=str(folder), method=method, task=task, num_labels=num_labels, seed=5)
    set_seed(config.seed)
    model: DeviceLM = open_model(config, Ledger())
    expected = {name.removeprefix("network.").removeprefix("bank."): value for name, value in model.named_parameters()}
    model.close()
    found = begun(config)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(("task", "drawn"), [("causal-lm", set()), ("regression", {"head.weight"})])
def test_of_a_whole_model_only_a_head_is_drawn(task: str, drawn: set[str], tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    assert begun(RunConfig(data="", out="", model=str(folder), method="full", task=task)).keys() == drawn
