"""LoRA as files, in PEFT's own format.

    adapter_config.json          the `LoraConfig`
    adapter_model.safetensors    `base_model.model.<projection>.lora_A.weight` (r x D) and `lora_B.weight` (W x r); with
                                 a head for whole texts, as `peft` has it for the task SEQ_CLS,
                                 `base_model.model.score.weight` (C x D)

May import errors, `peft`, `model` and libraries.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, cast

from peft import LoraConfig

from tidelock.errors import ConfigError
from tidelock.peft.adapter_files import CONFIG_FILE
from tidelock.peft.lora import LoraModule, lora_targets

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from tidelock.model.geometry import Geometry, SiteId
    from tidelock.peft.lora import LoraBranch
    from tidelock.peft.methods import SiteModule

LORA = "LORA"
LORA_HEAD = "base_model.model.score.weight"
# How transformers' models call the head of whole texts; `peft` names all that it knows.
_HEAD_MODULES = frozenset({"score", "classifier"})
# Families whose q, k and v are a Conv1D, stored transposed. `peft` looks at the layer and corrects a wrong entry.
_CONV1D_FAMILIES = frozenset({"gpt2", "openai-gpt"})


def lora_config_file(
    targets: Mapping[SiteId, tuple[str, ...]],
    config: LoraConfig,
    geometry: Geometry,
    base_model: str,
    *,
    with_head: bool,
) -> bytes:
    """Return the content of `adapter_config.json`, as `peft` itself writes it.

    Args:
        targets: The projections that are in the file, by site.
        config: What they were made from; not changed.
        geometry: The model's.
        base_model: Folder or hub name of the model.
        with_head: Whether a head for whole texts is in the file too.
    """
    config = _portable(config, targets, geometry)
    config.base_model_name_or_path = base_model
    config.task_type = "SEQ_CLS" if with_head else "CAUSAL_LM"
    config.modules_to_save = ["score"] if with_head else None
    config.inference_mode = True  # as peft itself saves; who trains on says so when loading
    config.fan_in_fan_out = geometry.family.name in _CONV1D_FAMILIES
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        return (Path(scratch) / CONFIG_FILE).read_bytes()


def read_lora_config(folder: Path) -> LoraConfig:
    """Return the configuration of a LoRA adapter that we or `peft` saved.

    Raises:
        ConfigError: `peft` does not understand it.
    """
    try:
        config = cast("LoraConfig", LoraConfig.from_pretrained(str(folder)))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        path = folder / CONFIG_FILE
        msg = f"Adapter: expected a LoraConfig that peft understands, got {error} ({path}). Save it again with peft."
        raise ConfigError(msg) from error
    if config.task_type == "SEQ_CLS" and set(config.modules_to_save or ()) <= _HEAD_MODULES:
        config.modules_to_save = None  # the head, which is no module of LoRA's here
    return config


def lora_parameters(modules: Mapping[SiteId, SiteModule], geometry: Geometry) -> dict[str, Tensor]:
    """Return every weight of LoRA modules by its name in the file."""
    found: dict[str, Tensor] = {}
    for site, module in sorted(modules.items()):
        lora = cast("LoraModule", module)
        for name in lora.targets:
            branch = cast("LoraBranch", lora.branches[name])
            for half in ("lora_A", "lora_B"):
                found[lora_name(geometry, site, name, half)] = getattr(branch, half).weight
    return found


def lora_name(geometry: Geometry, site: SiteId, projection: str, half: str) -> str:
    """Return the name of one half, `lora_A` or `lora_B`, of a branch in the file."""
    return f"base_model.model.{geometry.projection_path(site.block, projection)}.{half}.weight"


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
