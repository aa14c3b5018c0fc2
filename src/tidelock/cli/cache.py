"""`tidelock cache DATA FOLDER` and `tidelock cache info|verify|clear FOLDER`: an activation cache."""

from __future__ import annotations

import functools
import inspect
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidelock.cli.knobs import knob_options, option
from tidelock.cli.output import Output
from tidelock.errors import CacheError, ConfigError
from tidelock.run.config import RunConfig
from tidelock.units import format_bytes

if TYPE_CHECKING:
    from tidelock.cache.identity import CacheIdentity
    from tidelock.cache.upkeep import Group
    from tidelock.run.cache_ahead import Cached

ACTIONS = ("info", "verify", "clear")
# What an entry depends on, and where it is computed and kept.
_KNOBS = (
    *("split", "eval_data", "eval_split", "task", "num_labels", "model", "layer", "tap_width"),
    *("backbone", "cloud", "token_file", "ca", "client_cert", "client_key", "insecure"),
    *("codec", "in_flight", "patience"),
    *("cache_codec", "cache_limit", "cache_key", "max_length", "truncate", "threads"),
)


def command(what: str, folder: Path, *, remove: bool = False, json: bool = False, **knobs: Any) -> None:
    """Fill an activation cache before a run (DATA), say what is in one (info), read every entry (verify), remove it."""
    output = Output(json=json)
    if what not in ACTIONS:
        _fill(what, folder, knobs, output, remove=remove)
        return
    _refuse_others(what, knobs, remove=remove)
    if what == "info":
        _info(folder, output)
    elif what == "verify":
        _verify(folder, None if knobs["cache_key"] is None else Path(knobs["cache_key"]), output, remove=remove)
    else:
        _clear(folder, output)


def _refuse_others(action: str, knobs: dict[str, Any], *, remove: bool) -> None:
    """Refuse options that an action would not read."""
    taken = {"cache_key"} if action == "verify" else set()
    defaults = {name: parameter.default for name, parameter in _signature().parameters.items()}
    others = [name for name, value in knobs.items() if value != defaults[name] and name not in taken]
    others += ["remove"] if remove and action != "verify" else []
    if others:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        own = " and --cache-key, --remove" if action == "verify" else ""
        msg = f"Cache: expected {action} with FOLDER{own} only, got {flags}. Leave it out."
        raise ConfigError(msg)


def _fill(data: str, folder: Path, knobs: dict[str, Any], output: Output, *, remove: bool) -> None:
    if remove:
        msg = "Cache: expected --remove with verify only, got it with DATA. Leave it out."
        raise ConfigError(msg)
    config = RunConfig(data=data, out="", method="side", side_init="random", cache=str(folder), **knobs)
    # Loads torch, which --help must not wait for.
    module = import_module("tidelock.run.cache_ahead")
    output.quiet_libraries()
    cached: Cached = module.cache_ahead(config, output.say, functools.partial(output.progress, "Example"))
    output.result(
        {"event": "cached", **asdict(cached)},
        f"{cached.examples:,} examples are in {folder}, {cached.computed:,} of them new.",
    )


def _clear(folder: Path, output: Output) -> None:
    size: int = import_module("tidelock.cache.upkeep").clear(folder)
    stays = folder.exists()
    kept = " The folder has something else in it and stays." if stays else ""
    output.result(
        {"event": "cleared", "bytes": size, "folder_stays": stays}, f"Removed {format_bytes(size)} of entries.{kept}"
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
    crossed = "" if identity.wire_codec == "fp32" else f", crossed in {identity.wire_codec}"
    return (
        f"model {identity.model[:12]} in {identity.dtype}, {len(identity.taps)} taps, {width}, in {identity.codec}"
        f"{crossed}"
    )


def _verify(folder: Path, key_path: Path | None, output: Output, *, remove: bool) -> None:
    upkeep, keys = import_module("tidelock.cache.upkeep"), import_module("tidelock.cache.key")
    count = sum(group.entries for group in upkeep.groups_of(folder))
    path = key_path or keys.default_key_path()
    if not path.is_file():
        msg = f"Cache key: expected the file with which the cache was made, got none ({path}). Give its --cache-key."
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


def _signature() -> inspect.Signature:
    """Return the command's signature: what is done, where, and the knobs of `RunConfig` on which an entry depends."""
    what = typer.Argument(
        help="DATA to cache, as for train; or info, verify, clear.", metavar="WHAT", show_default=False
    )
    folder = typer.Argument(help="The cache.", metavar="FOLDER", show_default=False)
    arguments = [
        inspect.Parameter("what", inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[str, what]),
        inspect.Parameter("folder", inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[Path, folder]),
    ]
    others = [
        option("remove", bool, "verify: remove damaged entries.", default=False),
        option("json", bool, "Print JSON objects only.", default=False),
    ]
    return inspect.Signature([*arguments, *knob_options(_KNOBS), *others])


command.__signature__ = _signature()  # type: ignore[attr-defined]  # typer reads it in place of **knobs
