"""Who has which blocks, which rows, and in what order a stage computes: all that peers must agree on.

A batch is divided into micro-batches, the rows of a micro-batch among the peers of a stage (PAC, arXiv 2408.10746,
section 4.2). May import errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, final

from tidelock.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

Work: TypeAlias = Literal["forward", "backward"]


@final
@dataclass(frozen=True, slots=True)
class Stage:
    """Consecutive blocks on a group of peers.

    Attributes:
        blocks: Numbers of the blocks.
        peers: Numbers of the peers, in the order of their rows.
        shares: How many parts of a micro-batch's rows each of them computes.
        in_flight: Most micro-batches between their forward and their backward here.
    """

    blocks: range
    peers: tuple[int, ...]
    shares: tuple[int, ...]
    in_flight: int = 1


@final
@dataclass(frozen=True, slots=True)
class PoolLayout:
    """Stages for all blocks of a model.

    Attributes:
        stages: First to last.
        micro_batches: Into how many a batch is divided, at most.
        idle: Peers without blocks, which begin to learn when the outputs of all blocks are there.

    Raises:
        ConfigError: Blocks or peers are not each in one stage, or a later stage has more micro-batches in flight.
    """

    stages: tuple[Stage, ...]
    micro_batches: int
    idle: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        blocks = [block for stage in self.stages for block in stage.blocks]
        peers = [*(peer for stage in self.stages for peer in stage.peers), *self.idle]
        flights = [stage.in_flight for stage in self.stages]
        shares = [(stage.peers, stage.shares) for stage in self.stages]
        rules = (
            ("stages with blocks", bool(blocks) and all(stage.blocks for stage in self.stages), self.stages),
            ("each block in one stage, in their order", blocks == list(range(len(blocks))), blocks),
            ("each peer from 0 in one stage, or idle", sorted(peers) == list(range(len(peers))), peers),
            ("a share of at least 1 for each peer",
             all(len(p) == len(s) and all(share >= 1 for share in s) for p, s in shares), shares),
            ("no more micro-batches in flight than in the stage before, and at least 1",
             flights == sorted(flights, reverse=True) and flights[-1:] >= [1], flights),
            ("at least 1 micro-batch", self.micro_batches >= 1, self.micro_batches),
        )  # fmt: skip
        for expected, holds, got in rules:
            if not holds:
                msg = f"Layout of a pool: expected {expected}, got {got}. Make another plan."
                raise ConfigError(msg)

    @property
    def num_peers(self) -> int:
        """How many peers there are."""
        return sum(len(stage.peers) for stage in self.stages) + len(self.idle)

    def stage_of(self, peer: int) -> int | None:
        """Return the number of a peer's stage; None when it is idle."""
        return next((number for number, stage in enumerate(self.stages) if peer in stage.peers), None)

    def stages_with(self, blocks: Collection[int]) -> list[int]:
        """Return the numbers of the stages that have one of these blocks or several, in order."""
        return [number for number, stage in enumerate(self.stages) if any(block in blocks for block in stage.blocks)]

    def peers_with(self, blocks: Collection[int]) -> tuple[int, ...]:
        """Return the peers that have one of these blocks or several, in order."""
        return tuple(sorted(peer for number in self.stages_with(blocks) for peer in self.stages[number].peers))

    def rows_of(self, batch_rows: int) -> list[list[dict[int, range]]]:
        """Return which rows of a batch each peer computes: by micro-batch and stage, then by peer.

        Args:
            batch_rows: Rows of the batch.
        """
        count = min(self.micro_batches, batch_rows)
        groups = divide(range(batch_rows), [1] * count)
        return [
            [dict(zip(stage.peers, divide(group, stage.shares), strict=True)) for stage in self.stages]
            for group in groups
        ]


def one_forward_one_backward(micro_batches: int, in_flight: int) -> Iterator[tuple[Work, int]]:
    """Yield what a stage computes, in order, with the number of the micro-batch.

    As many forwards as may be in flight, then a backward and a forward in turn, then the backwards that are left (1F1B:
    Narayanan et al., PipeDream, SOSP '19); `plan.simulate` predicts this order.

    Args:
        micro_batches: In the batch.
        in_flight: Most of them between forward and backward.
    """
    for number in range(micro_batches):
        if number >= in_flight:
            yield "backward", number - in_flight
        yield "forward", number
    for number in range(max(0, micro_batches - in_flight), micro_batches):
        yield "backward", number


def divide(rows: range, shares: Sequence[int]) -> list[range]:
    """Return consecutive rows for each share, in proportion to it, as evenly as whole rows allow; some may get none."""
    total, ends, given = sum(shares), [], 0
    for share in shares:
        given += share
        # Rounded half up, in whole numbers: every peer must find the same.
        ends.append(rows.start + (2 * given * len(rows) + total) // (2 * total))
    return [range(start, end) for start, end in zip([rows.start, *ends], ends, strict=False)]
