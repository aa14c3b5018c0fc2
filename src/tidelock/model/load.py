"""Loads a whole frozen model, for the process that runs its blocks.

May import errors, `model` and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, final

import torch

from tidelock.errors import ConfigError, ModelError
from tidelock.model.cut import CutModel
from tidelock.model.ends import model_class, read_config

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from tidelock.model.checkpoint import Checkpoint

# What frozen blocks may compute in, by the name that options use.
BACKBONE_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@final
@dataclass(frozen=True, slots=True)
class ModelChoice:
    """Which model, and where and in what its blocks compute.

    Attributes:
        model: Folder or hub name.
        dtype: `fp32` or `bf16`.
        torch_device: `cpu`, `cuda`, `cuda:1`, `mps`, ...
    """

    model: str
    dtype: str = "fp32"
    torch_device: str = "cpu"


def load_cut_model(checkpoint: Checkpoint, choice: ModelChoice) -> CutModel:
    """Return a frozen model, cut, with all its weights in memory.

    Args:
        checkpoint: Where the weights are; a hub model is downloaded first.
        choice: Says what the blocks compute in, and where.

    Raises:
        ConfigError: The dtype is unknown or the device is not there.
        ModelError: The model cannot be loaded or cut.
    """
    if choice.dtype not in BACKBONE_DTYPES:
        msg = f"Backbone dtype: expected one of {sorted(BACKBONE_DTYPES)}, got {choice.dtype!r}. Choose one of those."
        raise ConfigError(msg)
    model = load_model(checkpoint, BACKBONE_DTYPES[choice.dtype])
    try:
        cast("nn.Module", model).to(choice.torch_device)
    except (RuntimeError, AssertionError) as error:
        msg = (
            f"Torch device: expected one that this machine has, got {choice.torch_device!r} ({error}). "
            "`tidelock doctor` lists them."
        )
        raise ConfigError(msg) from error
    return CutModel(model)


def load_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the whole language model, in eval mode, every weight of which was stored.

    Raises:
        ModelError: It cannot be loaded.
    """
    folder = checkpoint.materialise()
    kind = model_class(read_config(folder))
    try:
        loaded: Any = kind.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ArithmeticError) as error:
        msg = (
            f"Loading the model: expected a language model that transformers knows, with safetensors weights, "
            f"got {type(error).__name__}: {error} ({folder}). Check the folder."
        )
        raise ModelError(msg) from error
    model, loading = loaded
    # transformers only logs these, and goes on with random numbers in their place.
    absent = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in loading[kind])
    if absent:
        msg = (
            f"Loading the model: expected a stored tensor for every weight that its configuration has, got none that "
            f"fits for {len(absent)} of them, {absent[0]} among them ({folder}). Is the checkpoint complete?"
        )
        raise ModelError(msg)
    return cast("PreTrainedModel", model)
