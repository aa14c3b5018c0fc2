"""How peers of a pool reach each other: numbers between two of them, sums over a group.

Gloo groups of `torch.distributed`, made and kept here: none is the process's default group, so that after a fault new
ones can be made among the survivors. Gloo neither encrypts nor asks who connects: peers trust each other and their
network (docs/pool.md).

May import errors and libraries.
"""

from __future__ import annotations

import socket
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, final

import torch
from torch import distributed

from tidelock.errors import ListenRefused, PeerError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from torch._C._distributed_c10d import ProcessGroup, Store, TCPStore, Work

# Its types leave out what is used here.
_distributed: Any = distributed


def meeting_place(host: str, port: int, *, timeout_s: float, is_host: bool) -> TCPStore:
    """Return where peers find each other.

    Args:
        host: Address of the peer that holds it; that one listens there and nowhere else.
        port: Likewise; 0 takes a free one, which `TCPStore.port` says.
        timeout_s: Seconds to wait for it, and later for anything in it.
        is_host: Whether this peer holds it.

    Raises:
        ListenRefused: This peer cannot listen there.
        PeerError: The meeting place is not there in time.
    """
    timeout = timedelta(seconds=timeout_s)
    with _lost(f"opening the meeting place at {host}:{port}" if is_host else f"looking for peer 0 at {host}:{port}"):
        if not is_host:
            store: TCPStore = _distributed.TCPStore(host, port, timeout=timeout, is_master=False)
            return store
        try:
            listening = socket.create_server((host, port))  # by itself it would listen at every address
        except OSError as error:
            msg = (
                f"Pool: expected to listen at {host}:{port}, got {error.strerror}. Choose a free port, and an "
                "address of this device."
            )
            raise ListenRefused(msg) from error
        hosted: TCPStore = _distributed.TCPStore(
            host,
            listening.getsockname()[1],
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )
    return hosted


def ask(store: Store, name: str) -> str:
    """Return the text that a peer leaves at a meeting place, once it has.

    Raises:
        PeerError: It was not there in time.
    """
    with _lost(f"waiting for the {name}"):
        return store.get(name).decode()


@final
class Peers:
    """All peers of a pool, seen from one of them.

    Args:
        store: Where peers find each other; the same for all.
        peer: This one's number.
        count: How many there are.
        host: Address on which this peer listens for the others.
        timeout_s: Seconds after which a peer that does not answer counts as lost.

    Attributes:
        peer: As given.
        count: As given.

    Raises:
        PeerError: The others were not there in time.
    """

    def __init__(self, store: Store, peer: int, count: int, *, host: str = "127.0.0.1", timeout_s: float = 60) -> None:
        self.peer = peer
        self.count = count
        self._store = store
        self._host = host
        self._timeout = timedelta(seconds=timeout_s)
        self._all = self._open("all", range(count))
        self._groups: dict[tuple[int, ...], ProcessGroup] = {tuple(range(count)): self._all}

    def tell(self, name: str, text: str) -> None:
        """Leave a text for the other peers."""
        with _lost("leaving a notice"):
            self._store.set(name, text)

    def ask(self, name: str) -> str:
        """Return the text that a peer leaves, once it has.

        Raises:
            PeerError: It was not there in time.
        """
        return ask(self._store, name)

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
        with _lost(f"sending to peer {to}"):
            return Transfer(self._all.send([tensor], to, tag), f"sending to peer {to}", tensor)

    def receive(self, into: Tensor, sender: int, tag: int) -> Transfer:
        """Begin to receive into a contiguous tensor."""
        with _lost(f"receiving from peer {sender}"):
            return Transfer(self._all.recv([into], sender, tag), f"receiving from peer {sender}", into)

    def sum(self, tensor: Tensor, group: Sequence[int]) -> None:
        """Replace a tensor by its sum over a group that was joined.

        Raises:
            PeerError: A peer was lost.
        """
        if len(group) > 1:
            with _lost("summing over peers " + ", ".join(map(str, group))):
                self._groups[tuple(group)].allreduce([tensor]).wait()

    def _open(self, name: str, group: Sequence[int]) -> ProcessGroup:
        gloo = _distributed.ProcessGroupGloo
        options = gloo._Options()  # noqa: SLF001  (the only way to choose the address)
        options._devices = [gloo.create_device(hostname=self._host)]  # noqa: SLF001
        options._timeout = self._timeout  # noqa: SLF001
        store = _distributed.PrefixStore(name, self._store)
        with _lost("meeting peers " + ", ".join(map(str, group))):
            opened: ProcessGroup = gloo(store, list(group).index(self.peer), len(group), options)
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
        with _lost(self._what):
            self._work.wait()
        return self._tensor


@contextmanager
def _lost(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:
        reason = str(error).partition("]")[2].strip() or str(error)
        msg = (
            f"Pool: expected an answer while {what}, got: {reason.splitlines()[0]} Look whether that peer runs and is "
            "reached, and go on with `tidelock pool resume`: what is cached and saved stays."
        )
        raise PeerError(msg) from error
