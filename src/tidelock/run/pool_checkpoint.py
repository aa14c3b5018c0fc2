"""A pool's run as a checkpoint: all that is trained with its moments, kept by peer 0 and shared by it.

    checkpoint-N/pool.safetensors    after N steps: `KIND/NAME`, of kinds `parameters`, `exp_avg` and `exp_avg_sq`

May import everything below `run`, and `run.folder`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import set_seed

from tidelock.device.bank import Bank
from tidelock.device.causal_lm import fresh_head
from tidelock.errors import CheckpointError
from tidelock.model.ends import empty_model, read_config
from tidelock.model.geometry import geometry_of
from tidelock.model.sizes import sizes_of
from tidelock.peft.adapter_files import HEAD
from tidelock.peft.side import SideConfig, SideNetwork
from tidelock.peft.side_seq2seq import SideSeq2Seq
from tidelock.pool.full_part import FullConfig, learning_weights
from tidelock.pool.recipe import MOMENTS, Progress
from tidelock.run.connect import num_outputs
from tidelock.run.folder import storage_error
from tidelock.run.pool_job import pool_method_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn
    from transformers import PretrainedConfig

    from tidelock.model.checkpoint import Checkpoint
    from tidelock.model.geometry import Geometry
    from tidelock.pool.peers import Peers
    from tidelock.run.config import RunConfig
    from tidelock.run.folder import RunFolder

_STATE = "pool.safetensors"


def save_progress(progress: Progress, folder: RunFolder, keep: int) -> None:
    """Write a checkpoint, which is whole or not there.

    Args:
        progress: What to keep.
        folder: The run's.
        keep: Checkpoints to keep.

    Raises:
        StorageError: The file system refused.
    """
    checkpoint = folder.checkpoints / f"checkpoint-{progress.steps}"
    kinds = {"parameters": progress.parameters, **progress.moments}
    tensors = {f"{kind}/{name}": value.contiguous() for kind, values in kinds.items() for name, value in values.items()}
    try:
        checkpoint.mkdir(parents=True, exist_ok=True)
        save_file(tensors, checkpoint / _STATE)
        folder.mark_complete(checkpoint)
        folder.keep_newest(keep)
    except (OSError, SafetensorError) as error:
        refusal = storage_error("Writing a checkpoint", error, checkpoint)
        folder.discard(checkpoint)
        raise refusal from error


def load_progress(saved: Path) -> Progress:
    """Return what a checkpoint holds.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        tensors = load_file(saved / _STATE)
    except (OSError, SafetensorError) as error:
        msg = (
            f"Pool's checkpoint: expected a whole {_STATE}, got {type(error).__name__} ({saved}). Remove that folder; "
            "the one before is taken then."
        )
        raise CheckpointError(msg) from error
    kinds = {
        kind: {name.removeprefix(f"{kind}/"): value for name, value in tensors.items() if name.startswith(f"{kind}/")}
        for kind in ("parameters", *MOMENTS)
    }
    return Progress(int(saved.name.rpartition("-")[2]), kinds.pop("parameters"), kinds)


def shared_begin(peers: Peers, config: RunConfig, checkpoint: Checkpoint, saved: Progress | None) -> Progress:
    """Return what a run begins with, the same on every peer: new modules or a new network, or what peer 0 has saved.

    Args:
        peers: All peers; all of them call this.
        config: The run.
        checkpoint: The model's.
        saved: On peer 0, what it goes on with; None begins.

    Raises:
        CheckpointError: What was saved is of something else.
        PeerError: A peer was lost.
    """
    fresh = _fresh(config, checkpoint)
    steps = peers.share(torch.tensor([0 if saved is None else saved.steps]) if peers.peer == 0 else None)
    if not int(steps):
        drawn = {HEAD} if config.method == "full" else fresh.keys()
        return Progress(0, {name: value for name, value in fresh.items() if name in drawn}, {})
    kinds: list[dict[str, torch.Tensor]] = []
    for kind in ("", *MOMENTS):
        flat = torch.zeros(sum(parameter.numel() for parameter in fresh.values()))
        if saved is not None:
            values = saved.moments[kind] if kind else saved.parameters
            _check_shapes(values, fresh)
            flat = torch.cat([values[name].flatten() for name in fresh])
        peers.sum(flat, range(peers.count))
        parts = flat.split([parameter.numel() for parameter in fresh.values()])
        kinds.append({name: part.view_as(fresh[name]) for name, part in zip(fresh, parts, strict=True)})
    return Progress(int(steps), kinds[0], dict(zip(MOMENTS, kinds[1:], strict=True)))


def _fresh(config: RunConfig, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return all that a run trains, as it begins on one device; of a model's own weights, only what they are like."""
    set_seed(config.seed)
    model_config, method = read_config(checkpoint.folder), pool_method_of(config)
    num_labels = num_outputs(config.task, config.num_labels)
    if isinstance(method, FullConfig):
        trained = learning_weights(model_config, with_own_head=num_labels is None)
    elif isinstance(method, SideConfig) and model_config.is_encoder_decoder:
        trained = dict(SideSeq2Seq(method, model_config, sizes_of(model_config).of_stacks).named_parameters())
    elif isinstance(method, SideConfig):
        trained = dict(SideNetwork(method, model_config, _geometry(model_config)).named_parameters())
    else:
        trained = dict(Bank(method, _geometry(model_config)).named_parameters())
    if num_labels is not None:
        trained[HEAD] = cast("nn.Parameter", fresh_head(model_config, _geometry(model_config), num_labels).weight)
    return {name: parameter.detach() for name, parameter in trained.items()}


def _geometry(config: PretrainedConfig) -> Geometry:
    return geometry_of(empty_model(config))


def _check_shapes(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    shapes = ({name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (found, expected))
    if len({json.dumps(each, sort_keys=True) for each in shapes}) > 1:
        msg = "Pool's checkpoint: expected what this run trains, got other names or shapes. Begin another run."
        raise CheckpointError(msg)
