"""How many micro-batches are in flight changes neither the result nor, when places are few, whether there is one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from tests.support.cloud_process import TOKEN, CloudProcess, Service
from tests.support.link import Link
from tests.support.parity import assert_bit_equal, gradients_of, randomise_adapter, relative_error, token_batch
from tests.support.proxy import LinkProxy
from tidelock.backbone.protocol import AttemptSites, Pass
from tidelock.device.model import DeviceModel
from tidelock.model.walk import Batch
from tidelock.run.connect import connect

pytestmark = pytest.mark.timeout(120)

_MODEL = "llama"
_CONFIG = LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "k_proj", "v_proj"])
Narrow = Callable[[int], CloudProcess]


@pytest.fixture
def narrow(tiny_models: Path, tmp_path: Path) -> Iterator[Narrow]:
    """Return a function that starts a cloud with so many places."""
    with ExitStack() as stack:

        def start(places: int) -> CloudProcess:
            service = Service(_MODEL, str(tiny_models / _MODEL), max_sessions=places)
            return stack.enter_context(CloudProcess([service], tmp_path / "cloud.log"))

        yield start


def _join(where: str, folder: Path, micro_batches: int | None, dropout: float = 0.2) -> DeviceModel:
    config = LoraConfig(r=4, lora_dropout=dropout, target_modules=["q_proj", "k_proj", "v_proj"])
    model = connect(where, model=folder, peft_config=config, token=TOKEN, micro_batches=micro_batches)
    randomise_adapter(model)
    return model


def _step(
    model: DeviceModel, padding: str = "right", lengths: tuple[int, ...] = (11, 7, 9)
) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(7)
    model.zero_grad()
    batch = token_batch(padding, lengths=lengths)
    loss = model(**batch.arguments()).loss
    loss.backward()
    return loss.item(), gradients_of(model)


@contextmanager
def _counted(model: DeviceModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Yield how many forward passes ran at once, at the beginning of each, and then how many at most."""
    forward, lock, running, seen = model.backbone.forward, threading.Lock(), 0, []

    def counted(batch: Batch, sites: AttemptSites) -> Pass:
        nonlocal running
        with lock:
            running += 1
            seen.append(running)
        try:
            return forward(batch, sites)
        finally:
            with lock:
                running -= 1

    with monkeypatch.context() as patch:
        patch.setattr(model.backbone, "forward", counted)
        yield seen


@pytest.mark.parametrize("where", ["local", "cloud"])
def test_any_number_in_flight_gives_the_same_bits(
    where: str, cloud: CloudProcess, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
):
    """With int8 as well, whose rounding at random must not depend on it."""
    lengths = (60, 55, 64, 50, 58)
    url = "local"
    rounding: dict[str, Any] = {}
    if where == "cloud":
        url = cloud.url(_MODEL)
        rounding = {"codec": "int8", "stochastic_rounding": True}
    results = []
    for in_flight in (1, 2, 3, 4, 7, None):
        model = connect(
            url, model=tiny_models / _MODEL, peft_config=_CONFIG, token=TOKEN, in_flight=in_flight, **rounding
        )
        randomise_adapter(model)
        with _counted(model, monkeypatch) as seen:
            results.append(_step(model, lengths=lengths))
        assert len(seen) == 4  # micro-batches, whatever their number in flight
        assert max(seen) <= (in_flight or 2)
        results.append(_step(model, lengths=lengths))  # None has measured by now
        model.close()
    for loss, gradients in results[1:]:
        assert loss == results[0][0]
        assert_bit_equal(gradients, results[0][1])


def test_another_split_gives_other_bits(tiny_models: Path):
    """So that the test above can fail: sums of the same numbers in another order are not the same."""
    one, other = (_step(_join("local", tiny_models / _MODEL, count, dropout=0))[1] for count in (1, 3))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_the_number_adapts_to_what_passes_waited_for(cloud: CloudProcess, tiny_models: Path):
    """A link that delays keeps more of them on their way than none does, and changes no bit."""
    lengths = (60, 55, 64, 50, 58)
    expected = _step(_join("local", tiny_models / _MODEL, None), lengths=lengths)
    with LinkProxy(cloud.port(_MODEL), link=Link(0.02, jitter_seconds=0.01, mbit_per_second=100.0)) as proxy:
        model = _join(f"grpc://127.0.0.1:{proxy.port}", tiny_models / _MODEL, None)
        assert model.backbone.passes_at_once() == 2
        for _ in range(2):
            loss, gradients = _step(model, lengths=lengths)
            assert loss == expected[0]
            assert_bit_equal(gradients, expected[1])
            proxy.stall(0.1)
        assert model.backbone.passes_at_once() > 2
        model.close()


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_in_the_cloud_as_here_bit_for_bit(cloud: CloudProcess, tiny_models: Path, micro_batches: int):
    local = _join("local", tiny_models / _MODEL, micro_batches)
    remote = _join(cloud.url(_MODEL), tiny_models / _MODEL, micro_batches)
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
