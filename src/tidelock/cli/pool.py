"""`tidelock pool train DATA` on one device of a pool, `tidelock pool join HOST:PORT` on the others."""

from __future__ import annotations

import inspect
import math
import os
import socket
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidelock.cli.knobs import knob_options, option
from tidelock.cli.output import Output
from tidelock.cli.progress import StepProgress
from tidelock.errors import ConfigError
from tidelock.run.config import RunConfig
from tidelock.run.folder import RunFolder
from tidelock.units import format_seconds
from tidelock.wire.address import parse_listen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tidelock.plan.inputs import Profile
    from tidelock.pool.layout import PoolLayout
    from tidelock.pool.meeting import MeetingPlace
    from tidelock.pool.torchrun import Launch
    from tidelock.run.pool import Decision, PoolResult
    from tidelock.wire.address import Address

ACTIONS = ("train", "join", "resume")
_KNOBS = (
    *("model", "out", "split", "eval_data", "eval_split", "eval_every", "max_length", "truncate", "task", "num_labels"),
    *("rank", "alpha", "rslora", "target", "bottleneck", "place", "activation", "dropout", "layer"),
    *("reduction", "side_init", "upsample", "side_output", "cache_codec", "cache_limit", "cache_key"),
    *("epochs", "batch_size", "learning_rate", "lr_schedule", "warmup_steps", "weight_decay", "clip", "seed"),
    *("save_every", "keep", "threads", "memory_limit"),
)
_OWN_OF_PEER = frozenset({"model", "out", "threads", "memory_limit", "cache_key"})
_OF_LEAD = ("local", "listen", "peers", "stage", "micro_batches", "profile")


def command(what: str, subject: str, *, json: bool = False, **options: Any) -> None:
    """Train on several of your own devices: DATA on one of them (train, resume), the others join it."""
    # Of a lost peer torch would print its own stack; this is read when it is loaded.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    output = Output(json=json)
    if what not in ACTIONS:
        msg = f"Pool: expected train DATA, resume RUN or join HOST:PORT, got {what!r}. Write one of them."
        raise ConfigError(msg)
    knobs = {name: options.pop(name) for name in (*_KNOBS, "method")}
    with ExitStack() as stack:
        launch = _launch(what, options)
        if launch is not None and launch.peer > 0:
            stack.enter_context(_into_log(what, subject, knobs, launch))
            what, subject, knobs, options = _joining(what, subject, knobs, options, launch)
        progress = stack.enter_context(StepProgress(output))
        act = {"train": _train, "resume": _resume, "join": _join}[what]
        result = act(subject, knobs, options, progress, output)
        _print(result, output)


def _print(result: PoolResult, output: Output) -> None:
    adapter = None if result.adapter is None else str(result.adapter)
    values = {"event": "done", "steps": result.steps, "loss": result.loss, "eval_loss": result.eval_loss}
    losses = (("the last batch's loss", result.loss), ("on the evaluation data", result.eval_loss))
    said = "".join(f", {what} {loss:.4f}" for what, loss in losses if loss is not None)
    lines = [f"Done: {result.steps} steps in {format_seconds(result.seconds)}{said}."]
    lines += [f"{result.adapter.name.capitalize()}: {adapter}"] if result.adapter else []
    output.result({**values, "seconds": round(result.seconds, 3), "adapter": adapter}, "\n".join(lines))


def _train(
    data: str, knobs: dict[str, Any], options: dict[str, Any], progress: StepProgress, output: Output
) -> PoolResult:
    config = RunConfig(data=data, **knobs)
    with _leading(options, config) as (meeting, count, start_others):
        run = import_module("tidelock.run.pool")
        output.quiet_libraries()
        layout_of = partial(_layout, options, count, config.batch_size)
        result: PoolResult = run.lead(config, meeting, count, layout_of, progress, start_others)
        return result


def _resume(
    folder: str, knobs: dict[str, Any], options: dict[str, Any], progress: StepProgress, output: Output
) -> PoolResult:
    _refuse_changed(knobs, [name for name in knobs if name != "memory_limit"])
    _refuse(options, ("stage", "micro_batches", "profile"), "pool train")
    run_folder = RunFolder.open(Path(folder))
    config = replace(run_folder.config(), out=folder)  # which may have been moved
    if knobs["memory_limit"] is not None:
        config = replace(config, memory_limit=knobs["memory_limit"])
        run_folder.write_config(config)
    with _leading(options, config) as (meeting, count, start_others):
        run = import_module("tidelock.run.pool")
        output.quiet_libraries()
        layout_of = partial(_layout, options, count, config.batch_size)
        result: PoolResult = run.resume(Path(folder), meeting, count, layout_of, progress, start_others)
        return result


