"""`tidelock cache info|verify|clear FOLDER`: an activation cache."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from tidelock.cli.output import Output
from tidelock.errors import CacheError, ConfigError
from tidelock.units import format_bytes

ACTIONS = ("info", "verify", "clear")


def command(
    action: Annotated[str, typer.Argument(help="info, verify or clear.", metavar="ACTION", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="The cache.", metavar="FOLDER", show_default=False)],
    *,
    key: Annotated[Path | None, typer.Option(help="verify: file with the cache's key; by default the user's.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="verify: remove damaged entries.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON objects only.")] = False,
) -> None:
    """Say what is in an activation cache (info), read every entry (verify), or remove it (clear)."""
    output = Output(json=json)
    if action not in ACTIONS:
        msg = f"Cache: expected one of {', '.join(ACTIONS)}, got {action!r}. Choose one of those."
        raise ConfigError(msg)
    if action != "verify" and (remove or key is not None):
        msg = f"Cache: expected --key and --remove with verify only, got them with {action}. Leave them out."
        raise ConfigError(msg)
    if action == "info":
        _info(folder, output)
    elif action == "verify":
        _verify(folder, key, output, remove=remove)
    else:
        size = import_module("tidelock.cache.store").clear(folder)
        output.result({"event": "cleared", "bytes": size}, f"Removed {format_bytes(size)} of entries.")


def _info(folder: Path, output: Output) -> None:
    # Loads torch, which --help must not wait for.
    store = import_module("tidelock.cache.store")
    store.read_about(folder)
    for identity, entries in store.identities_of(folder):
        sizes = [size for _, size in store.entries_of(entries)]
        values = {"event": "entries", "entries": len(sizes), "bytes": sum(sizes)}
        values |= {name: getattr(identity, name) for name in ("model", "dtype", "taps", "tap_width", "codec")}
        values |= {"tokenizer": identity.tokenizer, "max_length": identity.max_length}
        width = "whole" if identity.tap_width is None else f"{identity.tap_width} wide"
        output.result(
            values,
            f"{len(sizes):,} examples, {format_bytes(sum(sizes))}: model {identity.model[:12]} in {identity.dtype}, "
            f"{len(identity.taps)} taps, {width}, in {identity.codec}, up to {identity.max_length} tokens",
        )


def _verify(folder: Path, key_path: Path | None, output: Output, *, remove: bool) -> None:
    store, keys = import_module("tidelock.cache.store"), import_module("tidelock.cache.key")
    store.read_about(folder)
    path = key_path or keys.default_key_path()
    if not path.is_file():
        msg = f"Cache key: expected the file with which the cache was made, got none ({path}). Give its --key."
        raise CacheError(msg)
    damaged: list[Path] = []
    key, right = keys.CacheKey.open(path), 0
    for identity, _ in store.identities_of(folder):
        cache = store.ActivationCache(folder, key, identity)
        good, bad = cache.verify(remove=remove)
        cache.close()
        right, damaged = right + good, damaged + bad
    values = {"event": "verified", "right": right, "damaged": [str(path) for path in damaged], "removed": remove}
    output.result(values, f"{right:,} entries are right, {len(damaged):,} are damaged.")
    if damaged and not remove:
        msg = (
            f"Cache: expected entries as they were written, got {len(damaged)} damaged ones, such as {damaged[0]}. "
            "Remove them by --remove; they are computed again."
        )
        raise CacheError(msg)
