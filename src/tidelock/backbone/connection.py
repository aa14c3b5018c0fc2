"""A device's connection to one cloud: what the cloud holds, and its public files.

May import `backbone`, `wire`, errors and libraries.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, final

import grpc

from tidelock.backbone.pass_times import PassTimes
from tidelock.errors import StorageError, WireError
from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire import tidelock_pb2_grpc as pb_grpc
from tidelock.wire.channel import Credentials, explain, open_channel
from tidelock.wire.codec import Codecs
from tidelock.wire.egress import Egress
from tidelock.wire.ledger import Kind
from tidelock.wire.limits import CALL_SECONDS, FETCH_SECONDS, PASS_METHOD, PROTOCOL_VERSION

if TYPE_CHECKING:
    from tidelock.errors import TidelockError
    from tidelock.wire.address import Address

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
# Nothing that could lead out of a folder, hide in it or be too long for it, by the rules of any system.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


@final
class Connection:
    """An open connection to a cloud that has said what it holds.

    Args:
        address: Where the cloud listens.
        credentials: Token and certificates.
        egress: Counts and checks what is sent.
        codecs: How activations and gradients are written on the wire; None is fp32.
        patience_seconds: How long to wait for a cloud that went away.

    Attributes:
        description: What the cloud holds.
        times: Where the time of this device's training passes goes.

    Raises:
        CloudUnreachable: Nobody answers.
        TlsError, TokenRefused: The cloud is not trusted, or does not trust this device.
        WireError: It speaks another version of the protocol.
    """

    def __init__(
        self,
        address: Address,
        credentials: Credentials,
        egress: Egress,
        *,
        codecs: Codecs | None = None,
        patience_seconds: float = 120.0,
    ) -> None:
        self.address = address
        self.credentials = credentials
        self.egress = egress
        self.codecs = codecs or Codecs()
        self.patience_seconds = patience_seconds
        self.times = PassTimes()
        self._channel = open_channel(address, credentials)
        self.stub = pb_grpc.BackboneStub(self._channel)
        # As the stub's Pass, but with messages as bytes: see wire.stream.
        self.open_pass = self._channel.stream_stream(PASS_METHOD, request_serializer=bytes, response_deserializer=bytes)
        try:
            self.description = self._describe()
        except BaseException:
            self._channel.close()
            raise

    def explain(self, error: grpc.RpcError) -> TidelockError:
        """Return our error for one of gRPC's."""
        return explain(error, self.address, self.credentials)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def fetch_model(self, cache: Path) -> Path:
        """Return a folder with all that a device needs of the cloud's model, fetched once and kept.

        Every file is checked against the hash in the cloud's description. That tells a damaged file, not a lying
        cloud: a device that must not trust the cloud's word brings its own model folder.

        Args:
            cache: Folder for fetched models. What a cloud gave is found again only by a cloud that describes the same
                files, so that a lying one cannot leave anything there for an honest one with the same weights.

        Raises:
            WireError: A file has another hash or size than described, or a name that is no plain file name.
            StorageError: The file system refused to write.
        """
        folder = cache / _folder_name(self.description)
        if folder.is_dir():
            return folder
        try:
            cache.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
            try:
                for artefact in self.description.files:
                    self._fetch_file(artefact, partial)
                _rename_unless_there(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        except OSError as error:
            msg = f"Keeping the fetched model: expected to write there, got {error.strerror} ({cache}). Make room."
            raise StorageError(msg) from error
        return folder

    def _describe(self) -> pb.Description:
        try:
            description: pb.Description = self.stub.Describe(
                pb.DescribeRequest(), metadata=self.credentials.metadata(), timeout=CALL_SECONDS
            )
        except grpc.RpcError as error:
            raise self.explain(error) from error
        self.egress.ledger.received(Kind.CONTROL, description.ByteSize())
        if description.protocol != PROTOCOL_VERSION:
            msg = (
                f"Cloud at {self.address.url}: expected protocol {PROTOCOL_VERSION}, got {description.protocol} (its "
                f"tidelock is {description.version}). Install the same version on both sides."
            )
            raise WireError(msg)
        if not _FINGERPRINT.fullmatch(description.fingerprint):
            msg = (
                f"Cloud at {self.address.url}: expected a fingerprint of 64 hex digits, got another. Restart the cloud."
            )
            raise WireError(msg)
        return description

    def _fetch_file(self, artefact: pb.Artefact, folder: Path) -> None:
        if not _PLAIN_NAME.fullmatch(artefact.name):
            got = f"{artefact.name[:80]!r}"
            msg = f"Fetching from the cloud: expected plain file names, got {got}. Do not use this cloud."
            raise WireError(msg)
        digest, size = hashlib.sha256(), 0
        request = pb.FetchRequest(name=artefact.name)
        try:
            with (folder / artefact.name).open("wb") as file:
                for part in self.stub.Fetch(request, metadata=self.credentials.metadata(), timeout=FETCH_SECONDS):
                    self.egress.ledger.received(Kind.MODEL, part.ByteSize())
                    size += len(part.data)
                    if size > artefact.size_bytes:
                        break
                    digest.update(part.data)
                    file.write(part.data)
        except grpc.RpcError as error:
            raise self.explain(error) from error
        if size != artefact.size_bytes or digest.hexdigest() != artefact.sha256:
            msg = (
                f"Fetching {artefact.name} from the cloud: expected {artefact.size_bytes} bytes with the hash that it "
                f"announced, got {size} bytes or another hash. Try again, or use a model folder of your own."
            )
            raise WireError(msg)


def _folder_name(description: pb.Description) -> str:
    """Return a name that stands for the model and for every file that the cloud describes."""
    files = [[artefact.name, artefact.sha256, artefact.size_bytes] for artefact in description.files]
    return hashlib.sha256(json.dumps([description.fingerprint, sorted(files)]).encode()).hexdigest()


def _rename_unless_there(partial: Path, folder: Path) -> None:
    """Give a finished folder its name; another process may have been faster, with the same content."""
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
