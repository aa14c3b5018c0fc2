"""Options of commands out of `RunConfig`'s fields, which declare every knob once. May import `run.config` and typer."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Annotated, get_type_hints

import typer

from tidelock.run.config import RunConfig

if TYPE_CHECKING:
    from collections.abc import Iterable


def data_argument(name: str) -> inspect.Parameter:
    """Return the argument for the examples to learn from."""
    argument = typer.Argument(help=_help(name), show_default=False)
    return _parameter(name, Annotated[str | None, argument], None)


def knob_options(names: Iterable[str]) -> list[inspect.Parameter]:
    """Return an option for each of these knobs of `RunConfig`."""
    hints = get_type_hints(RunConfig)
    defaults = {knob.name: "run" if knob.default is MISSING else knob.default for knob in fields(RunConfig)}
    return [option(name, hints[name], _help(name), default=defaults[name]) for name in names]


def option(name: str, hint: object, text: str, *, default: object) -> inspect.Parameter:
    """Return an option with the name of a parameter."""
    flag = f"--{name.replace('_', '-')}"
    declared = typer.Option(flag, help=text, show_default=default is not None and default is not False)
    return _parameter(name, Annotated[hint, declared], default)


def _help(name: str) -> str:
    text: str = next(knob.metadata["help"] for knob in fields(RunConfig) if knob.name == name)
    return text


def _parameter(name: str, annotation: object, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
