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
    CloudBusy,
    CloudUnreachable,
    ConfigError,
    ModelMismatch,
    NonFiniteError,
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
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),  # else gRPC waits 60 s for a ping's answer
    ("grpc.http2.max_pings_without_data", 0),
)
# A restarted cloud should be found again within a second or two; gRPC's own default goes up to two minutes.
_RECONNECT_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Not a pause, whatever its name: how long an attempt may take, TCP's and TLS's several round trips and all.
    ("grpc.min_reconnect_backoff_ms", 10_000),
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

    Raises:
        ConfigError: The token has characters that cannot be sent, or only one of certificate and key is given.
    """

    token: str
    ca: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        """Refuse what gRPC would refuse later and less clearly, or not survive."""
        # gRPC calls such a token "Invalid metadata" and never gets as far as the cloud.
        if not (self.token.isascii() and self.token.isprintable()):
            msg = "Token: expected printable ASCII characters, got others. Check the token, or the file that it is in."
            raise ConfigError(msg)
        # gRPC ends the whole process when it is given only one of them.
        if (self.client_cert is None) != (self.client_key is None):
            msg = (
                "Client certificate: expected a certificate and its key, got only one of them. Give --client-cert and "
                "--client-key."
            )
            raise ConfigError(msg)

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


_MEANING: dict[grpc.StatusCode, type[TidelockError]] = {
    grpc.StatusCode.UNAUTHENTICATED: TokenRefused,
    grpc.StatusCode.FAILED_PRECONDITION: ModelMismatch,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ConfigError,
    grpc.StatusCode.ABORTED: CloudBusy,
}


def explain(error: grpc.RpcError, address: Address, credentials: Credentials) -> TidelockError:
    """Return our error for one of gRPC's.

    What may pass by itself (a lost connection, a restarted cloud) becomes `CloudUnreachable`; all else is final.
    """
    code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
    details = (error.details() if isinstance(error, grpc.Call) else None) or str(error)
    if code in _MEANING:
        return _MEANING[code](details)
    if code == grpc.StatusCode.OUT_OF_RANGE:
        return NonFiniteError(f"Cloud at {address.url}: {details}")
    if code in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED}:
        return WireError(f"Cloud at {address.url}: expected it to take the message, got {details}")
    return (_tls_fault(address, credentials) if address.tls else None) or CloudUnreachable(
        f"Cloud at {address.url}: expected an answer, got {code.name}: {details}. Is it running, and "
        "reachable from here?"
    )


def _tls_fault(address: Address, credentials: Credentials) -> TlsError | None:
    """Return why a TLS handshake fails, which gRPC does not tell, or None when it does not fail or nobody answers."""
    ask = "Does it want a client certificate, or another one (--client-cert, --client-key)?"
    try:
        context = ssl.create_default_context(cafile=str(credentials.ca) if credentials.ca else None)
        context.set_alpn_protocols(["h2"])
        if credentials.client_cert and credentials.client_key:
            context.load_cert_chain(credentials.client_cert, credentials.client_key)
        # Twice, because a cloud that is just going hangs up once; then nobody answers.
        if _hangs_up(address, context) and _hangs_up(address, context):
            return TlsError(f"Cloud at {address.url}: expected a connection, got one closed after the handshake. {ask}")
    except ssl.SSLCertVerificationError as error:
        return TlsError(
            f"Cloud at {address.url}: expected a trusted certificate, got one that is not: {error.verify_message}. "
            "Give its authority with --ca, and use a name that the certificate has."
        )
    except ssl.SSLEOFError:
        # Accepted and hung up in mid-handshake: a cloud that is going, or a proxy whose cloud is away. It may pass.
        return None
    except ssl.SSLError as error:
        return TlsError(
            f"Cloud at {address.url}: expected a TLS handshake, got {error.reason or error}. {ask} "
            "Or does it speak without TLS (grpc://)?"
        )
    except OSError:
        return None
    return None


def _hangs_up(address: Address, context: ssl.SSLContext) -> bool:
    """Return whether the cloud closes a connection as soon as the handshake is done.

    With TLS 1.3 a gRPC server that does not like the device's certificate, or misses one, does that and says nothing.
    """
    with (
        socket.create_connection((address.host, address.port), timeout=_PROBE_SECONDS) as connection,
        context.wrap_socket(connection, server_hostname=address.host) as tls,
    ):
        tls.settimeout(0.5)
        return not tls.recv(1)
