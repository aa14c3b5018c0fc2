"""From a pipeline to data parallelism: every peer gets the whole side network, and the outputs for its own examples.

PAC (arXiv 2408.10746, section 5.2) does so after the first epoch. While the pipeline runs, each peer keeps what its
blocks gave; then who has an example's outputs sends them to who will learn from it, once. An example that is there
already is not sent, so that this can be repeated where it broke off.

Shapes: N real tokens of an example, M of them with a label, D hidden width, F width of the final state. May import
`pool`, `cache`, errors and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, TypeAlias, final

import torch

from tidelock.errors import CacheError
from tidelock.pool.pipeline import IGNORED
from tidelock.pool.recipe import MOMENTS, Progress

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from tidelock.cache.store import ActivationCache
    from tidelock.pool.layout import PoolLayout
    from tidelock.pool.peers import Peers, Transfer
    from tidelock.pool.pipeline import Example
    from tidelock.pool.recipe import Optimizer, Recipe

# Examples whose outputs are on their way at the same time.
_AT_ONCE = 8

# As `SideModel.examples_of` has it, so that a side model finds the entries.
Key: TypeAlias = "tuple[tuple[int, ...], tuple[int, ...]]"


def key_of(example: Example) -> Key:
    """Return an example as a cache has it: its ids, and where it begins and which tokens predict a label."""
    selected = [place for place, label in enumerate(example.labels[1:]) if label != IGNORED]
    return example.input_ids, (0, *selected)


@final
class Pieces:
    """What one peer's blocks gave, example by example.

    Args:
        cache: Of this peer alone, for its stage's blocks.
    """

    def __init__(self, cache: ActivationCache) -> None:
        self._cache = cache

    def keep(self, examples: Sequence[Example], outputs_ND: Sequence[Tensor], final_MF: Tensor | None) -> None:
        """Keep what the blocks gave for examples; arguments as `SideStage` tells them.

        Raises:
            StorageError: There is no room.
        """
        keys = [key_of(example) for example in examples]
        tokens = [len(ids) for ids, _ in keys]
        by_example = [list(parts) for parts in zip(*(out.float().split(tokens) for out in outputs_ND), strict=True)]
        if final_MF is not None:
            for parts, final in zip(by_example, final_MF.split([len(place) - 1 for _, place in keys]), strict=True):
                parts.append(final.float())
        for key, parts in zip(keys, by_example, strict=True):
            self._cache.put(key, parts)

    def get(self, key: Key) -> tuple[Tensor, ...]:
        """Return what was kept of an example.

        Raises:
            CacheError: Nothing, or it is damaged.
        """
        found = self._cache.get(key)
        if found is None:
            msg = (
                "Pool: expected this peer's outputs of an example of the first epoch, got none. Give it the --out that "
                "it had, or begin another run."
            )
            raise CacheError(msg)
        return found


def holders(layout: PoolLayout, recipe: Recipe, examples: int) -> list[list[int]]:
    """Return for each example which peer of each stage computed it in the first epoch."""
    order, found = recipe.order(examples, 0), [[0] * len(layout.stages) for _ in range(examples)]
    for first in range(0, examples, recipe.batch_size):
        batch = order[first : first + recipe.batch_size]
        for micro_batch in layout.rows_of(len(batch)):
            for stage, by_peer in enumerate(micro_batch):
                for peer, rows in by_peer.items():
                    for row in rows:
                        found[batch[row]][stage] = peer
    return found


@final
@dataclass(frozen=True, slots=True)
class Routes:
    """From which peers to which one the outputs of each example go.

    Attributes:
        examples: All examples.
        who_has: For each of them the peer of each stage that computed it; see `holders`.
        who_learns: For each of them the peer that it is for.
        blocks: How many blocks each stage has.
        hidden_width: D.
        final_width: F.
    """

    examples: Sequence[Example]
    who_has: Sequence[Sequence[int]]
    who_learns: Sequence[int]
    blocks: Sequence[int]
    hidden_width: int
    final_width: int

    def shapes(self, number: int, stage: int) -> list[tuple[int, int]]:
        """Return the shapes of what a stage gives for an example."""
        ids, (_, *selected) = key_of(self.examples[number])
        last = [(len(selected), self.final_width)] if stage == len(self.blocks) - 1 else []
        return [(len(ids), self.hidden_width)] * self.blocks[stage] + last


def redistribute(peers: Peers, routes: Routes, pieces: Pieces | None, whole: ActivationCache) -> int:
    """Bring the outputs of each example to the peer that learns from it; return how many bytes this peer sent.

    Args:
        peers: All peers.
        routes: From where to where.
        pieces: What this peer computed; None of an idle one.
        whole: Where this peer keeps whole examples.

    Raises:
        PeerError: A peer was lost.
        StorageError: There is no room.
    """
    there = torch.tensor(
        [
            owner == peers.peer and key_of(example) in whole
            for example, owner in zip(routes.examples, routes.who_learns, strict=True)
        ],
        dtype=torch.int,
    )
    peers.sum(there, range(peers.count))
    missing = (there == 0).nonzero().flatten().tolist()
    sent = 0
    for first in range(0, len(missing), _AT_ONCE):
        sent += _send_wave(peers, routes, missing[first : first + _AT_ONCE], pieces, whole)
    return sent


def _send_wave(
    peers: Peers, routes: Routes, numbers: Sequence[int], pieces: Pieces | None, whole: ActivationCache
) -> int:
    """Bring the outputs of some examples to where they go, at the same time."""
    stages = range(len(routes.blocks))
    leaving: list[Transfer] = []
    arriving: dict[int, list[Tensor | Transfer]] = {}
    sent = 0
    for number, stage in product(numbers, stages):
        holder, owner, tag = routes.who_has[number][stage], routes.who_learns[number], number * len(stages) + stage
        if holder == peers.peer and pieces is not None:
            flat = torch.cat([part.flatten() for part in pieces.get(key_of(routes.examples[number]))])
            if owner == peers.peer:
                arriving.setdefault(number, []).append(flat)
            else:
                leaving.append(peers.send(flat, owner, tag))
                sent += flat.numel() * flat.element_size()
        elif owner == peers.peer:
            size = sum(rows * width for rows, width in routes.shapes(number, stage))
            arriving.setdefault(number, []).append(peers.receive(torch.empty(size), holder, tag))
    for number, parts in arriving.items():
        tensors: list[Tensor] = []
        for stage, part in zip(stages, parts, strict=True):
            flat = part if isinstance(part, torch.Tensor) else part.wait()
            shapes = routes.shapes(number, stage)
            split = flat.split([rows * width for rows, width in shapes])
            tensors += [each.view(shape) for each, shape in zip(split, shapes, strict=True)]
        whole.put(key_of(routes.examples[number]), tensors)
    for transfer in leaving:
        transfer.wait()
    return sent


def gather(
    peers: Peers, optimizer: Optimizer, shapes: Mapping[str, torch.Size], slices: Mapping[str, slice], *, leads: bool
) -> Progress:
    """Return the whole network as it is after the last step, the same on every peer.

    Args:
        peers: All peers.
        optimizer: Of this peer's part.
        shapes: Of the whole network's parameters.
        slices: Where in a parameter of the whole this peer's is, if it is not all of it.
        leads: Whether this peer speaks for its stage.

    Raises:
        PeerError: A peer was lost.
    """
    own = optimizer.progress()
    found: list[dict[str, Tensor]] = []
    for values in (own.parameters, *(own.moments[kind] for kind in MOMENTS)):
        whole = {name: torch.zeros(shape) for name, shape in shapes.items()}
        if leads:
            for name, value in values.items():
                whole[name][slices.get(name, ...)] = value
        flat = torch.cat([tensor.flatten() for tensor in whole.values()])
        peers.sum(flat, range(peers.count))  # with zeros: no bit changes
        parts = flat.split([tensor.numel() for tensor in whole.values()])
        found.append({name: part.view(shapes[name]) for name, part in zip(whole, parts, strict=True)})
    return Progress(own.steps, found[0], dict(zip(MOMENTS, found[1:], strict=True)))
