"""Reads gRPC messages out of the bytes of HTTP/2 connections without TLS, as a recording proxy has them.

Frames: RFC 9113, section 4.1. Messages in them: gRPC over HTTP/2, "Length-Prefixed-Message".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _PADDED = 0x0, 0x8
_FRAME_HEADER_BYTES, _MESSAGE_HEADER_BYTES = 9, 5


def message_sizes(recorded: bytes) -> list[int]:
    """Return the size of every gRPC message in one direction, stream by stream, of connections one after another."""
    streams: dict[int, bytearray] = defaultdict(bytearray)
    for stream, data in _data_frames(recorded):
        streams[stream] += data
    return [size for stream in streams.values() for size in _messages(bytes(stream))]


def _data_frames(recorded: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(recorded):
        if recorded.startswith(_PREFACE, at):  # the device begins a connection
            at += len(_PREFACE)
        length = int.from_bytes(recorded[at : at + 3], "big")
        kind, flags = recorded[at + 3], recorded[at + 4]
        stream = int.from_bytes(recorded[at + 5 : at + 9], "big") & 0x7FFFFFFF
        at += _FRAME_HEADER_BYTES
        if kind == _DATA:
            assert not flags & _PADDED
            yield stream, recorded[at : at + length]
        at += length
    assert at == len(recorded)


def _messages(stream: bytes) -> Iterator[int]:
    at = 0
    while at < len(stream):
        assert stream[at] == 0  # not compressed
        size = int.from_bytes(stream[at + 1 : at + _MESSAGE_HEADER_BYTES], "big")
        at += _MESSAGE_HEADER_BYTES + size
        yield size
    assert at == len(stream)
