"""What models with a side network have in common, whatever is beside it: their start, their taps, their files.

Shapes: C classes. May import `backbone`, `peft`, `model`, `device`, errors and libraries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from tidelock.device.device_lm import DeviceLM
from tidelock.errors import ConfigError
from tidelock.peft.side_files import apply_side, save_side

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from tidelock.backbone.pass_times import TimeSplit
    from tidelock.device.tap_source import ExampleIds, TapSource
    from tidelock.model.ends import Ends
    from tidelock.model.seq2seq import Seq2SeqEnds
    from tidelock.peft.adapter_files import Adapter
    from tidelock.peft.side import SideConfig, SideNetwork
    from tidelock.peft.side_seq2seq import SideSeq2Seq


class BesideBlocks(DeviceLM, ABC):
    """A model whose side network is trained beside its frozen blocks, which are only read.

    Args:
        ends: The model's embedding and head.
        source: Gives the frozen blocks' outputs.
        network: The side network.
        num_labels: As for `DeviceLM`.

    Attributes:
        network: As given.
        source: As given.
    """

    network: SideNetwork | SideSeq2Seq

    def __init__(
        self,
        ends: Ends | Seq2SeqEnds,
        source: TapSource[Any],
        network: SideNetwork | SideSeq2Seq,
        num_labels: int | None = None,
    ) -> None:
        super().__init__(ends, num_labels)
        self.network = network
        self.source = source
        self._has_start = self.side_config.init == "random"
        self.register_load_state_dict_post_hook(_note_start)  # type: ignore[no-untyped-call]

    @property
    def side_config(self) -> SideConfig:
        """What the side network is like."""
        return self.network.config

    @property
    @abstractmethod
    def tapped(self) -> tuple[int, ...]:
        """The blocks that are read, by number; those of a decoder after those of its encoder."""
        ...

    @abstractmethod
    def examples_of(self, batch: Mapping[str, Tensor]) -> list[ExampleIds]:
        """Return what the taps of each row of a batch depend on, as a cache has it.

        Args:
            batch: What `forward` takes.
        """
        ...

    @abstractmethod
    def tap_shapes(self, example: ExampleIds) -> list[tuple[int, int]]:
        """Return the shapes (tokens, width) of what a cache keeps of an example."""
        ...

    @abstractmethod
    def read_taps(self, batch: Mapping[str, Tensor]) -> None:
        """Have the taps of a batch that are new computed and cached; the side network is not asked.

        Args:
            batch: What `forward` takes.
        """
        ...

    def announce(self, batch: Mapping[str, Tensor]) -> None:
        """Say that a batch will be asked for, so that its taps are read from the cache meanwhile.

        Args:
            batch: What `forward` will take.
        """
        self.source.announce(self.examples_of(batch))

    def start(self, model: PreTrainedModel, examples: Iterable[Mapping[str, Tensor]] | None = None) -> None:
        """Begin as the configuration says; arguments and errors as `SideNetwork.start`."""
        self.network.start(model, examples)
        self._has_start = True

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
        save_side(self.network, self.head, folder, base_model=base_model or str(self.ends.folder))

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

    def _require_start(self) -> None:
        """Refuse to compute with a network that is not what its configuration says.

        Raises:
            ConfigError: It has not begun.
        """
        if not self._has_start:
            msg = (
                f"Side network: expected it to have begun as init={self.side_config.init!r} says, got no start yet. "
                "Call start(model) with the whole model, load a state, or choose init='random'."
            )
            raise ConfigError(msg)


def _note_start(model: BesideBlocks, _keys: Any) -> None:  # noqa: ANN401  (as torch has it)
    """A state that is loaded is a start."""
    model._has_start = True  # noqa: SLF001
