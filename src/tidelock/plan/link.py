"""A link between device and cloud, as people write it: `40ms,50mbit`, or `40ms,20mbit/100mbit` where the ways differ.

May import errors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import final

from tidelock.errors import ConfigError

_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_BITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)([a-z]+)")


@final
@dataclass(frozen=True, slots=True)
class CloudLink:
    """What a link between device and cloud does to messages.

    Attributes:
        round_trip_seconds: From the device to the cloud and back, half of it each way.
        up_bits_per_second: From the device to the cloud.
        down_bits_per_second: From the cloud to the device.
    """

    round_trip_seconds: float
    up_bits_per_second: float
    down_bits_per_second: float


def parse_link(text: str) -> CloudLink:
    """Return the link in a text such as ``40ms,50mbit`` or ``40ms,20mbit/100mbit``, the way up first.

    Raises:
        ConfigError: The text has another form, an unknown unit, or a rate of 0.

    >>> parse_link("40ms,20mbit/100mbit")
    CloudLink(round_trip_seconds=0.04, up_bits_per_second=20000000.0, down_bits_per_second=100000000.0)
    """
    parts = text.lower().replace(" ", "").split(",")
    rates = parts[-1].split("/")
    delay = _quantity(parts[0], _SECONDS)
    up, down = (_quantity(rate, _BITS) for rate in (rates[0], rates[-1]))
    if len(parts) != 2 or len(rates) > 2 or delay is None or not up or not down:
        msg = (
            "--link: expected RTT,RATE or RTT,UP/DOWN with units (us, ms, s; kbit, mbit, gbit) and rates above 0, such "
            f"as 40ms,50mbit or 40ms,20mbit/100mbit, got {text!r}. Write it like that."
        )
        raise ConfigError(msg)
    return CloudLink(delay, up, down)


def _quantity(text: str, units: dict[str, float]) -> float | None:
    """Return a number with one of these units, or None for anything else."""
    match = _QUANTITY.fullmatch(text)
    return float(match[1]) * units[match[2]] if match and match[2] in units else None
