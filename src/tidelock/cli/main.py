"""The `tidelock` command: finds the command that was asked for, runs it, and turns errors into lines and exit codes.

Only the module of that one command is imported, and it imports its part of tidelock when it runs, so that `--help` is
quick. May import errors and small libraries.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import sys
import traceback
import warnings
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidelock.errors import INTERRUPTED_EXIT_CODE, StorageError, TidelockError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Name of a command, which is that of its module too, and its line in the list.
COMMANDS = {
    "demo": "The whole story on this machine: a cloud, a device, real sockets.",
    "cloud": "Serve the frozen blocks of a model to devices.",
    "train": "Train an adapter on private examples, which stay on this device.",
    "generate": "Ask a trained model.",
    "eval": "Measure a trained model on labelled data.",
    "export": "Write a run's adapter for use elsewhere, or a merged model.",
    "cache": "Fill an activation cache ahead of a run, look at it, check or remove it.",
    "plan": "Say what a run will take before it begins: bytes, time, memory; or who in a pool does what.",
    "pool": "Train on several of your own devices together.",
    "report": "Draw a run: loss, module activity, traffic and time.",
    "doctor": "Say what this machine can do, and what is wrong.",
}
_USAGE_ERRORS = typer.BadParameter.__bases__  # UsageError, which typer does not export


def main() -> None:
    """Run the command line and exit with its code."""
    # Device and cloud may share this machine's cores. By default OpenMP's threads spin while they wait for each other,
    # which takes the processor from the other process: measured, up to eight times the device's own computing.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # A short spin, about half a millisecond, loses nothing to waking up; GNU's OpenMP only.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if not sys.warnoptions:
        # What these libraries say to each other about their next versions is not for who runs a command.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(peft|transformers|trl)\b")
    sys.exit(run(sys.argv[1:]))


def run(args: Sequence[str]) -> int:
    """Run one command; return its exit code.

    Args:
        args: What follows `tidelock` on the command line.
    """
    as_json = "--json" in args
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what gRPC would log is in our errors
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # likewise of torch.distributed
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.ERROR if as_json else logging.WARNING)
    # peft imports bitsandbytes where it is installed, which says that it lacks a kernel for answering; none is missed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        group = typer.main.get_command(_app(next((arg for arg in args if not arg.startswith("-")), None)))
        code = group.main(args=list(args) or ["--help"], prog_name="tidelock", standalone_mode=False)
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:  # noqa: BLE001  (the edge of the process: nothing above could report it)
        return _report(error, as_json=as_json)
    return code if isinstance(code, int) else 0


def _app(called: str | None) -> typer.Typer:
    """Return the command line with the called command in full, and the others as lines in its list."""
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        help="Fine-tune a language model across your device and a cloud; text, labels and adapter stay with you.",
        epilog=_exit_codes(),
    )
    app.callback()(_root)
    for name, line in COMMANDS.items():
        function = _interruptible(import_module(f"tidelock.cli.{name}").command) if name == called else _listed
        app.command(name, short_help=line)(function)
    return app


def _print_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"tidelock {version('tidelock')}\n")
        raise typer.Exit


def _root(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_print_version, show_default=False
        ),
    ] = False,
) -> None:
    """Take the options of the group; `--version` has done its work when this runs."""


def _listed() -> None:
    """Stand for a command that was not called."""


def _interruptible(command: Callable[..., object]) -> Callable[..., object]:
    """Return the command with Ctrl-C as an exit code; typer's versions differ in what they make of it."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> object:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            raise typer.Exit(_interrupted()) from None

    return guarded


def _interrupted() -> int:
    sys.stderr.write("\nInterrupted.\n")
    return INTERRUPTED_EXIT_CODE


def _exit_codes() -> str:
    kinds: list[type[TidelockError]] = [TidelockError, *TidelockError.__subclasses__()]
    listed = ", ".join(f"{code} {name}" for code, name in sorted((kind.exit_code, kind.__name__) for kind in kinds))
    return f"Exit codes: 0 done, {listed}, {INTERRUPTED_EXIT_CODE} interrupted."


def _report(error: Exception, *, as_json: bool) -> int:
    """Print the one line of an error, for machines too; return the exit code."""
    kind, message, exit_code = _explain(error)
    sys.stderr.write(f"error: {message}\n")
    if as_json:
        values = {"error": {"type": kind, "message": message, "exit_code": exit_code}}
        sys.stdout.write(json.dumps(values) + "\n")
    return exit_code


def _explain(error: Exception) -> tuple[str, str, int]:
    """Return an error's kind, what to tell a person, and the exit code; print the traceback of an unexpected one."""
    kind = type(error).__name__
    if isinstance(error, TidelockError):
        return kind, error.message, error.exit_code
    if isinstance(error, _USAGE_ERRORS):
        usage: Any = error
        command = usage.ctx.command_path if usage.ctx is not None else "tidelock"
        return kind, f"{usage.format_message().rstrip('.')}. Try '{command} --help'.", usage.exit_code
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" ({error.filename})" if error.filename else ""
        message = f"Writing a file: expected room on the disk, got none left{where}. Free some space."
        return StorageError.__name__, message, StorageError.exit_code
    traceback.print_exception(error)
    message = f"{kind}, which tidelock did not expect. Please report it with the lines above."
    return kind, message, TidelockError.exit_code
