"""Opens the device's connection to a cloud, and says what went wrong in words.

May import errors, `wire` and libraries.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

import grpc

from tidelock.errors import (
    CloudUnreachable,
    ConfigError,
    ModelMismatch,
    TidelockError,
    TlsError,
    TokenRefused,
    WireError,
)
from tidelock.wire.limits import KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS, MESSAGE_BYTES

if TYPE_CHECKING:
    from tidelock.wire.address import Address

# Shared by both ends.
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
)
# A restarted cloud should be found again within a second or two; gRPC's own default goes up to two minutes.
_RECONNECT_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
)
_PROBE_SECONDS = 5.0


@final
@dataclass(frozen=True, slots=True)
class Credentials:
    """What a device shows to a cloud, and what it trusts.

    Attributes:
        token: Bearer token.
        ca: PEM file with the certificate authority (or the cloud's own certificate) to trust; None trusts the
            system's authorities.
        client_cert: PEM file with the device's own certificate, where the cloud asks for one.
        client_key: PEM file with its key.
        insecure: Allow a connection without TLS to another machine.
    """

    token: str
    ca: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None
    insecure: bool = False

    def __repr__(self) -> str:
        """Leave the token out."""
        return f"Credentials(ca={self.ca}, client_cert={self.client_cert}, insecure={self.insecure})"

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what goes with every call."""
        return (("authorization", f"Bearer {self.token}"),)


def open_channel(address: Address, credentials: Credentials) -> grpc.Channel:
    """Return a channel; nothing is sent yet.

    Raises:
        ConfigError: Without TLS to another machine, or a certificate file cannot be read.
    """
    options = [*CHANNEL_OPTIONS, *_RECONNECT_OPTIONS]
    if address.tls:
        return grpc.secure_channel(address.target, _tls(credentials), options=options)
    if not (address.is_loopback or credentials.insecure):
        msg = (
            f"Connecting to {address.url}: expected grpcs:// to another machine, got a connection without TLS, which "
            "would show token and activations to the network. Use grpcs://, or --insecure inside a tunnel of yours."
        )
        raise ConfigError(msg)
    return grpc.insecure_channel(address.target, options=options)


def _tls(credentials: Credentials) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        root_certificates=_read(credentials.ca, "--ca"),
        private_key=_read(credentials.client_key, "--client-key"),
        certificate_chain=_read(credentials.client_cert, "--client-cert"),
    )


def _read(path: Path | None, option: str) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        msg = f"{option}: expected a readable PEM file, got {error.strerror} ({path}). Check the path."
        raise ConfigError(msg) from error


def explain(error: grpc.RpcError, address: Address, credentials: Credentials) -> TidelockError:
    """Return our error for one of gRPC's.

    What may pass by itself (a lost connection, a restarted cloud) becomes `CloudUnreachable`; all else is final.
    """
    code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
    details = (error.details() if isinstance(error, grpc.Call) else None) or str(error)
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return TokenRefused(details)
    if code == grpc.StatusCode.FAILED_PRECONDITION:
        return ModelMismatch(details)
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return ConfigError(details)
    if code in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED}:
        return WireError(f"Cloud at {address.url}: expected it to take the message, got {details}")
    return (_tls_fault(address, credentials) if address.tls else None) or CloudUnreachable(
        f"Cloud at {address.url}: expected an answer, got {code.name}: {details}. Is it running, and "
        "reachable from here?"
    )


def _tls_fault(address: Address, credentials: Credentials) -> TlsError | None:
    """Return why a TLS handshake fails, which gRPC does not tell, or None when it does not fail or nobody answers."""
    try:
        context = ssl.create_default_context(cafile=str(credentials.ca) if credentials.ca else None)
        context.set_alpn_protocols(["h2"])
        if credentials.client_cert and credentials.client_key:
            context.load_cert_chain(credentials.client_cert, credentials.client_key)
        with (
            socket.create_connection((address.host, address.port), timeout=_PROBE_SECONDS) as connection,
            context.wrap_socket(connection, server_hostname=address.host) as tls,
        ):
            # A server that wants a client certificate refuses only when it is first written to or read from.
            tls.settimeout(0.5)
            tls.recv(1)
    except ssl.SSLCertVerificationError as error:
        return TlsError(
            f"Cloud at {address.url}: expected a trusted certificate, got one that is not: {error.verify_message}. "
            "Give its authority with --ca, and use a name that the certificate has."
        )
    except ssl.SSLError as error:
        return TlsError(
            f"Cloud at {address.url}: expected a TLS handshake, got {error.reason or error}. Does it want a client "
            "certificate (--client-cert, --client-key), or does it speak without TLS (grpc://)?"
        )
    except OSError:
        return None
    return None
