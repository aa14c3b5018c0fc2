"""`tidelock doctor`: what this machine can do, and what is wrong."""

from __future__ import annotations

import textwrap
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidelock.cli.output import Output
from tidelock.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidelock.run.doctor import Fact

_WIDTH = 100
# Topics whose facts are short enough to share lines.
_DENSE = frozenset({"libraries"})


def command(
    model: Annotated[str | None, typer.Option(help="Look at this model too: a folder or a hub name.")] = None,
    sites: Annotated[bool, typer.Option("--sites", help="With --model: list every site and its projections.")] = False,
    cloud: Annotated[str | None, typer.Option(help="Try this cloud too: grpcs://HOST:PORT.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with the bearer token for it.")] = None,
    ca: Annotated[Path | None, typer.Option(help="PEM file with the authority, or its certificate, to trust.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what this machine can do, and what is wrong; exits with the code of the first fault."""
    output = Output(json=json)
    _require(cloud, "--cloud", token_file, "--token-file")
    _require(cloud, "--cloud", ca, "--ca")
    _require(model, "--model", sites, "--sites")
    from tidelock.run.doctor import examine_machine, first_fault  # needs libraries that --help does not

    facts = list(examine_machine())
    if model is not None or cloud is not None:
        from tidelock.run.doctor_model import examine_cloud, examine_model  # loads torch and grpc

        facts += examine_model(model, all_sites=sites) if model is not None else ()
        facts += examine_cloud(cloud, token_file, ca, model) if cloud is not None else ()
    output.result(_as_values(facts), _as_text(facts))
    fault = first_fault(facts)
    if fault is not None:
        raise typer.Exit(fault.exit_code)


def _require(needed: str | None, needed_name: str, given: object, given_name: str) -> None:
    if given and needed is None:
        msg = f"{given_name}: expected {needed_name} with it, got none. Give both."
        raise ConfigError(msg)


def _as_values(facts: Sequence[Fact]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for fact in facts:
        values.setdefault(fact.topic.replace(" ", "_"), {})[fact.name.replace(" ", "_")] = fact.value
    values["faults"] = [
        {"type": type(fact.fault).__name__, "message": fact.fault.message, "exit_code": fact.fault.exit_code}
        for fact in facts
        if fact.fault is not None
    ]
    return values


def _as_text(facts: Sequence[Fact]) -> str:
    lines: list[str] = []
    for topic, group in groupby(facts, key=lambda fact: fact.topic):
        lines += ["", topic.capitalize(), *_section(list(group), dense=topic in _DENSE)]
    faults = [fact.fault.message for fact in facts if fact.fault is not None]
    if not faults:
        return "\n".join([*lines[1:], "", "Nothing is wrong."])
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    return "\n".join([*lines[1:], "", f"{count}:", *(f"  {number}. {text}" for number, text in enumerate(faults, 1))])


def _section(facts: Sequence[Fact], *, dense: bool) -> list[str]:
    if dense:
        listed = ", ".join(f"{fact.name} {fact.text}" + (" (WRONG)" if fact.fault else "") for fact in facts)
        return textwrap.wrap(
            listed, _WIDTH, initial_indent="  ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
    width = max(len(fact.name) for fact in facts)
    return [f"  {fact.name:<{width}}  {fact.text}" + ("  (WRONG)" if fact.fault else "") for fact in facts]
