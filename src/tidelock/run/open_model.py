"""Opens a run's model: joined to its backbone, with the adapter that it continues.

May import everything below `run`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peft import LoraConfig
from transformers import AutoTokenizer

from tidelock.cache.config import CacheConfig
from tidelock.errors import ConfigError
from tidelock.peft.adapter import AdapterConfig
from tidelock.peft.core import CoreConfig
from tidelock.peft.export import load_adapter
from tidelock.peft.lora import ALL_PROJECTIONS
from tidelock.peft.side import SideConfig
from tidelock.run.connect import connect
from tidelock.run.connect_side import connect_side
from tidelock.units import parse_bytes
from tidelock.wire.channel import Credentials

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tidelock.device.device_lm import DeviceLM
    from tidelock.peft.methods import MethodConfig
    from tidelock.peft.side import SideInit, SideOutput
    from tidelock.run.config import RunConfig
    from tidelock.wire.ledger import Ledger

_METHOD_NAMES: dict[type, str] = {AdapterConfig: "adapter", CoreConfig: "core", SideConfig: "side"}


def open_model(config: RunConfig, ledger: Ledger, cache: Path | None = None) -> DeviceLM:
    """Return the device's model of a run.

    Args:
        config: The run. Without an adapter to continue, its side network has not begun yet (`run.side.begin`).
        ledger: Counts what crosses.
        cache: Folder for the outputs of blocks; None keeps none.

    Raises:
        TidelockError: As `connect`.
    """
    adapter = load_adapter(Path(config.adapter)) if config.adapter is not None else None
    if adapter is not None and _METHOD_NAMES.get(type(adapter.config), "lora") != config.method:
        msg = (
            f"--adapter: expected one that --method {config.method} trained, got another ({adapter.folder}). Choose "
            "the other --method, or another adapter."
        )
        raise ConfigError(msg)
    where = "local" if config.cloud is None else config.cloud
    shared: dict[str, Any] = {
        "model": config.model,
        "task": config.task,
        "num_labels": config.num_labels,
        "credentials": _credentials(config),
        "codec": config.codec,
        "in_flight": config.in_flight,
        "patience_seconds": config.patience,
        "ledger": ledger,
    }
    model: DeviceLM
    peft_config = method_config_of(config) if adapter is None else adapter.config
    if isinstance(peft_config, SideConfig):
        kept = None if cache is None else cache_config_of(config, cache)
        model = connect_side(where, side_config=peft_config, start=False, cache=kept, **shared)
    else:
        model = connect(
            where,
            peft_config=peft_config,
            gradient_codec=config.gradient_codec,
            micro_batches=config.micro_batches,
            share_prefix=not config.no_share_prefix,
            stochastic_rounding=config.stochastic_rounding,
            **shared,
        )
    if adapter is not None:
        model.load_adapter(adapter)
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a model's folder.

    Raises:
        ConfigError: The model's folder has none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        msg = (
            f"Tokenizer: expected one beside the model's configuration, got {type(error).__name__} "
            f"({folder}). Put its files there."
        )
        raise ConfigError(msg) from error
    return tokenizer


def method_config_of(config: RunConfig) -> MethodConfig:
    """Return what a run trains, whose weights are frozen.

    Raises:
        ConfigError: It trains all weights.
    """
    if config.method == "full":
        msg = (
            "--method: expected one that leaves the model's weights as they are, got full, which is for pools, also "
            "one of one device: tidelock pool train --method full --local 1. Choose another, or do that."
        )
        raise ConfigError(msg)
    if config.method == "side":
        return side_config_of(config)
    if config.method == "adapter":
        return AdapterConfig(
            bottleneck=config.bottleneck,
            places=tuple(config.place or ("mlp",)),
            layers=None if config.layer is None else tuple(config.layer),
            activation=config.activation,
            dropout=config.dropout,
        )
    if config.method == "core":
        return CoreConfig(
            rank=config.core_rank,
            scaling=config.core_scale,
            frames=config.core_frames,
            targets=None if config.target is None else tuple(config.target),
            layers=None if config.layer is None else tuple(config.layer),
        )
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft's own maths takes any number
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        target_modules=config.target or [ALL_PROJECTIONS],
        layers_to_transform=config.layer,
        task_type="CAUSAL_LM",
    )


def side_config_of(config: RunConfig) -> SideConfig:
    """Return what a run's side network is like."""
    upsample = config.upsample or ("zero" if config.side_output == "add" else "random")
    # The others need the whole model on this device, which may have no room for it where there is a cloud.
    start = config.side_init or ("magnitude" if config.cloud is None else "random")
    return SideConfig(
        reduction=config.reduction,
        taps=None if config.layer is None else tuple(sorted(set(config.layer))),
        init=cast("SideInit", start),
        zero_upsample=upsample == "zero",
        output=cast("SideOutput", config.side_output),
        tap_width=config.tap_width,
        dropout=config.dropout,
        seed=config.seed,
    )


def cache_config_of(config: RunConfig, folder: Path) -> CacheConfig:
    """Return how a run keeps the outputs of blocks in a folder."""
    return CacheConfig(
        folder,
        codec=config.cache_codec,
        limit_bytes=None if config.cache_limit is None else parse_bytes(config.cache_limit),
        key=None if config.cache_key is None else Path(config.cache_key),
    )


def _credentials(config: RunConfig) -> Credentials | None:
    if config.cloud is None:
        return None
    token = ""
    if config.token_file is not None:
        try:
            token = Path(config.token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            msg = f"--token-file: expected a readable text file, got {type(error).__name__} ({config.token_file})."
            raise ConfigError(msg) from error
    ca, client_cert, client_key = (
        None if path is None else Path(path) for path in (config.ca, config.client_cert, config.client_key)
    )
    return Credentials(token, ca, client_cert, client_key, config.insecure)
