"""The connection to a cloud, over real sockets: what is refused beforehand, and what is said when it fails."""

from __future__ import annotations

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from tests.support.certs import make_certificates
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
from tidelock.wire import channel
from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire import tidelock_pb2_grpc as pb_grpc
from tidelock.wire.address import Address, parse_url
from tidelock.wire.channel import Credentials, explain, open_channel

TOKEN = "a-token-that-nobody-should-see"


class Answering(pb_grpc.BackboneServicer):
    """Answers every call, or aborts it with the status that the call names."""

    def Describe(self, request, context):  # noqa: N802
        metadata = dict(context.invocation_metadata())
        if "abort" in metadata:
            context.abort(getattr(grpc.StatusCode, metadata["abort"]), metadata["details"])
        return pb.Description(version=metadata["authorization"])


@contextmanager
def serving(credentials=None):
    server = grpc.server(ThreadPoolExecutor(4))
    pb_grpc.add_BackboneServicer_to_server(Answering(), server)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield port
    finally:
        server.stop(0).wait()


def describe(address, credentials, *more):
    """Return the answer, or our error for what went wrong."""
    with open_channel(address, credentials) as connection:
        try:
            return pb_grpc.BackboneStub(connection).Describe(
                pb.DescribeRequest(), metadata=(*credentials.metadata(), *more), timeout=10
            )
        except grpc.RpcError as error:
            return explain(error, address, credentials)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def tls_port(certificates):
    pair = (certificates.key.read_bytes(), certificates.cert.read_bytes())
    with serving(grpc.ssl_server_credentials([pair])) as port:
        yield port


@pytest.fixture(scope="module")
def mutual_tls_port(certificates):
    pair = (certificates.key.read_bytes(), certificates.cert.read_bytes())
    authority = certificates.ca.read_bytes()
    with serving(grpc.ssl_server_credentials([pair], authority, require_client_auth=True)) as port:
        yield port


@pytest.fixture(scope="module")
def plain_port():
    with serving() as port:
        yield port


FINAL = {
    "UNAUTHENTICATED": TokenRefused,
    "FAILED_PRECONDITION": ModelMismatch,
    "RESOURCE_EXHAUSTED": ConfigError,
    "ABORTED": CloudBusy,
    "OUT_OF_RANGE": NonFiniteError,
    "INVALID_ARGUMENT": WireError,
    "UNKNOWN": WireError,
    "UNIMPLEMENTED": WireError,
}


@pytest.mark.parametrize("status", [code.name for code in grpc.StatusCode if code != grpc.StatusCode.OK])
def test_each_status_becomes_one_of_our_errors(plain_port, status):
    address = Address("127.0.0.1", plain_port, tls=False)
    error = describe(address, Credentials(TOKEN), ("abort", status), ("details", "said by the cloud"))
    assert type(error) is FINAL.get(status, CloudUnreachable)
    assert "said by the cloud" in error.message
    if type(error) in {CloudUnreachable, WireError}:
        assert error.message.startswith(f"Cloud at grpc://127.0.0.1:{plain_port}: expected ")
    if type(error) is CloudUnreachable:
        assert f"got {status}: " in error.message


def test_a_status_without_details_still_says_something(plain_port):
    address = Address("127.0.0.1", plain_port, tls=False)
    error = describe(address, Credentials(TOKEN), ("abort", "UNAUTHENTICATED"), ("details", ""))
    assert type(error) is TokenRefused
    assert "UNAUTHENTICATED" in error.message


def test_an_error_that_is_no_call_is_final():
    error = explain(grpc.RpcError("odd"), parse_url("grpc://127.0.0.1:1"), Credentials(TOKEN))
    assert type(error) is WireError
    assert "odd" in error.message


def test_the_token_goes_with_the_call(plain_port):
    answer = describe(Address("127.0.0.1", plain_port, tls=False), Credentials(TOKEN))
    assert answer.version == f"Bearer {TOKEN}"


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for tls in (False, True):
        error = describe(Address("127.0.0.1", port, tls), Credentials(TOKEN))
        assert type(error) is CloudUnreachable
        assert "UNAVAILABLE" in error.message
        assert TOKEN not in error.message


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_trusted_certificate_is_accepted_for_each_of_its_names(certificates, tls_port, host):
    assert isinstance(describe(Address(host, tls_port, tls=True), Credentials(TOKEN, certificates.ca)), pb.Description)


def test_a_certificate_of_an_unknown_authority_is_not_trusted(certificates, tls_port):
    for ca in (certificates.other_ca, None):
        error = describe(Address("localhost", tls_port, tls=True), Credentials(TOKEN, ca))
        assert type(error) is TlsError
        assert f"Cloud at grpcs://localhost:{tls_port}: expected a trusted certificate" in error.message
        assert "unable to get local issuer" in error.message
        assert "--ca" in error.message


def test_a_certificate_for_another_name_is_not_trusted(certificates, tls_port):
    error = describe(Address("127.0.0.2", tls_port, tls=True), Credentials(TOKEN, certificates.ca))
    assert type(error) is CloudUnreachable  # nobody listens there
    with forwarded("127.0.0.3", tls_port) as port:
        error = describe(Address("127.0.0.3", port, tls=True), Credentials(TOKEN, certificates.ca))
    assert type(error) is TlsError
    assert "not valid for '127.0.0.3'" in error.message


def test_a_missing_client_certificate_is_told(certificates, mutual_tls_port):
    error = describe(Address("localhost", mutual_tls_port, tls=True), Credentials(TOKEN, certificates.ca))
    assert type(error) is TlsError
    assert "expected a connection, got one closed after the handshake" in error.message
    assert "--client-cert" in error.message


