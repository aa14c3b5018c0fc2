"""Serial adapters as files, in a format of ours, as PEFT has none.

    adapter_config.json          `peft_type` TIDELOCK_SERIAL_ADAPTER, `format_version`, `base_model_name_or_path` and
                                 the fields of `AdapterConfig`
    adapter_model.safetensors    `blocks.<N>.<place>.down.weight` (r x D) and `up.weight` (D x r); with a head for whole
                                 texts `head.weight` (C x D)

May import errors, `peft`, `model` and libraries.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

from tidelock.peft.adapter_files import own_config_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from tidelock.model.geometry import SiteId
    from tidelock.peft.adapter import AdapterConfig, SerialAdapter
    from tidelock.peft.methods import SiteModule

SERIAL_ADAPTER = "TIDELOCK_SERIAL_ADAPTER"


def serial_config_file(modules: Mapping[SiteId, SiteModule], config: AdapterConfig, base_model: str) -> bytes:
    """Return the content of `adapter_config.json` for the adapters that are written: some may have been killed."""
    written = replace(config, layers=tuple(sorted({site.block for site in modules})))
    return own_config_file(written, peft_type=SERIAL_ADAPTER, base_model_name_or_path=base_model)


def serial_parameters(modules: Mapping[SiteId, SiteModule]) -> dict[str, Tensor]:
    """Return every weight of serial adapters by its name in the file."""
    return {
        f"{site.name}.{half}.weight": getattr(cast("SerialAdapter", module), half).weight
        for site, module in sorted(modules.items())
        for half in ("down", "up")
    }
