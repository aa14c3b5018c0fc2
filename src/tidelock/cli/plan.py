"""`tidelock plan train DATA` and `tidelock plan pool PROFILE`: what a run will take, before it begins."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidelock.cli.knobs import knob_options, option
from tidelock.cli.output import Output
from tidelock.errors import ConfigError
from tidelock.run.config import RunConfig

if TYPE_CHECKING:
    from tidelock.plan.forecast import Forecast
    from tidelock.plan.plan import Plan

SUBJECTS = ("train", "pool")
# What bytes, time or memory depend on, and where the cloud is.
_KNOBS = (
    *("split", "eval_data", "eval_split", "task", "num_labels", "model"),
    *("backbone", "cloud", "token_file", "ca", "client_cert", "client_key", "insecure"),
    *("codec", "gradient_codec", "stochastic_rounding", "in_flight", "micro_batches"),
    *("method", "rank", "target", "bottleneck", "place", "activation", "core_rank", "core_frames", "dropout", "layer"),
    *("reduction", "tap_width", "no_cache", "schedule", "budget", "threshold", "warm_up", "warm_up_active", "period"),
    *("killed", "epochs", "max_steps", "batch_size", "length_grouped", "no_share_prefix", "accumulate", "clip"),
    *("max_length", "truncate", "seed", "threads"),
)
# Of those, what a plan for a pool reads too.
_OF_POOL = frozenset({"micro_batches"})


def command(what: str, subject: str, *, link: str | None, batch_rows: int, json: bool, **knobs: Any) -> None:
    """Say what a run will take: bytes, time and memory of training over a link; or who in a pool would do what."""
    output, defaults = Output(json=json), _defaults()
    if what == "train":
        _refuse([] if batch_rows == defaults["batch_rows"] else ["batch_rows"], "plan pool")
        _plan_train(subject, link, knobs, output)
    elif what == "pool":
        given = [name for name, value in knobs.items() if value != defaults[name] and name not in _OF_POOL]
        _refuse([*given, *([] if link is None else ["link"])], "plan train")
        _plan_pool(Path(subject), batch_rows, knobs["micro_batches"], output)
    else:
        msg = f"Plan: expected one of {', '.join(SUBJECTS)}, got {what!r}. Say which comes first, then DATA or PROFILE."
        raise ConfigError(msg)


def _plan_train(data: str, link: str | None, knobs: dict[str, Any], output: Output) -> None:
    config = RunConfig(data=data, out="", **knobs)
    links, words = (import_module(f"tidelock.plan.{name}") for name in ("link", "forecast"))
    parsed = None if link is None else links.parse_link(link)
    # Loads torch, which --help must not wait for.
    run = import_module("tidelock.run.plan_train")
    output.quiet_libraries()
    found: Forecast = run.forecast(config, parsed, output.say)
    output.result(words.forecast_values(found), words.forecast_text(found))


def _plan_pool(profile: Path, batch_rows: int, micro_batches: int | None, output: Output) -> None:
    # Loads pydantic, which --help need not wait for.
    inputs, planning, words = (import_module(f"tidelock.plan.{name}") for name in ("inputs", "plan", "words"))
    plan: Plan = planning.make_plan(inputs.read_profile(profile), batch_rows, micro_batches)
    output.result(words.plan_values(plan), words.plan_text(plan))


def _refuse(names: list[str], belongs_to: str) -> None:
    if names:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        msg = f"Plan: expected {flags} with {belongs_to} only, got it here. Leave it out."
        raise ConfigError(msg)


def _defaults() -> dict[str, object]:
    return {name: parameter.default for name, parameter in _signature().parameters.items()}


def _signature() -> inspect.Signature:
    """Return the command's signature: what is planned, and the knobs of `RunConfig` on which a forecast depends."""
    what = typer.Argument(help="train, or pool.", metavar="WHAT", show_default=False)
    subject = typer.Argument(help="train: DATA, as for tidelock train; pool: PROFILE (JSON).", metavar="TARGET",
                             show_default=False)  # fmt: skip
    arguments = [
        inspect.Parameter("what", inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[str, what]),
        inspect.Parameter("subject", inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[str, subject]),
    ]
    own = [
        option("link", str | None, "train: RTT,RATE or RTT,UP/DOWN of the link to plan for, such as 40ms,50mbit; by "
               "default the one that is there.", default=None),
        option("batch_rows", int, "pool: rows of a batch, which is a step.", default=16),
        option("json", bool, "Print JSON objects only.", default=False),
    ]  # fmt: skip
    return inspect.Signature([*arguments, *knob_options(_KNOBS), *own])


command.__signature__ = _signature()  # type: ignore[attr-defined]  # typer reads it in place of **knobs
