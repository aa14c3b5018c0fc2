"""A module's score: worked by hand, and what it says of the loss."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from tests.support.parity import token_batch
from tests.support.sites import attn
from tests.unit.hand_device import VOCABULARY
from tidelock.device.kill_revive import KillRevive, PeriodReport
from tidelock.errors import ConfigError
from tidelock.schedule.schedule import Schedule


@pytest.fixture
def arguments(tmp_path):
    return TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)


def begin(model, arguments, norm):
    """Return a callback that has joined a model, and the list of what became of its periods."""
    periods: list[PeriodReport] = []
    callback = KillRevive(Schedule("fixed", budget=1, norm=norm), periods.append)
    callback.on_init_end(arguments, TrainerState(), TrainerControl(), model=model)
    return callback, periods


def end_period(callback, arguments):
    # Not the last step, after which nothing is decided.
    callback.on_step_end(arguments, TrainerState(epoch=1.0, global_step=1, max_steps=9), TrainerControl())


def fill(model, *, weights, gradients):
    """Give all weights and gradients of the modules, in their order, these values."""
    for block, weight, gradient in zip(model.bank.numbers, weights, gradients, strict=True):
        for parameter in model.bank.module(block).parameters():
            torch.nn.init.constant_(parameter, weight)
            parameter.grad = None if gradient is None else torch.full_like(parameter, gradient)


def scores_of(period):
    return [module.score for module in period.table.modules]


def test_saliency_by_hand(make_model, arguments):
    model = make_model()
    size = sum(parameter.numel() for parameter in model.bank.module(0).parameters())
    callback, periods = begin(model, arguments, "saliency")
    fill(model, weights=[2, 2, 1], gradients=[-0.5, 0.25, -2])
    callback.on_pre_optimizer_step(arguments, TrainerState(), TrainerControl())
    fill(model, weights=[2, 2, 1], gradients=[-0.5, 0.25, None])  # in a turn in which the last is not active
    callback.on_pre_optimizer_step(arguments, TrainerState(), TrainerControl())
    end_period(callback, arguments)
    # A module without which the loss would fall is worth nothing, not less than nothing.
    assert scores_of(periods[0]) == [2 * size, 0, 2 * size]
    assert periods[0].decision.active == (0,)
    # The next period begins at zero; a killed module keeps its score.
    fill(model, weights=[3, 2, 1], gradients=[-1, None, None])
    callback.on_pre_optimizer_step(arguments, TrainerState(), TrainerControl())
    end_period(callback, arguments)
    assert scores_of(periods[1]) == [3 * size, 0, 2 * size]


@pytest.mark.parametrize(("norm", "expected"), [("difference", [2.0, 2.0]), ("difference-of-norms", [0.0, 2.0])])
def test_movement_by_hand(make_model, arguments, norm, expected):
    model = make_model(layers_to_transform=[0, 1])
    size = sum(parameter.numel() for parameter in model.bank.module(0).parameters())
    fill(model, weights=[1 / math.sqrt(size), 1 / math.sqrt(size)], gradients=[None, None])
    callback, periods = begin(model, arguments, norm)
    # From a norm of 1 to one of 1 in the opposite direction, and to one of 3 in the same.
    fill(model, weights=[-1 / math.sqrt(size), 3 / math.sqrt(size)], gradients=[None, None])
    end_period(callback, arguments)
    assert scores_of(periods[0]) == pytest.approx(expected, abs=1e-5)


def test_saliency_is_twice_what_a_low_rank_answer_saves_to_first_order(make_model, arguments):
    model, batch = make_model(lora_dropout=0.0), token_batch("right", vocab=VOCABULARY).arguments()
    callback, periods = begin(model, arguments, "saliency")
    loss = model(**batch).loss
    loss.backward()
    callback.on_pre_optimizer_step(arguments, TrainerState(), TrainerControl())
    step, rises = 1e-2, []
    for block in model.bank.numbers:
        halves = [branch.lora_B.weight for branch in model.bank.at(attn(block)).branches.values()]
        kept = [half.detach().clone() for half in halves]
        losses = []
        for factor in (1 - step, 1 + step):
            with torch.no_grad():
                for half, value in zip(halves, kept, strict=True):
                    half.copy_(factor * value)
                losses.append(float(model(**batch).loss))
        rises.append((losses[0] - losses[1]) / (2 * step))
        with torch.no_grad():
            for half, value in zip(halves, kept, strict=True):
                half.copy_(value)
    end_period(callback, arguments)
    assert max(rises) > 0.01
    assert scores_of(periods[0]) == pytest.approx([max(0.0, 2 * rise) for rise in rises], rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("norm", ["difference", "difference-of-norms", "saliency"])
def test_a_score_that_is_no_number_is_refused(make_model, arguments, norm):
    model = make_model()
    callback, periods = begin(model, arguments, norm)
    fill(model, weights=[1, math.nan, 1], gradients=[1, 1, 1])
    callback.on_pre_optimizer_step(arguments, TrainerState(), TrainerControl())
    with pytest.raises(ConfigError, match="score of the module at block 1: expected a finite number"):
        end_period(callback, arguments)
    assert periods == []
