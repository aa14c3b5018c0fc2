"""Loads a whole frozen model, for the process that runs its blocks.

May import errors, `model` and libraries.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast, final

import torch
from transformers import BitsAndBytesConfig

from tidelock.errors import ConfigError, ModelError
from tidelock.model.cut import CutModel
from tidelock.model.ends import model_class, read_config

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from tidelock.model.checkpoint import Checkpoint

# What the weights of frozen blocks may be kept in, by the name that options use, and what the blocks then give.
BACKBONE_DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.bfloat16,  # LLM.int8() (Dettmers et al., arXiv 2208.07339)
    "nf4": torch.bfloat16,  # 4-bit NormalFloat (QLoRA, Dettmers et al., arXiv 2305.14314)
}


@final
@dataclass(frozen=True, slots=True)
class ModelChoice:
    """Which model, and where and in what its blocks compute.

    Attributes:
        model: Folder or hub name.
        dtype: What their weights are kept in: `fp32`, `bf16`, `int8` or `nf4`.
        torch_device: `cpu`, `cuda`, `cuda:1`, `mps`, ...
    """

    model: str
    dtype: str = "fp32"
    torch_device: str = "cpu"


def load_cut_model(checkpoint: Checkpoint, choice: ModelChoice) -> CutModel:
    """Return a frozen model, cut, with all its weights in memory.

    Args:
        checkpoint: Where the weights are; a hub model is downloaded first.
        choice: Says what the blocks' weights are kept in, and where.

    Raises:
        ConfigError: The dtype is unknown, or needs a package that is not installed; or the device is not there.
        ModelError: The model cannot be loaded or cut.
    """
    if choice.dtype not in BACKBONE_DTYPES:
        msg = f"Backbone dtype: expected one of {sorted(BACKBONE_DTYPES)}, got {choice.dtype!r}. Choose one of those."
        raise ConfigError(msg)
    model = load_model(checkpoint, BACKBONE_DTYPES[choice.dtype], _quantised(choice))
    try:
        cast("nn.Module", model).to(choice.torch_device)
    except (RuntimeError, AssertionError) as error:
        msg = (
            f"Torch device: expected one that this machine has, got {choice.torch_device!r} ({error}). "
            "`tidelock doctor` lists them."
        )
        raise ConfigError(msg) from error
    if choice.dtype == "nf4":
        _keep_backward(model)
    return CutModel(model)


def _quantised(choice: ModelChoice) -> BitsAndBytesConfig | None:
    """Return how the weights of linears are quantised, all but the head's; None leaves them as they are."""
    if choice.dtype not in {"int8", "nf4"}:
        return None
    if find_spec("bitsandbytes") is None:
        msg = (
            f"Backbone dtype: expected bitsandbytes for {choice.dtype}, got no such package. Run: pip install "
            "'tidelock[quantised]'."
        )
        raise ConfigError(msg)
    if choice.dtype == "int8":
        # It says at every linear, in every pass, that it computes in fp16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    computes_in = BACKBONE_DTYPES[choice.dtype]
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computes_in)


def _keep_backward(model: PreTrainedModel) -> None:
    """Have 4-bit linears stay as they are: on some CPUs they are packed in eval mode, which leaves no backward pass."""
    from bitsandbytes.nn.modules import Linear4bit  # noqa: PLC0415  (only who quantises has it)

    for module in cast("nn.Module", model).modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def load_model(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, quantised: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """Return the whole language model, in eval mode, every weight of which was stored.

    Args:
        checkpoint: Where the weights are; a hub model is downloaded first.
        dtype: Of the weights, other than quantised ones.
        quantised: How linears are quantised, if they are.

    Raises:
        ModelError: It cannot be loaded.
    """
    folder = checkpoint.materialise()
    kind = model_class(read_config(folder))
    try:
        loaded: Any = kind.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=quantised,
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
