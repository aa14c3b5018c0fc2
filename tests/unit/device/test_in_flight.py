"""How many passes of a batch run at once, and that whatever order they end in changes nothing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tidelock.device.in_flight import BatchPass

pytestmark = pytest.mark.timeout(30)


class Blocks:
    """A backbone whose passes wait for each other until so many run at once, and end from the last to the first."""

    def __init__(self, at_once):
        self.together = threading.Barrier(at_once)
        self.lock, self.running, self.most = threading.Lock(), 0, 0

    def forward(self, batch, sites):
        self.meet()
        return SimpleNamespace(
            final_MD=torch.full((batch, 1), float(batch)), backward=lambda grad: self.learn(sites, grad)
        )

    def learn(self, sites, grad_MD):
        self.meet()
        sites.grads = [grad_MD.sum() * 0.1]

    def meet(self):
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        self.together.wait(10)
        with self.lock:
            self.running -= 1


def micro_batches():
    sites = [SimpleNamespace() for _ in range(6)]
    for each in sites:
        each.gradients = lambda each=each: each.grads
    return list(zip(range(1, 7), sites, strict=True))


def run(at_once):
    """Return final states and the gradient of a batch of six micro-batches, and the most passes that ran at once."""
    blocks: Any = Blocks(at_once)
    with ThreadPoolExecutor(6) as threads:
        batch = BatchPass(blocks, micro_batches(), threads, at_once)
        return batch.final_MD, batch.backward(torch.arange(21.0)[:, None]), blocks.most


@pytest.mark.parametrize("at_once", [1, 2, 3, 6])
def test_so_many_run_at_once_and_the_result_is_that_of_one_after_another(at_once):
    (final_MD, grads, most), (expected_MD, expected, _) = run(at_once), run(1)
    assert most == at_once
    assert torch.equal(final_MD, expected_MD)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(grads, expected, strict=True))


def test_an_error_comes_once_all_have_ended():
    ended = []

    def forward(batch, sites):
        if batch == 2:
            msg = "of the second"
            raise RuntimeError(msg)
        ended.append(batch)
        return SimpleNamespace(final_MD=torch.zeros(1, 1))

    blocks: Any = SimpleNamespace(forward=forward)
    with ThreadPoolExecutor(6) as threads, pytest.raises(RuntimeError, match="of the second"):
        BatchPass(blocks, micro_batches(), threads, 2)
    assert sorted(ended) == [1, 3, 4, 5, 6]
