"""A whole run in a pool gives the side network of one process: an epoch through a pipeline, then cached epochs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.equivalence.test_pool import CONFIG, LAYOUTS, examples
from tests.support.plain_side import side_model
from tests.support.pool import all_of, in_pool
from tidelock.cache.config import CacheConfig
from tidelock.cache.identity import CacheIdentity
from tidelock.model.checkpoint import Checkpoint
from tidelock.pool.peers import Peers
from tidelock.pool.recipe import Progress, Recipe
from tidelock.pool.side_stage import padded
from tidelock.pool.train import PoolJob, train_in_pool

RECIPE = Recipe(epochs=3, batch_size=4, learning_rate=1e-2, warmup_steps=2, clip=0.5)
COUNT = 10


class Notes:
    def __init__(self, steps: int) -> None:
        self.first = steps
        self.saved: dict[int, Progress] = {}
        self.losses: list[float] = []
        self.sent: list[int] = []

    def step(self, step: int, loss: float) -> None:
        assert step == self.first + len(self.losses) + 1
        self.losses.append(loss)

    def save(self, progress: Progress) -> None:
        copied = {kind: {n: t.clone() for n, t in values.items()} for kind, values in progress.moments.items()}
        parameters = {name: tensor.clone() for name, tensor in progress.parameters.items()}
        self.saved[progress.steps] = Progress(progress.steps, parameters, copied)

    def redistributed(self, sent_bytes: int) -> None:
        self.sent.append(sent_bytes)


def run_in_pool(folder: Path, layout: str, tmp_path: Path, begin: Progress | None = None):
    first = begin or Progress(0, side_model(folder, CONFIG).network.state_dict(), {})

    def work(peers: Peers):
        def open_cache(taps):
            identity = CacheIdentity("0" * 64, "1" * 64, "fp32", taps, None, "fp32")
            return CacheConfig(tmp_path / str(peers.peer), key=tmp_path / f"key{peers.peer}").open(identity)

        notes = Notes(first.steps)
        job = PoolJob("llama", Checkpoint.open(str(folder)), CONFIG, first, examples(COUNT), RECIPE, 2, open_cache)
        model = train_in_pool(peers, LAYOUTS[layout], job, notes)
        return model.network.state_dict(), notes

    return all_of(in_pool(LAYOUTS[layout].num_peers, work))


def one_process(folder: Path, peers: int, recipe: Recipe = RECIPE):
    """Train as a person would, on the batches that the pool has."""
    model, losses = side_model(folder, CONFIG), []
    rows, steps = examples(COUNT), recipe.epochs * recipe.steps_per_epoch(COUNT)
    adam = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    warm, order = recipe.warmup_steps, recipe.order(COUNT, 0)
    batches = [order[first : first + recipe.batch_size] for first in range(0, COUNT, recipe.batch_size)]
    for epoch in range(1, recipe.epochs):
        shards = recipe.shards(COUNT, epoch, peers)
        batches += [[n for shard in shards for n in shard[step]] for step in range(recipe.steps_per_epoch(COUNT))]
    for done, batch in enumerate(batches):
        adam.param_groups[0]["lr"] = recipe.learning_rate * (
            done / warm if done < warm else (steps - done) / (steps - warm)
        )
        loss = model(**padded([rows[number] for number in batch])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        adam.step()
        adam.zero_grad()
        losses.append(float(loss.detach()))
    return model.network.state_dict(), losses


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_is_that_of_one_process(layout: str, tiny_models: Path, tmp_path: Path) -> None:
    expected, losses = one_process(tiny_models / "llama", LAYOUTS[layout].num_peers)
    results = run_in_pool(tiny_models / "llama", layout, tmp_path)
    first, _ = results[0]
    for state, notes in results:
        assert notes.losses == pytest.approx(losses, rel=1e-4)
        assert all(torch.equal(state[name], first[name]) for name in first)
        assert len(notes.sent) == 1
    start = side_model(tiny_models / "llama", CONFIG).network.state_dict()
    for name, tensor in expected.items():
        assert not torch.equal(first[name], start[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.parametrize("steps", [2, 3, 4, 8])  # in the first epoch, at its end, and in later ones
@pytest.mark.parametrize("layout", ["hybrid", "one without blocks"])
def test_a_run_goes_on_bit_for_bit(layout: str, steps: int, tiny_models: Path, tmp_path: Path) -> None:
    whole = run_in_pool(tiny_models / "llama", layout, tmp_path)
    state, notes = whole[0]
    assert list(notes.saved) == [2, 3, 4, 6, 8]
    resumed = run_in_pool(tiny_models / "llama", layout, tmp_path, notes.saved[steps])
    for found, later in resumed:
        assert later.losses == notes.losses[steps:]
        assert all(torch.equal(found[name], state[name]) for name in state)
        assert later.sent == [0]
