"""The record of a small run, any part of which a test may change."""

from __future__ import annotations

from typing import Any

import pytest

from tidelock.report.facts import DataFacts, ModelFacts, RunFacts, SiteFacts
from tidelock.report.record import RunRecord

SITES = tuple(
    SiteFacts(name=f"blocks.{block}.attn", block=block, input_width=10, output_width=30) for block in (0, 1, 2)
)
FACTS = RunFacts(
    versions={"python": "3.12.1", "torch": "2.9"},
    machine="Linux x86_64, 2 cores",
    model=ModelFacts(
        family="llama", num_blocks=4, embedding_width=5, final_width=7, trained_parameters=1200, sites=SITES
    ),
    train=DataFacts(examples=8, tokens=100, labelled=20),
    evaluation=DataFacts(examples=2, tokens=30, labelled=6),
)
OPTIONS = {"data": "letters.jsonl", "backbone": "cloud", "method": "lora", "schedule": "kill-revive", "epochs": 2.0}
SECONDS = {"device": 1.0, "cloud": 2.0, "waiting": 0.0, "wire": 1.0}
METRICS = (
    {"step": 1, "loss": 3.0, "epoch": 0.5, "timed_steps": 1, "seconds": SECONDS},
    {"step": 2, "loss": 2.0, "epoch": 1.0, "timed_steps": 1, "seconds": SECONDS},
    {"step": 2, "eval_loss": 2.5, "epoch": 1.0},
    {"step": 4, "loss": 1.0, "epoch": 2.0, "timed_steps": 2, "seconds": SECONDS},
    {"step": 4, "eval_loss": 1.5, "epoch": 2.0},
    {"step": 4, "train_runtime": 20.0, "epoch": 2.0},
    {"step": 4, "eval_all_modules_loss": 1.25, "epoch": 2.0},
)
PERIODS = (
    {"period": 0, "epoch": 1.0, "step": 2, "active": [0, 1, 2], "scores": {"0": 1.0, "1": 4.0, "2": 2.0}},
    {"period": 1, "epoch": 2.0, "step": 4, "active": [1], "scores": {"0": 1.0, "1": 3.0, "2": 2.0}},
)
TRAINED = {"trained": 100, "trained_selected": 20}
EPOCHS = (
    {"epoch": 0, "sent": {}, "received": {"control": 500}, "tokens": {}},
    {
        "epoch": 1,
        "sent": {"embedding": 2000, "norms": 9},
        "received": {"site_input": 14000, "control": 11},
        "tokens": {**TRAINED, "evaluated": 30, "evaluated_selected": 6},
    },
    {"epoch": 2, "sent": {"embedding": 2000}, "received": {"site_input": 5000}, "tokens": TRAINED},
)


@pytest.fixture
def make_record():
    """Return a function that makes the record of a run with Kill and Revive against a cloud, some of it changed."""

    def make(**changes: Any) -> RunRecord:
        parts = {
            "name": "my-run",
            "options": OPTIONS,
            "facts": FACTS,
            "metrics": METRICS,
            "periods": PERIODS,
            "epochs": EPOCHS,
        }
        return RunRecord(**{**parts, **changes})

    return make
