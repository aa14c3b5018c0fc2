"""Joins a device's model to a backbone: the one place, with the commands, that names a concrete one.

May import everything below `run`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig

from tidelock.backbone.connection import Connection
from tidelock.backbone.local import LocalBackbone
from tidelock.backbone.remote import RemoteBackbone
from tidelock.device.in_flight import PassSettings
from tidelock.device.model import DeviceModel
from tidelock.errors import ConfigError, ModelMismatch, WireError
from tidelock.model.cache_folder import cache_folder
from tidelock.model.checkpoint import Checkpoint
from tidelock.model.ends import Ends, read_config
from tidelock.model.load import ModelChoice, load_cut_model
from tidelock.peft.lora import ALL_PROJECTIONS
from tidelock.peft.methods import check_config
from tidelock.run.config import TASKS
from tidelock.wire.address import parse_url
from tidelock.wire.channel import Credentials
from tidelock.wire.codec import Codecs
from tidelock.wire.egress import Egress
from tidelock.wire.ledger import Ledger

if TYPE_CHECKING:
    import os

    from transformers import PretrainedConfig

    from tidelock.backbone.protocol import Backbone
    from tidelock.peft.methods import MethodConfig
    from tidelock.wire.address import Address

# Where a model came from, who made its files and in what it computes: no part of what it computes.
NOT_THE_MODEL = frozenset(
    {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
)


def connect(  # noqa: PLR0913  (the public door: every argument has a default)
    where: str,
    *,
    model: str | os.PathLike[str] | None = None,
    task: str = "causal-lm",
    num_labels: int | None = None,
    peft_config: MethodConfig | None = None,
    credentials: Credentials | None = None,
    token: str | None = None,
    ca: str | os.PathLike[str] | None = None,
    codec: str = "fp32",
    gradient_codec: str | None = None,
    stochastic_rounding: bool = False,
    in_flight: int | None = None,
    micro_batches: int | None = None,
    share_prefix: bool = True,
    patience_seconds: float = 120.0,
    ledger: Ledger | None = None,
) -> DeviceModel:
    """Return a language model or classifier to train here, whose frozen blocks run wherever `where` says.

    Args:
        where: `local`, `grpcs://HOST:PORT` for a cloud, or `grpc://127.0.0.1:PORT` for one here without TLS.
        model: Folder or hub name of the model. This device reads only its embedding, head and small files (with
            `local`, all of it). None fetches those from the cloud.
        task: `causal-lm`; or with a new, trained head for whole texts, `classification` or `regression` (of a number).
        num_labels: How many classes there are.
        peft_config: A `peft.LoraConfig` (with no target modules named, `peft`'s own choice for the family), a
            `tidelock.AdapterConfig` or a `tidelock.CoreConfig`; None is LoRA of rank 8 on all of query, key and value.
        credentials: For a cloud; or give only its bearer `token`, and `ca`, a PEM file with whose certificate to trust.
        codec: How activations and gradients cross: `fp32`, `bf16` (half the bytes), `int8` (a quarter), `int4`.
        gradient_codec: Another for gradients.
        stochastic_rounding: Round `int8` or `int4` gradients up or down at random, right on average.
        in_flight: Micro-batches on their way at once; None goes by what passes have waited for. Never changes a result.
        micro_batches: How many a batch is split into, by rows; None is 4, or fewer of 64 tokens or more.
        share_prefix: Compute and send once what all rows of a micro-batch begin with; changes results in rounding only.
        patience_seconds: How long a step waits for a cloud that went away.
        ledger: Counts what crosses and is lost; None makes one, found at `backbone.connection.egress.ledger`.

    Raises:
        ConfigError: An argument cannot be honoured.
        ModelError: The model cannot be read or cut.
        CloudUnreachable, TlsError, TokenRefused, ModelMismatch: The cloud cannot be used, or holds another model.

    Example::

        model = tidelock.connect("local", model="HuggingFaceTB/SmolLM2-135M-Instruct")
        transformers.Trainer(model, args, train_dataset=rows).train()
    """
    config = copy.copy(peft_config or LoraConfig(target_modules=[ALL_PROJECTIONS]))
    check_config(config)
    num_labels = num_outputs(task, num_labels)
    codecs = Codecs.named(codec, gradient_codec, stochastic_rounding=stochastic_rounding)
    if where == "local":
        ends, backbone = _local(model)
    else:
        credentials = credentials or Credentials(token or "", Path(ca) if ca is not None else None)
        ends, backbone = _remote((parse_url(where), credentials), ledger or Ledger(), codecs, patience_seconds, model)
    settings = PassSettings(in_flight, micro_batches, share_prefix)
    return DeviceModel(ends, backbone, config, settings, num_labels=num_labels)


def num_outputs(task: str, num_labels: int | None) -> int | None:
    """Return how many outputs the head for whole texts has; None is none.

    Raises:
        ConfigError: The task is unknown, or has no such number of labels.
    """
    fits = {
        "causal-lm": num_labels is None,
        "text-to-text": num_labels is None,
        "classification": num_labels is not None and num_labels >= 2,
        "regression": num_labels in {None, 1},
    }
    if task not in TASKS or not fits[task]:
        msg = (
            f"Task: expected one of {', '.join(TASKS)}, and num_labels of 2 or more for classification only, got "
            f"task={task!r} with num_labels={num_labels!r}. Change one of them."
        )
        raise ConfigError(msg)
    return 1 if task == "regression" else num_labels


def _remote(
    link: tuple[Address, Credentials],
    ledger: Ledger,
    codecs: Codecs,
    patience_seconds: float,
    model: str | os.PathLike[str] | None,
) -> tuple[Ends, Backbone]:
    connection = Connection(*link, Egress(ledger), codecs=codecs, patience_seconds=patience_seconds)
    try:
        ends = ends_for(connection, None if model is None else str(model))
    except BaseException:
        connection.close()
        raise
    return ends, RemoteBackbone(connection, ends.geometry)


def require_model(model: str | os.PathLike[str] | None) -> str:
    """Return the name of the model that `local` needs.

    Raises:
        ConfigError: There is none.
    """
    if model is None:
        msg = "Connecting to 'local': expected a model folder or hub name, got none. Give one with model=."
        raise ConfigError(msg)
    return str(model)


def _local(model: str | os.PathLike[str] | None) -> tuple[Ends, Backbone]:
    checkpoint = Checkpoint.open(require_model(model))
    ends = Ends(read_config(checkpoint.folder), checkpoint)
    torch_device = "cuda" if torch.cuda.is_available() else "cpu"
    return ends, LocalBackbone(load_cut_model(checkpoint, ModelChoice(require_model(model), torch_device=torch_device)))


def ends_for(connection: Connection, model: str | None) -> Ends:
    """Return the ends, read from this device's own model or from what the cloud gives, once both are the same.

    Raises:
        ModelMismatch: They are not.
        TidelockError: One of them cannot be read.
    """
    if model is None:
        checkpoint = Checkpoint.open(str(connection.fetch_model(cache_folder() / "models")))
    else:
        checkpoint = Checkpoint.open(model)
    config = read_config(checkpoint.folder)
    _check_same_type(connection, config.model_type)
    _check_same_config(connection, config)
    ends = Ends(config, checkpoint)
    _check_same_weights(connection, checkpoint, ends)
    return ends


def _check_same_type(connection: Connection, model_type: str) -> None:
    theirs = connection.description.model_type
    if theirs != model_type:
        msg = (
            f"Model: expected the cloud at {connection.address.url} to hold a {model_type!r} model like this device, "
            f"got {theirs!r}. Name the model that the cloud holds, or start a cloud with yours."
        )
        raise ModelMismatch(msg)


def _check_same_config(connection: Connection, config: PretrainedConfig) -> None:
    """Compare what both sides know of the model's shape and mathematics: the same weights may be read in two ways."""
    try:
        theirs = json.loads(connection.description.config_json)
    except json.JSONDecodeError:
        theirs = None
    if not isinstance(theirs, dict):
        msg = f"Cloud at {connection.address.url}: expected its model's configuration, got no JSON object. Restart it."
        raise WireError(msg)
    ours = json.loads(json.dumps(config.to_dict(), default=str))
    # Only what both have: another version of transformers may have more settings, or fewer.
    for name in sorted(ours.keys() & theirs.keys() - NOT_THE_MODEL):
        if ours[name] != theirs[name] and not name.endswith("_token_id"):
            msg = (
                f"Model configuration: expected the cloud at {connection.address.url} to have {name} = "
                f"{str(ours[name])[:80]} like this device, got {str(theirs[name])[:80]}. Use one and the same model "
                "folder on both sides."
            )
            raise ModelMismatch(msg)


def _check_same_weights(connection: Connection, checkpoint: Checkpoint, ends: Ends) -> None:
    """Compare the hashes of the ends, and of the whole model when this device has all of it."""
    description = connection.description
    theirs = {artefact.name: artefact.sha256 for artefact in description.tensors}
    ours = {name: checkpoint.sha256(name) for name in ends.stored_names.values()}
    whole = len(checkpoint.names()) == description.num_tensors
    if ours != theirs or (whole and checkpoint.fingerprint() != description.fingerprint):
        different = sorted(name for name in ours if theirs.get(name) != ours[name]) or ["a tensor of the blocks"]
        msg = (
            f"Model weights: expected the cloud at {connection.address.url} to hold the same as this device "
            f"({checkpoint.folder}), got others in {different[0]}. Use one and the same checkpoint on both sides."
        )
        raise ModelMismatch(msg)
