"""The frozen blocks in this process: the reference that every other backbone must equal.

May import `backbone`, `model`, `schedule` and libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from transformers import DynamicCache

from tidelock.backbone.pass_times import TimeSplit
from tidelock.model.taps import TapPass
from tidelock.model.walk import Walk
from tidelock.schedule.decide import decide

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tidelock.backbone.protocol import AttemptSites
    from tidelock.model.cut import CutModel
    from tidelock.model.geometry import Geometry
    from tidelock.model.taps import Taps
    from tidelock.model.walk import Batch
    from tidelock.schedule.schedule import Decision, Schedule, ScoreTable


@final
class LocalPass:
    """A pass in this process; see `backbone.protocol.Pass`."""

    def __init__(self, walk: Walk) -> None:
        self._walk: Walk | None = walk
        self.final_MD = walk.forward()

    def backward(self, grad_MD: Tensor) -> None:
        """Hand every active site its gradient."""
        if self._walk is not None:
            self._walk.backward(grad_MD)
        self.close()

    def close(self) -> None:
        """Free what was kept for backward."""
        self._walk = None


@final
class LocalGeneration:
    """A growing batch in this process; see `backbone.protocol.Generation`."""

    def __init__(self, cut: CutModel, batch: Batch, sites: AttemptSites) -> None:
        self._cache = DynamicCache(config=cut.config)
        self._walk = Walk(cut, batch, sites.begin())
        self.final_BD = self._walk.forward(self._cache)

    def extend(self, embeddings_BE: Tensor) -> Tensor:
        """Return the final states after one more token in each row, shape (B, D)."""
        self.final_BD = self._walk.extend(embeddings_BE, self._cache)
        return self.final_BD

    def close(self) -> None:
        """Free the keys and values."""
        self._cache = DynamicCache()


@final
class LocalTapGeneration:
    """A growing batch whose taps are read, in this process; see `backbone.protocol.TapGeneration`."""

    def __init__(self, cut: CutModel, batch: Batch, blocks: Sequence[int], width: int | None) -> None:
        self._cache = DynamicCache(config=cut.config)
        self._pass = TapPass(cut, batch, blocks, width)
        self.taps = self._pass.forward(self._cache)

    def extend(self, embeddings_BE: Tensor) -> Taps:
        """Return the taps of one more token in each row."""
        self.taps = self._pass.extend(embeddings_BE, self._cache)
        return self.taps

    def close(self) -> None:
        """Free the keys and values."""
        self._cache = DynamicCache()


@final
class LocalBackbone:
    """Runs the frozen blocks in this process; see `backbone.protocol.Backbone`."""

    def __init__(self, cut: CutModel) -> None:
        self._cut = cut

    @property
    def geometry(self) -> Geometry:
        """The shape of the model."""
        return self._cut.geometry

    @property
    def on_own_cores(self) -> bool:
        """Whether the blocks are in main memory."""
        return self._cut.device.type == "cpu"

    def take_times(self) -> TimeSplit:
        """Nothing is waited for: all is this process's own computing."""
        return TimeSplit()

    def passes_at_once(self) -> int:
        """One: a second pass would wait for the same processor."""
        return 1

    @property
    def max_active(self) -> None:
        """No limit: nobody else uses this process."""
        return

    def decide(self, schedule: Schedule, table: ScoreTable) -> Decision:
        """Return what is active next: scheduler and device are one."""
        return decide(schedule, table)

    def forward(self, batch: Batch, sites: AttemptSites) -> LocalPass:
        """Run a batch through the blocks."""
        return LocalPass(Walk(self._cut, batch, sites.begin()))

    def generate(self, batch: Batch, sites: AttemptSites) -> LocalGeneration:
        """Run the prompts of a batch and keep keys and values for more tokens."""
        return LocalGeneration(self._cut, batch, sites)

    def read_taps(self, batch: Batch, blocks: Sequence[int], width: int | None = None) -> Taps:
        """Run a batch through the blocks and return what the tapped ones gave."""
        return TapPass(self._cut, batch, blocks, width).forward()

    def generate_taps(self, batch: Batch, blocks: Sequence[int], width: int | None = None) -> LocalTapGeneration:
        """Run the prompts of a batch, read the taps, and keep keys and values for more tokens."""
        return LocalTapGeneration(self._cut, batch, blocks, width)

    def close(self) -> None:
        """Nothing to let go of: the model goes with the last reference to it."""
