"""Outputs of an example come, once and unchanged, to the peer that learns from it."""

from __future__ import annotations

import pytest
import torch

from tests.support.pool import all_of, in_pool
from tidelock.cache.config import CacheConfig
from tidelock.cache.identity import CacheIdentity
from tidelock.errors import CacheError, PeerError
from tidelock.pool.example import Example
from tidelock.pool.redistribute import Kept, Widths, find_routes, key_of, redistribute

EXAMPLES = [
    Example((5, 6, 7), (-100, 6, 7)),
    Example((8, 9), (-100, 9)),
    Example((1, 2, 3, 4), (-100, -100, 3, 4)),
    Example((4, 4), (-100, 4)),
]
WIDTHS = Widths(num_blocks=3, hidden=3, final=5)
FRONT, BACK, REST, WHOLE = range(2), range(2, 3), range(1, 3), range(3)
# By peer and blocks, of which examples there is something.
HAVE = {0: {FRONT: [0]}, 1: {FRONT: [1, 2], BACK: [1]}, 2: {BACK: [0, 2], REST: [3]}}
OWNERS = [1, 1, 2, 0]


def kept_at(folder, there=()):
    def open_cache(taps):
        identity = CacheIdentity("0" * 64, "1" * 64, "fp32", taps, None, "fp32")
        return CacheConfig(folder, key=folder.parent / "key").open(identity)

    return Kept(open_cache, there, WIDTHS.num_blocks)


def outputs_of(number):
    """Return what all blocks give for an example, and the final states."""
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(shape, generator=generator) for shape in WIDTHS.shapes(EXAMPLES[number], WHOLE)]


def keep_own(kept, have):
    for blocks, numbers in have.items():
        for number in numbers:
            *outputs, last = outputs_of(number)
            final = last if blocks.stop == WIDTHS.num_blocks else None
            kept.keep(blocks, [EXAMPLES[number]], [[out] for out in outputs[blocks.start : blocks.stop]], final)


def test_each_example_comes_once_and_unchanged(tmp_path):
    def work(peers):
        kept = kept_at(tmp_path / f"peer{peers.peer}")
        keep_own(kept, HAVE[peers.peer])
        sent = []
        for _ in range(2):
            routes = find_routes(peers, kept, EXAMPLES, OWNERS, WIDTHS.num_blocks)
            sent.append(redistribute(peers, EXAMPLES, routes, OWNERS, kept, WIDTHS))
        return routes, sent, [kept.whole.get(key_of(example)) for example in EXAMPLES]

    results = all_of(in_pool(3, work))
    size = {
        (n, blocks): 4 * sum(rows * width for rows, width in WIDTHS.shapes(EXAMPLES[n], blocks))
        for n in range(4)
        for blocks in (FRONT, BACK)
    }
    # Peer 1 has its own part of example 1 already, peer 2 that of example 2. What is there is not sent again.
    assert [sent for _, sent, _ in results] == [[size[0, FRONT], 0], [size[2, FRONT], 0], [size[0, BACK], 0]]
    for peer, (routes, _, found) in enumerate(results):
        # Nobody has the first block of example 3.
        assert routes == [[(WHOLE, 1)], [(WHOLE, 1)], [(WHOLE, 2)], None]
        for number, tensors in enumerate(found):
            if OWNERS[number] != peer or number == 3:
                assert tensors is None
                continue
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(tensors, outputs_of(number), strict=True))


def test_routes_by_hand(tmp_path):
    """Few parts, and rather from the peer itself."""
    have = {
        0: {range(1): [0, 1, 2], REST: [0], FRONT: [1]},
        1: {REST: [0, 1], BACK: [1]},
        2: {WHOLE: [2], range(1): [3]},
    }

    def work(peers):
        kept = kept_at(tmp_path / f"peer{peers.peer}")
        keep_own(kept, have[peers.peer])
        return find_routes(peers, kept, EXAMPLES, [1, 2, 0, 0], WIDTHS.num_blocks)

    first, *others = all_of(in_pool(3, work))
    assert all(routes == first for routes in others)
    assert first == [[(range(1), 0), (REST, 1)], [(FRONT, 0), (BACK, 1)], [(WHOLE, 2)], None]


def test_what_a_peer_has_is_found_again(tmp_path):
    keep_own(kept_at(tmp_path / "peer"), HAVE[1])
    assert kept_at(tmp_path / "peer", [FRONT, BACK]).inventory(EXAMPLES) == HAVE[1]


def test_an_entry_that_is_gone_is_said(tmp_path):
    with pytest.raises(CacheError, match="expected the outputs of an example that this peer has kept"):
        kept_at(tmp_path / "peer").get(FRONT, key_of(EXAMPLES[0]))


def test_a_peer_that_is_lost_on_the_way_is_noticed(tmp_path):
    def work(peers):
        kept = kept_at(tmp_path / f"peer{peers.peer}")
        keep_own(kept, HAVE[peers.peer])
        routes = find_routes(peers, kept, EXAMPLES, OWNERS, WIDTHS.num_blocks)
        if peers.peer == 2:
            peers.close()
            return None
        return redistribute(peers, EXAMPLES, routes, OWNERS, kept, WIDTHS)

    _, receives, _ = in_pool(3, work)
    assert isinstance(receives, PeerError)
