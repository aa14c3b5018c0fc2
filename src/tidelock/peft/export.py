"""Adapters as files: LoRA in PEFT's own format, serial adapters, which PEFT does not know, in one described here.

    adapter_config.json          LoRA, and core as LoRA: the `LoraConfig`. Serial: `peft_type`
                                 TIDELOCK_SERIAL_ADAPTER, `format_version`, `base_model_name_or_path` and the fields of
                                 `AdapterConfig`
    adapter_model.safetensors    LoRA: `base_model.model.<projection>.lora_A.weight` (r x D), `lora_B.weight` (W x r).
                                 Serial: `blocks.<N>.<place>.down.weight` (r x D) and `up.weight` (D x r)
                                 With a head for whole texts: LoRA, as `peft` has it for the task SEQ_CLS,
                                 `base_model.model.score.weight` (C x D); serial `head.weight` (C x D)

A core is written as the LoRA that it is, for whoever reads PEFT's format, and beside it, to be trained on or asked by
tidelock, as itself:

    core_config.json             `format_version` and the fields of `CoreConfig`
    core_model.safetensors       `blocks.<N>.attn.<projection>.weight` (r x r), and with a head `head.weight` (C x D)

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
from typing import TYPE_CHECKING, Any, TypeVar, cast, final

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from tidelock.errors import CheckpointError, ConfigError, StorageError
from tidelock.model.cache_folder import write_atomically
from tidelock.model.frames import Frames
from tidelock.peft.adapter import AdapterConfig
from tidelock.peft.core import CoreConfig, CoreModule
from tidelock.peft.lora import LoraModule, lora_targets

if TYPE_CHECKING:
    from tidelock.model.geometry import Geometry, SiteId
    from tidelock.peft.lora import LoraBranch
    from tidelock.peft.methods import MethodConfig, SiteModule

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SERIAL_ADAPTER = "TIDELOCK_SERIAL_ADAPTER"
CORE_CONFIG_FILE = "core_config.json"
CORE_WEIGHTS_FILE = "core_model.safetensors"
_FORMAT = 1
_LORA_HEAD, _OWN_HEAD = "base_model.model.score.weight", "head.weight"
# How transformers' models call the head of whole texts; `peft` names all that it knows.
_HEAD_MODULES = frozenset({"score", "classifier"})
# Families whose q, k and v are a Conv1D, stored transposed. `peft` looks at the layer and corrects a wrong entry.
_CONV1D_FAMILIES = frozenset({"gpt2", "openai-gpt"})


_OwnConfig = TypeVar("_OwnConfig", AdapterConfig, CoreConfig)


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
    """Write an adapter; each of its files is whole or as it was before.

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
        files: dict[str, bytes | dict[str, Tensor]]
        if isinstance(config, LoraConfig):
            targets = {site: cast("LoraModule", module).targets for site, module in sorted(modules.items())}
            written = _lora_config_file(targets, config, geometry, base_model, with_head=head is not None)
            files = {WEIGHTS_FILE: tensors, CONFIG_FILE: written}
        elif isinstance(config, CoreConfig):
            files = _core_files(modules, config, geometry, base_model, tensors)
        else:
            files = {WEIGHTS_FILE: tensors, CONFIG_FILE: _serial_config_file(modules, config, base_model)}
        # Weights first: a folder with a configuration has weights.
        for name, content in files.items():
            whole = content if isinstance(content, bytes) else save(content, metadata={"format": "pt"})
            write_atomically(folder / name, whole)
    except OSError as error:
        msg = (
            f"Writing the adapter: expected the disk to take it, got {error.strerror or error} ({folder}). Free some "
            "space, or choose a folder that you may write."
        )
        raise StorageError(msg) from error


def _lora_config_file(
    targets: Mapping[SiteId, tuple[str, ...]],
    config: LoraConfig,
    geometry: Geometry,
    base_model: str,
    *,
    with_head: bool,
) -> bytes:
    config = _portable(config, targets, geometry)
    config.base_model_name_or_path = base_model
    config.task_type = "SEQ_CLS" if with_head else "CAUSAL_LM"
    config.modules_to_save = ["score"] if with_head else None
    config.inference_mode = True  # as peft itself saves; who trains on says so when loading
    config.fan_in_fan_out = geometry.family.name in _CONV1D_FAMILIES
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        return (Path(scratch) / CONFIG_FILE).read_bytes()


