"""Cores as files: as the LoRA that they are, for whoever reads PEFT's format, and as themselves.

The first pair of files is that of `peft.lora_files`; with frames of the SVD only an export writes it. The other is
what tidelock trains on or asks:

    core_config.json             `format_version` and the fields of `CoreConfig`
    core_model.safetensors       `blocks.<N>.attn.<projection>.weight` (r x r), and with a head for whole texts
                                 `head.weight` (C x D)

May import errors, `peft`, `model` and libraries.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from peft import LoraConfig

from tidelock.model.frames import FrameChoice, Frames
from tidelock.peft.adapter_files import CONFIG_FILE, HEAD, WEIGHTS_FILE, as_file, own_config_file
from tidelock.peft.core import core_targets
from tidelock.peft.lora_files import LORA_HEAD, lora_config_file, lora_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from tidelock.model.geometry import Geometry, SiteId
    from tidelock.peft.core import CoreConfig, CoreModule
    from tidelock.peft.methods import SiteModule

CORE_CONFIG_FILE = "core_config.json"
CORE_WEIGHTS_FILE = "core_model.safetensors"


def core_parameters(modules: Mapping[SiteId, SiteModule]) -> dict[str, Tensor]:
    """Return every matrix R by its name in `core_model.safetensors`."""
    found: dict[str, Tensor] = {}
    for site, module in sorted(modules.items()):
        core = cast("CoreModule", module)
        found.update({f"{site.name}.{name}.weight": core.core(name).weight for name in core.targets})
    return found


def core_files(
    modules: Mapping[SiteId, SiteModule],
    config: CoreConfig,
    geometry: Geometry,
    base_model: str,
    parameters: Mapping[str, Tensor],
) -> dict[str, bytes]:
    """Return the content of the files: all four, or with frames of the SVD only our own two.

    Whoever trains need not have the weights that such frames are of: `core_as_lora` writes the others where they are.

    Args:
        modules: The cores by site.
        config: What they were made from.
        geometry: The model's.
        base_model: Folder or hub name of the model.
        parameters: Those of the modules, and a head's, by their names in `core_model.safetensors`.
    """
    written = replace(config, layers=tuple(sorted({site.block for site in modules})))
    own = {CORE_WEIGHTS_FILE: as_file(parameters), CORE_CONFIG_FILE: own_config_file(written)}
    if config.frames == "svd":
        return own
    frames = Frames(geometry, torch.device("cpu"), torch.float32)
    return own | core_as_lora(written, geometry, base_model, parameters, frames)


@torch.no_grad()
def core_as_lora(
    config: CoreConfig, geometry: Geometry, base_model: str, parameters: Mapping[str, Tensor], frames: Frames
) -> dict[str, bytes]:
    """Return the content of both files in PEFT's format: LoRA branches with A = A and B = s B R.

    Args:
        config: As it lies beside the cores.
        geometry: The model's.
        base_model: Folder or hub name of the model.
        parameters: By their names in `core_model.safetensors`.
        frames: The model's, in fp32 on the CPU.
    """
    targets, names = core_targets(config, geometry), geometry.family.projections
    lora: dict[str, Tensor] = {}
    for site, of_site in targets.items():
        made = frames.at(site, of_site, FrameChoice(config.frames, config.rank))
        for name, (a_RD, b_WR) in zip(of_site, made, strict=True):
            core_RR = parameters[f"{site.name}.{name}.weight"].cpu().float()
            lora[lora_name(geometry, site, name, "lora_A")] = a_RD
            lora[lora_name(geometry, site, name, "lora_B")] = config.scaling * b_WR @ core_RR
    if HEAD in parameters:
        lora[LORA_HEAD] = parameters[HEAD]
    # Scaled by alpha / r = 1: s is in B.
    as_lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.rank,
        target_modules=[name for name in names if config.targets is None or name in config.targets],
        layers_to_transform=sorted({site.block for site in targets}),
    )
    return {
        WEIGHTS_FILE: as_file(lora),
        CONFIG_FILE: lora_config_file(targets, as_lora, geometry, base_model, with_head=HEAD in parameters),
    }
