from __future__ import annotations

import errno
import json
import subprocess
import sys
from types import ModuleType

import pytest

from tidelock.cli import main as cli
from tidelock.errors import DataError, TidelockError


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes `tidelock fake` do what it is given."""

    def install(action) -> None:
        def command(name: str = "x", json: bool = False) -> None:
            """Do something."""
            action()

        module = ModuleType("tidelock.cli.fake")
        module.command = command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "tidelock.cli.fake", module)
        monkeypatch.setitem(cli.COMMANDS, "fake", "Does something.")

    return install


def raising(error: BaseException):
    def action() -> None:
        raise error

    return action


def test_help_lists_every_command_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, line in cli.COMMANDS.items():
        assert f"{name} {line}" in shown
    for kind in TidelockError.__subclasses__():
        assert f"{kind.exit_code} {kind.__name__}" in shown


def test_without_a_command_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 0
    assert "Commands:" in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_that_loads_nothing_heavy(name: str) -> None:
    code = (
        "import sys\nfrom tidelock.cli.main import run\n"
        f"code = run([{name!r}, '--help'])\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'grpc', 'numpy', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"Usage: tidelock {name}" in done.stdout
    assert "--json" in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tidelock ")


def test_main_exits_with_the_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["tidelock", "nonsense"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "No such command 'nonsense'" in capsys.readouterr().err


def test_a_command_runs_and_gives_0(fake) -> None:
    ran = []
    fake(lambda: ran.append(1))
    assert cli.run(["fake"]) == 0
    assert ran == [1]


@pytest.mark.parametrize("args", [["fake", "--bogus"], ["--bogus"], ["fake", "too", "many"]])
def test_a_wrong_option_is_one_line(fake, capsys: pytest.CaptureFixture[str], args: list[str]) -> None:
    fake(lambda: None)
    assert cli.run(args) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("--help'.")


def test_an_expected_error_is_one_line_and_its_code(fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake(raising(DataError("Row: expected a string, got a number (x.jsonl, line 3). Mend it.")))
    assert cli.run(["fake"]) == DataError.exit_code
    shown = capsys.readouterr()
    assert shown.err == "error: Row: expected a string, got a number (x.jsonl, line 3). Mend it.\n"
    assert shown.out == ""


def test_an_error_is_json_too(fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake(raising(DataError("No.")))
    assert cli.run(["fake", "--json"]) == DataError.exit_code
    expected = {"error": {"type": "DataError", "message": "No.", "exit_code": 3}}
    assert json.loads(capsys.readouterr().out) == expected


def test_a_wrong_option_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "--json", "--bogus"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2


def test_ctrl_c_is_a_short_message_and_130(fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake(raising(KeyboardInterrupt()))
    assert cli.run(["fake"]) == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"


def test_ctrl_c_while_starting_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_app", lambda called: raising(KeyboardInterrupt())())
    assert cli.run(["doctor"]) == 130


def test_a_full_disk_is_a_storage_error(fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake(raising(OSError(errno.ENOSPC, "No space left on device", "/runs/x")))
    assert cli.run(["fake", "--json"]) == 6
    shown = capsys.readouterr()
    assert shown.err.startswith("error: Writing a file: expected room on the disk, got none left (/runs/x).")
    assert json.loads(shown.out)["error"]["type"] == "StorageError"


@pytest.mark.parametrize("error", [ZeroDivisionError("oh"), PermissionError(errno.EACCES, "Permission denied")])
def test_the_unexpected_has_a_traceback_and_asks_for_a_report(
    fake, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    fake(raising(error))
    assert cli.run(["fake"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "Please report it" in shown.splitlines()[-1]