def test_a_client_certificate_of_another_authority_is_refused(certificates, mutual_tls_port, tmp_path):
    stranger = make_certificates(tmp_path)
    shown = Credentials(TOKEN, certificates.ca, stranger.client_cert, stranger.client_key)
    error = describe(Address("localhost", mutual_tls_port, tls=True), shown)
    assert type(error) is TlsError
    assert "Does it want a client certificate, or another one" in error.message


def test_a_client_certificate_is_accepted(certificates, mutual_tls_port):
    shown = Credentials(TOKEN, certificates.ca, certificates.client_cert, certificates.client_key)
    assert isinstance(describe(Address("localhost", mutual_tls_port, tls=True), shown), pb.Description)


def test_a_failing_call_over_good_tls_is_not_blamed_on_tls(certificates, tls_port, mutual_tls_port):
    shown = Credentials(TOKEN, certificates.ca, certificates.client_cert, certificates.client_key)
    for port in (tls_port, mutual_tls_port):
        address = Address("localhost", port, tls=True)
        error = describe(address, shown, ("abort", "UNAVAILABLE"), ("details", "away"))
        assert type(error) is CloudUnreachable


def test_a_plain_text_cloud_behind_grpcs_is_told(certificates, plain_port):
    error = describe(Address("127.0.0.1", plain_port, tls=True), Credentials(TOKEN, certificates.ca))
    assert type(error) is TlsError
    assert "WRONG_VERSION_NUMBER" in error.message
    assert "does it speak without TLS" in error.message


def test_a_proxy_that_hangs_up_is_a_cloud_that_is_away(certificates):
    with forwarded("127.0.0.1", None) as port:
        error = describe(Address("127.0.0.1", port, tls=True), Credentials(TOKEN, certificates.ca))
    assert type(error) is CloudUnreachable


def test_a_cloud_that_hangs_up_once_is_a_cloud_that_is_going(certificates, tls_port, monkeypatch):
    answers = iter([True, False])
    monkeypatch.setattr(channel, "_hangs_up", lambda *_: next(answers))
    address = Address("localhost", tls_port, tls=True)
    error = describe(address, Credentials(TOKEN, certificates.ca), ("abort", "UNAVAILABLE"), ("details", "going"))
    assert type(error) is CloudUnreachable
    assert next(answers, None) is None


@contextmanager
def forwarded(host, to_port):
    """Accept on a loopback address and hand on every connection; `to_port` None hangs up after the first bytes."""
    listening = socket.create_server((host, 0))

    def serve():
        while True:
            try:
                device, _ = listening.accept()
            except OSError:
                return
            with device:
                hang_up(device) if to_port is None else hand_on(device, to_port)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


def hang_up(device):
    device.recv(65536)
    device.shutdown(socket.SHUT_WR)
    while device.recv(65536):  # to the end: what is left unread would reset the connection instead
        pass


def hand_on(device, port):
    with socket.create_connection(("127.0.0.1", port)) as cloud:
        pumps = [threading.Thread(target=pump, args=ends) for ends in ((device, cloud), (cloud, device))]
        for thread in pumps:
            thread.start()
        for thread in pumps:
            thread.join()


def pump(source, target):
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("url", ["grpc://192.168.0.1:7777", "grpc://cloud.example:7777", "grpc://0.0.0.0:7777"])
def test_no_plain_text_to_another_machine(url):
    with pytest.raises(ConfigError, match=f"Connecting to {url}: expected grpcs:// to another machine"):
        open_channel(parse_url(url), Credentials(TOKEN))
    open_channel(parse_url(url), Credentials(TOKEN, insecure=True)).close()


@pytest.mark.parametrize("url", ["grpc://localhost:7777", "grpc://127.0.0.1:7777", "grpc://[::1]:7777"])
def test_plain_text_on_this_machine(url):
    open_channel(parse_url(url), Credentials(TOKEN)).close()


@pytest.mark.parametrize(
    ("field", "option"), [("ca", "--ca"), ("client_cert", "--client-cert"), ("client_key", "--client-key")]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, certificates, field, option):
    missing = tmp_path / "missing.pem"
    files = {"ca": certificates.ca, "client_cert": certificates.client_cert, "client_key": certificates.client_key}
    with pytest.raises(ConfigError, match=f"{option}: expected a readable PEM file, got No such file.*missing.pem"):
        open_channel(parse_url("grpcs://localhost:1"), Credentials(TOKEN, **{**files, field: missing}))


def test_half_a_client_certificate_is_refused(certificates):
    for half in ({"client_cert": certificates.client_cert}, {"client_key": certificates.client_key}):
        with pytest.raises(ConfigError, match="expected a certificate and its key, got only one"):
            Credentials(TOKEN, **half)


@pytest.mark.parametrize("token", ["line\nbreak", "tab\t", "umlaut-ä", "\x00"])
def test_a_token_that_cannot_be_sent_is_refused_unseen(token):
    with pytest.raises(ConfigError, match="Token: expected printable ASCII") as caught:
        Credentials(token)
    assert token not in str(caught.value)


def test_the_token_is_in_no_text(certificates):
    shown = Credentials(TOKEN, certificates.ca, certificates.client_cert, certificates.client_key)
    for text in (repr(shown), str(shown), f"{shown}"):
        assert TOKEN not in text
        assert "ca.pem" in text


def test_every_error_of_explain_is_ours():
    assert all(issubclass(error, TidelockError) for error in FINAL.values())
