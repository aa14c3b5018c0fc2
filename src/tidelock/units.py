"""Sizes and times as people write them, read and written in one way.

May be imported by everything; imports only `errors`.
"""

from __future__ import annotations

import re

from tidelock.errors import ConfigError

_BYTE_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """Return the number of bytes in a size such as ``8GiB``, ``500 MB`` or ``4096``.

    Raises:
        ConfigError: The text is not a number followed by a known unit.

    >>> parse_bytes("8GiB")
    8589934592
    """
    match = _SIZE.fullmatch(text)
    factor = _BYTE_UNITS.get(match[2].upper() or "B") if match else None
    if match is None or factor is None:
        msg = f"Size: expected a number with a unit such as 8GiB or 500MB, got {text!r}. Give one like that."
        raise ConfigError(msg)
    return int(float(match[1]) * factor)


def format_bytes(count: int) -> str:
    """Return a size with one decimal in the largest fitting decimal unit (networks are sold in those).

    >>> format_bytes(189_000_000)
    '189.0 MB'
    """
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def format_seconds(seconds: float) -> str:
    """Return a duration as people say it.

    >>> format_seconds(75)
    '1 min 15 s'
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def format_short_seconds(seconds: float) -> str:
    """Return a duration that may be short, with three digits below a minute.

    >>> format_short_seconds(0.0123)
    '12.3 ms'
    """
    if seconds >= 60:
        return format_seconds(seconds)
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
