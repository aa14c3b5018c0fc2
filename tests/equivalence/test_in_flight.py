"""Micro-batches in flight at once change neither the result nor, when places are few, whether there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from tests.support.cloud_process import TOKEN, CloudProcess, Service
from tests.support.parity import assert_bit_equal, gradients_of, randomise_adapter, relative_error, token_batch
from tidelock.device.model import DeviceModel
from tidelock.run.connect import connect

pytestmark = pytest.mark.timeout(120)

_MODEL = "llama"
Narrow = Callable[[int], CloudProcess]


@pytest.fixture
def narrow(tiny_models: Path, tmp_path: Path) -> Iterator[Narrow]:
    """Return a function that starts a cloud with so many places."""
    with ExitStack() as stack:

        def start(places: int) -> CloudProcess:
            service = Service(_MODEL, str(tiny_models / _MODEL), max_sessions=places)
            return stack.enter_context(CloudProcess([service], tmp_path / "cloud.log"))

        yield start


def _join(where: str, folder: Path, in_flight: int, dropout: float = 0.2) -> DeviceModel:
    config = LoraConfig(r=4, lora_dropout=dropout, target_modules=["q_proj", "k_proj", "v_proj"])
    model = connect(where, model=folder, peft_config=config, token=TOKEN, in_flight=in_flight)
    randomise_adapter(model)
    return model


def _step(model: DeviceModel, padding: str = "right") -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(7)
    model.zero_grad()
    batch = token_batch(padding)
    loss = model(**batch.arguments()).loss
    loss.backward()
    return loss.item(), gradients_of(model)


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_in_the_cloud_as_here_bit_for_bit(cloud: CloudProcess, tiny_models: Path, in_flight: int):
    local = _join("local", tiny_models / _MODEL, in_flight)
    remote = _join(cloud.url(_MODEL), tiny_models / _MODEL, in_flight)
    for padding in ("right", "left", "none"):
        (ours, gradients), (theirs, expected) = _step(remote, padding), _step(local, padding)
        assert ours == theirs
        assert_bit_equal(gradients, expected)
    remote.close()


def test_split_or_whole_is_the_same_mathematics(tiny_models: Path):
    whole, split = (_join("local", tiny_models / _MODEL, count, dropout=0) for count in (1, 8))
    for padding in ("right", "left", "none"):
        (loss, gradients), (other_loss, others) = _step(whole, padding), _step(split, padding)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert max(relative_error(others[name], gradient) for name, gradient in gradients.items()) < 1e-5


def test_with_one_place_a_device_goes_on_alone(narrow: Narrow, cloud: CloudProcess, tiny_models: Path):
    expected = _step(_join(cloud.url(_MODEL), tiny_models / _MODEL, 3))
    scarce = _join(narrow(1).url(_MODEL), tiny_models / _MODEL, 3)
    loss, gradients = _step(scarce)
    assert loss == expected[0]
    assert_bit_equal(gradients, expected[1])
    scarce.close()


def test_several_forwards_before_one_backward_with_one_place(narrow: Narrow, tiny_models: Path):
    local = _join("local", tiny_models / _MODEL, 1, dropout=0)
    scarce = _join(narrow(1).url(_MODEL), tiny_models / _MODEL, 1, dropout=0)
    results = []
    for model in (local, scarce):
        batches = [token_batch(padding) for padding in ("right", "left")]
        losses = [model(**batch.arguments()).loss for batch in batches]
        torch.stack(losses).sum().backward()
        results.append(gradients_of(model))
    assert_bit_equal(results[1], results[0])
    scarce.close()


def test_devices_that_share_too_few_places_both_end(narrow: Narrow, cloud: CloudProcess, tiny_models: Path):
    expected = _step(_join(cloud.url(_MODEL), tiny_models / _MODEL, 2, dropout=0))
    url = narrow(2).url(_MODEL)
    models = [_join(url, tiny_models / _MODEL, 2, dropout=0) for _ in range(2)]

    def three_steps(model: DeviceModel) -> list[tuple[float, dict[str, Tensor]]]:
        return [_step(model) for _ in range(3)]

    with ThreadPoolExecutor(2) as threads:
        for steps in threads.map(three_steps, models):
            for loss, gradients in steps:
                assert loss == expected[0]
                assert_bit_equal(gradients, expected[1])
    for model in models:
        model.close()
