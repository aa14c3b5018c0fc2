"""Metrics: counted by tenant, served over HTTP where told, and nothing else in them."""

from __future__ import annotations

import socket
import urllib.request

import prometheus_client
import pytest
from prometheus_client import REGISTRY

from tidelock.cloud import metrics as metrics_module
from tidelock.cloud.metrics import Metrics
from tidelock.errors import ListenRefused
from tidelock.wire.address import Address


@pytest.fixture
def clean(monkeypatch):
    """Forget the counters and stop the HTTP servers after a test."""
    known, started = set(REGISTRY._collector_to_names), []

    def start(*args, **kwargs):
        started.append(prometheus_client.start_http_server(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(metrics_module, "start_http_server", start)
    yield
    for server, thread in started:
        server.shutdown()
        server.server_close()
        thread.join()
    for collector in set(REGISTRY._collector_to_names) - known:
        REGISTRY.unregister(collector)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.usefixtures("clean")
def test_counts_are_served_by_tenant():
    address = Address("127.0.0.1", free_port(), tls=False)
    metrics = Metrics(address)
    metrics.count_pass("anna", 8, 0.5)
    metrics.count_pass("anna", 2, 0.25)
    metrics.count_pass("boris", 1, 0.125)
    with urllib.request.urlopen(f"http://{address.target}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert 'tidelock_passes_total{tenant="anna"} 2.0' in text
    assert 'tidelock_tokens_total{tenant="anna"} 10.0' in text
    assert 'tidelock_compute_seconds_total{tenant="anna"} 0.75' in text
    assert 'tidelock_tokens_total{tenant="boris"} 1.0' in text


@pytest.mark.usefixtures("clean")
def test_a_port_in_use_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = Address("127.0.0.1", taken.getsockname()[1], tls=False)
        with pytest.raises(ListenRefused, match=f"Metrics at {address.target}: expected a free address, got Address"):
            Metrics(address)
