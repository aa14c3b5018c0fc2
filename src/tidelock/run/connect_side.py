"""Joins a device's side network to whatever gives its taps: frozen blocks here or in a cloud, and a cache of them.

A sibling of `run.connect`. May import everything below `run`.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

import torch

from tidelock.backbone.connection import Connection
from tidelock.backbone.local import LocalBackbone
from tidelock.backbone.local_seq2seq import LocalSeq2Seq
from tidelock.backbone.patience import Patience
from tidelock.backbone.remote import RemoteBackbone
from tidelock.cache.identity import CacheIdentity
from tidelock.device.side_model import SideModel
from tidelock.device.side_seq2seq import SideSeq2SeqModel
from tidelock.device.tap_source import TapSource
from tidelock.errors import CloudUnreachable, ConfigError, ModelMismatch
from tidelock.model.checkpoint import Checkpoint
from tidelock.model.ends import Ends, read_config, tokenizer_sha256
from tidelock.model.load import ModelChoice, load_cut_model, load_model
from tidelock.model.memory import give_back_memory
from tidelock.model.seq2seq import FrozenSeq2Seq, Seq2SeqEnds
from tidelock.peft.side import SideConfig
from tidelock.run.connect import NOT_THE_MODEL, ends_for, num_outputs, require_model
from tidelock.wire.address import parse_url
from tidelock.wire.channel import Credentials
from tidelock.wire.codec import Codecs
from tidelock.wire.egress import Egress
from tidelock.wire.ledger import Ledger

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

    from tidelock.cache.config import CacheConfig
    from tidelock.device.beside_blocks import BesideBlocks
    from tidelock.wire.address import Address

# On their way through a cloud's blocks, unless one says otherwise: one crosses while another is computed.
EXAMPLES_AT_ONCE = 2


def connect_side(  # noqa: PLR0913  (the public door: every argument has a default)
    where: str,
    *,
    model: str | os.PathLike[str] | None = None,
    task: str = "causal-lm",
    num_labels: int | None = None,
    side_config: SideConfig | None = None,
    start: bool = True,
    cache: CacheConfig | None = None,
    credentials: Credentials | None = None,
    token: str | None = None,
    ca: str | os.PathLike[str] | None = None,
    codec: str = "fp32",
    in_flight: int | None = None,
    patience_seconds: float = 120.0,
    ledger: Ledger | None = None,
) -> SideModel | SideSeq2SeqModel:
    """Return a model whose side network is trained here, beside frozen blocks that run wherever `where` says.

    The blocks are asked for their outputs, forward only, and with a cache once for each example.

    Args:
        where: As for `connect`, as are all arguments that are not here. T5 and BART are `local` only.
        model: As for `connect`. With `local`, the blocks are loaded when they are first needed.
        task: As for `connect`; of T5 and BART `text-to-text` in the place of `causal-lm`.
        side_config: What the side network is like; None is `SideConfig()`.
        start: Begin the network as `side_config.init` says. False leaves that to `start_side`, which Fisher scores
            need, or to a state that is loaded.
        cache: Where the blocks' outputs are kept; None computes them each time.
        codec: How embeddings and taps cross: `fp32`, `bf16`, `int8`, `int4`.
        in_flight: Examples on their way through the blocks at once; None is 2 with a cloud, one a core with `local`.

    Raises:
        CacheError, StorageError: The cache is of another key, or cannot be written.
        TidelockError: As `connect`.

    Example::

        cache = tidelock.CacheConfig("taps")
        model = tidelock.connect_side("local", model="HuggingFaceTB/SmolLM2-135M-Instruct", cache=cache)
        transformers.Trainer(model, args, train_dataset=rows).train()
    """
    blocks: _LocalBlocks | _CloudBlocks
    if where == "local":
        blocks = _LocalBlocks(require_model(model))
    else:
        credentials = credentials or Credentials(token or "", Path(ca) if ca is not None else None)
        link = (parse_url(where), credentials, Egress(ledger or Ledger()), patience_seconds)
        blocks = _CloudBlocks(link, Codecs.named(codec), model)
    source: TapSource[Any] = TapSource(blocks, at_once=in_flight or (None if where == "local" else EXAMPLES_AT_ONCE))
    device_model = _beside(blocks.ends, source, side_config or SideConfig(), task, num_labels)
    try:
        if cache is not None:
            source.cache = cache.open(_identity(blocks, device_model, cache.codec))
        if start:
            start_side(device_model, model)
    except BaseException:
        source.close()
        raise
    return device_model


def start_side(
    side_model: BesideBlocks,
    model: str | os.PathLike[str] | None,
    examples: Iterable[Mapping[str, Tensor]] | None = None,
) -> None:
    """Begin a side network as its configuration says.

    Args:
        side_model: Whose network it is.
        model: Folder or hub name of the whole model; read unless the start is random.
        examples: For Fisher scores: `input_ids` and `labels` of one example each, of shape (1, T), as the whole model
            takes them.

    Raises:
        ConfigError: No model, or Fisher scores without examples.
        ModelError: The model cannot be loaded whole.
    """
    init = side_model.side_config.init
    if init == "random":
        return
    if model is None:
        msg = (
            f"Start of the side network: expected the whole model on this device for init={init!r}, got none. Name its "
            "folder, or choose init='random'."
        )
        raise ConfigError(msg)
    # In fp32, as Fisher scores need it, and let go of at once: where all taps are cached it is not needed again.
    side_model.start(load_model(Checkpoint.open(str(model))), examples)
    give_back_memory()


def _beside(
    ends: Ends | Seq2SeqEnds, source: TapSource[Any], config: SideConfig, task: str, num_labels: int | None
) -> SideModel | SideSeq2SeqModel:
    """Return the model for the task; refuse the other kind of model's task of language."""
    num_labels = num_outputs(task, num_labels)
    wrong, right = ("text-to-text", "causal-lm") if isinstance(ends, Ends) else ("causal-lm", "text-to-text")
    if task == wrong:
        kind = "a decoder" if isinstance(ends, Ends) else "an encoder-decoder"
        msg = (
            f"Task: expected {right}, classification or regression of {kind} ({ends.config.model_type}), got {task}. "
            "Choose one of those with --task."
        )
        raise ConfigError(msg)
    if isinstance(ends, Ends):
        return SideModel(ends, source, config, num_labels=num_labels)
    return SideSeq2SeqModel(ends, source, config, num_labels=num_labels)


