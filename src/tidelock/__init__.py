"""tidelock: private, distributed parameter-efficient fine-tuning of large language models.

Importing this package is quick: what needs torch is loaded at its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tidelock.cache.config import CacheConfig
    from tidelock.device.generate import GenerationSettings
    from tidelock.device.kill_revive import KillRevive
    from tidelock.device.model import DeviceModel
    from tidelock.errors import TidelockError
    from tidelock.peft.adapter import AdapterConfig
    from tidelock.peft.attach import attach_adapter
    from tidelock.peft.attach_side import attach_side
    from tidelock.peft.core import CoreConfig
    from tidelock.peft.side import SideConfig
    from tidelock.run.connect import connect
    from tidelock.run.connect_side import connect_side, start_side
    from tidelock.schedule.schedule import Schedule
    from tidelock.wire.channel import Credentials
    from tidelock.wire.ledger import Ledger

__all__ = [
    "AdapterConfig",
    "CacheConfig",
    "CoreConfig",
    "Credentials",
    "DeviceModel",
    "GenerationSettings",
    "KillRevive",
    "Ledger",
    "Schedule",
    "SideConfig",
    "TidelockError",
    "attach_adapter",
    "attach_side",
    "connect",
    "connect_side",
    "start_side",
]

_HOMES = {
    "AdapterConfig": "tidelock.peft.adapter",
    "CacheConfig": "tidelock.cache.config",
    "CoreConfig": "tidelock.peft.core",
    "Credentials": "tidelock.wire.channel",
    "DeviceModel": "tidelock.device.model",
    "GenerationSettings": "tidelock.device.generate",
    "KillRevive": "tidelock.device.kill_revive",
    "Ledger": "tidelock.wire.ledger",
    "Schedule": "tidelock.schedule.schedule",
    "SideConfig": "tidelock.peft.side",
    "TidelockError": "tidelock.errors",
    "attach_adapter": "tidelock.peft.attach",
    "attach_side": "tidelock.peft.attach_side",
    "connect": "tidelock.run.connect",
    "connect_side": "tidelock.run.connect_side",
    "start_side": "tidelock.run.connect_side",
}


def __getattr__(name: str) -> object:
    """Load a public name from its home at its first use."""
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
