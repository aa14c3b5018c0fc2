"""`torchrun -m tidelock pool train`: its processes are the peers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tidelock.cli.main import run
from tidelock.errors import ConfigError
from tidelock.run.folder import read_rows

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def torchrun(*args: object, config: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_CONFIG_HOME": str(config)}
    return subprocess.run(
        [*TORCHRUN, *map(str, args)], env=environment, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.mark.slow
def test_it_trains_and_goes_on(chat_model: Path, facts: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out, size = tmp_path / "run", ("--batch-size", 4, "--epochs", 2, "--reduction", 2, "--save-every", 1)
    train = ("-m", "tidelock", "pool", "train", facts, "--model", chat_model, "--out", out, *size, "--keep", 9)
    stages = ("--stage", "0-1@1", "--stage", "2-2@0")
    done = torchrun("--nproc-per-node", 2, "--master-port", port, *train, *stages, config=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"Adapter: {out / 'adapter'}" in done.stdout
    assert "Pool: peer 0 of 2; blocks 0 to 1 on peers 1; blocks 2 to 2 on peers 0." in done.stderr
    log = (out / "peers" / "peer-1.log").read_text()
    assert "Pool: peer 1 of 2" in log
    assert "peer 1 of 2" not in done.stdout + done.stderr, "Another peer than 0 speaks."
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    # As if it had been broken off.
    adapter = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    for step in (3, 4):
        (out / "checkpoints" / f"checkpoint-{step}" / "pool.safetensors").unlink()
        (out / "checkpoints" / f"checkpoint-{step}" / "COMPLETE").unlink()
    resume = ("--standalone", "--nproc-per-node", 2, "-m", "tidelock", "pool", "resume", out)
    again = torchrun(*resume, config=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "Going on from" in again.stderr
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.parametrize("rank", [0, 1])
def test_a_network_that_nobody_trusts(
    rank: int,
    chat_model: Path,
    facts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": 1}
    elastic = {"RUN_ID": "none", "RESTART_COUNT": 0, "USE_AGENT_STORE": True}
    for name, value in {**told, **{f"TORCHELASTIC_{name}": value for name, value in elastic.items()}}.items():
        monkeypatch.setenv(name, str(value))
    command = ("pool", "train", facts, "--model", chat_model, "--out", tmp_path / "run")
    assert run([str(arg) for arg in command]) == ConfigError.exit_code
    assert "got 192.0.2.1: peers send the examples" in capsys.readouterr().err
