from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.certs import make_certificates
from tests.support.tiny_models import save_tiny_model
from tidelock.backbone.connection import Connection
from tidelock.cli.main import run
from tidelock.errors import ConfigError, ListenRefused, ModelError
from tidelock.wire.address import parse_url
from tidelock.wire.channel import Credentials
from tidelock.wire.egress import Egress
from tidelock.wire.ledger import Ledger

ANYWHERE = ("--listen", "127.0.0.1:0", "--threads", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def sigterm_as_before():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@contextmanager
def cloud(*args: object):
    """Start `tidelock cloud`; kill it in the end if it still runs."""
    command = [sys.executable, "-m", "tidelock", "cloud", *map(str, args)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def description(address: str, token: str, ca: Path | None = None):
    connection = Connection(parse_url(address), Credentials(token, ca), Egress(Ledger()), patience_seconds=0)
    connection.close()
    return connection.description


def test_with_json_it_says_where_it_listens_and_the_token_works(model: Path) -> None:
    with cloud(model, *ANYWHERE, "--json", "--max-memory", "1GiB") as process:
        assert process.stdout is not None
        event = json.loads(process.stdout.readline())
        assert event["event"] == "listening"
        assert event["model_type"] == "llama"
        assert event["verified"] is True
        described = description(event["address"], event["token"])
        assert described.fingerprint == event["fingerprint"]
        process.send_signal(signal.SIGTERM)
        rest, errors = process.communicate(timeout=30)
        assert (process.returncode, rest, errors) == (0, "", "")


def test_for_people_it_prints_a_command_that_works_and_says_what_it_can_read(model: Path) -> None:
    with cloud(model, *ANYWHERE) as process:
        assert process.stdout is not None
        shown = ""
        while "Ctrl-C stops it" not in shown:
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            shown += line
        assert "Family       llama (verified)" in shown
        assert "can read their text" in shown
        token = re.search(r"echo (\S+) > tidelock\.token", shown)
        address = re.search(r"--cloud (\S+) --token-file tidelock\.token", shown)
        assert token is not None
        assert address is not None
        described = description(address[1], token[1])
        assert described.fingerprint[:16] in shown
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "Traceback" not in errors
        assert errors.endswith("\nInterrupted.\n")


def test_with_tls_and_a_tokens_file_no_token_is_made(model: Path, tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path)
    token = "0123456789abcdef"
    (tmp_path / "tokens").write_text(f"me {token}\n")
    tls = ("--tls-cert", certificates.cert, "--tls-key", certificates.key, "--tokens", tmp_path / "tokens")
    with cloud(model, *ANYWHERE, *tls, "--json", "--dtype", "bf16") as process:
        assert process.stdout is not None
        event = json.loads(process.stdout.readline())
        assert event["address"].startswith("grpcs://")
        assert "token" not in event
        assert description(event["address"], token, certificates.ca).backbone_dtype == "bf16"


def test_the_process_loads_no_data_and_no_tokenizer(model: Path) -> None:
    code = (
        "import signal, sys, threading\n"
        "from tidelock.cli.main import run\n"
        "threading.Event.wait = lambda self, timeout=None: sys.exit(0)\n"
        "try:\n"
        f"    run(['cloud', {str(model)!r}, '--listen', '127.0.0.1:0', '--json'])\n"
        "except SystemExit:\n"
        "    pass\n"
        "print('|'.join(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    loaded = set(done.stdout.splitlines()[-1].split("|"))
    assert "tidelock.cloud.server" in loaded, done.stderr
    private = ("tidelock.data", "tidelock.device", "tidelock.peft", "tidelock.run", "datasets", "peft")
    assert [name for name in loaded if name.split(".")[0] in private or name.startswith(private)] == []
    assert "transformers.models.auto.tokenization_auto" not in loaded


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    code = run(["cloud", *map(str, args)])
    shown = capsys.readouterr()
    assert shown.out == ""
    return code, shown.err.splitlines()[-1]


def test_beyond_loopback_it_wants_tls(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = refused(capsys, "no-such-model", "--listen", "0.0.0.0:0")
    assert code == ListenRefused.exit_code
    assert "--insecure only inside a tunnel" in said


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--tls-cert", "cert.pem"], "--tls-cert and --tls-key"),
        (["--tls-cert", "gone.pem", "--tls-key", "gone.pem"], "gone.pem"),
        (["--client-ca", "ca.pem"], "--tls-cert and --tls-key"),
        (["--listen", "7777"], "expected HOST:PORT"),
        (["--tokens", "no-such-file"], "no-such-file"),
        (["--max-memory", "much"], "expected a number with a unit"),
        (["--max-sessions", "0"], "--max-sessions"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_a_wrong_option_is_refused_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str], args: list[str], said: str
) -> None:
    code, line = refused(capsys, "no-such-model", *args)
    assert code == ConfigError.exit_code
    assert said in line


@pytest.mark.parametrize(("option", "value"), [("--dtype", "fp8"), ("--torch-device", "cuda:77")])
def test_what_the_machine_has_not_is_refused(
    capsys: pytest.CaptureFixture[str], model: Path, option: str, value: str
) -> None:
    code, line = refused(capsys, model, *ANYWHERE[:2], option, value)
    assert code == ConfigError.exit_code
    assert value in line


def test_a_missing_model_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, line = refused(capsys, tmp_path / "gone", *ANYWHERE[:2])
    assert code == ModelError.exit_code
    assert "gone" in line


def test_a_taken_port_is_refused_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, line = refused(capsys, "no-such-model", "--listen", f"127.0.0.1:{port}")
    assert code == ListenRefused.exit_code
    assert "Address already in use" in line


def test_an_address_of_another_machine_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = refused(capsys, "no-such-model", "--listen", "192.0.2.1:7777", "--insecure")
    assert code == ListenRefused.exit_code


def test_metrics_without_their_package_say_how_to_get_it(
    capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "tidelock.cloud.metrics", raising=False)
    code, line = refused(capsys, model, *ANYWHERE[:2], "--metrics", "127.0.0.1:0")
    assert code == ConfigError.exit_code
    assert "pip install 'tidelock[metrics]'" in line
