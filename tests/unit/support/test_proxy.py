"""The proxy over real sockets, of which only what must not be sooner is asserted: a busy machine makes all later."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.link import Link
from tests.support.proxy import LinkProxy

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that gives back what it gets."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=give_back, args=(connection,), daemon=True).start()

    def give_back(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # whoever was served may be cut off
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def exchange(proxy: LinkProxy, data: bytes) -> tuple[bytes, float]:
    """Return what came back, and after how long all of it was there."""
    with socket.create_connection(("127.0.0.1", proxy.port)) as mine:
        began = time.monotonic()
        threading.Thread(target=mine.sendall, args=(data,), daemon=True).start()
        got = b""
        while len(got) < len(data):
            part = mine.recv(1 << 16)
            assert part, "the connection ended early"
            got += part
        return got, time.monotonic() - began


def test_nothing_arrives_before_its_delay(echo: int) -> None:
    with LinkProxy(echo, link=Link(delay_seconds=0.05)) as proxy:
        got, seconds = exchange(proxy, b"hello")
    assert got == b"hello"
    assert seconds >= 2 * 0.05
    assert (proxy.bytes_sent, proxy.bytes_received) == (5, 5)


def test_a_delay_does_not_limit_how_much_goes(echo: int) -> None:
    """Were pieces sent one after the other's delay, 64 of them would take 2 x 64 x 0.2 s, which is 25 s."""
    data = bytes(range(256)) * (64 * 256)
    with LinkProxy(echo, link=Link(delay_seconds=0.2)) as proxy:
        got, seconds = exchange(proxy, data)
    assert got == data
    assert 0.4 <= seconds < 20


def test_nothing_goes_faster_than_the_bandwidth(echo: int) -> None:
    data = bytes(200_000)
    with LinkProxy(echo, link=Link(mbit_per_second=16.0)) as proxy:  # 0.1 s for all of it
        got, seconds = exchange(proxy, data)
    assert got == data
    assert seconds >= 0.1 - 0.004  # a lane's clock may be so much ahead, in each direction


def test_connections_share_the_bandwidth(echo: int) -> None:
    with LinkProxy(echo, link=Link(mbit_per_second=16.0)) as proxy:
        began = time.monotonic()
        threads = [threading.Thread(target=exchange, args=(proxy, bytes(100_000))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - began >= 0.1 - 0.004


def test_a_stall_holds_everything_up(echo: int) -> None:
    with LinkProxy(echo) as proxy:
        proxy.stall(0.1)
        _, seconds = exchange(proxy, b"hello")
    assert seconds >= 0.1 - 0.01


def test_a_cut_ends_what_is_open_and_lets_new_connections_through(echo: int) -> None:
    with LinkProxy(echo) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port)) as mine:
            mine.sendall(b"x")
            assert mine.recv(1) == b"x"
            assert proxy.cut() == 1
            with pytest.raises(ConnectionResetError):
                mine.recv(1)  # an orderly end would be b""
        assert exchange(proxy, b"again")[0] == b"again"
        assert (proxy.cuts, proxy.connections) == (1, 2)
