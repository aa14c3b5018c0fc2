"""The ledger: kinds and directions apart, sums right from several threads, and carried over a resumed run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tidelock.wire.ledger import Kind, Ledger


def test_kinds_and_directions_are_apart():
    ledger = Ledger()
    ledger.sent(Kind.EMBEDDING, 3)
    ledger.sent(Kind.EMBEDDING, 4)
    ledger.received(Kind.EMBEDDING, 5)
    ledger.received(Kind.MODEL, 6)
    assert ledger.totals() == {"sent": {"embedding": 7}, "received": {"embedding": 5, "model": 6}}


def test_what_never_crossed_is_not_listed():
    assert Ledger().totals() == {"sent": {}, "received": {}}


def test_no_count_is_lost_between_threads():
    ledger = Ledger()

    def count(_):
        for _ in range(500):
            ledger.sent(Kind.SITE_OUTPUT, 1)
            ledger.received(Kind.SITE_INPUT, 2)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count, range(8)))
    assert ledger.totals() == {"sent": {"site_output": 4000}, "received": {"site_input": 8000}}


def test_epochs_are_apart():
    ledger = Ledger()
    ledger.received(Kind.CONTROL, 1)
    for epoch, size_bytes in ((1, 10), (2, 20), (2, 5)):
        ledger.begin_epoch(epoch)
        ledger.sent(Kind.EMBEDDING, size_bytes)
    ledger.received(Kind.SITE_INPUT, 7)
    assert ledger.epochs() == [
        {"epoch": 0, "sent": {}, "received": {"control": 1}, "tokens": {}},
        {"epoch": 1, "sent": {"embedding": 10}, "received": {}, "tokens": {}},
        {"epoch": 2, "sent": {"embedding": 25}, "received": {"site_input": 7}, "tokens": {}},
    ]
    assert ledger.totals() == {"sent": {"embedding": 35}, "received": {"site_input": 7, "control": 1}}


def test_an_earlier_part_of_a_run_is_added():
    ledger = Ledger()
    ledger.begin_epoch(2)
    ledger.sent(Kind.EMBEDDING, 1)
    ledger.count_pass(6, 2, training=True)
    earlier = {"epoch": 2, "sent": {"embedding": 10}, "received": {"model": 20}, "tokens": {"trained": 5}}
    ledger.add([earlier, {"epoch": 1, "sent": {"norms": 5}}])
    assert ledger.epochs() == [
        {"epoch": 1, "sent": {"norms": 5}, "received": {}, "tokens": {}},
        {
            "epoch": 2,
            "sent": {"embedding": 11},
            "received": {"model": 20},
            "tokens": {"trained": 11, "trained_selected": 2},
        },
    ]


def test_tokens_that_learn_and_those_that_measure_are_apart():
    ledger = Ledger()
    ledger.count_pass(6, 2, training=True)
    ledger.begin_epoch(1)
    ledger.count_pass(5, 1, training=True)
    ledger.count_pass(4, 4, training=False)
    assert ledger.tokens() == {"trained": 11, "trained_selected": 3, "evaluated": 4, "evaluated_selected": 4}


def test_an_unknown_kind_of_an_earlier_part_is_not_counted_as_another():
    with pytest.raises(ValueError, match="gossip"):
        Ledger().add([{"epoch": 1, "sent": {"gossip": 1}}])