def _core_files(
    modules: Mapping[SiteId, SiteModule],
    config: CoreConfig,
    geometry: Geometry,
    base_model: str,
    tensors: dict[str, Tensor],
) -> dict[str, bytes | dict[str, Tensor]]:
    """Return a core's files: as LoRA with the branch's A = A and B = s B R, and as itself."""
    frames = Frames(geometry, torch.device("cpu"), torch.float32)
    targets = {site: cast("CoreModule", module).targets for site, module in sorted(modules.items())}
    lora: dict[str, Tensor] = {}
    for site, names in targets.items():
        for name, (a_RD, b_WR) in zip(names, frames.at(site, names, config.rank), strict=True):
            path = f"base_model.model.{geometry.projection_path(site.block, name)}"
            lora[f"{path}.lora_A.weight"] = a_RD.contiguous()
            core = tensors[f"{site.name}.{name}.weight"].float()
            lora[f"{path}.lora_B.weight"] = (config.scaling * b_WR @ core).contiguous()
    if _OWN_HEAD in tensors:
        lora[_LORA_HEAD] = tensors[_OWN_HEAD]
    names = geometry.family.projections
    # Scaled by alpha / r = 1: s is in B.
    as_lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.rank,
        target_modules=[name for name in names if config.targets is None or name in config.targets],
        layers_to_transform=sorted({site.block for site in modules}),
    )
    own = {"format_version": _FORMAT, **asdict(replace(config, layers=tuple(sorted({site.block for site in modules}))))}
    return {
        CORE_WEIGHTS_FILE: tensors,
        CORE_CONFIG_FILE: (json.dumps(own, indent=2) + "\n").encode(),
        WEIGHTS_FILE: lora,
        CONFIG_FILE: _lora_config_file(targets, as_lora, geometry, base_model, with_head=_OWN_HEAD in tensors),
    }


def _serial_config_file(modules: Mapping[SiteId, SiteModule], config: AdapterConfig, base_model: str) -> bytes:
    values = {
        "peft_type": SERIAL_ADAPTER,
        "format_version": _FORMAT,
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
    path = folder / (CORE_WEIGHTS_FILE if isinstance(config, CoreConfig) else WEIGHTS_FILE)
    if not path.is_file():
        got = "adapter_model.bin" if (folder / "adapter_model.bin").is_file() else "none"
        msg = (
            f"Adapter: expected its weights in {path.name}, got {got} ({folder}). Check the path; with peft, save "
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
    if (folder / CORE_CONFIG_FILE).is_file():
        return _read_own(folder / CORE_CONFIG_FILE, CoreConfig, "a core")
    path = folder / CONFIG_FILE
    values = _read_json(path)
    kind = values.get("peft_type") if isinstance(values, dict) else None
    if kind == SERIAL_ADAPTER:
        return _read_own(path, AdapterConfig, "a serial adapter")
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


def _read_json(path: Path) -> Any:  # noqa: ANN401  (whatever the file holds)
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        msg = f"Adapter: expected a folder with {path.name}, got {reason} ({path}). Check the path."
        raise CheckpointError(msg) from error


def _read_own(path: Path, kind: type[_OwnConfig], what: str) -> _OwnConfig:
    """Return the configuration in one of our own files."""
    values = _read_json(path)
    try:
        version = values.pop("format_version", None)
        settings: dict[str, Any] = {
            # JSON has no tuples.
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
            if name not in {"peft_type", "base_model_name_or_path"}
        }
        if version != _FORMAT:
            msg = f"format_version {version!r}"
            raise ValueError(msg)  # noqa: TRY301  (one sentence for all that can be wrong)
        return kind(**settings)
    except (AttributeError, TypeError, ValueError, ConfigError) as error:
        msg = (
            f"Adapter: expected the configuration of {what}, format {_FORMAT}, got: {error} ({path}). "
            "Save it again with tidelock."
        )
        raise ConfigError(msg) from error


def _head_name(config: MethodConfig) -> str:
    """Return the name of the head's weight in the files."""
    return _LORA_HEAD if isinstance(config, LoraConfig) else _OWN_HEAD


def _parameters(
    modules: Mapping[SiteId, SiteModule], config: MethodConfig, geometry: Geometry, head: nn.Linear | None
) -> dict[str, Tensor]:
    """Return every weight of the modules, and the head's, by its name in the files."""
    found: dict[str, Tensor] = {} if head is None else {_head_name(config): head.weight}
    for site, module in sorted(modules.items()):
        if isinstance(module, CoreModule):
            found.update({f"{site.name}.{name}.weight": module.core(name).weight for name in module.targets})
            continue
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
