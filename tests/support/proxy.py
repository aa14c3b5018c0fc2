"""A TCP proxy on loopback that can shape, stall, cut, count and record what goes through it."""

from __future__ import annotations

import contextlib
import queue
import socket
import struct
import threading
import time
from types import TracebackType
from typing import final

from tests.support.link import Lane, Link

# How far a lane's clock may run ahead of the real one: a sleep that takes too long then loses no bandwidth.
_AHEAD_SECONDS = 2e-3
# Close with a reset, as a lost connection does, not with an orderly end.
_RESET = struct.pack("ii", 1, 0)


@final
class LinkProxy:
    """Forwards connections to a port of this machine as a link would, until it is told to cut them.

    Args:
        target_port: Where connections are forwarded to.
        link: What all connections share; by default one that takes no time.
        record: Keep all bytes, in `sent` (from the device) and `received` (from the cloud).

    Attributes:
        port: Where it listens.
        cuts: How many connections were cut.
        connections: How many were made.
        bytes_sent: Bytes from the device to the cloud.
        bytes_received: Bytes from the cloud to the device.
    """

    def __init__(self, target_port: int, *, link: Link | None = None, record: bool = False) -> None:
        self._target_port = target_port
        self._link = link or Link()
        self._lanes = {outward: Lane(self._link, seed=outward) for outward in (True, False)}
        self._record = record
        self._lock = threading.Lock()
        self._sent = bytearray()
        self._received = bytearray()
        self._open: set[tuple[socket.socket, socket.socket]] = set()
        self.bytes_sent = 0
        self.bytes_received = 0
        self.cuts = 0
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def __enter__(self) -> LinkProxy:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.close()

    @property
    def sent(self) -> bytes:
        """All bytes that the device sent, over all connections, if recorded."""
        with self._lock:
            return bytes(self._sent)

    @property
    def received(self) -> bytes:
        """All bytes that the cloud sent, over all connections, if recorded."""
        with self._lock:
            return bytes(self._received)

    def cut(self) -> int:
        """Reset every open connection; return how many. New ones are let through."""
        with self._lock:
            pairs, self._open = self._open, set()
            self.cuts += len(pairs)
        for pair in pairs:
            _reset(pair)
        return len(pairs)

    def stall(self, seconds: float) -> None:
        """Let nothing into the link for so long, in both directions."""
        with self._lock:
            for lane in self._lanes.values():
                lane.stall(time.monotonic() + seconds)

    def close(self) -> None:
        """Cut everything and listen no more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                device, _ = self._listener.accept()
            except OSError:
                return
            try:
                cloud = socket.create_connection(("127.0.0.1", self._target_port), timeout=5)
            except OSError:  # the cloud is away: the device sees a connection that ends at once
                device.close()
                continue
            cloud.settimeout(None)
            pair = (device, cloud)
            for end in pair:  # else small messages would wait for acknowledgements, which is not this link's delay
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open.add(pair)
                self.connections += 1
            for outward in (True, False):
                threading.Thread(target=self._pump, args=(pair, outward), name="proxy", daemon=True).start()

    def _pump(self, pair: tuple[socket.socket, socket.socket], outward: bool) -> None:
        """Take what one end sends, as fast as the link lets it in."""
        source = pair[0] if outward else pair[1]
        on_its_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        arguments = (pair, outward, on_its_way)
        threading.Thread(target=self._deliver, args=arguments, name="proxy", daemon=True).start()
        with contextlib.suppress(OSError):
            while data := source.recv(self._link.piece_bytes):
                now = time.monotonic()
                with self._lock:
                    left, due = self._lanes[outward].send(now, len(data))
                on_its_way.put((due, data))
                time.sleep(max(0.0, left - now - _AHEAD_SECONDS))
        on_its_way.put((0.0, b""))

    def _deliver(
        self,
        pair: tuple[socket.socket, socket.socket],
        outward: bool,
        on_its_way: queue.SimpleQueue[tuple[float, bytes]],
    ) -> None:
        """Hand each piece to the other end when it is due; end both when there is no more."""
        sink = pair[1] if outward else pair[0]
        with contextlib.suppress(OSError):
            while (piece := on_its_way.get())[1]:
                due, data = piece
                time.sleep(max(0.0, due - time.monotonic()))
                self._count(data, outward)
                sink.sendall(data)
        with self._lock:
            mine = pair in self._open
            self._open.discard(pair)
        if mine:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def _count(self, data: bytes, outward: bool) -> None:
        with self._lock:
            if outward:
                self.bytes_sent += len(data)
            else:
                self.bytes_received += len(data)
            if self._record:
                (self._sent if outward else self._received).extend(data)


def _reset(pair: tuple[socket.socket, socket.socket]) -> None:
    for end in pair:
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            # A thread that waits in recv keeps the socket alive past close(); this wakes it.
            end.shutdown(socket.SHUT_RD)
        end.close()
