"""Faults at exact places of a run: a process reaches a place for the n-th time, and a signal is sent there and then."""

from __future__ import annotations

import functools
import os
import signal
from enum import Enum
from typing import Any

from tests.support.tidelock_process import Hook


class Place(Enum):
    """Where a fault strikes, as the class and the method that is called there.

    With batches of 2 of 9 examples, two batches a step and adapters in 3 blocks there are 5 batches and 3 steps an
    epoch, and 3 calls of a site a batch and direction.
    """

    SITE_FORWARD = ("tidelock.device.bank", "BankPass", "forward")
    SITE_BACKWARD = ("tidelock.device.bank", "BankPass", "backward")
    BATCH_DONE = ("tidelock.device.bank", "BankPass", "gradients")
    OPTIMIZER_MOVED = ("torch.optim.lr_scheduler", "LambdaLR", "step")
    HALF_SAVED = ("tidelock.run.trainer", "RunTrainer", "_save_rng_state")
    UNMARKED = ("tidelock.run.folder", "RunFolder", "mark_complete")
    SAVED = ("tidelock.run.trainer", "Journal", "on_save")


def strike(place: Place, count: int, number: signal.Signals, pid: int | None = None, times: int = 1) -> Hook:
    """Return a hook that sends a signal when the place is reached for the `count`-th time.

    Args:
        place: Where.
        count: From 1.
        number: The signal.
        pid: The process that gets it; the one that got there when None.
        times: How often it is sent.
    """
    return functools.partial(_arm, place.value, count, int(number), pid, times)


def _arm(place: tuple[str, str, str], count: int, number: int, pid: int | None, times: int) -> None:
    from importlib import import_module

    module, name, method = place
    owner = getattr(import_module(module), name)
    original = getattr(owner, method)
    reached = 0

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal reached
        reached += 1
        if reached == count:
            for _ in range(times):
                os.kill(pid or os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, method, wrapper)