@final
class _LocalBlocks:
    """Loads the frozen blocks of a model, folder or hub name, into this process."""

    def __init__(self, model: str) -> None:
        self._model, self._checkpoint = model, Checkpoint.open(model)
        self._checkpoint.materialise()  # from then on it has a fingerprint
        config = read_config(self._checkpoint.folder)
        kind = Seq2SeqEnds.read if config.is_encoder_decoder else Ends
        self.ends: Ends | Seq2SeqEnds = kind(config, self._checkpoint)
        self.fingerprint = str(self._checkpoint.fingerprint())
        self.dtype = self.codec = "fp32"

    def __call__(self) -> LocalBackbone | LocalSeq2Seq:
        """Return the blocks, loaded."""
        torch_device = "cuda" if torch.cuda.is_available() else "cpu"
        if isinstance(self.ends, Ends):
            return LocalBackbone(load_cut_model(self._checkpoint, ModelChoice(self._model, self.dtype, torch_device)))
        whole = cast("nn.Module", load_model(self._checkpoint)).to(torch_device)
        return LocalSeq2Seq(FrozenSeq2Seq(cast("PreTrainedModel", whole)))


@final
class _CloudBlocks:
    """Connects to the frozen blocks in a cloud, whose model is the one in `model` where that is given."""

    def __init__(
        self,
        link: tuple[Address, Credentials, Egress, float],
        codecs: Codecs,
        model: str | os.PathLike[str] | None,
    ) -> None:
        address, credentials, egress, self._patience_seconds = link
        self._reach = partial(
            Connection, address, credentials, egress, codecs=codecs, patience_seconds=self._patience_seconds
        )
        connection = self._reach()
        try:
            self.ends = ends_for(connection, None if model is None else str(model))
        finally:
            connection.close()
        self.fingerprint, self.dtype = connection.description.fingerprint, connection.description.backbone_dtype
        self.codec = connection.codecs.activation.value

    def __call__(self) -> RemoteBackbone:
        """Return the blocks, connected.

        Raises:
            ModelMismatch: The cloud holds another model than it did before.
            CloudUnreachable: It stayed away for longer than the connection's patience.
            TidelockError: It cannot be used.
        """
        patience = Patience(self._patience_seconds)
        while True:
            try:
                connection = self._reach()
                break
            except CloudUnreachable as error:
                patience.wait(error, error)
        found = connection.description.fingerprint
        if found != self.fingerprint:
            connection.close()
            msg = (
                f"Cloud at {connection.address.url}: expected the model with fingerprint {self.fingerprint[:12]} that "
                f"it held before, got {found[:12]}. Start it with that model."
            )
            raise ModelMismatch(msg)
        return RemoteBackbone(connection, self.ends.geometry)


def model_hash(fingerprint: str, config: PretrainedConfig) -> str:
    """Return a hash of a model's weights and of its configuration, which says how these are used.

    Args:
        fingerprint: Of the weights.
        config: The model's.
    """
    settings = json.loads(json.dumps(config.to_dict(), default=str))
    settings = {name: value for name, value in settings.items() if name not in NOT_THE_MODEL}
    return hashlib.sha256(json.dumps([fingerprint, settings], sort_keys=True).encode()).hexdigest()


def _identity(blocks: _LocalBlocks | _CloudBlocks, model: BesideBlocks, codec: str) -> CacheIdentity:
    """Return what a cache of the blocks' outputs is of."""
    return CacheIdentity(
        model=model_hash(blocks.fingerprint, blocks.ends.config),
        tokenizer=tokenizer_sha256(blocks.ends.folder),
        dtype=blocks.dtype,
        taps=model.tapped,
        tap_width=model.side_config.tap_width,
        codec=codec,
        wire_codec=blocks.codec,
    )
