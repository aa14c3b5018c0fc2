"""Where taps come from: how many examples are computed at once, and on how many cores."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tidelock.backbone.pass_times import TimeSplit
from tidelock.device.tap_source import ExampleIds, TapSource

_EXAMPLES: list[ExampleIds] = [((number,), (0,)) for number in range(4)]


class _Blocks:
    def __init__(self, *, on_own_cores: bool) -> None:
        self.on_own_cores = on_own_cores

    def take_times(self) -> TimeSplit:
        return TimeSplit()

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_each_of_the_own_cores_computes_an_example() -> None:
    source = TapSource(lambda: _Blocks(on_own_cores=True))
    both = threading.Barrier(2, timeout=20)

    def compute(_blocks: _Blocks, number: int) -> tuple[Tensor, ...]:
        both.wait()  # breaks unless two are inside at the same time
        return (torch.tensor([number, torch.get_num_threads()]),)

    found = [tensor.tolist() for (tensor,) in source.read(_EXAMPLES, compute)]
    assert found == [[number, 1] for number in range(4)]
    assert torch.get_num_threads() == 2


def test_threads_are_as_before_when_an_example_fails() -> None:
    source = TapSource(lambda: _Blocks(on_own_cores=True))

    def compute(_blocks: _Blocks, _number: int) -> tuple[Tensor, ...]:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        source.read(_EXAMPLES, compute)
    assert torch.get_num_threads() == 2


def test_where_others_compute_threads_stay_and_as_many_examples_cross_as_one_says() -> None:
    source = TapSource(lambda: _Blocks(on_own_cores=False), at_once=4)
    all_four = threading.Barrier(4, timeout=20)

    def compute(_blocks: _Blocks, number: int) -> tuple[Tensor, ...]:
        all_four.wait()
        return (torch.tensor([number, torch.get_num_threads()]),)

    found = [tensor.tolist() for (tensor,) in source.read(_EXAMPLES, compute)]
    assert found == [[number, 2] for number in range(4)]
