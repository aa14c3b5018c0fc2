"""What a forecast says to people: where the time goes, and what to change."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tidelock.plan.forecast import Forecast, PhaseForecast, Traffic, bottleneck, forecast_text, forecast_values
from tidelock.plan.link import CloudLink

LINK = CloudLink(0.04, 20e6, 100e6)
STEP = Traffic({"control": 1000, "embedding": 4000}, {"site_input": 7000})
PHASE = PhaseForecast(
    name="all steps",
    steps=6,
    active=30,
    in_flight=4,
    round_trips=61,
    step=STEP,
    epoch=STEP.times(3),
    seconds=4.0,
    split={"device": 0.5, "cloud": 1.0, "wire": 2.5, "waiting": 0.0},
)
FORECAST = Forecast(
    title="llama, lora, bf16",
    link=LINK,
    examples=24,
    tokens=1000,
    labelled=200,
    steps_per_epoch=3,
    phases=(PHASE,),
    evaluation=Traffic(),
    device_memory_bytes=10**9,
    cloud_memory_bytes=2 * 10**9,
    cloud_kept_bytes=5 * 10**8,
)


ADVICE = (
    "The link is the bottleneck, most of all its delay: 2.44 s of a step at least. Fewer active modules (--layer, "
    "--schedule) make it less."
)
MEMORY = "device 1.0 GB, cloud 2.0 GB, of which the passes of the largest batch keep 500.0 MB."


def test_it_says_bytes_time_and_memory() -> None:
    assert forecast_text(FORECAST).splitlines() == [
        "llama, lora, bf16: 24 examples, 1,000 tokens, 200 with a label; 3 steps an epoch.",
        "Link: 40 ms there and back, 20 Mbit/s up, 100 Mbit/s down.",
        "",
        "All steps: 6 steps, 30 active modules",
        "  a step    4 s (device 500 ms, cloud 1 s, wire 2.5 s), 5.0 kB up, 7.0 kB down",
        "  an epoch  15.0 kB up, 21.0 kB down",
        "    sent: control 3.0 kB, embedding 12.0 kB",
        "    received: site_input 21.0 kB",
        f"  {ADVICE}",
        "",
        f"Memory of the process, at most: {MEMORY}",
        "All steps: 24.0 s, 72.0 kB. Evaluations and checkpoints come on top.",
    ]


def test_what_only_the_cloud_knows_and_what_is_measured_on_top() -> None:
    elsewhere = replace(FORECAST, link=None, cloud_memory_bytes=None, cloud_kept_bytes=None, evaluation=STEP)
    text = forecast_text(elsewhere)
    assert "Link: the one that is there." in text
    assert "One evaluation: 5.0 kB up, 7.0 kB down." in text
    assert "device 1.0 GB, the cloud says its own when it starts." in text


@pytest.mark.parametrize(
    ("largest", "words"),
    [
        ("device", "The device is the bottleneck"),
        ("cloud", "The cloud's computing is the bottleneck"),
        ("waiting", "The turns in the cloud are the bottleneck"),
        ("wire", "Messages are the bottleneck"),
    ],
)
def test_what_takes_most_is_named(largest: str, words: str) -> None:
    assert bottleneck(replace(PHASE, split={**PHASE.split, largest: 3.0}), None).startswith(words)


@pytest.mark.parametrize(
    ("link", "part"),
    [
        (CloudLink(0.04, 20e6, 100e6), "most of all its delay: 2.44 s"),
        (CloudLink(0.0, 1e4, 1e9), "most of all its rate up: 4 s"),
        (CloudLink(0.0, 1e9, 1e4), "most of all its rate down: 5.6 s"),
    ],
)
def test_of_a_link_it_says_which_part(link: CloudLink, part: str) -> None:
    assert part in bottleneck(PHASE, link)


def test_only_a_gain_that_is_more_than_an_error_is_said() -> None:
    gains = {"--codec int8": 3.0, "--method core": 3.9}
    said = bottleneck(replace(PHASE, others=gains), LINK)
    assert said.endswith("; with --codec int8 it would be 3 s.")


def test_json_has_every_field() -> None:
    values = forecast_values(FORECAST)
    assert (values["event"], values["seconds"], values["cloud_kept_bytes"]) == ("forecast", 24.0, 5 * 10**8)
    assert values["link"] == {"round_trip_seconds": 0.04, "up_bits_per_second": 20e6, "down_bits_per_second": 100e6}
