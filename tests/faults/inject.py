"""Faults at exact places of a run: a process reaches a place for the n-th time, and it happens there and then."""

from __future__ import annotations

import functools
import os
import resource
import signal
from collections.abc import Callable
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.support.tidelock_process import Hook


class Place(Enum):
    """Where a fault strikes, as the class and the method that is called there.

    With batches of 2 of 9 examples, two batches a step and adapters in 3 blocks there are 5 batches and 3 steps an
    epoch, and 3 calls of a site a batch and direction; the evaluation after an epoch has 2 batches.
    """

    SITE_FORWARD = ("tidelock.device.bank", "BankPass", "forward")
    SITE_BACKWARD = ("tidelock.device.bank", "BankPass", "backward")
    BATCH_DONE = ("tidelock.device.bank", "BankPass", "gradients")
    OPTIMIZER_MOVED = ("torch.optim.lr_scheduler", "LambdaLR", "step")
    HALF_SAVED = ("tidelock.run.trainer", "RunTrainer", "_save_rng_state")
    UNMARKED = ("tidelock.run.folder", "RunFolder", "mark_complete")
    SAVED = ("tidelock.run.trainer", "Journal", "on_save")
    # Of a side network only.
    BATCH_ANNOUNCED = ("tidelock.device.side_model", "SideModel", "announce")
    TAPS_READ = ("tidelock.device.tap_source", "TapSource", "read")
    EXAMPLE_CACHED = ("tidelock.cache.store", "ActivationCache", "put")
    LET_GO = ("tidelock.device.tap_source", "TapSource", "release")


def strike(place: Place, count: int, number: signal.Signals, pid: int | None = None, times: int = 1) -> Hook:
    """Return a hook that sends a signal when the place is reached for the `count`-th time.

    Args:
        place: Where.
        count: From 1.
        number: The signal.
        pid: The process that gets it; the one that got there when None.
        times: How often it is sent.
    """
    return functools.partial(_arm, place.value, count, functools.partial(_send, int(number), pid, times))


def fill_disk(place: Place, count: int, path: Path) -> Hook:
    """Return a hook that, when the place is reached, leaves no room for one file: it becomes a link to /dev/full."""
    return functools.partial(_arm, place.value, count, functools.partial(_link_to_full, path))


def limit_files(place: Place, count: int, size_bytes: int) -> Hook:
    """Return a hook after which, once the place is reached, no file can grow beyond a size."""
    return functools.partial(_arm, place.value, count, functools.partial(_limit, size_bytes))


def _send(number: int, pid: int | None, times: int) -> None:
    for _ in range(times):
        os.kill(pid or os.getpid(), number)


def _link_to_full(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("/dev/full")


def _limit(size_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY))


def _arm(place: tuple[str, str, str], count: int, act: Callable[[], None]) -> None:
    module, name, method = place
    owner = getattr(import_module(module), name)
    original = getattr(owner, method)
    reached = 0

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal reached
        reached += 1
        if reached == count:
            act()
        return original(*args, **kwargs)

    setattr(owner, method, wrapper)
