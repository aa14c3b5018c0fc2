"""Devices that train at once on one cloud get, bit for bit, what each gets alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from tests.support.cloud_process import TOKEN, CloudProcess
from tests.support.parity import adapter_of, assert_bit_equal, randomise_adapter, token_batch
from tidelock.run.connect import connect

_MODEL = "llama"
_STEPS = 8
# Different in everything that a pass asks for: targets, blocks, codec, padding, length.
_DEVICES: list[dict[str, Any]] = [
    {"targets": ["q_proj", "k_proj", "v_proj"], "layers": None, "codec": "fp32", "padding": "right", "seed": 1},
    {"targets": ["v_proj"], "layers": [1, 3], "codec": "fp32", "padding": "left", "seed": 2},
    {"targets": ["q_proj", "v_proj"], "layers": [2], "codec": "bf16", "padding": "none", "seed": 3},
]


def _train(url: str, folder: Path, device: dict[str, Any], barrier: Barrier | None) -> dict[str, Tensor]:
    torch.set_num_threads(1)  # a new thread begins with another number
    config = LoraConfig(r=4, target_modules=device["targets"], layers_to_transform=device["layers"])
    model = connect(url, model=folder, peft_config=config, token=TOKEN, codec=device["codec"])
    randomise_adapter(model, device["seed"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(_STEPS):
        if barrier is not None:
            barrier.wait(timeout=60)  # so that no device is done before another has begun
        batch = token_batch(device["padding"], seed=device["seed"] + step % 3)
        model(**batch.arguments()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.close()
    return adapter_of(model)


def test_devices_at_once_get_what_each_gets_alone(cloud: CloudProcess, tiny_models: Path):
    url, folder = cloud.url(_MODEL), tiny_models / _MODEL
    alone = [_train(url, folder, device, None) for device in _DEVICES]
    barrier = Barrier(len(_DEVICES))
    with ThreadPoolExecutor(len(_DEVICES)) as pool:
        runs = [pool.submit(_train, url, folder, device, barrier) for device in _DEVICES]
        together = [run.result() for run in runs]
    for ours, theirs in zip(together, alone, strict=True):
        assert_bit_equal(ours, theirs)


def test_two_passes_open_in_one_device_do_not_mix(cloud: CloudProcess, tiny_models: Path):
    model = connect(cloud.url(_MODEL), model=tiny_models / _MODEL, token=TOKEN)
    randomise_adapter(model)
    first, second = token_batch("right", seed=1), token_batch("left", seed=2)
    expected = []
    for batch in (first, second):
        model.zero_grad()
        model(**batch.arguments()).loss.backward()
        expected.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    losses = [model(**batch.arguments()).loss for batch in (first, second)]
    for loss, grads in zip(losses, expected, strict=True):
        model.zero_grad()
        loss.backward()
        ours = [parameter.grad for parameter in model.parameters()]
        assert all(a is not None and torch.equal(a, b) for a, b in zip(ours, grads, strict=True))
    model.close()
