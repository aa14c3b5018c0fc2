"""Who computes which rows, and in what order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidelock.errors import ConfigError
from tidelock.plan.simulate import StageTimes, gantt
from tidelock.pool.layout import PoolLayout, Stage, divide, one_forward_one_backward
from tidelock.pool.recipe import Recipe


def test_rows_by_hand():
    layout = PoolLayout((Stage(range(2), (0, 2), (1, 3), 2), Stage(range(2, 3), (1,), (1,))), 2)
    assert layout.num_peers == 3
    assert [layout.stage_of(peer) for peer in range(3)] == [0, 1, 0]
    assert layout.rows_of(7) == [
        [{0: range(1), 2: range(1, 4)}, {1: range(4)}],
        [{0: range(4, 5), 2: range(5, 7)}, {1: range(4, 7)}],
    ]
    # Fewer rows than micro-batches: no micro-batch is empty, though a peer may have none of it.
    assert layout.rows_of(1) == [[{0: range(0), 2: range(1)}, {1: range(1)}]]


def test_who_has_blocks_by_hand():
    stages = (Stage(range(2), (0, 3), (1, 1), 2), Stage(range(2, 4), (1,), (1,)), Stage(range(4, 6), (2,), (1,)))
    layout = PoolLayout(stages, 1)
    assert layout.stages_with(range(1, 3)) == [0, 1]
    assert layout.peers_with(range(1, 3)) == (0, 1, 3)
    assert layout.peers_with((0, 5)) == (0, 2, 3)


@given(rows=st.integers(0, 40), shares=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_rows_are_divided_whole_and_in_proportion(rows, shares):
    parts = divide(range(5, 5 + rows), shares)
    assert [row for part in parts for row in part] == list(range(5, 5 + rows))
    for part, share in zip(parts, shares, strict=True):
        assert abs(len(part) - rows * share / sum(shares)) <= 1


@given(micro_batches=st.integers(1, 12), in_flight=st.integers(1, 6))
def test_each_forward_is_before_its_backward_and_few_are_in_flight(micro_batches, in_flight):
    order = list(one_forward_one_backward(micro_batches, in_flight))
    assert sorted(order) == sorted((work, n) for work in ("forward", "backward") for n in range(micro_batches))
    flying = 0
    for work, number in order:
        flying += 1 if work == "forward" else -1
        assert flying <= in_flight
        assert work == "forward" or order.index(("forward", number)) < order.index(("backward", number))


@given(
    micro_batches=st.integers(1, 8),
    flights=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(lambda found: sorted(found, reverse=True)),
)
def test_it_is_the_order_that_the_simulator_predicts(micro_batches, flights):
    stages = [StageTimes(1.0, 2.0, flight, 0.0, 0.1, 0.1) for flight in flights]
    bars = gantt(stages, micro_batches)
    for number, flight in enumerate(flights):
        computed = [bar for bar in bars if bar.stage == number and bar.work in {"forward", "backward"}]
        assert [(bar.work, bar.micro_batch) for bar in computed] == list(
            one_forward_one_backward(micro_batches, flight)
        )


def test_every_example_is_learned_from_once_an_epoch_by_one_peer():
    recipe = Recipe(epochs=3, batch_size=4, seed=3)
    epochs = [recipe.shards(11, epoch, 3) for epoch in (1, 2)]
    for shards in epochs:
        assert sorted(n for shard in shards for batch in shard for n in batch) == list(range(11))
        assert all(len(shard) == recipe.steps_per_epoch(11) == 3 for shard in shards)
    first, second = ([sorted(n for batch in shard for n in batch) for shard in shards] for shards in epochs)
    assert first == second
    assert epochs[0] != epochs[1]
    # Peer 1 has two of the four places of a batch.
    assert [len(shard) for shard in first] == [3, 5, 3]
    owners = recipe.owners(11, 3)
    assert [[n for n in range(11) if owners[n] == peer] for peer in range(3)] == first


@given(examples=st.integers(1, 40), batch_size=st.integers(1, 9), peers=st.integers(1, 5), epoch=st.integers(1, 3))
def test_a_step_has_the_same_examples_for_any_number_of_peers(examples, batch_size, peers, epoch):
    recipe = Recipe(batch_size=batch_size)
    alone, together = recipe.shards(examples, epoch, 1)[0], recipe.shards(examples, epoch, peers)
    for step, batch in enumerate(alone):
        assert [number for shard in together for number in shard[step]] == batch
        assert 1 <= len(batch) <= batch_size
    assert sorted(number for batch in alone for number in batch) == list(range(examples))
    for step in range(len(alone) - 1):
        counts = [len(shard[step]) for shard in together]
        assert max(counts) - min(counts) <= 1 + (examples % batch_size > 0)


@pytest.mark.parametrize(
    ("stages", "micro_batches", "expected"),
    [
        ((), 1, "stages with blocks"),
        ((Stage(range(1, 2), (0,), (1,)),), 1, "each block in one stage"),
        ((Stage(range(2), (1,), (1,)),), 1, "each peer from 0 in one stage, or idle"),
        ((Stage(range(2), (0, 1), (1,)),), 1, "a share of at least 1 for each peer"),
        ((Stage(range(1), (0,), (1,), 1), Stage(range(1, 2), (1,), (1,), 2)), 1, "no more micro-batches in flight"),
        ((Stage(range(2), (0,), (1,)),), 0, "at least 1 micro-batch"),
    ],
)
def test_refused(stages, micro_batches, expected):
    with pytest.raises(ConfigError, match=expected):
        PoolLayout(stages, micro_batches)
