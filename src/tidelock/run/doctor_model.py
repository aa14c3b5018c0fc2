"""The doctor's look at a model and at a cloud.

May import everything below `run`.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import grpc

from tidelock.backbone.connection import Connection
from tidelock.errors import ConfigError, ModelMismatch, TidelockError
from tidelock.model.checkpoint import Checkpoint
from tidelock.model.ends import empty_model, end_tensors, read_config
from tidelock.model.geometry import Place, geometry_of
from tidelock.run.doctor import Fact
from tidelock.units import format_bytes
from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire.address import parse_url
from tidelock.wire.channel import Credentials
from tidelock.wire.egress import Egress
from tidelock.wire.ledger import Ledger
from tidelock.wire.limits import CALL_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from transformers import PreTrainedModel

    from tidelock.model.geometry import Geometry

_FP32_BYTES, _BF16_BYTES = 4, 2
_PINGS = 5


def examine_model(model: str, *, all_sites: bool) -> Iterator[Fact]:
    """Yield what tidelock makes of a model; of its weights only headers are read.

    Args:
        model: Folder or hub name.
        all_sites: Whether every site has a fact of its own.
    """
    try:
        checkpoint = Checkpoint.open(model)
        config = read_config(checkpoint.folder)
        whole = empty_model(config)
        geometry = geometry_of(whole)
        ends = end_tensors(whole, checkpoint)
    except TidelockError as error:
        yield Fact("model", "files", model, model, error)
        return
    yield Fact("model", "files", str(checkpoint.folder), str(checkpoint.folder))
    yield Fact("model", "type", config.model_type, f"{config.model_type} ({type(whole).__name__})")
    verified = geometry.family.verified
    yield Fact(
        "model",
        "verified",
        verified,
        "yes: tests compare this family with peft" if verified else "no: cut by its structure; compare with peft first",
    )
    positions = geometry.max_positions
    yield Fact("model", "longest text", positions, "not stated" if positions is None else f"{positions} tokens")
    widths = {
        "blocks": geometry.num_blocks,
        "embedding": geometry.embedding_width,
        "head_input": geometry.final_width,
        "vocabulary": geometry.vocab_size,
    }
    yield Fact("model", "widths", widths, ", ".join(f"{name} {width}" for name, width in widths.items()))
    yield from _sizes(whole, set(ends))
    yield from _sites(geometry, all_sites=all_sites)


def _sizes(whole: PreTrainedModel, ends: set[str]) -> Iterator[Fact]:
    """Yield what each side holds; a tied head is the embedding and counted once."""
    module = cast("nn.Module", whole)
    counts = {name: parameter.numel() for name, parameter in module.named_parameters()}
    if whole.config.get_text_config().tie_word_embeddings:
        head = whole.get_output_embeddings()
        path = next(path for path, found in module.named_modules() if found is head)
        counts.pop(f"{path}.weight", None)
    device, total = sum(counts[name] for name in ends), sum(counts.values())
    size = format_bytes(device * _FP32_BYTES)
    value = {"parameters": device, "fp32_bytes": device * _FP32_BYTES}
    yield Fact("model", "device holds", value, f"{device:,} parameters (embedding and head), {size} in fp32")
    value = {"parameters": total, "fp32_bytes": total * _FP32_BYTES, "bf16_bytes": total * _BF16_BYTES}
    sizes = f"{format_bytes(total * _FP32_BYTES)} in fp32, {format_bytes(total * _BF16_BYTES)} in bf16"
    yield Fact("model", "cloud holds", value, f"{total:,} parameters, {sizes}")


def _sites(geometry: Geometry, *, all_sites: bool) -> Iterator[Fact]:
    if all_sites:
        for site_id, site in geometry.sites.items():
            at_attention = site_id.place is Place.ATTN
            widths = {
                geometry.projection_path(site_id.block, part.name)
                if at_attention
                else geometry.output_path(site_id): part.width
                for part in site.projections
            }
            listed = ", ".join(f"{path} ({width})" for path, width in widths.items())
            value = {"width": site.width, "linears": widths}
            reads = f"reads {site.width}, adds to" if at_attention else "reads and adds to"
            yield Fact("sites", site_id.name, value, f"{reads} {listed}")
        return
    for place in Place:
        found = [site for site_id, site in geometry.sites.items() if site_id.place is place]
        if not found:
            yield Fact("model", f"{place.label} sites", {"count": 0, "linears": []}, "not known for this family")
            continue
        listed = ", ".join(f"{part.name} ({part.width})" for part in found[0].projections)
        summary = {"count": len(found), "linears": [part.name for part in found[0].projections]}
        yield Fact("model", f"{place.label} sites", summary, f"{len(found)}, one a block, each with {listed}")


def examine_cloud(url: str, token_file: Path | None, ca: Path | None, model: str | None) -> Iterator[Fact]:
    """Yield what a cloud says of itself, and how fast it answers.

    Args:
        url: `grpcs://HOST:PORT` or `grpc://HOST:PORT`.
        token_file: File with the bearer token.
        ca: PEM file with the authority, or the certificate, to trust.
        model: Folder or hub name of the model that it should hold; None compares nothing.
    """
    try:
        credentials = Credentials(_read_token(token_file), ca)
        connection = Connection(parse_url(url), credentials, Egress(Ledger()), patience_seconds=0)
    except TidelockError as error:
        yield Fact("cloud", "connection", url, url, error)
        return
    try:
        yield from _describe(connection, model)
    finally:
        connection.close()


def _describe(connection: Connection, model: str | None) -> Iterator[Fact]:
    described = connection.description
    secured = connection.address.tls
    yield Fact("cloud", "connection", connection.address.url, connection.address.url)
    yield Fact("cloud", "tls", secured, "certificate trusted" if secured else "none")
    yield Fact("cloud", "token", value=True, text="accepted")
    yield Fact("cloud", "tidelock", described.version, f"{described.version}, protocol {described.protocol}")
    held = {"type": described.model_type, "blocks": described.num_blocks, "dtype": described.backbone_dtype}
    text = f"{described.model_type}, {described.num_blocks} blocks in {described.backbone_dtype}"
    yield Fact("cloud", "model", held, text)
    yield Fact("cloud", "fingerprint", described.fingerprint, described.fingerprint[:16])
    if model is not None:
        yield _same_model(connection, model)
    yield _latency(connection)


def _same_model(connection: Connection, model: str) -> Fact:
    """Return whether the cloud holds a model's weights; told by those of the ends where the rest is not here."""
    described = connection.description
    try:
        checkpoint = Checkpoint.open(model)
        names = end_tensors(empty_model(read_config(checkpoint.folder)), checkpoint)
        ours = checkpoint.fingerprint() or {name: checkpoint.sha256(name) for name in names.values()}
    except TidelockError as error:
        return Fact("cloud", "same model", None, "not compared", error)
    theirs = described.fingerprint if isinstance(ours, str) else {part.name: part.sha256 for part in described.tensors}
    if ours == theirs:
        return Fact("cloud", "same model", value=True, text="yes" if isinstance(ours, str) else "yes, by its ends")
    fault = ModelMismatch(
        f"Model weights: expected the cloud at {connection.address.url} to hold {model}, got others. Use one and the "
        "same checkpoint on both sides."
    )
    return Fact("cloud", "same model", value=False, text="no", fault=fault)


def _latency(connection: Connection) -> Fact:
    times = []
    try:
        for _ in range(_PINGS):
            began = time.perf_counter()
            connection.stub.Describe(
                pb.DescribeRequest(), metadata=connection.credentials.metadata(), timeout=CALL_SECONDS
            )
            times.append(1000 * (time.perf_counter() - began))
    except grpc.RpcError as error:
        return Fact("cloud", "round trip", None, "lost", connection.explain(error))
    middle = round(statistics.median(times), 2)
    return Fact(
        "cloud", "round trip", {"milliseconds": middle}, f"{middle:.1f} ms; each active module needs two a step"
    )


def _read_token(path: Path | None) -> str:
    if path is None:
        msg = "--token-file: expected a file with the cloud's token, got none. Give the one that the cloud showed."
        raise ConfigError(msg)
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        msg = f"--token-file: expected a readable text file, got {type(error).__name__} ({path}). Check the path."
        raise ConfigError(msg) from error
