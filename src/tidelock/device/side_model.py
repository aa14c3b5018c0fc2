"""The side method's model: a frozen backbone that is only read, and a trained side network beside it.

A sibling of `device.model`: any training loop for causal language models, or for classifiers, can train it. No gradient
goes through the backbone, so a pass asks it for its taps once, forward, and the rest happens here.

Shapes: B rows, T positions, N real tokens, M tokens whose final state is wanted, F width of that state.
May import `backbone`, `peft`, `model`, `device`, errors and libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch

from tidelock.device.causal_lm import DeviceCausalLM, fresh_head, packed_ids
from tidelock.device.loss import labelled_tokens, last_tokens
from tidelock.device.tap_source import examples_of
from tidelock.errors import ConfigError
from tidelock.model.walk import Batch
from tidelock.peft.side import SideNetwork
from tidelock.peft.side_files import apply_side, save_side

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from tidelock.backbone.pass_times import TimeSplit
    from tidelock.backbone.protocol import Generation, TapGeneration
    from tidelock.device.tap_source import ExampleIds, TapSource
    from tidelock.model.ends import Ends
    from tidelock.model.rows import Rows
    from tidelock.model.taps import Taps
    from tidelock.peft.adapter_files import Adapter
    from tidelock.peft.side import SideConfig


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
        self._has_start = config.init == "random"
        self.register_load_state_dict_post_hook(_note_start)  # type: ignore[no-untyped-call]

    def start(self, model: PreTrainedModel, examples: Iterable[Mapping[str, Tensor]] | None = None) -> None:
        """Begin as the configuration says; arguments and errors as `SideNetwork.start`."""
        self.network.start(model, examples)
        self._has_start = True

    def final_states(self, ids_BT: Tensor, rows: Rows, select_M: Tensor) -> Tensor:
        """Return the states that the head reads at the selected tokens, shape (M, F).

        Raises:
            ConfigError: The network has not begun as its configuration says; see `start`.
        """
        self._require_start()
        ids_N = packed_ids(ids_BT, rows)
        batch = self._open_batch(ids_N, rows, select_M)
        taps = self._read(ids_N, batch)
        final_MF: Tensor = self.network(batch.embeddings_NE, taps, rows.layout(self.device), select_M)
        return final_MF

    def open_generation(self, ids_BT: Tensor, rows: Rows, select_B: Tensor) -> Generation:
        """Run prompts padded at the left; frozen and side blocks keep keys and values."""
        batch = self._open_batch(packed_ids(ids_BT, rows), rows, select_B)
        return _SideGeneration(
            self.network, batch, self.source.generate(batch, self.network.blocks, self.side_config.tap_width)
        )

    def examples_of(self, batch: Mapping[str, Tensor]) -> list[ExampleIds]:
        """Return what the taps of each row of a batch depend on, as a cache has it.

        Args:
            batch: What `forward` takes.
        """
        return examples_of(*self._selection(batch))

    @property
    def token_widths(self) -> tuple[int, ...]:
        """Numbers of a token's embedding, of each of its taps, and of its final state."""
        geometry = self.ends.geometry
        taps = (self.network.tap_width,) * len(self.network.blocks)
        return (geometry.embedding_width, *taps, geometry.final_width)

    def tap_shapes(self, example: ExampleIds) -> list[tuple[int, int]]:
        """Return the shapes (tokens, width) of what a cache keeps of an example: its taps, and the final states."""
        (ids, (_, *selected)), (_, *taps, final) = example, self.token_widths
        return [*((len(ids), width) for width in taps), (len(selected), final)]

    def announce(self, batch: Mapping[str, Tensor]) -> None:
        """Say that a batch will be asked for, so that its taps are read from the cache meanwhile.

        Args:
            batch: What `forward` will take.
        """
        self.source.announce(*self._selection(batch))

    def read_taps(self, batch: Mapping[str, Tensor]) -> Taps:
        """Return a batch's taps, and have those that are new cached; the side network is not asked.

        Args:
            batch: What `forward` takes.
        """
        ids_N, rows, select_M = self._selection(batch)
        return self._read(ids_N, self._open_batch(ids_N, rows, select_M))

    def take_times(self) -> TimeSplit:
        """Return what passes have waited for since the last call, in seconds on the clock."""
        return self.source.take_times()

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
        self._has_start = True

    def close(self) -> None:
        """Let go of the taps' source."""
        self.source.close()

    def _selection(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Rows, Tensor]:
        """Return the ids of a batch's real tokens, where these are, and which of them are selected."""
        ids_BT, rows = self._read_batch(batch["input_ids"], batch.get("attention_mask"), {})
        labels = batch.get("labels")
        if self.head is not None:
            select_M = last_tokens(rows)
        elif labels is None:
            select_M = torch.arange(rows.num_tokens)
        else:
            select_M, _ = labelled_tokens(labels, rows)
        return packed_ids(ids_BT, rows), rows, select_M

    def _require_start(self) -> None:
        if not self._has_start:
            msg = (
                f"Side network: expected it to have begun as init={self.side_config.init!r} says, got no start yet. "
                "Call start(model) with the whole causal model, load a state, or choose init='random'."
            )
            raise ConfigError(msg)

    def _read(self, ids_N: Tensor, batch: Batch) -> Taps:
        return self.source.read(ids_N, batch, self.network.blocks, self.side_config.tap_width)

    def _open_batch(self, ids_N: Tensor, rows: Rows, select_M: Tensor) -> Batch:
        return Batch(self.ends.embed(ids_N), rows, select_M, active={}, training=False)


def _note_start(model: SideModel, _keys: Any) -> None:  # noqa: ANN401  (as torch has it)
    """A state that is loaded is a start."""
    model._has_start = True  # noqa: SLF001


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
