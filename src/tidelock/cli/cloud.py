"""`tidelock cloud MODEL`: serve the frozen blocks of a model to devices."""

from __future__ import annotations

import shlex
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from tidelock.cli.output import Output
from tidelock.cloud.turns import AT_ONCE_ON_CPU
from tidelock.errors import ConfigError, ListenRefused
from tidelock.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from tidelock.cloud.metrics import Metrics
    from tidelock.cloud.server import CloudServer, Listener
    from tidelock.cloud.tenants import Tenants
    from tidelock.model.load import ModelChoice
    from tidelock.wire.address import Address

SMOLLM2 = "smollm2"
_EVERY_ADDRESS = frozenset({"0.0.0.0", "::"})  # noqa: S104  (looked for, not listened at)
_PRIVACY = (
    "Privacy: nothing of what devices send is stored here, but whoever runs this process can read their text in it "
    "(tried with SmolLM2-135M: 99.9 % of the tokens); TLS and tokens keep others out, not the operator."
)


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help=f"Model folder, hub name, or {SMOLLM2}: a small one to try.", show_default=False
        ),
    ],
    *,
    listen: Annotated[str, typer.Option(help="HOST:PORT to listen at; port 0 takes a free one.")] = "127.0.0.1:7777",
    tls_cert: Annotated[Path | None, typer.Option(help="PEM file with the certificate chain to show.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file with its key.")] = None,
    client_ca: Annotated[
        Path | None, typer.Option(help="PEM file; ask devices for a certificate of this authority too.")
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(help="File with one 'NAME TOKEN [max-active=N]' a line; left out, a token is made and shown."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond this machine without TLS (inside a tunnel).")
    ] = False,
    torch_device: Annotated[str, typer.Option(help="Where the blocks run: cpu, cuda, cuda:1 or mps.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="What their weights are kept in: fp32, bf16, int8 or nf4.")] = "fp32",
    max_sessions: Annotated[int, typer.Option(min=1, help="Passes open at once, of a device up to 4; more wait.")] = 16,
    max_memory: Annotated[
        str | None, typer.Option(help="What open passes may keep together, such as 8GiB; more wait.")
    ] = None,
    max_active: Annotated[
        int | None, typer.Option(min=1, help="Active modules in a training pass; per tenant in the tokens file.")
    ] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Run blocks again on the way back: slower, but passes keep less memory.")
    ] = False,
    metrics: Annotated[str | None, typer.Option(help="HOST:PORT to serve Prometheus metrics at.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice by default.")] = None,
    at_once: Annotated[int | None, typer.Option(min=1, help="Passes that compute at once; 2 on a CPU, else 1.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON objects only.")] = False,
) -> None:
    """Serve the frozen blocks of a model to devices, until Ctrl-C."""
    output = Output(json=json)
    memory = None if max_memory is None else parse_bytes(max_memory)
    output.say(f"Loading {model} ...")
    listener = _listener(listen, tls_cert, tls_key, client_ca, insecure=insecure)
    tenants, token = _tenants(tokens)
    choice = _choice(model, dtype, torch_device, output)
    at_once = _share_threads(threads, at_once or (AT_ONCE_ON_CPU if torch_device == "cpu" else 1))
    # The usual way to stop a service: leave as after any error, tidying up, with exit code 0.
    signal.signal(signal.SIGTERM, _leave)
    # Loads torch, which --help must not wait for; so does what is called above.
    from tidelock.cloud.server import CloudServer
    from tidelock.cloud.service import Limits

    limits = Limits(max_sessions, max_memory_bytes=memory, at_once=at_once, max_active=max_active, recompute=recompute)
    counters = None if metrics is None else _metrics(metrics)
    _serve(CloudServer(choice, tenants, listener, limits=limits, metrics=counters), choice, token, output)


def _serve(server: CloudServer, choice: ModelChoice, token: str | None, output: Output) -> None:
    try:
        _announce(server, server.start(), choice, token, output)
        while True:
            threading.Event().wait(3600)
    except (KeyboardInterrupt, SystemExit):
        output.say("Stopping; passes that run have 5 s to end.")
        raise
    finally:
        server.stop()


def _listener(listen: str, cert: Path | None, key: Path | None, client_ca: Path | None, *, insecure: bool) -> Listener:
    """Return where to listen, once it is known to be allowed: before a model is loaded."""
    from tidelock.cloud.server import Listener
    from tidelock.wire.address import parse_listen

    listener = Listener(parse_listen(listen, tls=cert is not None), cert, key, client_ca, insecure)
    listener.credentials()
    _require_free(listener.address)
    return listener


def _require_free(address: Address) -> None:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        socket.create_server((address.host, address.port), family=family).close()
    except OSError as error:
        msg = (
            f"Listening at {address.target}: expected a free address of this machine, got {error.strerror or error}. "
            "Choose another, or port 0."
        )
        raise ListenRefused(msg) from error


def _share_threads(threads: int | None, at_once: int) -> int:
    """Give each pass that computes an equal part of the threads; return how many may compute at once."""
    import torch

    torch.set_num_threads(max(1, (threads or torch.get_num_threads()) // at_once))
    return at_once


def _choice(model: str, dtype: str, torch_device: str, output: Output) -> ModelChoice:
    """Return which model is served; a folder that is called like the small one is that folder."""
    from tidelock.model.load import ModelChoice
    from tidelock.model.smollm2 import fetch_smollm2

    output.quiet_libraries()
    if model == SMOLLM2 and not Path(model).is_dir():
        model = str(fetch_smollm2(on_progress=output.say))
    return ModelChoice(model, dtype, torch_device)


def _leave(_signal: int, _frame: object) -> NoReturn:
    sys.exit(0)


def _tenants(tokens: Path | None) -> tuple[Tenants, str | None]:
    """Return who may call, and the token that was made when no file names any."""
    from tidelock.cloud.tenants import Tenants, new_token

    if tokens is not None:
        return Tenants.from_file(tokens), None
    token = new_token()
    return Tenants({"default": token}), token


def _metrics(listen: str) -> Metrics:
    from tidelock.wire.address import parse_listen

    address = parse_listen(listen, tls=False)
    try:
        from tidelock.cloud.metrics import Metrics
    except ModuleNotFoundError as error:
        msg = "--metrics: expected prometheus_client, got no such package. Run: pip install 'tidelock[metrics]'."
        raise ConfigError(msg) from error
    return Metrics(address)


def _announce(server: CloudServer, address: Address, choice: ModelChoice, token: str | None, output: Output) -> None:
    import psutil

    described, family = server.description, server.geometry.family
    memory, per_token = psutil.Process().memory_info().rss, int(server.cost.per_token)
    verified = "verified" if family.verified else "unverified: cut by its structure; compare with peft before use"
    lines = [
        f"Model        {choice.model} ({described.num_blocks} blocks, {choice.dtype} on {choice.torch_device})",
        f"Family       {family.name} ({verified})",
        f"Fingerprint  {described.fingerprint[:16]}",
        f"Memory       {format_bytes(memory)} now; {format_bytes(per_token)} more a token of an open training pass",
        f"Listening    {address.url}",
        _PRIVACY,
        *([] if token is None else _how_to_train(address, token)),
        "Ctrl-C stops it.",
    ]
    values = {
        "event": "listening",
        "address": address.url,
        "model": choice.model,
        "model_type": described.model_type,
        "verified": family.verified,
        "num_blocks": described.num_blocks,
        "dtype": choice.dtype,
        "torch_device": choice.torch_device,
        "fingerprint": described.fingerprint,
        "memory_bytes": memory,
        "memory_bytes_per_token": per_token,
        "memory_bytes_per_token_squared": server.cost.per_token_squared,
        **({} if token is None else {"token": token}),
    }
    output.result(values, "\n".join(lines))


def _how_to_train(address: Address, token: str) -> list[str]:
    """Return the lines that show a fresh token, once, and how a device uses it."""
    host = socket.gethostname() if address.host in _EVERY_ADDRESS else address.host
    url = type(address)(host, address.port, address.tls).url
    options = ["--backbone", "cloud", "--cloud", url, "--token-file", "tidelock.token", "--out", "my-run"]
    trust = "    (add --ca FILE unless a public authority made the certificate)"
    return [
        "",
        "A token for one device, shown only now. There:",
        f"    (umask 077; echo {token} > tidelock.token)",
        f"    tidelock train examples.jsonl {shlex.join(options)}",
        *([trust] if address.tls else []),
        "",
    ]
