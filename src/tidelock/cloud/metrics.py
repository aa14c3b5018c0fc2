"""Prometheus counters of a cloud; nothing in them tells what was computed.

Needs the extra `tidelock[metrics]`. May import errors, `wire` and libraries.
"""

from __future__ import annotations

from typing import final

from prometheus_client import Counter, start_http_server

from tidelock.errors import ListenRefused
from tidelock.wire.address import Address


@final
class Metrics:
    """Counts passes, tokens and computing seconds by tenant, and serves the counts over HTTP.

    Args:
        address: Where to serve; loopback unless an operator puts it elsewhere on purpose.

    Raises:
        ListenRefused: The system does not let it listen there.
    """

    def __init__(self, address: Address) -> None:
        self._passes = Counter("tidelock_passes", "Micro-batches run to their end", ["tenant"])
        self._tokens = Counter("tidelock_tokens", "Real tokens in them", ["tenant"])
        self._seconds = Counter("tidelock_compute_seconds", "Seconds of computing", ["tenant"])
        try:
            start_http_server(address.port, addr=address.host)
        except OSError as error:
            msg = f"Metrics at {address.target}: expected a free address, got {error.strerror}. Choose another."
            raise ListenRefused(msg) from error

    def count_pass(self, tenant: str, tokens: int, seconds: float) -> None:
        """Count one finished pass."""
        self._passes.labels(tenant).inc()
        self._tokens.labels(tenant).inc(tokens)
        self._seconds.labels(tenant).inc(seconds)
