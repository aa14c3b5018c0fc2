"""Starts a cloud: loads a model, describes it, and listens.

May import `wire`, `model`, `cloud`, errors and libraries; never a tokenizer or code that reads data.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tidelock.cloud.service import BackboneService, Limits, Offer, add_service
from tidelock.errors import ConfigError, ListenRefused, ModelError
from tidelock.model.checkpoint import Checkpoint
from tidelock.model.ends import empty_model, end_tensors, read_config, write_device_folder
from tidelock.model.load import ModelChoice, load_cut_model
from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire.address import Address
from tidelock.wire.channel import CHANNEL_OPTIONS
from tidelock.wire.limits import KEEPALIVE_TIMEOUT_MS, PROTOCOL_VERSION, SERVICE_NAME

if TYPE_CHECKING:
    from tidelock.cloud.metrics import Metrics
    from tidelock.cloud.tenants import Tenants


@final
@dataclass(frozen=True, slots=True)
class Listener:
    """Where and how a cloud listens.

    Attributes:
        address: Its host and port; port 0 lets the system choose one.
        tls_cert: PEM file with the cloud's certificate chain.
        tls_key: PEM file with its key.
        client_ca: PEM file with the authority that devices' certificates must come from; None asks for none.
        insecure: Listen beyond loopback without TLS.
    """

    address: Address
    tls_cert: Path | None = None
    tls_key: Path | None = None
    client_ca: Path | None = None
    insecure: bool = False

    def credentials(self) -> grpc.ServerCredentials | None:
        """Return what the server shows and asks for, or None without TLS.

        Raises:
            ConfigError: Only part of the files is given, or one cannot be read.
            ListenRefused: It would listen beyond loopback without TLS.
        """
        if (self.tls_cert is None) != (self.tls_key is None) or (self.client_ca and not self.tls_cert):
            msg = (
                "TLS: expected a certificate and its key (and those for a client authority too), got only one of them. "
                "Give --tls-cert and --tls-key."
            )
            raise ConfigError(msg)
        if self.tls_cert is None or self.tls_key is None:
            if not (self.address.is_loopback or self.insecure):
                msg = (
                    f"Listening at {self.address.target}: expected TLS beyond this machine, got neither --tls-cert nor "
                    "--insecure. Give a certificate and its key; --insecure only inside a tunnel of your own."
                )
                raise ListenRefused(msg)
            return None
        try:
            chain = [(self.tls_key.read_bytes(), self.tls_cert.read_bytes())]
            authority = self.client_ca.read_bytes() if self.client_ca else None
        except OSError as error:
            msg = f"TLS: expected readable PEM files, got {error.strerror} ({error.filename}). Check the paths."
            raise ConfigError(msg) from error
        return grpc.ssl_server_credentials(chain, authority, require_client_auth=authority is not None)


@final
class CloudServer:
    """A cloud that holds one model; `start` makes it listen.

    Args:
        choice: The model, and where and in what it computes.
        tenants: Who may call.
        listener: Where and how to listen.
        limits: What one cloud gives.
        metrics: Counts passes; None counts nothing.

    Attributes:
        description: What devices are told.
        geometry: The model's.
        cost: What a training pass keeps.

    Raises:
        ModelError, ConfigError: The model cannot be loaded, or not there.
        ListenRefused: The address is not allowed.
    """

    def __init__(
        self,
        choice: ModelChoice,
        tenants: Tenants,
        listener: Listener,
        *,
        limits: Limits | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._credentials = listener.credentials()
        self._listener = listener
        limits = limits or Limits()
        checkpoint = Checkpoint.open(choice.model)
        cut = load_cut_model(checkpoint, choice)
        # Belongs to this object: removed with it.
        self._folder = tempfile.TemporaryDirectory(prefix="tidelock-cloud-")
        try:
            self.description = _describe(checkpoint, Path(self._folder.name), limits, choice.dtype)
        except BaseException:
            self._folder.cleanup()
            raise
        self.geometry = cut.geometry
        offer = Offer(self.description, Path(self._folder.name))
        self._service = BackboneService(cut, offer, tenants, limits, metrics)
        self.cost = self._service.cost
        self._health = health.HealthServicer()
        # Streams that wait for an engine hold one of these threads each, and Describe and health need some too.
        threads = ThreadPoolExecutor(4 * limits.max_sessions + 16, thread_name_prefix="grpc")
        self._server = grpc.server(
            threads,
            options=[
                *CHANNEL_OPTIONS,
                ("grpc.so_reuseport", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_TIMEOUT_MS),
            ],
        )
        add_service(self._service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    def start(self) -> Address:
        """Listen; return the address with the port that was taken.

        Raises:
            ListenRefused: The system does not let it listen there, or the certificate and key do not fit.
        """
        address = self._listener.address
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(address.target)
            else:
                port = self._server.add_secure_port(address.target, self._credentials)
        except RuntimeError:
            port = 0
        if not port:
            msg = (
                f"Listening at {address.target}: expected a free address of this machine (and a certificate that fits "
                "its key), got a refusal. Choose another port, or port 0."
            )
            raise ListenRefused(msg)
        self._server.start()
        for name in ("", SERVICE_NAME):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return Address(address.host, port, self._credentials is not None)

    def wait(self) -> None:
        """Serve until stopped."""
        self._server.wait_for_termination()

    def stop(self, grace_seconds: float = 5.0) -> None:
        """Take no more calls; let running ones end within the grace."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace_seconds).wait()
        self._service.close()
        self._folder.cleanup()


def _describe(checkpoint: Checkpoint, folder: Path, limits: Limits, dtype: str) -> pb.Description:
    """Write what a device needs into the folder; return the description of it and of the model."""
    config = read_config(checkpoint.folder)
    model = empty_model(config)
    names = end_tensors(model, checkpoint)
    write_device_folder(checkpoint, names, folder)
    fingerprint = checkpoint.fingerprint()
    if fingerprint is None:
        msg = f"Model: expected all weights on this disk, got only a part ({checkpoint.folder}). Download it again."
        raise ModelError(msg)
    return pb.Description(
        protocol=PROTOCOL_VERSION,
        version=version("tidelock"),
        model_type=config.model_type,
        config_json=json.dumps(config.to_dict(), sort_keys=True, default=str),
        fingerprint=fingerprint,
        num_tensors=len(checkpoint.names()),
        tensors=[pb.Artefact(name=name, sha256=checkpoint.sha256(name)) for name in sorted(names.values())],
        files=[_artefact(path) for path in sorted(folder.iterdir())],
        num_blocks=config.get_text_config().num_hidden_layers,
        backbone_dtype=dtype,
        max_tokens=limits.max_tokens,
    )


def _artefact(path: Path) -> pb.Artefact:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return pb.Artefact(name=path.name, sha256=digest.hexdigest(), size_bytes=path.stat().st_size)
