"""Reads what the blocks of an unchanged model give, by hooks that do nothing while nobody reads.

May import libraries.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

# What the blocks give in the thread that runs them, while someone reads it.
_READ: ContextVar[dict[int, Tensor] | None] = ContextVar("tidelock_read", default=None)


def watch(blocks: nn.ModuleList) -> None:
    """Have the blocks of one stack give what they compute to whoever is `reading`, by their number."""
    for index, block in enumerate(blocks):
        block.register_forward_hook(_keep(index))


@contextmanager
def reading() -> Iterator[dict[int, Tensor]]:
    """Give a dictionary that holds each watched block's output, shape (B, T, D), once its stack has run."""
    read: dict[int, Tensor] = {}
    token = _READ.set(read)
    try:
        yield read
    finally:
        _READ.reset(token)


def _keep(index: int) -> Callable[[nn.Module, object, Any], None]:
    def hook(_block: nn.Module, _args: object, output: Any) -> None:  # noqa: ANN401  (as blocks have it)
        read = _READ.get()
        if read is not None:
            read[index] = output[0] if isinstance(output, tuple) else output

    return hook
