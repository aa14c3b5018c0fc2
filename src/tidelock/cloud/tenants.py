"""Who may use the cloud: bearer tokens, each with the name of its tenant, and what that tenant may have.

A tokens file has one `NAME TOKEN` or `NAME TOKEN max-active=N` a line; empty lines and lines that begin with `#` are
passed over. Tokens are kept
as hashes and compared in constant time. May import errors and libraries.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from typing import TYPE_CHECKING, final

from tidelock.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_SHORTEST_TOKEN = 16
_MAX_ACTIVE = re.compile(r"max-active=([1-9][0-9]{0,5})")


@final
class Tenants:
    """The known tokens.

    Args:
        tokens: Token by tenant name.
        max_active: Most active modules that a tenant's training passes may have, by name; others have no such limit.

    Attributes:
        max_active: As given.

    Raises:
        ConfigError: There is none, one is too short to be safe, or two tenants have the same.
    """

    def __init__(self, tokens: Mapping[str, str], max_active: Mapping[str, int] | None = None) -> None:
        self.max_active = dict(max_active or {})
        short = sorted(name for name, token in tokens.items() if len(token) < _SHORTEST_TOKEN)
        if short or not tokens:
            got = f"shorter ones for {short}" if short else "no tenant at all"
            msg = (
                f"Tokens: expected at least one tenant with a token of {_SHORTEST_TOKEN} characters or more, got "
                f"{got}. Make one with `openssl rand -hex 24`."
            )
            raise ConfigError(msg)
        self._names = {_hash(token): name for name, token in tokens.items()}
        if len(self._names) != len(tokens):
            shared = sorted(set(tokens) - set(self._names.values()))
            msg = f"Tokens: expected a token of its own for every tenant, got another's for {shared}. Make new ones."
            raise ConfigError(msg)

    @classmethod
    def from_file(cls, path: Path) -> Tenants:
        """Return the tenants of a tokens file.

        Raises:
            ConfigError: The file cannot be read, or a line has another form.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            msg = f"Tokens file: expected a readable text file, got {type(error).__name__} ({path}). Check the path."
            raise ConfigError(msg) from error
        tokens: dict[str, str] = {}
        max_active: dict[str, int] = {}
        for number, line in enumerate(lines, start=1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            limit = _MAX_ACTIVE.fullmatch(words[2]) if len(words) == 3 else None
            if not (len(words) == 2 or limit) or words[0] in tokens:
                msg = (
                    f"Tokens file: expected one `NAME TOKEN` or `NAME TOKEN max-active=N` a line, each name once, got "
                    f"another form ({path}, line {number}). Mend that line."
                )
                raise ConfigError(msg)
            tokens[words[0]] = words[1]
            if limit:
                max_active[words[0]] = int(limit[1])
        return cls(tokens, max_active)

    def tenant_of(self, metadata: Sequence[tuple[str, str | bytes]]) -> str | None:
        """Return the tenant whose token is in a call's metadata, or None."""
        for key, value in metadata:
            if key == "authorization" and isinstance(value, str) and value.startswith("Bearer "):
                shown = _hash(value.removeprefix("Bearer "))
                for known, name in self._names.items():
                    if hmac.compare_digest(known, shown):
                        return name
        return None


def new_token() -> str:
    """Return a fresh random token."""
    return secrets.token_hex(24)


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
