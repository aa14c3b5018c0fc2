"""The micro-batches of one batch, several of which are on their way through the backbone at once.

While one waits for the device or the wire, the backbone computes another. The result depends neither on which is
faster nor on how many are in flight: the batch alone decides how it is split, each micro-batch has its own graphs and
dropout seed, and gradients are summed in the order of the rows.

Shapes: M tokens whose final state is wanted, D hidden width. May import `backbone`, `device`, `model` and libraries.
"""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from tidelock.backbone.protocol import Backbone
    from tidelock.device.bank import BankPass
    from tidelock.model.walk import Batch

_T = TypeVar("_T")


@final
@dataclass(frozen=True, slots=True)
class PassSettings:
    """How the passes of a batch are made and run.

    Attributes:
        in_flight: Micro-batches on their way through the blocks at once; None has the backbone judge. The result does
            not depend on it.
        micro_batches: How many a batch is split into, by rows; None has the batch decide (see `Rows.split`).
        share_prefix: Whether what all rows of a micro-batch begin with is computed once (see `model.shared_prefix`).
    """

    in_flight: int | None = None
    micro_batches: int | None = None
    share_prefix: bool = True


@final
class BatchPass:
    """One batch that has been run forward, as one pass for each of its micro-batches.

    Args:
        backbone: Runs the frozen blocks.
        micro_batches: Each with the bank's half of its pass, in the order of the rows.
        threads: Runs the passes, if more than one at once.
        at_once: How many of them run at once.

    Attributes:
        final_MD: The decoder's final states at the selected tokens, shape (M, D), detached.
    """

    def __init__(
        self,
        backbone: Backbone,
        micro_batches: Sequence[tuple[Batch, BankPass]],
        threads: ThreadPoolExecutor,
        at_once: int,
    ) -> None:
        self._threads = threads
        self._at_once = at_once
        self._sites = [sites for _, sites in micro_batches]
        self._passes = self._each(backbone.forward, micro_batches)
        self._sizes = [len(run.final_MD) for run in self._passes]
        self.final_MD = torch.cat([run.final_MD for run in self._passes])

    def backward(self, grad_MD: Tensor) -> list[Tensor]:
        """Take the gradient of `final_MD`; return that of each wanted parameter. Once, and only when training.

        Raises:
            WireError: A parameter got no gradient.
            NonFiniteError: A gradient is infinite or not a number.
        """
        passes, self._passes = self._passes, []
        self._each(lambda run, grad: run.backward(grad), list(zip(passes, grad_MD.split(self._sizes), strict=True)))
        by_parameter = zip(*(sites.gradients() for sites in self._sites), strict=True)
        return [functools.reduce(torch.add, grads) for grads in by_parameter]

    def _each(self, call: Callable[..., _T], arguments: Sequence[tuple[Any, ...]]) -> list[_T]:
        """Return what a function returns for each of the arguments; when one fails, once all have ended."""
        if self._at_once == 1:
            return [call(*values) for values in arguments]
        free = threading.Semaphore(self._at_once)

        def run(values: tuple[Any, ...]) -> _T:
            with free:
                return call(*values)

        futures = [self._threads.submit(run, values) for values in arguments]
        wait(futures)
        return [future.result() for future in futures]
