"""A tiny chat model, a cloud over TLS that holds it, and a folder for what runs leave behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.certs import Certificates, make_certificates
from tests.support.chat_model import save_chat_model
from tests.support.tidelock_process import TidelockProcess

TOKEN = "0123456789abcdef-for-tests"


@dataclass(frozen=True)
class CloudAccess:
    """What a device needs to use the cloud."""

    address: str
    token_file: Path
    certificates: Certificates

    def options(self, **changes: object) -> list[str]:
        """Return the options of `tidelock train` that name the cloud, some of them changed, or left out by None."""
        values = {
            "backbone": "cloud",
            "cloud": self.address,
            "token-file": self.token_file,
            "ca": self.certificates.ca,
            **{name.replace("_", "-"): value for name, value in changes.items()},
        }
        return [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Compute with one thread, whatever a command asks for: models this small are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep hashes and fetched models out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIDELOCK_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def cloud_access(chat_model: Path, own_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudAccess]:
    """Return how to use a cloud, in a process of its own, that holds the chat model."""
    folder = tmp_path_factory.mktemp("cloud")
    certificates = make_certificates(folder)
    (folder / "tokens").write_text(f"device {TOKEN}\n")
    (folder / "token").write_text(f"{TOKEN}\n")
    tls = ["--tls-cert", certificates.cert, "--tls-key", certificates.key, "--tokens", folder / "tokens"]
    args = ["cloud", chat_model, "--listen", "127.0.0.1:0", *tls, "--threads", 1, "--json"]
    with TidelockProcess(*args, folder=folder, env={"TIDELOCK_CACHE": str(own_cache)}) as process:
        process.wait_until(process.events)
        yield CloudAccess(str(process.events()[0]["address"]), folder / "token", certificates)


@pytest.fixture(scope="session")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a JSON Lines file with four rows to learn from and two to measure on."""
    path = tmp_path_factory.mktemp("data") / "facts.jsonl"
    rows: list[dict[str, Any]] = [
        {
            "messages": [
                {"role": "user", "content": f"where is key {number}?"},
                {"role": "assistant", "content": "in the box"},
            ],
            "split": "train" if number < 4 else "held_out",
        }
        for number in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
