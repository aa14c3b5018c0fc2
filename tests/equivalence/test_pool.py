"""A batch through any layout of a pool gives the loss and the gradients of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.equivalence.test_side_part import gradients_of
from tests.support.parity import token_batch
from tests.support.plain_side import randomise_side, side_model
from tests.support.pool import all_of, in_pool
from tests.support.tiny_models import ALL_MODELS, BLOCKS
from tidelock.device.beside_blocks import BesideBlocks
from tidelock.device.side_model import SideModel
from tidelock.model.checkpoint import Checkpoint
from tidelock.peft.side import SideConfig
from tidelock.peft.side_part import join_parts
from tidelock.pool.example import Example
from tidelock.pool.layout import PoolLayout, Stage
from tidelock.pool.peers import Peers
from tidelock.pool.pipeline import Pipeline, sum_of_losses
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


def texts(count: int, num_labels: int | None) -> list[Example]:
    """Return such examples with one class each, or where there is one label one number; None leaves them alone."""
    found, generator = examples(count), torch.Generator().manual_seed(5)
    if num_labels is None:
        return found
    labels = torch.randn(count, generator=generator).tolist() if num_labels == 1 else range(count)
    return [
        replace(example, labels=label if num_labels == 1 else label % num_labels)
        for example, label in zip(found, labels, strict=True)
    ]


def padded(batch: list[Example]) -> dict[str, torch.Tensor]:
    width = max(len(example.input_ids) for example in batch)
    rows = [
        (
            [*example.input_ids, *[0] * (width - len(example.input_ids))],
            [*example.labels, *[-100] * (width - len(example.input_ids))]
            if isinstance(example.labels, tuple)
            else example.labels,
            [1] * len(example.input_ids) + [0] * (width - len(example.input_ids)),
        )
        for example in batch
    ]
    ids, labels, mask = (torch.tensor(column) for column in zip(*rows, strict=True))
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def state_of(model: BesideBlocks) -> dict[str, torch.Tensor]:
    """Return what is trained by its names in a pool."""
    return {name.removeprefix("network."): value for name, value in model.state_dict().items()}


def one_process(folder: Path, batch: list[Example], num_labels: int | None) -> tuple[SideModel, float]:
    model = side_model(folder, CONFIG, num_labels)
    randomise_side(model)
    loss = model(**padded(batch)).loss
    loss.backward()
    return model, float(loss.detach())


def assert_equal(folder: Path, layout: PoolLayout, count: int, num_labels: int | None = None) -> None:
    batch = texts(count, num_labels)
    model, expected_loss = one_process(folder, batch, num_labels)
    whole = state_of(model)

    def work(peers: Peers) -> tuple[float, dict[str, torch.Tensor]]:
        number = layout.stage_of(peers.peer)
        if number is None:
            return sum_of_losses(peers, 0.0), {}
        stage = SideStage.load(Checkpoint.open(str(folder)), CONFIG, layout.stages[number].blocks, num_labels)
        stage.load_whole(whole)
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
    parameters = {name.removeprefix("network."): parameter for name, parameter in model.named_parameters()}
    assert gradients.keys() == parameters.keys()
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_gradients_of_one_process(layout: str, tiny_models: Path) -> None:
    assert_equal(tiny_models / "llama", LAYOUTS[layout], 7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_a_head_for_whole_texts_too(layout: str, tiny_models: Path) -> None:
    assert_equal(tiny_models / "llama", LAYOUTS[layout], 7, num_labels=3)


def test_with_a_head_for_a_number_too(tiny_models: Path) -> None:
    assert_equal(tiny_models / "llama", LAYOUTS["hybrid"], 7, num_labels=1)


@pytest.mark.parametrize("num_labels", [None, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ALL_MODELS)
def test_every_family_does(name: str, num_labels: int | None, tiny_models: Path) -> None:
    assert_equal(tiny_models / name, LAYOUTS["hybrid"], 4, num_labels)


def test_fewer_examples_than_peers(tiny_models: Path) -> None:
    assert_equal(tiny_models / "llama", LAYOUTS["hybrid, uneven groups"], 1)
