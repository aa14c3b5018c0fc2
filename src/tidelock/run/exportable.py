"""What comes before an export: that an adapter fits its model, and that `peft` can read it.

May import everything below `run`.
"""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tidelock.device.bank import Bank
from tidelock.device.causal_lm import fresh_head
from tidelock.device.side_seq2seq import fresh_classification_head
from tidelock.errors import ConfigError
from tidelock.model.checkpoint import Checkpoint
from tidelock.model.ends import empty_model, read_config
from tidelock.model.frames import Frames
from tidelock.model.geometry import geometry_of
from tidelock.model.load import ModelChoice, load_cut_model
from tidelock.model.seq2seq import Seq2SeqEnds
from tidelock.peft.adapter_files import saving, write_files
from tidelock.peft.core import CoreConfig
from tidelock.peft.core_files import core_as_lora
from tidelock.peft.export import apply_adapter
from tidelock.peft.side import SideConfig, SideNetwork
from tidelock.peft.side_files import apply_side
from tidelock.peft.side_seq2seq import SideSeq2Seq

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tidelock.peft.adapter_files import Adapter


def require_fit(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Refuse an adapter of another model; `peft` would leave out, or make up, what does not fit.

    Raises:
        CheckpointError: It does not fit.
    """
    config = read_config(checkpoint.folder)
    model = empty_model(config)
    if isinstance(adapter.config, SideConfig) and config.is_encoder_decoder:
        network = SideSeq2Seq(adapter.config, config, Seq2SeqEnds(model, checkpoint.folder).num_blocks)
        num_labels = adapter.num_labels
        apply_side(adapter, network, None if num_labels is None else fresh_classification_head(config, num_labels))
        return
    geometry = geometry_of(model)
    head = None if adapter.num_labels is None else fresh_head(config, geometry, adapter.num_labels)
    if isinstance(adapter.config, SideConfig):
        apply_side(adapter, SideNetwork(adapter.config, config, geometry), head)
        return
    bank = Bank(adapter.config, geometry)
    apply_adapter(adapter, {site: bank.at(site) for site in bank.targets}, geometry, head)


@contextmanager
def readable_by_peft(adapter: Adapter, model: str | None, on_progress: Callable[[str], None]) -> Iterator[Adapter]:
    """Give an adapter in a folder that `peft` can read: as it is, or with frames of the SVD one written out for it.

    Args:
        adapter: As read from its folder.
        model: Folder or hub name of the model that it was trained on; None where that is the cloud's own.
        on_progress: Told in a short sentence what is going on, for a person to read.

    Raises:
        ConfigError: The model's weights are needed, and it is not known.
        CheckpointError: The adapter does not fit the model.
        ModelError: The model cannot be read on this device.
        StorageError: The file system refused.
    """
    config = adapter.config
    if not isinstance(config, CoreConfig) or config.frames != "svd":
        yield adapter
        return
    if model is None:
        msg = (
            f"Exporting cores: expected the whole model on this device, since --core-frames svd are made of its "
            f"weights, got a run on the cloud's own model ({adapter.folder}). Give --model with the same one's folder "
            "or hub name, or export on a machine that has it."
        )
        raise ConfigError(msg)
    on_progress(f"Reading all of {model}, for the frames around the cores.")
    checkpoint = Checkpoint.open(model)
    require_fit(adapter, checkpoint)
    # What frames are made of is bf16 anyway.
    cut = load_cut_model(checkpoint, ModelChoice(model, dtype="bf16"))
    frames = Frames(cut.geometry, torch.device("cpu"), torch.float32, cut.weight)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with saving(folder):
            write_files(folder, core_as_lora(config, cut.geometry, model, adapter.tensors, frames))
        yield replace(adapter, folder=folder)
