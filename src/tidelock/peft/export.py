"""Adapters in PEFT's own file format: what `peft.PeftModel.from_pretrained` loads, and what `peft` saved.

    adapter_config.json          the `LoraConfig`
    adapter_model.safetensors    `base_model.model.<projection>.lora_A.weight` (r x D) and `lora_B.weight` (W x r)

Only safetensors are read: PEFT's older `.bin` files run code when they are opened. May import errors, `model` and
libraries.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from tidelock.errors import CheckpointError, ConfigError, StorageError
from tidelock.model.cache_folder import write_atomically
from tidelock.peft.lora import lora_targets

if TYPE_CHECKING:
    from tidelock.model.geometry import Geometry
    from tidelock.peft.lora import LoraBranch, LoraModule

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# Families whose q, k and v are a Conv1D, stored transposed. `peft` looks at the layer and corrects a wrong entry.
_CONV1D_FAMILIES = frozenset({"gpt2", "openai-gpt"})


@final
@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter as it lies in its folder.

    Attributes:
        folder: Where it was read.
        config: Its configuration, not yet checked against what tidelock can train.
        tensors: Its weights on the CPU, by the names in the file.
    """

    folder: Path
    config: LoraConfig
    tensors: Mapping[str, Tensor]


def save_adapter(
    modules: Mapping[int, LoraModule], config: LoraConfig, geometry: Geometry, folder: Path, *, base_model: str
) -> None:
    """Write an adapter; each of its two files is whole or as it was before.

    Args:
        modules: The trained modules by block, as `config` targets them.
        config: Their configuration; not changed.
        geometry: The model's.
        folder: Made when it is not there; other files in it are left alone.
        base_model: Folder or hub name of the model, for whoever loads the adapter.

    Raises:
        StorageError: The file system refused.
    """
    targets = {block: modules[block].targets for block in sorted(modules)}
    config = _portable(config, targets, geometry)
    config.base_model_name_or_path = base_model
    config.task_type = "CAUSAL_LM"
    config.inference_mode = True  # as peft itself saves; who trains on says so when loading
    config.fan_in_fan_out = geometry.family.name in _CONV1D_FAMILIES
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in _parameters(modules, geometry).items()}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            config.save_pretrained(scratch)
            written = (Path(scratch) / CONFIG_FILE).read_bytes()
        # Weights first: a folder with a configuration has weights.
        write_atomically(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
        write_atomically(folder / CONFIG_FILE, written)
    except OSError as error:
        msg = (
            f"Writing the adapter: expected the disk to take it, got {error.strerror or error} ({folder}). Free some "
            "space, or choose a folder that you may write."
        )
        raise StorageError(msg) from error


def load_adapter(folder: Path) -> Adapter:
    """Return the LoRA adapter in a folder.

    Raises:
        CheckpointError: A file is missing, damaged or not safetensors.
        ConfigError: It is no LoRA adapter, or its settings contradict each other.
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


def apply_adapter(adapter: Adapter, modules: Mapping[int, LoraModule], geometry: Geometry) -> None:
    """Copy an adapter's weights into modules that were made from its configuration; all of them, or none.

    Args:
        adapter: As read from its folder.
        modules: By block.
        geometry: The model's.

    Raises:
        CheckpointError: Names or shapes are not those of the modules, or a weight is not a finite number.
    """
    parameters = _parameters(modules, geometry)
    missing, unexpected = sorted(parameters.keys() - adapter.tensors), sorted(adapter.tensors.keys() - parameters)
    if missing or unexpected:
        found = [
            f"{len(names)} {kind} ({names[0]})"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        msg = (
            f"Adapter weights: expected the {len(parameters)} tensors that its configuration names for this model, got "
            f"{' and '.join(found)} ({adapter.folder}). Use the model that it was trained on; only plain LoRA on q, k "
            "and v can be read."
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


def _read_config(folder: Path) -> LoraConfig:
    path = folder / CONFIG_FILE
    try:
        values: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        msg = f"Adapter: expected a folder with {CONFIG_FILE}, got {reason} ({path}). Check the path."
        raise CheckpointError(msg) from error
    kind = values.get("peft_type") if isinstance(values, dict) else None
    if kind != "LORA":
        msg = f"Adapter: expected one of peft_type LORA, got {kind!r} ({path}). tidelock trains plain LoRA."
        raise ConfigError(msg)
    try:
        return cast("LoraConfig", LoraConfig.from_pretrained(str(folder)))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        msg = f"Adapter: expected a LoraConfig that peft understands, got {error} ({path}). Save it again with peft."
        raise ConfigError(msg) from error


def _parameters(modules: Mapping[int, LoraModule], geometry: Geometry) -> dict[str, Tensor]:
    """Return every weight of the modules by its name in PEFT's files."""
    found: dict[str, Tensor] = {}
    for block, module in sorted(modules.items()):
        for name in module.targets:
            path = f"base_model.model.{geometry.projection_path(block, name)}"
            branch = cast("LoraBranch", module.branches[name])
            found[f"{path}.lora_A.weight"] = branch.lora_A.weight
            found[f"{path}.lora_B.weight"] = branch.lora_B.weight
    return found


def _portable(config: LoraConfig, targets: Mapping[int, tuple[str, ...]], geometry: Geometry) -> LoraConfig:
    """Return a copy of a configuration whose target modules mean the same to `peft`, which knows no sites."""
    config = copy.copy(config)
    config.target_modules = sorted({name for names in targets.values() for name in names})
    if not _same_targets(config, targets, geometry):
        # Full names are matched exactly, before any other rule.
        config.target_modules = [geometry.projection_path(block, name) for block in targets for name in targets[block]]
        config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    return config


def _same_targets(config: LoraConfig, targets: Mapping[int, tuple[str, ...]], geometry: Geometry) -> bool:
    try:
        return lora_targets(config, geometry) == dict(targets)
    except ConfigError:
        return False
