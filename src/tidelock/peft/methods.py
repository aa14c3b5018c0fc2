"""The methods: for each kind of configuration, what it targets and what it puts at a site.

May import `peft`, `model`, errors and libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from peft import LoraConfig

from tidelock.errors import ConfigError
from tidelock.peft.adapter import AdapterConfig, SerialAdapter, adapter_targets
from tidelock.peft.core import CoreConfig, CoreModule, core_targets
from tidelock.peft.lora import LoraModule, check_lora_config, lora_targets
from tidelock.peft.side import SideConfig

if TYPE_CHECKING:
    from tidelock.model.geometry import Geometry, SiteId

ModuleConfig: TypeAlias = LoraConfig | AdapterConfig | CoreConfig  # these put modules at sites
MethodConfig: TypeAlias = ModuleConfig | SideConfig
SiteModule: TypeAlias = LoraModule | SerialAdapter | CoreModule


def check_config(config: MethodConfig) -> None:
    """Refuse a configuration that cannot be honoured.

    Raises:
        ConfigError: It is of no method, or has a setting that needs the frozen weights or trains something else.
    """
    if isinstance(config, LoraConfig):
        check_lora_config(config)
    elif not isinstance(config, AdapterConfig | CoreConfig | SideConfig):
        msg = (
            "What to train: expected a peft.LoraConfig, a tidelock.AdapterConfig, a tidelock.CoreConfig or a "
            f"tidelock.SideConfig, got {type(config).__name__}. Give one of those."
        )
        raise ConfigError(msg)


def at_sites(config: MethodConfig) -> ModuleConfig:
    """Return a configuration of modules at sites as what it is.

    Raises:
        ConfigError: It is that of a side network, which is beside the blocks.
    """
    if isinstance(config, SideConfig):
        msg = (
            "What to train at the sites: expected a peft.LoraConfig, a tidelock.AdapterConfig or a "
            "tidelock.CoreConfig, got a tidelock.SideConfig. A side network is beside the blocks: use SideModel."
        )
        raise ConfigError(msg)
    return config


def targets_of(config: ModuleConfig, geometry: Geometry) -> dict[SiteId, tuple[str, ...]]:
    """Return the targeted linears of each site that has any, in the order of the sites.

    Raises:
        ConfigError: Nothing is targeted, or something that is not at a site of this model.
    """
    if isinstance(config, LoraConfig):
        return lora_targets(config, geometry)
    return core_targets(config, geometry) if isinstance(config, CoreConfig) else adapter_targets(config, geometry)


def module_at(site: SiteId, targets: tuple[str, ...], config: ModuleConfig, geometry: Geometry) -> SiteModule:
    """Return a fresh module for a site that the configuration targets.

    Args:
        site: Where it attaches.
        targets: The site's targeted linears.
        config: What it is.
        geometry: The model's.
    """
    if isinstance(config, LoraConfig):
        return LoraModule(site, targets, config, geometry)
    if isinstance(config, CoreConfig):
        return CoreModule(targets, config)
    return SerialAdapter(geometry.sites[site].width, config)
