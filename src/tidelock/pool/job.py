"""What a pool trains, and who is told how it gets on.

May import `pool`, `peft`, `model` and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, final

from tidelock.model.ends import read_config
from tidelock.pool.full_part import FullConfig, learning_weights
from tidelock.pool.held_out import HeldOut
from tidelock.pool.memory import MemoryLimit

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from torch import Tensor

    from tidelock.model.checkpoint import TensorSource
    from tidelock.peft.methods import MethodConfig
    from tidelock.pool.example import Example
    from tidelock.pool.held_out import Measured
    from tidelock.pool.recipe import Progress, Recipe
    from tidelock.pool.redistribute import Kept
    from tidelock.pool.timeline import Activity, Timeline


class Watcher(Protocol):
    """Is told how a run gets on."""

    def step(self, step: int, loss: float) -> None:
        """An optimizer step is done, with the batch's loss before it."""
        ...

    def save(self, progress: Progress) -> None:
        """All that is trained as it is now, which a run can go on with; the same on every peer."""
        ...

    def evaluated(self, step: int, found: Measured) -> None:
        """After a step, what was measured on the examples that are held out, in their order."""
        ...

    def owes_evaluation(self, step: int) -> bool:
        """Whether that was due after a step, the last one of the round before, and was not done."""
        ...

    def activity(self, step: int, of_peers: list[Activity]) -> None:
        """What each peer did in a step, every few steps."""
        ...

    def timelines(self, step: int, of_peers: list[Timeline]) -> None:
        """What each peer did when in a step of the pipeline; told to peer 0 once in a round."""
        ...

    def fill(self, examples: int) -> None:
        """Of so many examples there is not every block's output, or not any more; the blocks are run for them."""
        ...

    def redistributed(self, sent_bytes: int) -> None:
        """The first epoch's outputs are where later epochs need them; this peer has sent so many bytes."""
        ...

    def wants_change(self) -> bool:
        """Whether the pool is to change after this step, since somebody wants to join it."""
        ...


class Trained(Protocol):
    """What a run has trained."""

    def save_adapter(self, folder: Path, base_model: str | None = None) -> None:
        """Write it as an adapter, as `DeviceModel.save_adapter`, or as a whole model."""
        ...

    def close(self) -> None:
        """Let go of what is open."""
        ...


@final
@dataclass(frozen=True, slots=True)
class PoolJob:
    """What is trained.

    Attributes:
        model: Says which model it is.
        source: The model's stored tensors.
        config: The method, and what its modules or its side network are like.
        begin: What it begins or goes on with, the same on every peer; before the first step, with `init="magnitude"`,
            of what does not come from the model's weights.
        examples: All of them, on every peer.
        recipe: How it is trained.
        save_every: Steps between two calls of `Watcher.save`.
        kept: What this peer has of the blocks' outputs, for a side network; None for what learns in the blocks.
        held_out: What it is measured on.
        memory: What this peer may take; one that takes more leaves after the step.
        num_labels: Classes of whole texts, 1 for a number; None models language.
    """

    model: str
    source: TensorSource
    config: MethodConfig | FullConfig
    begin: Progress
    examples: Sequence[Example]
    recipe: Recipe
    save_every: int
    kept: Kept | None
    held_out: HeldOut = field(default_factory=HeldOut)
    memory: MemoryLimit = field(default_factory=lambda: MemoryLimit(None))
    num_labels: int | None = None

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of all parameters that are trained, by name."""
        known: dict[str, Tensor] = dict(self.begin.parameters)
        if isinstance(self.config, FullConfig):  # of which at first a head for whole texts is known alone
            config = read_config(self.source.folder)
            known = {**learning_weights(config, with_own_head=self.num_labels is None), **known}
        return {name: tensor.shape for name, tensor in known.items()}
