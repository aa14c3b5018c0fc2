"""`tidelock train DATA`: train an adapter on private examples."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tidelock.cli.knobs import data_argument, knob_options, option
from tidelock.cli.output import Output
from tidelock.cli.progress import StepProgress
from tidelock.errors import INTERRUPTED_EXIT_CODE, ConfigError
from tidelock.run.config import RunConfig
from tidelock.run.folder import RunFolder
from tidelock.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from tidelock.run.train import TrainResult


# What a resumed run may have otherwise than it began: nothing that its result depends on.
_CHANGEABLE = frozenset(
    {
        *("out", "cloud", "token_file", "ca", "client_cert", "client_key", "insecure", "patience", "threads", "keep"),
        *("report_to", "cache", "cache_limit", "cache_key"),
    }
)


def command(*, resume: bool = False, json: bool = False, **knobs: Any) -> None:
    """Train an adapter on private examples; the text, the labels and the adapter stay on this device."""
    output = Output(json=json)
    config = _resumed(knobs) if resume else _new(knobs)
    with StepProgress(output) as progress:
        # Loads torch, which --help must not wait for.
        train = import_module("tidelock.run.train").train
        output.quiet_libraries()
        result: TrainResult = train(config, progress, resume=resume)
    _report(result, Path(config.out), output)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED_EXIT_CODE)


def _new(knobs: dict[str, Any]) -> RunConfig:
    if knobs["data"] is None:
        msg = "Training: expected DATA to learn from, got none. Name a file or a hub data set, or use --resume."
        raise ConfigError(msg)
    return RunConfig(**knobs)


def _resumed(knobs: dict[str, Any]) -> RunConfig:
    """Return the configuration that a run began with; only where its folder and its cloud are may have changed."""
    defaults = {name: parameter.default for name, parameter in _signature().parameters.items()}
    given = {name: value for name, value in knobs.items() if value != defaults[name] or name == "out"}
    fixed = sorted(f"--{name.replace('_', '-')}" for name in given if name not in _CHANGEABLE)
    if fixed:
        msg = (
            f"Resuming: expected only --out and where the cloud is, got {', '.join(fixed)}. A resumed run keeps what "
            "it began with; start another one for other settings."
        )
        raise ConfigError(msg)
    return replace(RunFolder.open(Path(knobs["out"])).config(), **given)


def _report(result: TrainResult, out: Path, output: Output) -> None:
    # Loaded with the training.
    describe_distortion = import_module("tidelock.run.codecs").describe_distortion
    sent = sum(result.traffic_bytes.get("sent", {}).values())
    received = sum(result.traffic_bytes.get("received", {}).values())
    lines = [
        f"Stopped after step {result.steps}; all up to it is saved. Go on with: tidelock train --resume --out {out}"
        if result.interrupted
        else f"Done: {result.steps} steps in {format_seconds(result.seconds)}.",
        f"Loss {_shown(result.loss)}; on the evaluation data {_shown(result.eval_loss)}{_measured(result)}.",
        f"Crossed the wire: {format_bytes(sent)} sent, {format_bytes(received)} received ({out / 'ledger.json'}).",
        *([f"{describe_distortion(result.codec_error)}."] if result.codec_error else []),
        *([_all_modules_line(result)] if result.adapter_all is not None else []),
        f"Adapter: {result.adapter}",
    ]
    values = {
        "event": "interrupted" if result.interrupted else "done",
        "steps": result.steps,
        "loss": result.loss,
        "eval_loss": result.eval_loss,
        "eval_metrics": result.eval_metrics,
        "eval_loss_all_modules": result.eval_loss_all_modules,
        "active": list(result.active),
        "seconds": round(result.seconds, 3),
        "traffic_bytes": result.traffic_bytes,
        "codec_error": result.codec_error,
        "adapter": str(result.adapter),
    }
    output.result(values, "\n".join(lines))


def _all_modules_line(result: TrainResult) -> str:
    blocks = ", ".join(map(str, result.active))
    return (
        f"Active at the end: the modules of blocks {blocks}. With the killed ones too, on the evaluation data "
        f"{_shown(result.eval_loss_all_modules)}: {result.adapter_all}"
    )


def _measured(result: TrainResult) -> str:
    return "".join(f", {name.replace('_', ' ')} {value:.4f}" for name, value in result.eval_metrics.items())


def _shown(loss: float | None) -> str:
    return "not measured" if loss is None else f"{loss:.4f}"


def _signature() -> inspect.Signature:
    """Return the command's signature: an option for every knob of `RunConfig` but those of pools."""
    data, *names = (knob.name for knob in fields(RunConfig) if knob.name != "memory_limit")
    others = [
        option("resume", bool, "Go on with the run in --out, with the options that it has.", default=False),
        option("json", bool, "Print JSON objects only.", default=False),
    ]
    return inspect.Signature([data_argument(data), *knob_options(names), *others])


command.__signature__ = _signature()  # type: ignore[attr-defined]  # typer reads it in place of **knobs
