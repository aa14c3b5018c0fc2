"""Adapters as files: LoRA in PEFT's own format, serial adapters, which PEFT does not know, in one described here.

    adapter_config.json          LoRA: the `LoraConfig`. Serial: `peft_type` TIDELOCK_SERIAL_ADAPTER, `format_version`,
                                 `base_model_name_or_path` and the fields of `AdapterConfig`
    adapter_model.safetensors    LoRA: `base_model.model.<projection>.lora_A.weight` (r x D), `lora_B.weight` (W x r).
                                 Serial: `blocks.<N>.<place>.down.weight` (r x D) and `up.weight` (D x r)
                                 With a head for whole texts: LoRA, as `peft` has it for the task SEQ_CLS,
                                 `base_model.model.score.weight` (C x D); serial `head.weight` (C x D)

Only safetensors are read: PEFT's older `.bin` files run code when they are opened. May import errors, `peft`, `model`
and libraries.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from tidelock.errors import CheckpointError, ConfigError, StorageError
from tidelock.model.cache_folder import write_atomically
from tidelock.peft.adapter import AdapterConfig
from tidelock.peft.lora import LoraModule, lora_targets

if TYPE_CHECKING:
    from tidelock.model.geometry import Geometry, SiteId
    from tidelock.peft.lora import LoraBranch
    from tidelock.peft.methods import MethodConfig, SiteModule

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SERIAL_ADAPTER = "TIDELOCK_SERIAL_ADAPTER"
_SERIAL_FORMAT = 1
_LORA_HEAD, _SERIAL_HEAD = "base_model.model.score.weight", "head.weight"
# How transformers' models call the head of whole texts; `peft` names all that it knows.
_HEAD_MODULES = frozenset({"score", "classifier"})
# Families whose q, k and v are a Conv1D, stored transposed. `peft` looks at the layer and corrects a wrong entry.
_CONV1D_FAMILIES = frozenset({"gpt2", "openai-gpt"})


@final
@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as it lies in its folder.

    Attributes:
        folder: Where it was read.
        config: Its configuration, not yet checked against what tidelock can train.
        tensors: Its weights on the CPU, by the names in the file.
    """

    folder: Path
    config: MethodConfig
    tensors: Mapping[str, Tensor]

    @property
    def num_labels(self) -> int | None:
        """How many labels its head for whole texts has; None without one."""
        head = self.tensors.get(_head_name(self.config))
        return None if head is None else len(head)


