from __future__ import annotations

import pytest
from pydantic import ValidationError

from tests.unit.report.conftest import EPOCHS, FACTS, METRICS, SECONDS
from tidelock.report.facts import RunFacts, SiteFacts
from tidelock.report.record import EpochTraffic


def test_facts_are_what_was_written() -> None:
    assert RunFacts.model_validate_json(FACTS.model_dump_json()) == FACTS
    assert FACTS.model.blocks == (0, 1, 2)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"versions": {}}', "\ufffd"])
def test_damaged_facts_are_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        RunFacts.model_validate_json(text)


def test_two_sites_of_a_block_are_one_module() -> None:
    sites = tuple(
        SiteFacts(name=f"blocks.7.{place}", block=7, input_width=1, output_width=1) for place in ("attn", "mlp")
    )
    assert FACTS.model.model_copy(update={"sites": sites}).blocks == (7,)


def test_what_was_measured_is_in_the_order_of_steps(make_record) -> None:
    record = make_record(metrics=METRICS[::-1])
    assert record.series("loss") == [(1, 3.0), (2, 2.0), (4, 1.0)]
    assert (record.last("eval_loss"), record.last("grad_norm")) == (1.5, None)
    assert (record.steps, record.epochs_done, record.has_ended) == (4, 2.0, True)


def test_a_run_without_trainers_summary_has_not_ended(make_record) -> None:
    record = make_record(metrics=METRICS[:2])
    assert (record.steps, record.epochs_done, record.has_ended) == (2, 1.0, False)
    nothing = make_record(metrics=())
    assert (nothing.steps, nothing.epochs_done, nothing.has_ended, nothing.step_times(9)) == (0, 0.0, False, [])


def test_traffic_is_both_directions_together(make_record) -> None:
    # Up: the embedding of 5, and 10 + 30 at each of three sites. Down: 30 at each, and 10 at all but the lowest.
    up, down = 5 + 3 * 40, 3 * 30 + 2 * 10
    trained = 4 * (100 * (up + down) + 2 * 20 * 7)
    evaluated = 4 * (30 * up + 6 * 7)
    first = {"embedding": 2000, "norms": 9, "site_input": 14000, "control": 11}
    assert make_record().traffic() == [
        EpochTraffic(1, first, trained + evaluated),
        EpochTraffic(2, {"embedding": 2000, "site_input": 5000}, trained),
    ]
    assert make_record().kinds() == {"embedding": 4000, "norms": 9, "site_input": 19000, "control": 511}


def test_what_was_fetched_before_training_is_an_epoch_of_its_own(make_record) -> None:
    fetched = {"epoch": 0, "sent": {}, "received": {"model": 10**6, "control": 500}, "tokens": {}}
    assert make_record(epochs=(fetched, *EPOCHS[1:])).traffic()[0] == EpochTraffic(
        0, {"model": 10**6, "control": 500}, 0
    )


def test_a_local_run_has_no_traffic(make_record) -> None:
    record = make_record(epochs=())
    assert (record.traffic(), record.kinds()) == ([], {})


def test_times_are_of_a_mean_step(make_record) -> None:
    times = make_record().step_times(40)
    assert [(group.first, group.last) for group in times] == [(0, 1), (1, 2), (2, 4)]
    assert times[0].seconds == SECONDS
    assert times[2].seconds == {"device": 0.5, "cloud": 1.0, "waiting": 0.0, "wire": 0.5}


def test_neighbouring_steps_are_drawn_together_where_there_are_many(make_record) -> None:
    times = make_record().step_times(2)
    assert [(group.first, group.last) for group in times] == [(0, 2), (2, 4)]
    assert times[0].seconds == SECONDS
    (all_of_it,) = make_record().step_times(1)
    assert all_of_it.seconds == {"device": 0.75, "cloud": 1.5, "waiting": 0.0, "wire": 0.75}
    many = [{"step": n, "timed_steps": 1, "seconds": SECONDS} for n in range(1, 1002)]
    assert len(make_record(metrics=many).step_times(40)) <= 40


def test_steps_that_nobody_timed_are_not_counted(make_record) -> None:
    """A run that was killed after step 7 of ten between two lines, and resumed from there."""
    rows = [
        {"step": 5, "loss": 1.0, "timed_steps": 5, "seconds": {"device": 5.0}},
        {"step": 10, "loss": 1.0, "timed_steps": 3, "seconds": {"device": 3.0}},
    ]
    times = make_record(metrics=rows).step_times(40)
    assert [(group.first, group.last, group.seconds["device"]) for group in times] == [(0, 5, 1.0), (7, 10, 1.0)]