@contextmanager
def _leading(options: dict[str, Any], config: RunConfig) -> Iterator[tuple[MeetingPlace, int, Callable[[], None]]]:
    """Open the meeting place; give it, the number of peers, and what starts the others if they are processes here."""
    _refuse(options, ("peer",), "pool join")
    local, listen, given = options["local"], options["listen"], options["peers"]
    launch = _launch("train", options)
    if launch is None and ((local is None) == (listen is None) or (listen is None) != (given is None)):
        msg = (
            "Pool: expected --local N, or --listen HOST:PORT with --peers N, or torchrun, got neither or both. "
            "Choose one."
        )
        raise ConfigError(msg)
    if launch is not None:
        _refuse(options, ("peers",), "--listen")
        listen, given = f"{launch.host}:0", launch.count
    count = given if local is None else local
    if count < 1:
        msg = f"Pool: expected at least 1 peer, got {count}. Give --local or --peers a larger number."
        raise ConfigError(msg)
    address = _trusted_address(listen or "127.0.0.1:0", options)
    # Loads torch, which --help must not wait for.
    places, processes = import_module("tidelock.pool.meeting"), import_module("tidelock.run.pool_processes")
    meeting, port = places.MeetingPlace.host(address.host, address.port, timeout_s=options["timeout"])
    if launch is not None:
        launch.tell_port(port, options["timeout"])
    with ExitStack() as stack:

        def start_others() -> None:
            if options["local"] is not None:
                own = ["--model", str(config.model), "--timeout", str(options["timeout"])]
                own += [] if config.threads is None else ["--threads", str(config.threads)]
                own += ["--memory-limit", config.memory_limit] if config.memory_limit else []
                own += ["--cache-key", config.cache_key] if config.cache_key else []
                where = f"{address.host}:{port}"
                stack.enter_context(processes.local_peers(count - 1, where, own, Path(config.out) / "peers"))

        yield meeting, count, start_others


def _join(
    where: str, knobs: dict[str, Any], options: dict[str, Any], progress: StepProgress, output: Output
) -> PoolResult:
    _refuse(options, _OF_LEAD, "pool train")
    _refuse_changed(knobs, [name for name in knobs if name not in _OWN_OF_PEER])
    address = _trusted_address(where, options)
    run, places = import_module("tidelock.run.pool"), import_module("tidelock.pool.meeting")
    processes = import_module("tidelock.run.pool_processes")
    output.quiet_libraries()
    own = RunConfig(data="", method="side", **{name: knobs[name] for name in _OWN_OF_PEER})
    meeting = places.MeetingPlace.find(
        address.host, address.port, own_host=_address_towards(address), timeout_s=options["timeout"]
    )
    given = options["peer"]
    # The number that it had, which what it has cached goes with.
    wish = processes.remembered_number(Path(own.out)) if given is None else given
    result: PoolResult = run.follow(own, meeting, progress, wish=wish, insists=given is not None)
    return result


def _launch(what: str, options: dict[str, Any]) -> Launch | None:
    """Return how torchrun has started this process, unless the options say how peers meet."""
    if what == "join" or options["local"] is not None or options["listen"] is not None:
        return None
    found: Launch | None = import_module("tidelock.pool.torchrun").Launch.of(os.environ)
    return found


def _peers_folder(what: str, subject: str, knobs: dict[str, Any]) -> Path:
    """Return where peers have their folders that are started with peer 0's own command."""
    return Path(knobs["out"] if what == "train" else subject) / "peers"


@contextmanager
def _into_log(what: str, subject: str, knobs: dict[str, Any], launch: Launch) -> Iterator[None]:
    """Have another peer than 0 print into its log, as with --local; errors are printed by who catches them."""
    folder = _peers_folder(what, subject, knobs)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"peer-{launch.peer}.log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        yield


def _joining(
    what: str, subject: str, knobs: dict[str, Any], options: dict[str, Any], launch: Launch
) -> tuple[str, str, dict[str, Any], dict[str, Any]]:
    """Return peer 0's own command, as torchrun gives it to all, as one that joins peer 0."""
    own = {name: value if name in _OWN_OF_PEER else _default(name) for name, value in knobs.items()}
    own["out"] = str(_peers_folder(what, subject, knobs) / f"peer-{launch.peer}")
    if what == "resume":
        own["model"] = RunFolder.open(Path(subject)).config().model
    others = {name: None if name in _OF_LEAD else value for name, value in options.items()}
    _trusted_address(f"{launch.host}:0", options)
    where = f"{launch.host}:{launch.ask_port(options['timeout'])}"
    return "join", where, own, {**others, "peer": launch.peer}