def save_adapter(
    modules: Mapping[SiteId, SiteModule],
    config: MethodConfig,
    geometry: Geometry,
    folder: Path,
    *,
    base_model: str,
    head: nn.Linear | None = None,
) -> None:
    """Write an adapter; each of its two files is whole or as it was before.

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
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in parameters.items()}
    try:
        if isinstance(config, LoraConfig):
            written = _lora_config_file(modules, config, geometry, base_model, with_head=head is not None)
        else:
            written = _serial_config_file(modules, config, base_model)
        # Weights first: a folder with a configuration has weights.
        write_atomically(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
        write_atomically(folder / CONFIG_FILE, written)
    except OSError as error:
        msg = (
            f"Writing the adapter: expected the disk to take it, got {error.strerror or error} ({folder}). Free some "
            "space, or choose a folder that you may write."
        )
        raise StorageError(msg) from error


def _lora_config_file(
    modules: Mapping[SiteId, SiteModule], config: LoraConfig, geometry: Geometry, base_model: str, *, with_head: bool
) -> bytes:
    targets = {site: cast("LoraModule", module).targets for site, module in sorted(modules.items())}
    config = _portable(config, targets, geometry)
    config.base_model_name_or_path = base_model
    config.task_type = "SEQ_CLS" if with_head else "CAUSAL_LM"
    config.modules_to_save = ["score"] if with_head else None
    config.inference_mode = True  # as peft itself saves; who trains on says so when loading
    config.fan_in_fan_out = geometry.family.name in _CONV1D_FAMILIES
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        return (Path(scratch) / CONFIG_FILE).read_bytes()


def _serial_config_file(modules: Mapping[SiteId, SiteModule], config: AdapterConfig, base_model: str) -> bytes:
    values = {
        "peft_type": SERIAL_ADAPTER,
        "format_version": _SERIAL_FORMAT,
        "base_model_name_or_path": base_model,
        # Those that are written: some may have been killed.
        **asdict(replace(config, layers=tuple(sorted({site.block for site in modules})))),
    }
    return (json.dumps(values, indent=2) + "\n").encode()


def load_adapter(folder: Path) -> Adapter:
    """Return the adapter in a folder.

    Raises:
        CheckpointError: A file is missing, damaged or not safetensors.
        ConfigError: It is neither LoRA nor serial, or its settings contradict each other.
    """
    config = _read_config(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        got = "adapter_model.bin" if (folder / "adapter_model.bin").is_file() else "none"
        msg = (
            f"Adapter: expected its weights in {WEIGHTS_FILE}, got {got} ({folder}). Check the path; with peft, save "
            "it again by save_pretrained(folder)."
        )
        raise CheckpointError(msg)
    try:
        tensors = load_file(path, device="cpu")
    except (OSError, SafetensorError, ValueError) as error:
        msg = (
            f"Adapter: expected a whole safetensors file, got {type(error).__name__}: {error} ({path}). Copy it again."
        )
        raise CheckpointError(msg) from error
    return Adapter(folder, config, tensors)


def apply_adapter(
    adapter: Adapter, modules: Mapping[SiteId, SiteModule], geometry: Geometry, head: nn.Linear | None = None
) -> None:
    """Copy an adapter's weights into modules that were made from its configuration; all of them, or none.

    Args:
        adapter: As read from its folder.
        modules: By site.
        geometry: The model's.
        head: The head of whole texts; None where there is none.

    Raises:
        CheckpointError: Names or shapes are not those of the modules, or a weight is not a finite number.
    """
    parameters = _parameters(modules, adapter.config, geometry, head)
    missing, unexpected = sorted(parameters.keys() - adapter.tensors), sorted(adapter.tensors.keys() - parameters)
    if missing or unexpected:
        found = [
            f"{len(names)} {kind} ({names[0]})"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        msg = (
            f"Adapter weights: expected the {len(parameters)} tensors that its configuration names for this model, got "
            f"{' and '.join(found)} ({adapter.folder}). Use the model that it was trained on; of LoRA only the plain "
            "one on q, k and v can be read."
        )
        raise CheckpointError(msg)
    for name, parameter in parameters.items():
        tensor = adapter.tensors[name]
        if tensor.shape != parameter.shape or not tensor.is_floating_point():
            msg = (
                f"Adapter weight {name!r}: expected floating-point numbers of shape {tuple(parameter.shape)}, got "
                f"{tensor.dtype} of {tuple(tensor.shape)} ({adapter.folder}). Use the model that it was trained on."
            )
            raise CheckpointError(msg)
        if not bool(torch.isfinite(tensor).all()):
            msg = (
                f"Adapter weight {name!r}: expected finite numbers, got infinite or undefined ones ({adapter.folder}). "
                "Use another checkpoint of it."
            )
            raise CheckpointError(msg)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(adapter.tensors[name])


def _read_config(folder: Path) -> MethodConfig:
    path = folder / CONFIG_FILE
    try:
        values: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        msg = f"Adapter: expected a folder with {CONFIG_FILE}, got {reason} ({path}). Check the path."
        raise CheckpointError(msg) from error
    kind = values.get("peft_type") if isinstance(values, dict) else None
    if kind == SERIAL_ADAPTER:
        return _read_serial_config(values, path)
    if kind != "LORA":
        msg = (
            f"Adapter: expected one of peft_type LORA or {SERIAL_ADAPTER}, got {kind!r} ({path}). tidelock trains "
            "plain LoRA and serial adapters."
        )
        raise ConfigError(msg)
    try:
        config = cast("LoraConfig", LoraConfig.from_pretrained(str(folder)))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        msg = f"Adapter: expected a LoraConfig that peft understands, got {error} ({path}). Save it again with peft."
        raise ConfigError(msg) from error
    if config.task_type == "SEQ_CLS" and set(config.modules_to_save or ()) <= _HEAD_MODULES:
        config.modules_to_save = None  # the head, which is no module of LoRA's here
    return config


def _read_serial_config(values: dict[str, Any], path: Path) -> AdapterConfig:
    version = values.get("format_version")
    settings: dict[str, Any] = {
        # JSON has no tuples.
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if name not in {"peft_type", "format_version", "base_model_name_or_path"}
    }
    try:
        if version != _SERIAL_FORMAT:
            msg = f"format_version {version!r}"
            raise ValueError(msg)  # noqa: TRY301  (one sentence for all that can be wrong)
        return AdapterConfig(**settings)
    except (TypeError, ValueError, ConfigError) as error:
        msg = (
            f"Adapter: expected the configuration of a serial adapter, format {_SERIAL_FORMAT}, got: {error} ({path}). "
            "Save it again with tidelock."
        )
        raise ConfigError(msg) from error


def _head_name(config: MethodConfig) -> str:
    """Return the name of the head's weight in the files."""
    return _LORA_HEAD if isinstance(config, LoraConfig) else _SERIAL_HEAD


def _parameters(
    modules: Mapping[SiteId, SiteModule], config: MethodConfig, geometry: Geometry, head: nn.Linear | None
) -> dict[str, Tensor]:
    """Return every weight of the modules, and the head's, by its name in the files."""
    found: dict[str, Tensor] = {} if head is None else {_head_name(config): head.weight}
    for site, module in sorted(modules.items()):
        if not isinstance(module, LoraModule):
            found[f"{site.name}.down.weight"] = module.down.weight
            found[f"{site.name}.up.weight"] = module.up.weight
            continue
        for name in module.targets:
            path = f"base_model.model.{geometry.projection_path(site.block, name)}"
            branch = cast("LoraBranch", module.branches[name])
            found[f"{path}.lora_A.weight"] = branch.lora_A.weight
            found[f"{path}.lora_B.weight"] = branch.lora_B.weight
    return found


def _portable(config: LoraConfig, targets: Mapping[SiteId, tuple[str, ...]], geometry: Geometry) -> LoraConfig:
    """Return a copy of a configuration whose target modules mean the same to `peft`, which knows no sites."""
    config = copy.copy(config)
    config.target_modules = sorted({name for names in targets.values() for name in names})
    if not _same_targets(config, targets, geometry):
        # Full names are matched exactly, before any other rule.
        config.target_modules = [
            geometry.projection_path(site.block, name) for site in targets for name in targets[site]
        ]
        config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    return config


def _same_targets(config: LoraConfig, targets: Mapping[SiteId, tuple[str, ...]], geometry: Geometry) -> bool:
    try:
        return lora_targets(config, geometry) == dict(targets)
    except ConfigError:
        return False
