"""What a pool has trained in the blocks, and how it is written.

May import errors, `device`, `peft`, `model` and libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from safetensors import SafetensorError
from torch import nn

from tidelock.device.bank import Bank
from tidelock.device.causal_lm import fresh_head
from tidelock.errors import StorageError
from tidelock.model.checkpoint import Checkpoint
from tidelock.model.ends import copy_small_files, empty_model, load_ends, read_config
from tidelock.model.geometry import geometry_of
from tidelock.peft.adapter_files import HEAD
from tidelock.peft.export import save_adapter

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from tidelock.peft.methods import ModuleConfig

# What `transformers` calls a decoder's head for whole texts.
SCORE = "score"


@final
class TrainedModules:
    """The modules of all blocks.

    Args:
        model: The model's folder.
        config: What the modules are like.
        parameters: Theirs, by the names that they have in a `Bank`; and the weight of the head for whole texts.
        num_labels: Classes of whole texts, 1 for a number; None without such a head.
    """

    def __init__(
        self, model: Path, config: ModuleConfig, parameters: Mapping[str, Tensor], num_labels: int | None = None
    ) -> None:
        self._model = model
        self._config = config
        model_config = read_config(model)
        self._geometry = geometry_of(empty_model(model_config))
        self.bank = Bank(config, self._geometry)
        self.bank.load_state_dict({name: value for name, value in parameters.items() if name != HEAD})
        self.head = None if num_labels is None else fresh_head(model_config, self._geometry, num_labels)
        if self.head is not None:
            self.head.load_state_dict({"weight": parameters[HEAD]})

    def save_adapter(self, folder: Path, base_model: str | None = None) -> None:
        """Write them and the head as an adapter, as `DeviceModel.save_adapter` does.

        Raises:
            StorageError: The file system refused.
        """
        modules = {site: self.bank.at(site) for site in self.bank.targets}
        base_model = base_model or str(self._model)
        save_adapter(modules, self._config, self._geometry, folder, base_model=base_model, head=self.head)

    def close(self) -> None:
        """Nothing is open."""


@final
class TrainedModel:
    """All weights of a model.

    Args:
        model: Folder of the model that they began as.
        parameters: By their names in the model; and the weight of the head for whole texts.
    """

    def __init__(self, model: Path, parameters: Mapping[str, Tensor]) -> None:
        self._model = model
        self._parameters = parameters

    def save_adapter(self, folder: Path, base_model: str | None = None) -> None:  # noqa: ARG002  (there is none)
        """Write the model as `transformers` reads it: weights in safetensors, configuration, tokenizer.

        A head for whole texts is among the weights under the name that it has there; beside it is the model's own.

        Raises:
            StorageError: The file system refused.
        """
        model, parameters = empty_model(read_config(self._model)), dict(self._parameters)
        head = parameters.pop(HEAD, None)
        if head is not None:
            load_ends(model, Checkpoint.open(str(self._model)))
            setattr(model, SCORE, fresh_head(model.config, geometry_of(model), len(head)))
            parameters[f"{SCORE}.weight"] = head
            model.config.num_labels = len(head)
        for name, value in parameters.items():
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, nn.Parameter(value, requires_grad=False))
        model.tie_weights()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            model.save_pretrained(folder)
            copy_small_files(self._model, folder, with_config=False)
        except (OSError, SafetensorError) as error:
            msg = (
                f"Writing the trained model: expected the disk to take it, got {error} ({folder}). Make room and go on "
                "with `tidelock pool resume`."
            )
            raise StorageError(msg) from error

    def close(self) -> None:
        """Nothing is open."""
