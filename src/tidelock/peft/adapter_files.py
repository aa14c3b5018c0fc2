"""What the formats of saved adapters share: their files, written whole and read with care.

Only safetensors are read: PEFT's older `.bin` files run code when they are opened. May import errors, `peft`, `model`
and libraries.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from tidelock.errors import CheckpointError, ConfigError, StorageError
from tidelock.model.cache_folder import write_atomically
from tidelock.peft.adapter import AdapterConfig
from tidelock.peft.core import CoreConfig
from tidelock.peft.side import SideConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from tidelock.peft.methods import MethodConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# The head of whole texts in our own formats.
HEAD = "head.weight"
_FORMAT = 1

_OwnConfig = TypeVar("_OwnConfig", AdapterConfig, CoreConfig, SideConfig)


@final
@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as it lies in its folder.

    Attributes:
        folder: Where it was read.
        config: Its configuration, not yet checked against what tidelock can train.
        tensors: Its weights on the CPU, by the names in the file.
        head: The name that the head of whole texts has in the file, if there is one.
    """

    folder: Path
    config: MethodConfig
    tensors: Mapping[str, Tensor]
    head: str

    @property
    def num_labels(self) -> int | None:
        """How many labels its head for whole texts has; None without one."""
        head = self.tensors.get(self.head)
        return None if head is None else len(head)


def as_file(parameters: Mapping[str, Tensor]) -> bytes:
    """Return parameters as the content of a safetensors file."""
    return save({name: weight.detach().cpu().contiguous() for name, weight in parameters.items()}, {"format": "pt"})


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of an adapter in their order; each is whole or as it was before.

    Args:
        folder: Made when it is not there; other files in it are left alone.
        files: Weights first: a folder with a configuration has weights.
    """
    for name, content in files.items():
        write_atomically(folder / name, content)


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Say of a file system that refused what was to be done.

    Raises:
        StorageError: It refused.
    """
    try:
        yield
    except OSError as error:
        msg = (
            f"Writing the adapter: expected the disk to take it, got {error.strerror or error} ({folder}). Free some "
            "space, or choose a folder that you may write."
        )
        raise StorageError(msg) from error


def own_config_file(config: AdapterConfig | CoreConfig | SideConfig, **more: str) -> bytes:
    """Return the content of a configuration file of our own: a format, what is given, and all fields."""
    kind = {"peft_type": more.pop("peft_type")} if "peft_type" in more else {}
    values = {**kind, "format_version": _FORMAT, **more, **asdict(config)}
    return (json.dumps(values, indent=2) + "\n").encode()


def read_own_config(path: Path, kind: type[_OwnConfig], what: str) -> _OwnConfig:
    """Return the configuration in a file of our own.

    Args:
        path: The file.
        kind: Its class.
        what: What it configures, for people.

    Raises:
        CheckpointError: There is no such file, or it is no JSON.
        ConfigError: It is of another format, has an unknown field, or a value breaks its rule.
    """
    values = read_json(path)
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


def read_json(path: Path) -> Any:  # noqa: ANN401  (whatever the file holds)
    """Return what a JSON file of an adapter holds.

    Raises:
        CheckpointError: There is no such file, or it is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        msg = f"Adapter: expected a folder with {path.name}, got {reason} ({path}). Check the path."
        raise CheckpointError(msg) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter's safetensors file, on the CPU.

    Raises:
        CheckpointError: The file is missing, damaged or not safetensors.
    """
    if not path.is_file():
        got = "adapter_model.bin" if (path.parent / "adapter_model.bin").is_file() else "none"
        msg = (
            f"Adapter: expected its weights in {path.name}, got {got} ({path.parent}). Check the path; with peft, save "
            "it again by save_pretrained(folder)."
        )
        raise CheckpointError(msg)
    try:
        return load_file(path, device="cpu")
    except (OSError, SafetensorError, ValueError) as error:
        msg = (
            f"Adapter: expected a whole safetensors file, got {type(error).__name__}: {error} ({path}). Copy it again."
        )
        raise CheckpointError(msg) from error


def copy_weights(adapter: Adapter, parameters: Mapping[str, Tensor]) -> None:
    """Copy an adapter's weights into parameters; all of them, or none.

    Args:
        adapter: As read from its folder.
        parameters: By the names in the file.

    Raises:
        CheckpointError: Names or shapes are not those of the parameters, or a weight is not a finite number.
    """
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