def _layout(
    options: dict[str, Any], first_count: int, batch_size: int, num_blocks: int, count: int, measured: Profile | None
) -> Decision | None:
    """Return who computes what, as `run.pool.LayoutOf`."""
    if measured is None and count != first_count:  # what was said was said of another pool
        return None
    layouts = import_module("tidelock.run.pool_layout")
    layout: PoolLayout
    if measured is None and options["profile"] is None:
        if not options["stage"]:
            return None
        layout = layouts.written_layout(options["stage"], num_blocks, count, options["micro_batches"])
        return layout, None
    if options["profile"] is not None and options["stage"]:
        msg = "Pool: expected --profile or --stage, got both. The plan for the profile says the stages; leave one out."
        raise ConfigError(msg)
    inputs, planning = (import_module(f"tidelock.plan.{name}") for name in ("inputs", "plan"))
    profile = measured or inputs.read_profile(options["profile"])
    layout = layouts.planned_layout(
        planning.make_plan(profile, batch_size, options["micro_batches"]), profile, num_blocks
    )
    if layout.num_peers != count:
        msg = f"Pool: expected {layout.num_peers} peers, as the profile has devices, got {count}. Start as many."
        raise ConfigError(msg)
    return layout, profile


def _refuse(options: dict[str, Any], names: Iterable[str], belongs_to: str) -> None:
    given = [f"--{name.replace('_', '-')}" for name in names if options[name] not in (None, False)]
    if given:
        msg = f"Pool: expected {', '.join(given)} with {belongs_to} only, got it here. Leave it out."
        raise ConfigError(msg)


def _refuse_changed(knobs: dict[str, Any], names: Iterable[str]) -> None:
    """Refuse options of the run that are not as they are by default."""
    _refuse({name: value if value != _default(name) else None for name, value in knobs.items()}, names, "pool train")


def _default(name: str) -> object:
    return _signature().parameters[name].default


def _trusted_address(text: str, options: dict[str, Any]) -> Address:
    """Return where peers meet; refuse a network that nobody has said is trusted.

    Peers neither encrypt nor ask who connects.
    """
    if not 0 < options["timeout"] < math.inf:
        msg = f"--timeout: expected seconds above 0, got {options['timeout']}. Change it."
        raise ConfigError(msg)
    address = parse_listen(text, tls=False)
    if not address.is_loopback and not options["trust_network"]:
        msg = (
            f"Pool: expected an address of this machine alone, got {address.host}: peers send the examples and the "
            "model's states in clear, to whoever connects. On a network of your own, or inside WireGuard, say "
            "--trust-network."
        )
        raise ConfigError(msg)
    return address


def _address_towards(address: Address) -> str:
    """Return this machine's address on the way to another."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address.host, address.port))  # sends nothing
        return str(probe.getsockname()[0])


def _signature() -> inspect.Signature:
    what = typer.Argument(help="train or resume, on the device with the data; join, on the others.", metavar="WHAT",
                          show_default=False)  # fmt: skip
    subject = typer.Argument(help="train: DATA; resume: the run's folder; join: HOST:PORT of peer 0.", metavar="TARGET",
                            show_default=False)  # fmt: skip
    arguments = [
        inspect.Parameter("what", inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[str, what]),
        inspect.Parameter("subject", inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[str, subject]),
    ]
    own = [
        option("method", str, "What is trained: side (blocks run in the first epoch only), lora, adapter, full.",
               default="side"),
        option("local", int | None, "train: run all peers here, as so many processes.", default=None),
        option("listen", str | None, "train: HOST:PORT of this device, at which the others join.", default=None),
        option("peers", int | None, "train: how many devices there are, this one among them.", default=None),
        option("stage", list[str] | None, "train: FIRST-LAST@PEER,PEER*SHARE (repeat): who has which blocks.",
               default=None),
        option("micro_batches", int | None, "train: parts of a batch that go through the stages one by one.",
               default=None),
        option("profile", Path | None, "train: a profile of the pool, whose plan says the stages.", default=None),
        option("peer", int | None, "join: this device's number at the start; by default in the order of joining.",
               default=None),
        option("timeout", float, "Seconds after which a silent peer counts as lost.", default=60.0),
        option("trust_network", bool, "The network between the peers is your own, or a tunnel.", default=False),
        option("json", bool, "Print JSON objects only.", default=False),
    ]  # fmt: skip
    return inspect.Signature([*arguments, *knob_options(_KNOBS), *own])


command.__signature__ = _signature()  # type: ignore[attr-defined]  # typer reads it in place of **options
