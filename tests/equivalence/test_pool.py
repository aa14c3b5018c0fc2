"""A batch through any layout of a pool gives the loss and the gradients of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.equivalence.test_side_part import gradients_of
from tests.support.parity import token_batch
from tests.support.plain_side import randomise_side, side_model
from tests.support.pool import all_of, in_pool
from tests.support.tiny_models import ALL_MODELS, BLOCKS
from tidelock.device.side_model import SideModel
from tidelock.model.checkpoint import Checkpoint
from tidelock.model.ends import Ends, read_config
from tidelock.model.part import ModelPart
from tidelock.peft.side import SideConfig
from tidelock.peft.side_part import SidePart, join_parts
from tidelock.pool.layout import PoolLayout, Stage
from tidelock.pool.peers import Peers
from tidelock.pool.pipeline import Example, Pipeline, sum_of_losses
from tidelock.pool.side_stage import SideStage

CONFIG = SideConfig(init="random", zero_upsample=False)
LAYOUTS = {
    "alone": PoolLayout((Stage(range(BLOCKS), (0,), (1,)),), 1),
    "data parallel": PoolLayout((Stage(range(BLOCKS), (0, 1), (1, 1)),), 2),
    "uneven shares": PoolLayout((Stage(range(BLOCKS), (1, 0), (3, 1)),), 1),
    "straight pipeline": PoolLayout(
        (Stage(range(2), (0,), (1,), 3), Stage(range(2, 3), (1,), (1,), 2), Stage(range(3, BLOCKS), (2,), (1,))), 4
    ),
    "hybrid": PoolLayout(
        (Stage(range(1), (0, 2), (2, 1), 2), Stage(range(1, BLOCKS), (1,), (1,), 1)),
        3,
    ),
    "one without blocks": PoolLayout((Stage(range(BLOCKS), (1,), (1,)),), 2, idle=(0, 2)),
    "hybrid, uneven groups": PoolLayout(
        (Stage(range(3), (2,), (1,), 2), Stage(range(3, BLOCKS), (0, 1, 3), (1, 2, 1), 1)),
        2,
    ),
}


def examples(count: int) -> list[Example]:
    """Return examples of unlike lengths."""
    found = []
    for seed in range(count):
        batch = token_batch("right", seed=seed)
        length = int(batch.attention_mask[-1].sum())
        row = (batch.input_ids[-1, :length], batch.labels[-1, :length])
        found.append(Example(tuple(row[0].tolist()[: length - seed % 2]), tuple(row[1].tolist()[: length - seed % 2])))
    return found


def padded(batch: list[Example]) -> dict[str, torch.Tensor]:
    width = max(len(example.input_ids) for example in batch)
    rows = [
        (
            [*example.input_ids, *[0] * (width - len(example.input_ids))],
            [*example.labels, *[-100] * (width - len(example.input_ids))],
            [1] * len(example.input_ids) + [0] * (width - len(example.input_ids)),
        )
        for example in batch
    ]
    ids, labels, mask = (torch.tensor(column) for column in zip(*rows, strict=True))
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def one_process(folder: Path, batch: list[Example]) -> tuple[SideModel, float]:
    model = side_model(folder, CONFIG)
    randomise_side(model)
    loss = model(**padded(batch)).loss
    loss.backward()
    return model, float(loss.detach())


def assert_equal(folder: Path, layout: PoolLayout, batch: list[Example]) -> None:
    model, expected_loss = one_process(folder, batch)
    whole = model.network.state_dict()

    def work(peers: Peers) -> tuple[float, dict[str, torch.Tensor]]:
        checkpoint = Checkpoint.open(str(folder))
        ends = Ends(read_config(folder), checkpoint)
        number = layout.stage_of(peers.peer)
        if number is None:
            return sum_of_losses(peers, 0.0), {}
        blocks = layout.stages[number].blocks
        side = SidePart(CONFIG, ends.config, ends.geometry, blocks)
        side.load_whole(whole)
        stage = SideStage(ModelPart(checkpoint, blocks), side, ends)
        loss = Pipeline(peers, layout, number, stage).run(batch)
        return loss, gradients_of(stage.trained())

    results = all_of(in_pool(layout.num_peers, work))
    for result in results:
        assert result[0] == pytest.approx(expected_loss, rel=1e-5)
    for stage in layout.stages:
        first, *others = (results[peer][1] for peer in stage.peers)
        for other in others:
            assert all(torch.equal(first[name], other[name]) for name in first)
    gradients = join_parts([results[stage.peers[0]][1] for stage in layout.stages])
    for name, parameter in model.network.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_gradients_of_one_process(layout: str, tiny_models: Path) -> None:
    assert_equal(tiny_models / "llama", LAYOUTS[layout], examples(7))


@pytest.mark.parametrize("name", ALL_MODELS)
def test_every_family_does(name: str, tiny_models: Path) -> None:
    assert_equal(tiny_models / name, LAYOUTS["hybrid"], examples(4))


def test_fewer_examples_than_peers(tiny_models: Path) -> None:
    assert_equal(tiny_models / "llama", LAYOUTS["hybrid, uneven groups"], examples(1))
