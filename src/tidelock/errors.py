"""Every error that tidelock raises on purpose, in one tree, each with its exit code.

    TidelockError                   1   anything below, when nothing more exact fits
    ├── ConfigError                 2   an option, a PEFT setting or an argument that cannot be honoured
    ├── DataError                   3   a data file or a row of it (the message has the line number)
    ├── ModelError                  4   a model folder, a tensor of it, or an architecture that cannot be cut
    ├── CheckpointError             5   a run folder or a checkpoint that cannot be read or resumed
    ├── StorageError                6   the disk refused: full, read-only or gone
    ├── NonFiniteError              7   a loss, a gradient or an activation is not a finite number
    ├── CacheError                  8   an activation cache that is none, has another key, or has damaged entries
    ├── MemoryExceeded              9   a peer of a pool took more memory than it was given
    ├── WireError                   10  a message broke the protocol: length, shape, dtype or order
    ├── CloudUnreachable            11  no cloud answers at that address, or it stayed away too long
    ├── TlsError                    12  the cloud's certificate is not trusted, or ours is refused
    ├── TokenRefused                13  the cloud does not know this token
    ├── ModelMismatch               14  device and cloud hold different models or different weights
    ├── ListenRefused               15  the cloud will not listen at that address, or cannot
    ├── CloudBusy                   16  the cloud has no place for another pass of this device
    └── PeerError                   17  a device that the pool cannot do without is gone or silent

An interrupted command (Ctrl-C) exits with 130, as a shell expects. A new error is a new leaf here, with the next
free code of its kind (2-9: what is on this machine; 10-19: what is on the other side); a retired code is not reused.

A message has one form: ``<what was asked>: expected <rule>, got <value> (<where>). <what to do>.``

May be imported by everything; imports nothing of tidelock.
"""

from __future__ import annotations

from typing import ClassVar

INTERRUPTED_EXIT_CODE = 130


class TidelockError(Exception):
    """The root of all errors raised on purpose.

    Args:
        message: The whole sentence that a person reads; the command line prints it as it is.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(TidelockError):
    """An option, a PEFT setting or an argument asks for something that cannot be done."""

    exit_code = 2


class DataError(TidelockError):
    """A data file cannot be read, or one of its rows has the wrong form."""

    exit_code = 3


class ModelError(TidelockError):
    """A model folder is incomplete, one of its tensors is malformed, or its architecture cannot be cut."""

    exit_code = 4


class CheckpointError(TidelockError):
    """A run folder or a checkpoint is missing, incomplete, or belongs to another run."""

    exit_code = 5


class StorageError(TidelockError):
    """The file system refused to write: it is full, read-only or gone."""

    exit_code = 6


class NonFiniteError(TidelockError):
    """A loss, a gradient or an activation is infinite or not a number; raised before the optimizer moves."""

    exit_code = 7


class CacheError(TidelockError):
    """A folder is no activation cache, or one with another key, or entries of it are damaged."""

    exit_code = 8


class MemoryExceeded(TidelockError):
    """This process took more memory than its device gives."""

    exit_code = 9


class WireError(TidelockError):
    """A message between device and cloud broke the protocol: its length, shape, dtype or order."""

    exit_code = 10


class CloudUnreachable(TidelockError):
    """No cloud answers at the address, or it stayed away for longer than the device is told to wait."""

    exit_code = 11


class CloudBusy(TidelockError):
    """A cloud has no place for another pass of a device that holds one; the device goes on with fewer at once."""

    exit_code = 16


class TlsError(TidelockError):
    """TLS failed: the cloud's certificate is not trusted, or the cloud does not trust the device's."""

    exit_code = 12


class TokenRefused(TidelockError):
    """The cloud does not know the bearer token that the device sent."""

    exit_code = 13


class ModelMismatch(TidelockError):
    """Device and cloud hold different models, or the same model with different weights."""

    exit_code = 14


class ListenRefused(TidelockError):
    """The cloud will not listen at the address (beyond loopback without TLS), or the system does not let it."""

    exit_code = 15


class PeerError(TidelockError):
    """A device that the pool cannot do without is gone or silent."""

    exit_code = 17
