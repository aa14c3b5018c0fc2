"""Outputs of an example come, once and unchanged, to the peer that learns from it."""

from __future__ import annotations

import pytest
import torch

from tests.support.pool import all_of, in_pool
from tidelock.cache.config import CacheConfig
from tidelock.cache.identity import CacheIdentity
from tidelock.errors import CacheError
from tidelock.pool.pipeline import Example
from tidelock.pool.redistribute import Pieces, Routes, key_of, redistribute

EXAMPLES = [Example((5, 6, 7), (-100, 6, 7)), Example((8, 9), (-100, 9)), Example((1, 2, 3, 4), (-100, -100, 3, 4))]
# Stage 0 has two blocks, on peers 0 and 1; stage 1 has one, on peer 2.
WHO_HAS, WHO_LEARNS = [[0, 2], [1, 2], [1, 2]], [1, 1, 2]
ROUTES = Routes(EXAMPLES, WHO_HAS, WHO_LEARNS, (2, 1), hidden_width=3, final_width=5)
TAPS = {0: (0, 1), 1: (0, 1), 2: (2,)}


def cache_at(folder, taps):
    identity = CacheIdentity("0" * 64, "1" * 64, "fp32", taps, None, "fp32")
    return CacheConfig(folder, key=folder.parent / "key").open(identity)


def outputs_of(number, stage):
    """Return what a stage gives for an example."""
    generator = torch.Generator().manual_seed(10 * number + stage)
    return [torch.randn(shape, generator=generator) for shape in ROUTES.shapes(number, stage)]


def keep_own(peer, pieces):
    stage = 1 if peer == 2 else 0
    for number, example in enumerate(EXAMPLES):
        if WHO_HAS[number][stage] == peer:
            *outputs, last = outputs_of(number, stage)
            pieces.keep([example], [*outputs, last] if stage == 0 else outputs, last if stage else None)


def test_each_example_comes_once_and_unchanged(tmp_path):
    def work(peers):
        pieces = Pieces(cache_at(tmp_path / f"pieces{peers.peer}", TAPS[peers.peer]))
        keep_own(peers.peer, pieces)
        whole = cache_at(tmp_path / f"whole{peers.peer}", (0, 1, 2))
        sent = [redistribute(peers, ROUTES, pieces, whole) for _ in range(2)]
        return sent, [whole.get(key_of(example)) for example in EXAMPLES]

    results = all_of(in_pool(3, work))
    size = {(n, s): 4 * sum(rows * width for rows, width in ROUTES.shapes(n, s)) for n in range(3) for s in range(2)}
    # Peer 1 has its own part of example 1 already, peer 2 that of example 2. What is there is not sent again.
    assert [sent for sent, _ in results] == [
        [size[0, 0], 0],
        [size[2, 0], 0],
        [size[0, 1] + size[1, 1], 0],
    ]
    for peer, (_, found) in enumerate(results):
        for number, tensors in enumerate(found):
            if WHO_LEARNS[number] != peer:
                assert tensors is None
                continue
            expected = [*outputs_of(number, 0), *outputs_of(number, 1)]
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(tensors, expected, strict=True))


def test_a_piece_that_is_gone_is_said(tmp_path):
    pieces = Pieces(cache_at(tmp_path / "pieces", (0, 1)))
    with pytest.raises(CacheError, match="expected this peer's outputs of an example"):
        pieces.get(key_of(EXAMPLES[0]))
