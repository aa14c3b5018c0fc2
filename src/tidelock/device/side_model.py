"""The side method's model: a frozen backbone that is only read, and a trained side network beside it.

A sibling of `device.model`: any training loop for causal language models, or for classifiers, can train it. No gradient
goes through the backbone, so a pass asks it for its taps once, forward, and the rest happens here.

Shapes: B rows, T positions, N real tokens, M tokens whose final state is wanted, F width of that state.
May import `backbone`, `peft`, `model`, `device` and libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, final

import torch

from tidelock.device.causal_lm import DeviceCausalLM, fresh_head, packed_ids
from tidelock.model.walk import Batch
from tidelock.peft.side import SideNetwork
from tidelock.peft.side_files import apply_side, save_side

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from tidelock.backbone.protocol import Generation, TapGeneration, TappedBackbone
    from tidelock.model.ends import Ends
    from tidelock.model.rows import Rows
    from tidelock.model.taps import Taps
    from tidelock.peft.adapter_files import Adapter
    from tidelock.peft.side import SideConfig


class TapSource(Protocol):
    """Where a side network's taps come from: a backbone, or what was kept of one."""

    def read(self, ids_N: Tensor, batch: Batch, blocks: Sequence[int]) -> Taps:
        """Return the taps of a batch.

        Args:
            ids_N: Ids of the real tokens, which identify their rows.
            batch: The same tokens, embedded.
            blocks: The tapped blocks.
        """
        ...

    def generate(self, batch: Batch, blocks: Sequence[int]) -> TapGeneration:
        """Run prompts padded at the left, and keep keys and values for more tokens."""
        ...

    def close(self) -> None:
        """Let go of whatever gives the taps."""
        ...


@final
class BackboneTaps:
    """Taps straight from a backbone, computed each time; see `TapSource`."""

    def __init__(self, backbone: TappedBackbone) -> None:
        self._backbone = backbone

    def read(self, ids_N: Tensor, batch: Batch, blocks: Sequence[int]) -> Taps:  # noqa: ARG002  (they say nothing new)
        """Run the batch through the frozen blocks."""
        return self._backbone.read_taps(batch, blocks)

    def generate(self, batch: Batch, blocks: Sequence[int]) -> TapGeneration:
        """Run the prompts through the frozen blocks."""
        return self._backbone.generate_taps(batch, blocks)

    def close(self) -> None:
        """Let go of the backbone."""
        self._backbone.close()


@final
class SideModel(DeviceCausalLM):
    """A causal language model, or a classifier, whose side network is trained beside its frozen blocks.

    Args:
        ends: The model's embedding and head.
        source: Gives the frozen blocks' outputs.
        config: What the side network is like.
        num_labels: Classes of whole texts, 1 for a number; a head for them is trained too. None is a model of language.

    Attributes:
        side_config: As given.
        network: The side network.
        source: As given.

    Raises:
        ConfigError: The configuration names blocks that the model does not have.
        ModelError: The family's class does not take the reduced widths.
    """

    def __init__(self, ends: Ends, source: TapSource, config: SideConfig, *, num_labels: int | None = None) -> None:
        super().__init__(ends)
        self.side_config = config
        self.network = SideNetwork(config, ends.config, ends.geometry)
        self.head = None if num_labels is None else fresh_head(ends.config, ends.geometry, num_labels)
        self.source = source

    def final_states(self, ids_BT: Tensor, rows: Rows, select_M: Tensor) -> Tensor:
        """Return the states that the head reads at the selected tokens, shape (M, F)."""
        ids_N = packed_ids(ids_BT, rows)
        batch = self._open_batch(ids_N, rows, select_M)
        taps = self.source.read(ids_N, batch, self.network.blocks)
        final_MF: Tensor = self.network(batch.embeddings_NE, taps, rows.layout(self.device), select_M)
        return final_MF

    def open_generation(self, ids_BT: Tensor, rows: Rows, select_B: Tensor) -> Generation:
        """Run prompts padded at the left; frozen and side blocks keep keys and values."""
        batch = self._open_batch(packed_ids(ids_BT, rows), rows, select_B)
        return _SideGeneration(self.network, batch, self.source.generate(batch, self.network.blocks))

    def save_adapter(self, folder: Path, base_model: str | None = None) -> None:
        """Write the side network, and the head of whole texts, as an adapter; see `peft.side_files`.

        Args:
            folder: Made when it is not there.
            base_model: Folder or hub name of the model, for whoever loads the adapter; None takes where this device
                read it.

        Raises:
            StorageError: The file system refused.
        """
        base_model = base_model or str(self.ends.folder)
        save_side(self.network, self.head, self.side_config, folder, base_model=base_model)

    def load_adapter(self, adapter: Adapter) -> None:
        """Copy an adapter's weights into the side network, which was made from its configuration, and the head.

        Raises:
            CheckpointError: Its tensors are not those of the network and head.
        """
        apply_side(adapter, self.network, self.head)

    def close(self) -> None:
        """Let go of the taps' source."""
        self.source.close()

    def _open_batch(self, ids_N: Tensor, rows: Rows, select_M: Tensor) -> Batch:
        return Batch(self.ends.embed(ids_N), rows, select_M, active={}, training=False)


@final
class _SideGeneration:
    """A growing batch, with keys and values of the frozen blocks and of the side blocks."""

    def __init__(self, network: SideNetwork, batch: Batch, taps: TapGeneration) -> None:
        self._network = network
        self._taps = taps
        self._rows = batch.rows
        self._device = batch.embeddings_NE.device
        self._cache = network.new_cache()
        layout = batch.rows.layout(self._device, counted=True)
        self.final_BD = network(batch.embeddings_NE, taps.taps, layout, batch.select_M, self._cache)

    def extend(self, embeddings_BE: Tensor) -> Tensor:
        """Return the final states of one more token in each row, shape (B, F)."""
        taps = self._taps.extend(embeddings_BE)
        layout = self._rows.next_layout(self._cache.get_seq_length(), self._device)
        select_B = torch.arange(len(embeddings_BE))
        final_BD: Tensor = self._network(embeddings_BE, taps, layout, select_B, self._cache)
        self.final_BD = final_BD
        return final_BD

    def close(self) -> None:
        """Free all keys and values."""
        self._taps.close()
        self._cache = self._network.new_cache()
