"""`tidelock cache info|verify|clear FOLDER`: an activation cache."""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tidelock.cli.output import Output
from tidelock.errors import CacheError, ConfigError
from tidelock.units import format_bytes

if TYPE_CHECKING:
    from tidelock.cache.identity import CacheIdentity
    from tidelock.cache.upkeep import Group

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
        size: int = import_module("tidelock.cache.upkeep").clear(folder)
        stays = folder.exists()
        kept = " The folder has something else in it and stays." if stays else ""
        output.result(
            {"event": "cleared", "bytes": size, "folder_stays": stays},
            f"Removed {format_bytes(size)} of entries.{kept}",
        )


def _info(folder: Path, output: Output) -> None:
    # Loads torch, which --help must not wait for.
    groups: list[Group] = import_module("tidelock.cache.upkeep").groups_of(folder)
    for group in groups:
        values: dict[str, object] = {"event": "entries", "entries": group.entries, "bytes": group.size_bytes}
        values |= {"group": group.name, **(asdict(group.identity) if group.identity else {})}
        output.result(
            values, f"{group.entries:,} examples, {format_bytes(group.size_bytes)}: {_described(group.identity)}"
        )
    if not groups:
        output.result({"event": "empty"}, "No entries.")


def _described(identity: CacheIdentity | None) -> str:
    if identity is None:
        return "of what cannot be read; the next run that uses them says it again"
    width = "whole" if identity.tap_width is None else f"{identity.tap_width} wide"
    return (
        f"model {identity.model[:12]} in {identity.dtype}, {len(identity.taps)} taps, {width}, in {identity.codec}, "
        f"up to {identity.max_length} tokens"
    )


def _verify(folder: Path, key_path: Path | None, output: Output, *, remove: bool) -> None:
    upkeep, keys = import_module("tidelock.cache.upkeep"), import_module("tidelock.cache.key")
    count = sum(group.entries for group in upkeep.groups_of(folder))
    path = key_path or keys.default_key_path()
    if not path.is_file():
        msg = f"Cache key: expected the file with which the cache was made, got none ({path}). Give its --key."
        raise CacheError(msg)
    key, right, damaged = keys.CacheKey.open(path), 0, []
    with output.progress("Verifying", count) as progress:
        for entry, is_right in upkeep.verify(folder, key, remove=remove):
            right += is_right
            if not is_right:
                damaged.append(str(entry))
            progress.advance(damaged=len(damaged) or None)
    left = [entry for entry in damaged if Path(entry).exists()]
    values = {"event": "verified", "right": right, "damaged": damaged, "left": left, "removed": remove}
    output.result(values, "\n".join([f"{right:,} entries are right, {len(damaged):,} are damaged.", *damaged]))
    if left:
        advice = "Check permissions" if remove else "Remove them by --remove; they are computed again"
        msg = f"Cache: expected entries as they were written, got {len(left)} damaged ones ({folder}). {advice}."
        raise CacheError(msg)
