"""LoRA or serial adapters that a pool has trained. May import `pool`, `device`, `peft`, `model` and libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from tidelock.device.bank import Bank
from tidelock.model.ends import empty_model, read_config
from tidelock.model.geometry import geometry_of
from tidelock.peft.export import save_adapter

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from tidelock.peft.methods import ModuleConfig


@final
class TrainedModules:
    """The modules of all blocks.

    Args:
        model: The model's folder.
        config: What the modules are like.
        parameters: Theirs, by the names that they have in a `Bank`.
    """

    def __init__(self, model: Path, config: ModuleConfig, parameters: Mapping[str, Tensor]) -> None:
        self._model = model
        self._config = config
        self._geometry = geometry_of(empty_model(read_config(model)))
        self.bank = Bank(config, self._geometry)
        self.bank.load_state_dict(parameters)

    def save_adapter(self, folder: Path, base_model: str | None = None) -> None:
        """Write them as an adapter, as `DeviceModel.save_adapter` does.

        Raises:
            StorageError: The file system refused.
        """
        modules = {site: self.bank.at(site) for site in self.bank.targets}
        save_adapter(modules, self._config, self._geometry, folder, base_model=base_model or str(self._model))

    def close(self) -> None:
        """Nothing is open."""
