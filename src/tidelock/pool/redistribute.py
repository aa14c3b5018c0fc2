"""From a pipeline to data parallelism: every peer gets the whole side network, and the outputs for its own examples.

PAC (arXiv 2408.10746, section 5.2) does so after the first epoch. While the pipeline runs, each peer keeps what its
blocks gave; then who has an example's outputs sends them to who will learn from it, once. From where they come is found
from what every peer has, whatever has happened before: so this can be repeated where it broke off, and by other peers.

Shapes: N tokens of an example that a block reads, M of them with a label, D hidden width, F width of the final state.
May import `pool`, `cache`, `model`, errors and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, final

import torch

from tidelock.errors import CacheError
from tidelock.pool.recipe import MOMENTS, Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from torch import Tensor

    from tidelock.cache.store import ActivationCache
    from tidelock.model.sizes import ModelSizes
    from tidelock.pool.example import Example
    from tidelock.pool.peers import Peers, Transfer
    from tidelock.pool.recipe import Optimizer

# Examples whose outputs are on their way at the same time.
_AT_ONCE = 8
# Numbers that are summed at once when what is trained is gathered: 16 MiB in fp32.
_SUMMED_NUMBERS = 1 << 22

# As `SideModel.examples_of` and `SideSeq2SeqModel.examples_of` have it, so that they find the entries.
Key: TypeAlias = "tuple[tuple[int, ...], ...]"


def key_of(example: Example) -> Key:
    """Return an example as a cache has it: its ids, and where it begins and which tokens predict a label.

    Of an encoder-decoder, the source's ids, the decoder's, and these of the decoder's.
    """
    ids = (example.input_ids, example.decoder_ids) if example.decoder_ids else (example.input_ids,)
    return *ids, (0, *example.selected)


@final
class Kept:
    """What this peer has of the blocks' outputs, example by example, by the blocks that gave them.

    Args:
        open_cache: Given consecutive blocks, returns where their outputs are kept.
        there: Of which blocks there is something already.
        num_blocks: Of the model.
    """

    def __init__(
        self, open_cache: Callable[[tuple[int, ...]], ActivationCache], there: Iterable[range], num_blocks: int
    ) -> None:
        self._open_cache = open_cache
        self._caches: dict[range, ActivationCache] = {}
        for blocks in there:
            self.of(blocks)
        self._all = range(num_blocks)

    @property
    def whole(self) -> ActivationCache:
        """The outputs of all blocks, which a side model learns from."""
        return self.of(self._all)

    def of(self, blocks: range) -> ActivationCache:
        """Return what is kept of some blocks."""
        if blocks not in self._caches:
            self._caches[blocks] = self._open_cache(tuple(blocks))
        return self._caches[blocks]

    def inventory(self, examples: Sequence[Example]) -> dict[range, list[int]]:
        """Return of which examples there is something: the numbers, by the blocks."""
        keys = [key_of(example) for example in examples]
        return {blocks: [n for n, key in enumerate(keys) if key in cache] for blocks, cache in self._caches.items()}

    def keep(
        self,
        blocks: range,
        examples: Sequence[Example],
        outputs: Sequence[Sequence[Tensor]],
        final_MF: Tensor | None,
    ) -> None:
        """Keep what blocks gave for examples; the other arguments as a stage tells them (`OnOutputs`).

        Raises:
            StorageError: There is no room.
        """
        keys = [key_of(example) for example in examples]
        by_example = [[part.float() for part in parts] for parts in zip(*outputs, strict=True)]
        if final_MF is not None:
            for parts, final in zip(by_example, final_MF.split([len(key[-1]) - 1 for key in keys]), strict=True):
                parts.append(final.float())
        for key, parts in zip(keys, by_example, strict=True):
            self.of(blocks).put(key, parts)

    def get(self, blocks: range, key: Key) -> tuple[Tensor, ...]:
        """Return what was kept of an example.

        Raises:
            CacheError: It is damaged, or gone since the inventory.
        """
        found = self.of(blocks).get(key)
        if found is None:
            msg = (
                "Pool: expected the outputs of an example that this peer has kept, got damaged ones or none any more. "
                "Let it join again, or go on with `tidelock pool resume`: they are computed again."
            )
            raise CacheError(msg)
        return found


# Where an example's outputs are: from the first block to the last one, which blocks' on which peer.
Route: TypeAlias = "list[tuple[range, int]]"


def find_routes(
    peers: Peers, kept: Kept, examples: Sequence[Example], owners: Sequence[int], num_blocks: int
) -> list[Route | None]:
    """Return from where each example's outputs come to the peer that it is for, the same on every peer.

    Args:
        peers: All peers; all of them call this.
        kept: What this one has.
        examples: All examples.
        owners: For each of them the peer that it is for.
        num_blocks: Of the model.

    Returns:
        For each example its route; None of one whose outputs are not all there.

    Raises:
        PeerError: A peer was lost.
    """
    own = kept.inventory(examples)
    spans = peers.union([(blocks.start, blocks.stop) for blocks in own])
    there = torch.zeros(len(spans), len(examples), peers.count, dtype=torch.int8)
    for place, span in enumerate(spans):
        there[place, own.get(range(*span), []), peers.peer] = 1
    peers.sum(there, range(peers.count))
    who_has = there.tolist()
    found: list[Route | None] = []
    for number, owner in enumerate(owners):
        having = {
            range(*span): [peer for peer, has in enumerate(who_has[place][number]) if has]
            for place, span in enumerate(spans)
        }
        found.append(_route(having, owner, num_blocks))
    return found


def _route(having: Mapping[range, Sequence[int]], owner: int, num_blocks: int) -> Route | None:
    """Return a route with the fewest parts; of these the one with the longest first parts."""
    best: dict[int, Route] = {num_blocks: []}  # from a block to the end
    for start in reversed(range(num_blocks)):
        onwards = [
            [(blocks, owner if owner in holders else holders[0]), *best[blocks.stop]]
            for blocks, holders in having.items()
            if blocks.start == start and holders and blocks.stop in best
        ]
        if onwards:
            best[start] = min(onwards, key=lambda route: (len(route), -len(route[0][0])))
    return best.get(0)


@final
@dataclass(frozen=True, slots=True)
class Widths:
    """What a model's outputs are like.

    Attributes:
        num_blocks: How many blocks it has.
        hidden: D.
        final: F.
        encoder_blocks: How many of the blocks are an encoder's, which are the first.
    """

    num_blocks: int
    hidden: int
    final: int
    encoder_blocks: int = 0

    @classmethod
    def of(cls, sizes: ModelSizes) -> Widths:
        """Return them of a model of these sizes."""
        return cls(sizes.num_blocks, sizes.block_width, sizes.final_width, sizes.num_encoder_blocks)

    def shapes(self, example: Example, blocks: range) -> list[tuple[int, int]]:
        """Return the shapes of what blocks give for an example."""
        *_, (_, *selected) = key_of(example)
        last = [(len(selected), self.final)] if blocks.stop == self.num_blocks else []
        source, target = len(example.input_ids), len(example.decoder_ids or example.input_ids)
        return [(source if block < self.encoder_blocks else target, self.hidden) for block in blocks] + last


def redistribute(
    peers: Peers,
    examples: Sequence[Example],
    routes: Sequence[Route | None],
    owners: Sequence[int],
    kept: Kept,
    widths: Widths,
) -> int:
    """Bring the outputs of each example to the peer that learns from it; return how many bytes this peer sent.

    Args:
        peers: All peers.
        examples: All examples.
        routes: From where; see `find_routes`. An example without a route is left out.
        owners: To which peer.
        kept: What this peer has.
        widths: Of the model's outputs.

    Raises:
        CacheError: What this peer has is damaged.
        PeerError: A peer was lost.
        StorageError: There is no room.
    """
    whole = range(widths.num_blocks)
    moves = [
        _Move(number, examples[number], route, owner)
        for number, (route, owner) in enumerate(zip(routes, owners, strict=True))
        if route is not None and route != [(whole, owner)]
    ]
    return sum(
        _send_wave(peers, moves[first : first + _AT_ONCE], kept, widths) for first in range(0, len(moves), _AT_ONCE)
    )


@final
@dataclass(frozen=True, slots=True)
class _Move:
    """An example whose outputs are brought to a peer."""

    number: int
    example: Example
    route: Route
    owner: int


def _send_wave(peers: Peers, moves: Sequence[_Move], kept: Kept, widths: Widths) -> int:
    """Bring the outputs of some examples to where they go, at the same time."""
    leaving: list[Transfer] = []
    arriving: dict[int, list[Tensor | Transfer]] = {}
    sent = 0
    for move in moves:
        for blocks, holder in move.route:
            tag = move.number * widths.num_blocks + blocks.start
            if holder == peers.peer:
                flat = torch.cat([part.flatten() for part in kept.get(blocks, key_of(move.example))])
                if move.owner == peers.peer:
                    arriving.setdefault(move.number, []).append(flat)
                else:
                    leaving.append(peers.send(flat, move.owner, tag))
                    sent += flat.numel() * flat.element_size()
            elif move.owner == peers.peer:
                size = sum(rows * width for rows, width in widths.shapes(move.example, blocks))
                arriving.setdefault(move.number, []).append(peers.receive(torch.empty(size), holder, tag))
    for move in (move for move in moves if move.owner == peers.peer):
        tensors: list[Tensor] = []
        for (blocks, _), part in zip(move.route, arriving[move.number], strict=True):
            flat = part if isinstance(part, torch.Tensor) else part.wait()
            shapes = widths.shapes(move.example, blocks)
            split = flat.split([rows * width for rows, width in shapes])
            tensors += [each.view(shape) for each, shape in zip(split, shapes, strict=True)]
        kept.whole.put(key_of(move.example), tensors)
    for transfer in leaving:
        transfer.wait()
    return sent


def gather(
    peers: Peers,
    optimizer: Optimizer,
    shapes: Mapping[str, torch.Size],
    slices: Mapping[str, slice],
    *,
    speaks_for: Collection[str],
    keeps: bool,
) -> Progress:
    """Return all that is trained as it is after the last step, the same on every peer that keeps it.

    Args:
        peers: All peers.
        optimizer: Of this peer's part.
        shapes: Of all parameters.
        slices: Where in a parameter of the whole this peer's is, if it is not all of it.
        speaks_for: Names of the parameters of which this peer gives its part; of each part one peer does.
        keeps: Whether this peer wants what is gathered; else it is empty.

    Raises:
        PeerError: A peer was lost.
    """
    own = optimizer.progress()
    found: list[dict[str, Tensor]] = []
    for values in (own.parameters, *(own.moments[kind] for kind in MOMENTS)):
        whole: dict[str, Tensor] = {}
        for names in _summed_at_once(shapes):
            tensors = [torch.zeros(shapes[name]) for name in names]
            for name, tensor in zip(names, tensors, strict=True):
                if name in speaks_for:
                    tensor[slices.get(name, ...)] = values[name]
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            peers.sum(flat, range(peers.count))  # with zeros: no bit changes
            if keeps:
                parts = flat.split([tensor.numel() for tensor in tensors])
                whole |= {name: part.view(shapes[name]).clone() for name, part in zip(names, parts, strict=True)}
        found.append(whole)
    return Progress(own.steps, found[0], dict(zip(MOMENTS, found[1:], strict=True)))


def _summed_at_once(shapes: Mapping[str, torch.Size]) -> list[list[str]]:
    """Return the names in groups: each sum takes a round trip, but a whole model need not be there twice."""
    groups: list[list[str]] = []
    count = 0
    for name, shape in shapes.items():
        count += shape.numel()
        if not groups or count > _SUMMED_NUMBERS:
            groups.append([])
            count = shape.numel()
        groups[-1].append(name)
    return groups
