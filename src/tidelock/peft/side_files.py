"""Side networks as files, in a format of ours.

    adapter_config.json          `peft_type` TIDELOCK_SIDE, `format_version`, `base_model_name_or_path` and the fields
                                 of `SideConfig`
    adapter_model.safetensors    every parameter of the side network, `network.<name>`, and of the head for whole texts,
                                 `head.<name>`: for a decoder one, `head.weight` (C x F)

The names are those of `SideNetwork.named_parameters`, or of an encoder-decoder's `SideSeq2Seq`; within a side block
they are the family's own. May import errors, `peft`, `model` and libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidelock.peft.adapter_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    as_file,
    copy_weights,
    own_config_file,
    saving,
    write_files,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from tidelock.peft.adapter_files import Adapter
    from tidelock.peft.side import SideNetwork
    from tidelock.peft.side_seq2seq import SideSeq2Seq

SIDE = "TIDELOCK_SIDE"
# Of an encoder-decoder's head: one row a class.
OUTPUT_OF_HEAD = "head.out_proj.weight"


def save_side(network: SideNetwork | SideSeq2Seq, head: nn.Module | None, folder: Path, *, base_model: str) -> None:
    """Write a side network; each of its files is whole or as it was before.

    Args:
        network: The side network.
        head: The trained head of whole texts, if there is one.
        folder: Made when it is not there; other files in it are left alone.
        base_model: Folder or hub name of the model, for whoever loads the adapter.

    Raises:
        StorageError: The file system refused.
    """
    files = {
        WEIGHTS_FILE: as_file(_parameters(network, head)),
        CONFIG_FILE: own_config_file(network.config, peft_type=SIDE, base_model_name_or_path=base_model),
    }
    with saving(folder):
        write_files(folder, files)


def apply_side(adapter: Adapter, network: SideNetwork | SideSeq2Seq, head: nn.Module | None) -> None:
    """Copy a saved side network's weights into one that was made from its configuration; all of them, or none.

    Raises:
        CheckpointError: Names or shapes are not those of the network and head, or a weight is not a finite number.
    """
    copy_weights(adapter, _parameters(network, head))


def _parameters(network: SideNetwork | SideSeq2Seq, head: nn.Module | None) -> dict[str, Tensor]:
    """Return every weight by its name in the file."""
    parts = {"network": network} if head is None else {"network": network, "head": head}
    return {
        f"{part}.{name}": parameter for part, module in parts.items() for name, parameter in module.named_parameters()
    }
