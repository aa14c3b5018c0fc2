"""Adapters as files: which format a configuration is written in, and which one a folder holds.

The formats are in `peft.lora_files`, `peft.core_files`, `peft.serial_files` and `peft.side_files`. May import errors,
`peft`, `model` and libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from peft import LoraConfig

from tidelock.errors import ConfigError
from tidelock.peft.adapter import AdapterConfig
from tidelock.peft.adapter_files import (
    CONFIG_FILE,
    HEAD,
    WEIGHTS_FILE,
    Adapter,
    as_file,
    copy_weights,
    read_json,
    read_own_config,
    read_weights,
    saving,
    write_files,
)
from tidelock.peft.core import CoreConfig
from tidelock.peft.core_files import CORE_CONFIG_FILE, CORE_WEIGHTS_FILE, core_files, core_parameters
from tidelock.peft.lora_files import LORA, LORA_HEAD, lora_config_file, lora_parameters, read_lora_config
from tidelock.peft.serial_files import SERIAL_ADAPTER, serial_config_file, serial_parameters
from tidelock.peft.side import SideConfig
from tidelock.peft.side_files import OUTPUT_OF_HEAD, SIDE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from tidelock.model.geometry import Geometry, SiteId
    from tidelock.peft.lora import LoraModule
    from tidelock.peft.methods import MethodConfig, ModuleConfig, SiteModule


def save_adapter(
    modules: Mapping[SiteId, SiteModule],
    config: ModuleConfig,
    geometry: Geometry,
    folder: Path,
    *,
    base_model: str,
    head: nn.Linear | None = None,
) -> None:
    """Write the modules of an adapter; each of its files is whole or as it was before.

    Args:
        modules: The trained modules by site, as `config` targets them.
        config: Their configuration; not changed.
        geometry: The model's.
        folder: Made when it is not there; other files in it are left alone.
        base_model: Folder or hub name of the model, for whoever loads the adapter.
        head: The trained head of whole texts, if there is one.

    Raises:
        StorageError: The file system refused.
    """
    parameters = _parameters(modules, config, geometry, head)
    with saving(folder):
        if isinstance(config, CoreConfig):
            files = core_files(modules, config, geometry, base_model, parameters)
        elif isinstance(config, LoraConfig):
            targets = {site: cast("LoraModule", module).targets for site, module in sorted(modules.items())}
            written = lora_config_file(targets, config, geometry, base_model, with_head=head is not None)
            files = {WEIGHTS_FILE: as_file(parameters), CONFIG_FILE: written}
        else:
            files = {WEIGHTS_FILE: as_file(parameters), CONFIG_FILE: serial_config_file(modules, config, base_model)}
        write_files(folder, files)


def holds_adapter(folder: Path) -> bool:
    """Return whether a folder has an adapter of any method in it."""
    return any((folder / name).is_file() for name in (CORE_CONFIG_FILE, CONFIG_FILE))


def load_adapter(folder: Path) -> Adapter:
    """Return the adapter in a folder: that of any method.

    Raises:
        CheckpointError: A file is missing, damaged or not safetensors.
        ConfigError: It is of no method of ours, or its settings contradict each other.
    """
    config = _read_config(folder)
    tensors = read_weights(folder / (CORE_WEIGHTS_FILE if isinstance(config, CoreConfig) else WEIGHTS_FILE))
    if isinstance(config, SideConfig) and OUTPUT_OF_HEAD in tensors:
        return Adapter(folder, config, tensors, OUTPUT_OF_HEAD)
    return Adapter(folder, config, tensors, _head_name(config))


def apply_adapter(
    adapter: Adapter, modules: Mapping[SiteId, SiteModule], geometry: Geometry, head: nn.Linear | None = None
) -> None:
    """Copy an adapter's weights into modules that were made from its configuration; all of them, or none.

    Args:
        adapter: As read from its folder; of a method that puts modules at sites.
        modules: By site.
        geometry: The model's.
        head: The head of whole texts; None where there is none.

    Raises:
        CheckpointError: Names or shapes are not those of the modules, or a weight is not a finite number.
    """
    copy_weights(adapter, _parameters(modules, adapter.config, geometry, head))


def _read_config(folder: Path) -> MethodConfig:
    if (folder / CORE_CONFIG_FILE).is_file():
        return read_own_config(folder / CORE_CONFIG_FILE, CoreConfig, "a core")
    path = folder / CONFIG_FILE
    values = read_json(path)
    kind = values.get("peft_type") if isinstance(values, dict) else None
    if kind == SERIAL_ADAPTER:
        return read_own_config(path, AdapterConfig, "a serial adapter")
    if kind == SIDE:
        return read_own_config(path, SideConfig, "a side network")
    if kind != LORA:
        msg = (
            f"Adapter: expected one of peft_type {LORA}, {SERIAL_ADAPTER} or {SIDE}, got {kind!r} ({path}). tidelock "
            "trains plain LoRA, serial adapters and side networks."
        )
        raise ConfigError(msg)
    return read_lora_config(folder)


def _head_name(config: MethodConfig) -> str:
    """Return the name of the head's weight in the file that tidelock reads."""
    return LORA_HEAD if isinstance(config, LoraConfig) else HEAD


def _parameters(
    modules: Mapping[SiteId, SiteModule], config: MethodConfig, geometry: Geometry, head: nn.Linear | None
) -> dict[str, Tensor]:
    """Return every weight of the modules, and the head's, by its name in the file that tidelock reads."""
    found: dict[str, Tensor] = {} if head is None else {_head_name(config): head.weight}
    if isinstance(config, LoraConfig):
        return found | lora_parameters(modules, geometry)
    return found | (core_parameters(modules) if isinstance(config, CoreConfig) else serial_parameters(modules))
