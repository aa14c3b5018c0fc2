"""Addresses of a cloud, as people write them.

May import errors.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import final
from urllib.parse import urlsplit

from tidelock.errors import ConfigError

# No user, path, query, fragment, space or control character: nothing that would be passed over silently.
_HOST_AND_PORT = re.compile(r"[^\s\x00-\x1f@/?#\\]+")


@final
@dataclass(frozen=True, slots=True)
class Address:
    """Where a cloud listens.

    Attributes:
        host: Name or IP address.
        port: TCP port.
        tls: Whether the connection is encrypted.
    """

    host: str
    port: int
    tls: bool

    @property
    def target(self) -> str:
        """`host:port`, as gRPC takes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """`grpcs://host:port`, or `grpc://` without TLS."""
        return f"{'grpcs' if self.tls else 'grpc'}://{self.target}"

    @property
    def is_loopback(self) -> bool:
        """Whether it cannot be reached from another machine."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_url(url: str) -> Address:
    """Return the address in `grpcs://HOST:PORT` or `grpc://HOST:PORT`.

    Raises:
        ConfigError: The URL has another form.
    """
    scheme, _, rest = url.partition("://")
    found = _split(rest.removesuffix("/"))
    if scheme.lower() not in {"grpc", "grpcs"} or found is None or not found[1]:
        msg = (
            f"Cloud address: expected grpcs://HOST:PORT (or grpc:// on this machine), got {url!r}. Write it like that."
        )
        raise ConfigError(msg)
    return Address(*found, tls=scheme.lower() == "grpcs")


def parse_listen(text: str, *, tls: bool) -> Address:
    """Return the address in `HOST:PORT`; port 0 lets the system choose.

    Raises:
        ConfigError: The text has another form.
    """
    found = _split(text)
    if found is None:
        msg = f"Listen address: expected HOST:PORT such as 127.0.0.1:7777, got {text!r}. Write it like that."
        raise ConfigError(msg)
    return Address(*found, tls=tls)


def _split(text: str) -> tuple[str, int] | None:
    """Return host and port, or None when the text has another form."""
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    return (host, port) if host and port is not None and _HOST_AND_PORT.fullmatch(text) else None
