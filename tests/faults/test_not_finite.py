"""Losses that are no numbers: the optimizer does not move, and what was learned before stays."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.faults.world import Run, World
from tests.support.chat_model import save_chat_model

LAST_LINE = "error: Loss: expected a finite number, got "


def train(world: World, name: str, model: Path, *options: object) -> Run:
    out = world.folder / name
    steps = ["--epochs", 4, "--batch-size", 3, "--save-every", 2, "--threads", 1]
    args = [world.folder / "facts.jsonl", "--model", model, "--out", out, *steps, *options]
    return Run(out, world.start(name, "train", *args))


def test_a_damaged_model_moves_nothing(world: World) -> None:
    model = save_chat_model(world.folder / "damaged")
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][7] = float("inf")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    run = train(world, "not-finite", model)
    assert run.process.wait() == 7
    assert run.process.stderr.splitlines()[-1].startswith(LAST_LINE)
    assert run.metrics == []
    assert list((run.out / "checkpoints").iterdir()) == []
    assert not (run.out / "adapter").exists()


def test_an_exploding_learning_rate_keeps_the_steps_before(world: World) -> None:
    # Constant, or the first step would depend on how many are to come.
    options = ["--learning-rate", 1e30, "--lr-schedule", "constant", "--clip", 0]
    exploding = train(world, "exploding", world.model, *options)
    one_step = train(world, "one-step", world.model, *options, "--max-steps", 1)
    assert exploding.process.wait() == 7
    assert exploding.process.stderr.splitlines()[-1].startswith(LAST_LINE)
    assert exploding.checkpoints == [1]
    assert [row["step"] for row in exploding.metrics] == [1]
    assert one_step.process.wait() == 0
    first = [run.out / "checkpoints" / "checkpoint-1" for run in (exploding, one_step)]
    saved, expected = (load_file(folder / "model.safetensors") for folder in first)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    moments, expected_moments = ((folder / "optimizer.pt").read_bytes() for folder in first)
    assert moments == expected_moments
