from __future__ import annotations

import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest

from tidelock.run.certificates import make_loopback_certificate


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_who_trusts_the_certificate_can_connect_on_this_machine(tmp_path: Path, name: str) -> None:
    certificate, key = make_loopback_certificate(tmp_path)
    assert handshake(certificate, key, name) is None


def test_another_name_is_not_trusted(tmp_path: Path) -> None:
    certificate, key = make_loopback_certificate(tmp_path)
    refusal = handshake(certificate, key, "example.org")
    assert isinstance(refusal, ssl.SSLCertVerificationError)


def test_only_this_user_can_read_the_key(tmp_path: Path) -> None:
    _, key = make_loopback_certificate(tmp_path)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


def handshake(certificate: Path, key: Path, name: str) -> ssl.SSLError | None:
    """Return why a TLS client that trusts the certificate alone does not want to talk to its server."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    client = ssl.create_default_context(cafile=str(certificate))
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        client.wrap_socket(ours, server_hostname=name).close()
    except ssl.SSLError as error:
        ours.close()
        return error
    finally:
        thread.join()
    return None
