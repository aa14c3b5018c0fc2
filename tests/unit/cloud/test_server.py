"""Where and how a cloud listens, and what it says of its model."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from pathlib import Path

import grpc
import pytest

from tests.support.certs import make_certificates
from tests.unit.hand_device import TOKEN
from tidelock.cloud.server import CloudServer, Listener
from tidelock.cloud.tenants import Tenants
from tidelock.errors import CloudUnreachable, ConfigError, ListenRefused, ModelError, TlsError
from tidelock.model.checkpoint import Checkpoint, tensor_sha256
from tidelock.model.load import ModelChoice
from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire import tidelock_pb2_grpc as pb_grpc
from tidelock.wire.address import Address, parse_listen
from tidelock.wire.channel import Credentials, explain, open_channel
from tidelock.wire.limits import PROTOCOL_VERSION

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def describe(address: Address, credentials: Credentials):
    """Return the cloud's description, or our error."""
    with open_channel(address, credentials) as channel:
        try:
            return pb_grpc.BackboneStub(channel).Describe(
                pb.DescribeRequest(), metadata=credentials.metadata(), timeout=10
            )
        except grpc.RpcError as error:
            return explain(error, address, credentials)


@pytest.fixture
def make_server(tiny_folder):
    """Return a function that makes a server without starting it."""
    servers = []

    def make(listen="127.0.0.1:0", model=None, *, tls=False, **listening):
        tenants = Tenants({"anna": TOKEN})
        listener = Listener(parse_listen(listen, tls=tls), **listening)
        servers.append(CloudServer(ModelChoice(str(model or tiny_folder)), tenants, listener))
        return servers[-1]

    yield make
    for server in servers:
        server.stop(0)


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.168.0.1:1", "cloud.example:1"])
def test_no_plain_text_beyond_loopback(listen):
    listener = Listener(parse_listen(listen, tls=False))
    with pytest.raises(ListenRefused, match=r"expected TLS beyond this machine, got neither --tls-cert nor --insecure"):
        listener.credentials()
    assert Listener(listener.address, insecure=True).credentials() is None


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:0", "[::1]:0"])
def test_plain_text_on_loopback(listen):
    assert Listener(parse_listen(listen, tls=False)).credentials() is None


def test_an_address_that_is_refused_is_refused_before_the_model_is_loaded(tmp_path, make_server):
    with pytest.raises(ListenRefused):
        make_server("0.0.0.0:0", tmp_path / "no such model")


@pytest.mark.parametrize("given", [["tls_cert"], ["tls_key"], ["client_ca"], ["client_ca", "tls_key"]])
def test_part_of_the_tls_files_is_refused(certificates, given):
    files = {"tls_cert": certificates.cert, "tls_key": certificates.key, "client_ca": certificates.ca}
    with pytest.raises(ConfigError, match="expected a certificate and its key"):
        Listener(parse_listen("127.0.0.1:0", tls=True), **{name: files[name] for name in given}).credentials()


@pytest.mark.parametrize("broken", ["tls_cert", "tls_key", "client_ca"])
def test_a_file_that_cannot_be_read_is_named(certificates, tmp_path, broken):
    files = {"tls_cert": certificates.cert, "tls_key": certificates.key, "client_ca": certificates.ca}
    files[broken] = tmp_path / "missing.pem"
    with pytest.raises(ConfigError, match=r"expected readable PEM files, got No such file.*missing\.pem"):
        Listener(parse_listen("127.0.0.1:0", tls=True), **files).credentials()


def test_a_certificate_that_does_not_fit_its_key_is_refused(make_server, certificates):
    server = make_server(tls=True, tls_cert=certificates.cert, tls_key=certificates.client_key)
    with pytest.raises(ListenRefused, match="a certificate that fits its key"):
        server.start()


def test_no_pem_at_all_is_refused(make_server, certificates, tmp_path):
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    with pytest.raises(ListenRefused):
        make_server(tls=True, tls_cert=nonsense, tls_key=certificates.key).start()


def test_a_port_in_use_is_refused(make_server):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenRefused, match=f"Listening at 127.0.0.1:{port}: expected a free address"):
            make_server(f"127.0.0.1:{port}").start()


def test_two_clouds_do_not_share_a_port(make_server):
    first = make_server().start()
    with pytest.raises(ListenRefused):
        make_server(first.target).start()


def test_the_system_chooses_port_0(make_server):
    address = make_server().start()
    assert address.port > 0
    assert (address.host, address.tls) == ("127.0.0.1", False)
    assert describe(address, Credentials(TOKEN)).num_blocks == 3


def test_tls(make_server, certificates):
    address = make_server("localhost:0", tls=True, tls_cert=certificates.cert, tls_key=certificates.key).start()
    assert address.url.startswith("grpcs://localhost:")
    assert describe(address, Credentials(TOKEN, certificates.ca)).num_blocks == 3
    assert type(describe(address, Credentials(TOKEN, certificates.other_ca))) is TlsError
    plain = Address(address.host, address.port, tls=False)
    assert type(describe(plain, Credentials(TOKEN))) is CloudUnreachable


def test_client_certificates(make_server, certificates):
    address = make_server(
        tls=True, tls_cert=certificates.cert, tls_key=certificates.key, client_ca=certificates.ca
    ).start()
    without = Credentials(TOKEN, certificates.ca)
    assert type(describe(address, without)) is TlsError
    shown = Credentials(TOKEN, certificates.ca, certificates.client_cert, certificates.client_key)
    assert describe(address, shown).num_blocks == 3


def test_the_description_is_true(make_server, tiny_folder):
    server = make_server()
    description, checkpoint = server.description, Checkpoint.open(str(tiny_folder))
    assert description.fingerprint == checkpoint.fingerprint()
    assert description.num_tensors == len(checkpoint.names())
    assert {artefact.name for artefact in description.tensors} == {"model.embed_tokens.weight", "lm_head.weight"}
    for artefact in description.tensors:
        assert artefact.sha256 == tensor_sha256(checkpoint.read(artefact.name))
    folder = Path(server._folder.name)
    assert {artefact.name for artefact in description.files} == {path.name for path in folder.iterdir()}
    for artefact in description.files:
        content = (folder / artefact.name).read_bytes()
        assert (artefact.size_bytes, artefact.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert Checkpoint.open(str(folder)).names() == {"model.embed_tokens.weight", "lm_head.weight"}
    assert json.loads(description.config_json)["hidden_size"] == 32
    assert (description.max_tokens, description.protocol) == (1 << 16, PROTOCOL_VERSION)


def test_a_model_that_is_not_all_here_is_not_served(make_server, tiny_folder, monkeypatch):
    monkeypatch.setattr(Checkpoint, "fingerprint", lambda self: None)
    with pytest.raises(ModelError, match="expected all weights on this disk, got only a part"):
        make_server()


def test_a_folder_without_a_model_is_refused(make_server, tiny_folder, tmp_path):
    shutil.copy(tiny_folder / "config.json", tmp_path)
    with pytest.raises(ModelError, match=r"expected model.safetensors"):
        make_server(model=tmp_path)


def test_stopping_ends_everything(tiny_folder):
    server = CloudServer(
        ModelChoice(str(tiny_folder)), Tenants({"anna": TOKEN}), Listener(parse_listen("127.0.0.1:0", tls=False))
    )
    address = server.start()
    folder = Path(server._folder.name)
    assert folder.is_dir()
    server.stop(0)
    server.wait()
    assert not folder.exists()
    assert type(describe(address, Credentials(TOKEN))) is CloudUnreachable
