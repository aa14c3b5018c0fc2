from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from tidelock.cloud.memory import PassCost
from tidelock.errors import CloudUnreachable
from tidelock.run import cloud_process
from tidelock.run.cloud_process import loopback_cloud

LISTENS = """#!/bin/sh
echo "$@" > "$(dirname "$0")/arguments"
echo '{"event": "loading"}'
echo '{"event": "listening", "address": "grpcs://127.0.0.1:7",' \\
  '"memory_bytes_per_token": 8, "memory_bytes_per_token_squared": 0.5}'
echo noise on stderr >&2
"""
WAITS = "exec sleep 60\n"
# Stopping it takes more than asking.
STUBBORN = "trap '' TERM\nwhile true; do sleep 0.05; done\n"
GIVES_UP = "#!/bin/sh\necho 'a line before' >&2\necho 'error: no such model' >&2\nexit 4\n"


@pytest.fixture
def python_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that has a script run in place of Python with `-m tidelock`."""

    def replace(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(script)
        path.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(path))

    return replace


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("then", [WAITS, STUBBORN], ids=["asked to end", "made to end"])
def test_it_runs_as_long_as_it_is_needed(python_is, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str) -> None:
    monkeypatch.setattr(cloud_process, "_STOP_SECONDS", 0.2 if then == STUBBORN else 30)
    python_is(LISTENS + then)
    with loopback_cloud("the-model", "--threads", "1") as cloud:
        assert cloud.address == "grpcs://127.0.0.1:7"
        assert cloud.cost == PassCost(per_token=8.0, per_token_squared=0.5)
        assert is_running(cloud.pid)
        for path in (cloud.token_file, cloud.token_file.with_name("tokens"), cloud.token_file.with_name("cloud.key")):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        token = cloud.token_file.read_text()
        assert cloud.token_file.with_name("tokens").read_text() == f"loopback {token}\n"
        assert cloud.certificate.read_text().startswith("-----BEGIN CERTIFICATE-----")
        arguments = (tmp_path / "arguments").read_text().split()
        assert arguments[:6] == ["-m", "tidelock", "cloud", "the-model", "--listen", "127.0.0.1:0"]
        assert arguments[-2:] == ["--threads", "1"]
        assert token not in arguments
    assert not is_running(cloud.pid)
    assert not cloud.token_file.parent.exists()


@pytest.mark.parametrize(("script", "got"), [(GIVES_UP, "error: no such model"), ("#!/bin/sh\n", "it said nothing")])
def test_what_a_cloud_that_does_not_start_said_last_is_told(python_is, script: str, got: str) -> None:
    python_is(script)
    with pytest.raises(CloudUnreachable, match=f"expected it to listen, got an exit: {got}$"), loopback_cloud("gone"):
        pass
