"""What this machine can do, and what is wrong with it: facts, each with its fault if it has one.

Light on purpose, so that it works where the heavy libraries are missing or broken; `run.doctor_model` looks at models
and clouds. May import errors, `units`, `model.cache_folder` and small libraries.
"""

from __future__ import annotations

import os
import platform
import shutil
import threading
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import psutil
from huggingface_hub import constants, get_session
from huggingface_hub.errors import HfHubHTTPError
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tidelock.errors import StorageError, TidelockError
from tidelock.model.cache_folder import cache_folder
from tidelock.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_HUB_SECONDS = 2.5
_REACHED = "answers"
_LEAST_DISK_BYTES = 500_000_000
_UNUSED_EXTRAS = frozenset({"dev"})
# The hub's client raises OSError or its HTTP library's own root error, which HfHubHTTPError derives from.
_HUB_ERRORS: tuple[type[BaseException], ...] = (OSError, *HfHubHTTPError.__bases__)


@final
@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that was looked at.

    Attributes:
        topic: What it belongs to, e.g. `libraries`.
        name: What it is.
        value: What was found, as JSON can write it.
        text: The same for people.
        fault: What is wrong with it, and what to do; None when nothing is.
    """

    topic: str
    name: str
    value: Any
    text: str
    fault: TidelockError | None = None


def examine_machine() -> Iterator[Fact]:
    """Yield what is found on this machine, without any model."""
    yield from _interpreter()
    yield from _libraries()
    yield from _torch_devices()
    yield from _memory_and_disk()
    yield _hub()


def first_fault(facts: Iterable[Fact]) -> TidelockError | None:
    """Return the first fault, whose exit code is the doctor's, or None."""
    return next((fact.fault for fact in facts if fact.fault is not None), None)


def _interpreter() -> Iterator[Fact]:
    found, wanted = platform.python_version(), metadata.metadata("tidelock")["Requires-Python"] or ""
    fault = None
    if not SpecifierSet(wanted).contains(found, prereleases=True):
        fault = TidelockError(f"Python: expected {wanted}, got {found}. Install tidelock with a newer one.")
    yield Fact("system", "python", found, found, fault)
    yield Fact("system", "platform", platform.platform(), platform.platform())
    version = metadata.version("tidelock")
    yield Fact("system", "tidelock", version, version)


def _libraries() -> Iterator[Fact]:
    distribution = metadata.metadata("tidelock")
    extras = [extra for extra in distribution.get_all("Provides-Extra") or [] if extra not in _UNUSED_EXTRAS]
    for requirement in map(Requirement, metadata.requires("tidelock") or []):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            yield _library(requirement, None)
        else:
            yield from (_library(requirement, extra) for extra in extras if marker.evaluate({"extra": extra}))


def _library(requirement: Requirement, extra: str | None) -> Fact:
    """Return whether a library is there in a version that is allowed; one of an extra may be missing."""
    name, wanted = requirement.name, requirement.specifier
    try:
        found: str | None = metadata.version(name)
    except metadata.PackageNotFoundError:
        found = None
    if found is None and extra is not None:
        return Fact("libraries", name, None, f"not installed (optional: pip install 'tidelock[{extra}]')")
    if found is not None and wanted.contains(found, prereleases=True):
        return Fact("libraries", name, found, found)
    got = found or "none"
    msg = f"Library {name}: expected {wanted or 'any version'}, got {got}. Run: pip install '{name}{wanted}'."
    return Fact("libraries", name, found, got, TidelockError(msg))


def _torch_devices() -> Iterator[Fact]:
    try:
        torch = import_module("torch")  # here, because a machine on which it is broken is to be told so
    except (ImportError, OSError) as error:
        fault = TidelockError(f"PyTorch: expected that it can be loaded, got {error}. Install torch again.")
        yield Fact("torch devices", "cpu", None, "PyTorch cannot be loaded", fault)
        return
    threads = int(torch.get_num_threads())
    yield Fact("torch devices", "cpu", {"threads": threads}, f"{threads} threads on {os.cpu_count()} cores")
    if not torch.cuda.is_available():
        yield Fact("torch devices", "cuda", None, "none")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        value = {"name": found.name, "memory_bytes": found.total_memory}
        yield Fact("torch devices", f"cuda:{index}", value, f"{found.name}, {format_bytes(found.total_memory)}")
    mps = bool(torch.backends.mps.is_available())
    yield Fact("torch devices", "mps", mps, "yes" if mps else "none")


def _memory_and_disk() -> Iterator[Fact]:
    memory = psutil.virtual_memory()
    text = f"{format_bytes(memory.available)} free of {format_bytes(memory.total)}"
    yield Fact("space", "memory", {"free_bytes": memory.available, "total_bytes": memory.total}, text)
    folders = {
        "this folder": Path.cwd(),
        "tidelock cache": cache_folder(),
        "hub cache": Path(constants.HF_HUB_CACHE),
    }
    for name, folder in folders.items():
        yield _disk(name, folder)


def _disk(name: str, folder: Path) -> Fact:
    """Return how much room a folder has; one that is not there yet is judged by where it would be made."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    value, text = {"folder": str(folder), "free_bytes": free}, f"{format_bytes(free)} free in {folder}"
    fault = None
    if not os.access(there, os.W_OK) or not there.is_dir():
        msg = f"Disk: expected {name} to be writable, got one that is not ({folder}). Change its permissions, or "
        fault = StorageError(msg + "choose others: TIDELOCK_CACHE and HF_HOME move the caches.")
    elif free < _LEAST_DISK_BYTES:
        least = format_bytes(_LEAST_DISK_BYTES)
        fault = StorageError(f"Disk: expected {least} or more for {name}, got {text}. Free some space.")
    return Fact("space", name, value, text, fault)


def _hub() -> Fact:
    """Return whether the hub answers in time; that it does not is no fault, because models on disk need no hub."""
    url = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        answer = "not asked (HF_HUB_OFFLINE is set)"
    else:
        answers: list[str] = []
        # A thread of its own: looking up a name cannot be given a time limit.
        asking = threading.Thread(target=_ask_hub, args=(url, answers), daemon=True)
        asking.start()
        asking.join(_HUB_SECONDS)
        answer = answers[0] if answers else f"no answer within {_HUB_SECONDS} s"
    reached = answer == _REACHED
    text = f"{url}: {answer}" if reached else f"{url}: {answer}; only models on this disk can be used"
    return Fact("network", "hub", {"endpoint": url, "answers": reached}, text)


def _ask_hub(url: str, answers: list[str]) -> None:
    try:
        get_session().head(url, timeout=_HUB_SECONDS)
    except _HUB_ERRORS as error:
        answers.append(f"does not answer ({type(error).__name__})")
    else:
        answers.append(_REACHED)
