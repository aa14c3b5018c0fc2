"""How peers of a pool reach each other: numbers between two of them, sums over a group.

Gloo groups of `torch.distributed`, made and kept here: none is the process's default group, so that after a fault new
ones can be made among the survivors. Gloo neither encrypts nor asks who connects: peers trust each other and their
network (docs/pool.md).

May import `pool` and libraries.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, final

import torch
from torch import distributed

from tidelock.pool.notices import in_time, lost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch._C._distributed_c10d import ProcessGroup, Work

    from tidelock.pool.notices import Notices

# Its types leave out what is used here.
_distributed: Any = distributed


@final
class Peers:
    """All peers of a pool, seen from one of them.

    Args:
        notices: Of these peers alone; how long a silent one is waited for is theirs.
        peer: This one's number.
        count: How many there are.
        host: Address on which this peer listens for the others.

    Attributes:
        notices: As given.
        peer: As given.
        count: As given.

    Raises:
        PeerError: The others were not there in time.
    """

    def __init__(self, notices: Notices, peer: int, count: int, *, host: str = "127.0.0.1") -> None:
        self.notices = notices
        self.peer = peer
        self.count = count
        self._host = host
        self._everyone = tuple(range(count))
        self._groups: dict[tuple[int, ...], ProcessGroup] = {self._everyone: self._open("all", self._everyone)}

    def agree(self, *, says: bool) -> bool:
        """Return whether one of the peers says so; all of them call this."""
        said = torch.tensor([int(says)])
        self.sum(said, range(self.count))
        return bool(said)

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """Return what each peer gives, by the peers' numbers; all of them call this, with as many numbers."""
        given = torch.zeros(self.count, len(numbers), dtype=torch.float64)
        given[self.peer] = torch.tensor(numbers, dtype=torch.float64)
        self.sum(given, self._everyone)
        found: list[list[float]] = given.tolist()
        return found

    def union(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return the pairs of numbers that one of the peers gives or several, in order; all of them call this."""
        numbers = [number for pair in pairs for number in pair]
        sizes = torch.zeros(self.count, dtype=torch.long)
        sizes[self.peer] = len(numbers)
        self.sum(sizes, self._everyone)
        ends = sizes.cumsum(0).tolist()
        given = torch.zeros(int(sizes.sum()), dtype=torch.long)
        given[ends[self.peer] - len(numbers) : ends[self.peer]] = torch.tensor(numbers, dtype=torch.long)
        self.sum(given, self._everyone)
        return sorted({(first, second) for first, second in given.view(-1, 2).tolist()})

    def close(self) -> None:
        """Let go of the others, who notice it; what is under way fails."""
        self._groups.clear()

    def share(self, numbers: Tensor | None) -> Tensor:
        """Return the int64 vector that peer 0 gives, on every peer; the others give None."""
        size = torch.tensor([0 if numbers is None else len(numbers)])
        self.sum(size, range(self.count))
        shared = torch.zeros(int(size), dtype=torch.long) if numbers is None else numbers.clone()
        self.sum(shared, range(self.count))
        return shared

    def join(self, group: Sequence[int]) -> None:
        """Prepare sums over a group that this peer is in; all of the group call this."""
        key = tuple(group)
        if key not in self._groups and len(key) > 1:
            self._groups[key] = self._open("-".join(map(str, key)), key)

    def send(self, tensor: Tensor, to: int, tag: int) -> Transfer:
        """Begin to send a contiguous tensor, which must not change before the sending is waited for."""
        with lost(f"sending to peer {to}"):
            work = self._groups[self._everyone].send([tensor], to, tag)
            return Transfer(work, f"sending to peer {to}", tensor)

    def receive(self, into: Tensor, sender: int, tag: int) -> Transfer:
        """Begin to receive into a contiguous tensor."""
        with lost(f"receiving from peer {sender}"):
            return Transfer(
                self._groups[self._everyone].recv([into], sender, tag), f"receiving from peer {sender}", into
            )

    def sum(self, tensor: Tensor, group: Sequence[int]) -> None:
        """Replace a tensor by its sum over a group that was joined.

        Raises:
            PeerError: A peer was lost.
        """
        if len(group) > 1:
            with lost("summing over peers " + ", ".join(map(str, group))):
                self._groups[tuple(group)].allreduce([tensor]).wait()

    def _open(self, name: str, group: Sequence[int]) -> ProcessGroup:
        gloo = _distributed.ProcessGroupGloo
        options = gloo._Options()  # noqa: SLF001  (the only way to choose the address)
        options._devices = [gloo.create_device(hostname=self._host)]  # noqa: SLF001
        options._timeout = timedelta(seconds=self.notices.timeout_s)  # noqa: SLF001
        store = self.notices.under(name).store
        with lost("meeting peers " + ", ".join(map(str, group))):
            place = list(group).index(self.peer)
            # Gloo has a deadline too, and says more when it keeps that.
            patience_s = 2 * self.notices.timeout_s
            opened: ProcessGroup = in_time(patience_s, lambda: gloo(store, place, len(group), options))
            return opened


@final
class Transfer:
    """A tensor on its way, either way.

    Args:
        work: What `torch.distributed` waits for.
        what: For the message when a peer is lost.
        tensor: Kept until it has arrived.
    """

    def __init__(self, work: Work, what: str, tensor: Tensor) -> None:
        self._work = work
        self._what = what
        self._tensor = tensor

    def wait(self) -> Tensor:
        """Return the tensor once it has arrived.

        Raises:
            PeerError: The peer was lost.
        """
        with lost(self._what):
            self._work.wait()
        return self._tensor
