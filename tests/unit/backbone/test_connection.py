"""What a device believes of a cloud: its files only by their hashes and plain names, its numbers not at all."""

from __future__ import annotations

import hashlib
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.unit.hand_device import TOKEN
from tidelock.backbone import connection as connection_module
from tidelock.backbone.connection import Connection
from tidelock.errors import CloudUnreachable, StorageError, TokenRefused, WireError
from tidelock.model.checkpoint import Checkpoint
from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire import tidelock_pb2_grpc as pb_grpc
from tidelock.wire.address import Address
from tidelock.wire.channel import Credentials, open_channel
from tidelock.wire.egress import Egress
from tidelock.wire.ledger import Ledger
from tidelock.wire.limits import PART_BYTES, PROTOCOL_VERSION


class LyingCloud(pb_grpc.BackboneServicer):
    """Says and gives whatever a test tells it to."""

    address: Address

    def __init__(self):
        self.description = pb.Description(protocol=PROTOCOL_VERSION, version="9.9", fingerprint="0" * 64)
        self.given = {}
        self.fetched = []
        self.wait = None

    def offer(self, name, content, *, given=None, sha256=None, size=None):
        digest = hashlib.sha256(content).hexdigest()
        size = len(content) if size is None else size
        self.description.files.append(pb.Artefact(name=name, sha256=sha256 or digest, size_bytes=size))
        self.given[name] = content if given is None else given

    def Describe(self, request, context):  # noqa: N802
        return self.description

    def Fetch(self, request, context):  # noqa: N802
        self.fetched.append(request.name)
        if self.wait is not None:
            self.wait()
        content = self.given[request.name]
        if content is None:
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        for start in range(0, len(content), PART_BYTES):
            yield pb.FetchPart(data=content[start : start + PART_BYTES])


@pytest.fixture
def liar():
    """A lying cloud and its address."""
    server, cloud = grpc.server(ThreadPoolExecutor(4)), LyingCloud()
    pb_grpc.add_BackboneServicer_to_server(cloud, server)
    cloud.address = Address("127.0.0.1", server.add_insecure_port("127.0.0.1:0"), tls=False)
    server.start()
    yield cloud
    server.stop(0).wait()


@pytest.fixture
def connect():
    """Return a function that connects to a cloud; all connections are closed at the end."""
    connections = []

    def open_connection(cloud, **options):
        connections.append(Connection(cloud.address, Credentials(TOKEN), Egress(Ledger()), **options))
        return connections[-1]

    yield open_connection
    for connection in connections:
        connection.close()


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} if folder.exists() else set()


def test_the_cloud_says_what_it_holds(liar, connect):
    connection = connect(liar)
    assert connection.description == liar.description
    assert connection.egress.ledger.totals() == {
        "sent": {},
        "received": {"control": liar.description.ByteSize()},
    }


def test_errors_are_ours(liar, connect):
    connection = connect(liar)
    with pytest.raises(grpc.RpcError) as caught:
        next(connection.stub.Pass(iter([]), timeout=10))
    assert type(connection.explain(caught.value)) is WireError


def test_nobody_listens(liar, connect):
    liar.address = Address("127.0.0.1", 1, tls=False)
    with pytest.raises(CloudUnreachable, match=r"grpc://127.0.0.1:1"):
        connect(liar)


def test_a_wrong_token_is_refused_by_the_cloud(start_cloud):
    cloud = start_cloud()
    with pytest.raises(TokenRefused):
        Connection(cloud.address, Credentials("a-token-nobody-knows"), Egress(Ledger()))


def test_another_protocol_is_refused_and_the_connection_closed(liar, connect, monkeypatch):
    channels: list[grpc.Channel] = []

    def open_and_note(*args):
        channels.append(open_channel(*args))
        return channels[-1]

    monkeypatch.setattr(connection_module, "open_channel", open_and_note)
    liar.description.protocol = PROTOCOL_VERSION + 1
    expected = rf"expected protocol {PROTOCOL_VERSION}, got {PROTOCOL_VERSION + 1} \(its tidelock is 9.9\)"
    with pytest.raises(WireError, match=expected):
        connect(liar)
    with pytest.raises(ValueError, match="closed channel"):
        pb_grpc.BackboneStub(channels[0]).Describe(pb.DescribeRequest())


@pytest.mark.parametrize(
    "fingerprint", ["", "../x", "../" * 21 + "x", "0" * 63, "0" * 65, "G" * 64, "A" * 64, "é" * 64, "0" * 64 + "\n"]
)
def test_a_fingerprint_that_is_none_steers_nothing(liar, connect, fingerprint):
    liar.description.fingerprint = fingerprint
    with pytest.raises(WireError, match="expected a fingerprint of 64 hex digits, got another") as caught:
        connect(liar)
    assert ".." not in str(caught.value)


