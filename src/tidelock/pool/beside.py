"""The side method in a pool, whatever it stands beside: what a stage computes, and the model of the cached epochs.

May import `pool`, `device`, `cache`, `peft`, `model`, errors and libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import torch

from tidelock.device.side_model import SideModel
from tidelock.device.side_seq2seq import SideSeq2SeqModel
from tidelock.device.tap_source import TapSource
from tidelock.errors import CacheError
from tidelock.model.ends import Ends, read_config
from tidelock.model.seq2seq import Seq2SeqEnds
from tidelock.model.sizes import sizes_of
from tidelock.pool.seq2seq_stage import Seq2SeqStage
from tidelock.pool.side_stage import SideStage

if TYPE_CHECKING:
    from torch import Tensor

    from tidelock.cache.store import ActivationCache
    from tidelock.model.checkpoint import TensorSource
    from tidelock.peft.side import SideConfig
    from tidelock.pool.side_stage import OnOutputs


def side_stage(
    source: TensorSource,
    config: SideConfig,
    blocks: range,
    num_labels: int | None = None,
    on_outputs: OnOutputs | None = None,
) -> SideStage | Seq2SeqStage:
    """Return what a stage computes; arguments and errors as of `SideStage.load`."""
    if read_config(source.folder).is_encoder_decoder:
        return Seq2SeqStage.load(source, config, blocks, on_outputs)
    return SideStage.load(source, config, blocks, num_labels, on_outputs)


def no_scores(source: TensorSource) -> Tensor:
    """Return what a stage's `residual_scores` would add without any blocks: zeros."""
    sizes = sizes_of(read_config(source.folder))
    return torch.zeros(2 if sizes.num_encoder_blocks else 1, sizes.block_width)


def cached_model(
    source: TensorSource, config: SideConfig, cache: ActivationCache, num_labels: int | None = None
) -> SideModel | SideSeq2SeqModel:
    """Return a model with a fresh side network that learns from what was cached, without any blocks.

    Args:
        source: The model's stored tensors.
        config: What the side network is like.
        cache: Has the outputs of all blocks for all examples that it is asked for.
        num_labels: Classes of whole texts, 1 for a number, of a decoder with a head for them; None without one.
    """
    model_config = read_config(source.folder)
    if model_config.is_encoder_decoder:
        return SideSeq2SeqModel(Seq2SeqEnds.read(model_config, source), TapSource(_no_blocks, cache), config)
    return SideModel(Ends(model_config, source), TapSource(_no_blocks, cache), config, num_labels=num_labels)


def _no_blocks() -> NoReturn:
    msg = (
        "Pool: expected the outputs of all blocks for an example to be kept, got damaged ones, and the blocks are let "
        "go. Let this peer join again, or go on with `tidelock pool resume`: they are computed again."
    )
    raise CacheError(msg)
