"""One batch through a pipeline of stages, seen from one peer: forwards and backwards in 1F1B order, and their messages.

PAC (arXiv 2408.10746, section 4.1): with a side network forward carries the frozen block's output and the side state;
back comes the gradient of the side state alone, as nothing flows through the frozen blocks. With a method whose
gradient goes through the blocks both carry as much. What is trained is summed once a batch over the peers of a stage.

A message is one vector: what is sent of one example after the other (`Boundary`), so that peers with other shares of
the rows find theirs in it.

Shapes: P numbers of a message, B rows, C classes (1 for a number). May import `pool`, `model`, errors and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol, TypeAlias, final

import torch

from tidelock.pool.example import Boundary, Example, Width
from tidelock.pool.held_out import sum_of_measures
from tidelock.pool.layout import one_forward_one_backward
from tidelock.pool.memory import MemoryLimit
from tidelock.pool.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from tidelock.pool.held_out import Measured
    from tidelock.pool.layout import PoolLayout
    from tidelock.pool.peers import Peers, Transfer

# What tells a stage's forward messages and the backward ones of a micro-batch apart.
_FORWARD, _BACKWARD, _KINDS = 0, 1, 2


class BlocksPart(Protocol):
    """The blocks of a stage: a `ModelPart`, or a `Seq2SeqPart`.

    Attributes:
        is_first: Whether they begin with the model's first one.
        is_last: Whether they end with its last one.
    """

    is_first: bool
    is_last: bool

    @property
    def working_widths(self) -> tuple[int, int]:
        """How many numbers are there while a block is computed, as `Width` counts them."""
        ...


class StageCompute(Protocol):
    """What a stage computes; a peer's own rows of a micro-batch at a time.

    Attributes:
        before: What crosses between it and the stage before.
        after: And between it and the next one.
        tied: Of a parameter that other stages have too, blocks: the stages with one of them have it.
        slices: Where in a parameter of the whole this stage's is, if it is not all of it.
    """

    before: Boundary
    after: Boundary
    tied: Mapping[str, Collection[int]]
    slices: Mapping[str, slice]

    @property
    def part(self) -> BlocksPart:
        """Its blocks."""
        ...

    def forward(
        self,
        examples: Sequence[Example],
        received_P: Tensor | None,
        num_labels: int,
        dropout_seeds: Sequence[int] | None = None,
    ) -> tuple[Kept, Tensor]:
        """Return what the backward needs, and the message to the next stage, of any shape; the last one's loss.

        Args:
            examples: The rows.
            received_P: From the stage before; None in the first.
            num_labels: What the loss is divided by: the labels of the whole batch.
            dropout_seeds: For each row, what its dropout masks follow from; None leaves dropout off.
        """
        ...

    def backward(self, kept: Kept, received_P: Tensor | None) -> Tensor | None:
        """Return the gradient for the stage before, of any shape; None where none is sent.

        Args:
            kept: From the forward.
            received_P: From the next stage; None in the last, and where nothing is sent.
        """
        ...

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the stage's parameters, by their names in the whole; each peer of a stage has the same ones."""
        ...

    def own_of(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is the stage's of tensors that are shaped as all stages' parameters, by their names."""
        ...

    def weights(self) -> Iterator[Tensor]:
        """Yield all weights that a pass reads, trained or not."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of a micro-batch from its forward to its backward.

    Attributes:
        state_in: The state that came in, a leaf of the graph; None in the first stage.
        result: The state that goes out, or the loss.
        outputs_BC: What a head for whole texts gave for the rows; None without one.
    """

    state_in: Tensor | None
    result: Tensor
    outputs_BC: Tensor | None = None


# Where in a message of a peer's rows those are that another peer of the next stage, or of the one before, has.
_Parts: TypeAlias = "list[tuple[int, slice]]"


@final
class Pipeline:
    """One peer's part in every batch.

    Args:
        peers: All peers.
        layout: Who computes what.
        number: Of this peer's stage.
        compute: What it computes.
        memory: Looked at where most of it is taken.

    Attributes:
        timeline: What this peer did when in the last batch.
    """

    def __init__(
        self,
        peers: Peers,
        layout: PoolLayout,
        number: int,
        compute: StageCompute,
        memory: MemoryLimit | None = None,
    ) -> None:
        self.timeline = Timeline(peers.peer, number)
        self._peers = peers
        self._layout = layout
        self._compute = compute
        self._memory = memory or MemoryLimit(None)
        self._number = number
        self._stage = layout.stages[number]
        peers.join(self._stage.peers)
        for blocks in compute.tied.values():
            peers.join(layout.peers_with(blocks))

    def run(self, batch: Sequence[Example], dropout_seeds: Sequence[int] | None = None) -> float:
        """Compute the gradients of a batch, which are then the same on all peers of a stage; return the batch's loss.

        Args:
            batch: All its examples, the same on every peer; they are padded at the right.
            dropout_seeds: For each of them, what its dropout masks follow from; None leaves dropout off.

        Raises:
            NonFiniteError: The loss is infinite or not a number.
            PeerError: A peer was lost.
        """
        step = self._begin(batch, dropout_seeds)
        last = len(self._layout.stages) - 1
        for work, number in one_forward_one_backward(len(step.rows), self._stage.in_flight):
            if work == "forward":
                step.forward(number, is_last=self._number == last)
            else:
                step.backward(number, is_last=self._number == last)
        step.finish()
        with self.timeline.during("all-reduce"):
            trained, tied = self._compute.trained(), self._compute.tied
            sum_gradients(self._peers, [p for name, p in trained.items() if name not in tied], self._stage.peers)
            # In one order everywhere: nobody waits for somebody who waits for him.
            for name, blocks in tied.items():
                sum_gradients(self._peers, [trained[name]], self._layout.peers_with(blocks))
        return sum_of_losses(self._peers, step.loss)

    @torch.no_grad()
    def measure(self, batch: Sequence[Example], num_outputs: int = 0) -> Measured:
        """Compute forwards alone, and keep what the blocks give; return what came of it.

        Args:
            batch: As for `run`.
            num_outputs: C of the head for whole texts; 0 without one.

        Raises:
            PeerError: A peer was lost.
        """
        step = self._begin(batch)
        for number in range(len(step.rows)):
            step.forward(number, is_last=self._number == len(self._layout.stages) - 1)
        step.finish()
        outputs_BC = torch.zeros(len(batch), num_outputs)
        step.collect(outputs_BC)
        return sum_of_measures(self._peers, step.loss, outputs_BC)

    def _begin(self, batch: Sequence[Example], dropout_seeds: Sequence[int] | None = None) -> _Step:
        self.timeline = Timeline(self._peers.peer, self._number)
        rows = self._layout.rows_of(len(batch))
        return _Step(self._peers, self._compute, self._memory, self._number, self.timeline, rows, batch, dropout_seeds)


@final
@dataclass
class _Step:
    """A batch on its way.

    Attributes:
        loss: Of this peer's rows, in the last stage.
    """

    peers: Peers
    compute: StageCompute
    memory: MemoryLimit
    number: int
    timeline: Timeline
    rows: list[list[dict[int, range]]]
    batch: Sequence[Example]
    dropout_seeds: Sequence[int] | None
    loss: float = 0.0
    _kept: dict[int, Kept] = field(default_factory=dict)
    _sent: list[Transfer] = field(default_factory=list)

    def forward(self, number: int, *, is_last: bool) -> None:
        """Compute the forward of a micro-batch, and send what comes of it."""
        examples = self._own(number)
        if not examples:
            return
        received = None
        if self.number > 0:
            with self.timeline.during("wait-forward", number):
                received = self._receive(number, self.number - 1, _FORWARD, self.compute.before.forward)
        num_labels = sum(example.num_labels for example in self.batch)
        own = self._own_rows(number)
        seeds = None if self.dropout_seeds is None else self.dropout_seeds[own.start : own.stop]
        with self.timeline.during("forward", number):
            self._kept[number], result = self.compute.forward(examples, received, num_labels, seeds)
        self.memory.look()
        if is_last:
            self.loss += float(result)
        else:
            self._send(result, number, self.number + 1, _FORWARD, self.compute.after.forward)

    def backward(self, number: int, *, is_last: bool) -> None:
        """Compute the backward of a micro-batch, and send what comes of it."""
        if number not in self._kept:
            return
        width = self.compute.after.backward
        received = None
        if width is not None and not is_last:
            with self.timeline.during("wait-backward", number):
                received = self._receive(number, self.number + 1, _BACKWARD, width)
        with self.timeline.during("backward", number):
            gradient = self.compute.backward(self._kept.pop(number), received)
        self.memory.look()
        width = self.compute.before.backward
        if gradient is not None and width is not None:
            self._send(gradient, number, self.number - 1, _BACKWARD, width)

    def finish(self) -> None:
        """Wait until all that was sent has arrived."""
        for sent in self._sent:
            sent.wait()

    def collect(self, outputs_BC: Tensor) -> None:
        """Write what a head gave for this peer's rows, after forwards alone, where these are in the batch."""
        for number, kept in self._kept.items():
            if kept.outputs_BC is not None:
                rows = self._own_rows(number)
                outputs_BC[rows.start : rows.stop] = kept.outputs_BC

    def _own_rows(self, number: int) -> range:
        return self.rows[number][self.number][self.peers.peer]

    def _own(self, number: int) -> Sequence[Example]:
        rows = self._own_rows(number)
        return self.batch[rows.start : rows.stop]

    def _send(self, message: Tensor, number: int, stage: int, kind: int, width: Width) -> None:
        message_P = message.flatten()
        for peer, part in self._parts(number, stage, width):
            self._sent.append(self.peers.send(message_P[part], peer, number * _KINDS + kind))

    def _receive(self, number: int, stage: int, kind: int, width: Width) -> Tensor:
        into_P = torch.empty(sum(width.numbers(example) for example in self._own(number)))
        arriving = [
            self.peers.receive(into_P[part], peer, number * _KINDS + kind)
            for peer, part in self._parts(number, stage, width)
        ]
        for part in arriving:
            part.wait()
        return into_P

    def _parts(self, number: int, stage: int, width: Width) -> _Parts:
        """Return the peers of a neighbouring stage with rows of this peer's, and where in the message these are."""
        own = self._own_rows(number)
        ends = [0, *accumulate(width.numbers(self.batch[row]) for row in own)]
        found = []
        for peer, rows in self.rows[number][stage].items():
            first, end = max(own.start, rows.start), min(own.stop, rows.stop)
            if first < end:
                found.append((peer, slice(ends[first - own.start], ends[end - own.start])))
        return found


def sum_of_losses(peers: Peers, loss: float) -> float:
    """Return the loss of a batch, out of what each peer has of it; a peer without a part of it gives 0.

    Raises:
        PeerError: A peer was lost.
    """
    total = torch.tensor([loss], dtype=torch.float64)
    peers.sum(total, range(peers.count))
    return float(total)


def sum_gradients(peers: Peers, parameters: Iterable[nn.Parameter], group: Sequence[int]) -> None:
    """Replace the gradients of parameters by their sums over the peers of a group, which all have the same ones.

    Args:
        peers: All peers.
        parameters: One without a gradient counts as having zero, as on a peer that had no rows.
        group: Who sums.

    Raises:
        PeerError: A peer was lost.
    """
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    peers.sum(flat, group)
    for gradient, part in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