def test_a_model_is_fetched_once(start_cloud, connect, tmp_path, tiny_folder):
    cloud = start_cloud()
    connection = connect(cloud)
    folder = connection.fetch_model(tmp_path / "models")
    assert folder.parent == tmp_path / "models"
    assert {path.name for path in folder.iterdir()} == {file.name for file in cloud.server.description.files}
    ends, whole = Checkpoint.open(str(folder)), Checkpoint.open(str(tiny_folder))
    assert all(ends.sha256(name) == whole.sha256(name) for name in ends.names())
    received = connection.egress.ledger.totals()["received"]["model"]
    assert received > sum(file.size_bytes for file in cloud.server.description.files)
    assert connect(cloud).fetch_model(tmp_path / "models") == folder
    assert connection.fetch_model(tmp_path / "models") == folder
    assert connection.egress.ledger.totals()["received"]["model"] == received
    assert files_in(tmp_path / "models") == {folder.name} | {f"{folder.name}/{path.name}" for path in folder.iterdir()}


def test_large_and_empty_files_arrive_whole(liar, connect, tmp_path):
    content = bytes(range(256)) * (2 * PART_BYTES // 256) + b"rest"
    liar.offer("large", content)
    liar.offer("empty", b"")
    folder = connect(liar).fetch_model(tmp_path)
    assert (folder / "large").read_bytes() == content
    assert (folder / "empty").read_bytes() == b""
    assert stat.S_IMODE(folder.stat().st_mode) & 0o022 == 0


LIES: dict[str, dict[str, Any]] = {
    "another content": {"given": b"CONTENT"},
    "one byte less": {"given": b"conten"},
    "one byte more": {"given": b"contents"},
    "nothing": {"given": b""},
    "another hash": {"sha256": "0" * 64},
    "no hash": {"sha256": "x"},
    "a smaller size": {"size": 6},
    "a larger size": {"size": 8},
    "a hundred megabytes": {"given": bytes(100 << 20)},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_is_not_as_described_is_refused_and_not_kept(liar, connect, tmp_path, lie):
    liar.offer("good", b"good")
    liar.offer("config.json", b"content", **LIES[lie])
    with pytest.raises(WireError, match=r"Fetching config.json from the cloud: expected \d+ bytes with the hash"):
        connect(liar).fetch_model(tmp_path / "models")
    assert files_in(tmp_path / "models") == set()


def test_a_file_longer_than_described_is_not_taken_to_its_end(liar, connect, tmp_path):
    liar.offer("config.json", b"content", given=bytes(100 << 20))
    connection = connect(liar)
    with pytest.raises(WireError):
        connection.fetch_model(tmp_path)
    assert connection.egress.ledger.totals()["received"]["model"] < 2 * PART_BYTES


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../evil",
        "/etc/evil",
        "a/b",
        "a\\b",
        ".hidden",
        "a\x00b",
        "a\nb",
        "C:evil",
        "x" * 101,
        "ä",
        "-rf",
    ],
)
def test_a_name_that_is_no_plain_file_name_is_refused(liar, connect, tmp_path, name):
    liar.offer(name, b"content")
    with pytest.raises(WireError, match="expected plain file names") as caught:
        connect(liar).fetch_model(tmp_path / "deep" / "models")
    assert len(str(caught.value)) < 300
    assert liar.fetched == []
    assert files_in(tmp_path) == {"deep", "deep/models"}


def test_a_cloud_that_goes_away_in_the_middle_leaves_nothing(liar, connect, tmp_path):
    liar.offer("good", b"good")
    liar.offer("lost", b"content")
    liar.given["lost"] = None
    with pytest.raises(CloudUnreachable, match="gone"):
        connect(liar).fetch_model(tmp_path / "models")
    assert files_in(tmp_path / "models") == set()


def test_a_lying_cloud_leaves_nothing_for_an_honest_one(liar, connect, tmp_path):
    liar.offer("tokenizer.json", b"poison")
    poisoned = connect(liar).fetch_model(tmp_path)
    del liar.description.files[:]
    liar.offer("tokenizer.json", b"honest")
    folder = connect(liar).fetch_model(tmp_path)
    assert folder != poisoned
    assert (folder / "tokenizer.json").read_bytes() == b"honest"


def test_a_cache_that_cannot_be_written_is_named(liar, connect, tmp_path):
    liar.offer("config.json", b"content")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"Keeping the fetched model: expected to write there, got .*file"):
        connect(liar).fetch_model(tmp_path / "file" / "models")


def test_two_that_fetch_at_once_get_the_same_folder(liar, connect, tmp_path):
    liar.offer("config.json", b"content")
    both = threading.Barrier(2, timeout=20)
    liar.wait = both.wait
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda connection: connection.fetch_model(tmp_path), [connect(liar), connect(liar)])
    assert first == second
    assert files_in(tmp_path) == {first.name, f"{first.name}/config.json"}


def test_a_folder_that_cannot_get_its_name_is_an_error(liar, connect, tmp_path, monkeypatch):
    def refuse(self, target):
        raise PermissionError(13, "not here")

    liar.offer("config.json", b"content")
    connection = connect(liar)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError, match="got not here"):
        connection.fetch_model(tmp_path)
    assert files_in(tmp_path) == set()
