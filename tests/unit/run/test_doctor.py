from __future__ import annotations

import importlib
import platform
import re
import shutil
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from tests.support.tiny_models import save_tiny_model
from tidelock.cloud.server import CloudServer, Listener
from tidelock.cloud.tenants import Tenants
from tidelock.errors import (
    CloudUnreachable,
    ConfigError,
    ModelError,
    ModelMismatch,
    StorageError,
    TidelockError,
    TokenRefused,
)
from tidelock.model.load import ModelChoice
from tidelock.run import doctor
from tidelock.run.doctor import Fact, examine_machine, first_fault
from tidelock.run.doctor_model import examine_cloud, examine_model
from tidelock.wire.address import Address

TOKEN = "a token of sixteen or more"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "llama_tied", "gpt2", "phi"):
        save_tiny_model(name, folder)
    return folder


@pytest.fixture(scope="module")
def cloud(models: Path):
    server = CloudServer(
        ModelChoice(str(models / "llama")), Tenants({"me": TOKEN}), Listener(Address("127.0.0.1", 0, tls=False))
    )
    yield server.start().url
    server.stop(0)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    return path


def by_name(facts) -> dict[str, Fact]:
    return {fact.name: fact for fact in facts}


def test_a_good_machine_has_no_fault() -> None:
    facts = list(examine_machine())
    assert first_fault(facts) is None
    found = by_name(facts)
    assert found["torch"].value == metadata.version("torch")
    assert found["cpu"].value["threads"] >= 1
    assert found["memory"].value["free_bytes"] > 0
    assert "HF_HUB_OFFLINE" in found["hub"].text
    assert {"this folder", "tidelock cache", "hub cache", "python", "tidelock"} <= found.keys()
    assert "ruff" not in found


def test_the_first_fault_decides() -> None:
    facts = [
        Fact("a", "b", None, ""),
        Fact("a", "c", None, "", StorageError("x")),
        Fact("a", "d", None, "", ModelError("y")),
    ]
    fault = first_fault(facts)
    assert fault is not None
    assert fault.exit_code == StorageError.exit_code


@pytest.mark.parametrize(
    ("versions", "said"),
    [({"peft": "0.1.0"}, "Library peft: expected >=0.17, got 0.1.0"), ({"peft": None}, "Library peft: .* got none")],
)
def test_a_wrong_or_missing_library_is_a_fault(monkeypatch: pytest.MonkeyPatch, versions, said: str) -> None:
    real = metadata.version

    def version(name: str) -> str:
        found: str | None = versions.get(name, real(name))
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    fault = first_fault(examine_machine())
    assert fault is not None
    assert fault.exit_code == TidelockError.exit_code
    with pytest.raises(TidelockError, match=said):
        raise fault


def test_a_library_of_an_extra_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "trl":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    fact = by_name(examine_machine())["trl"]
    assert fact.fault is None
    assert "tidelock[trl]" in fact.text


def test_an_old_python_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "python_version", lambda: "3.9.1")
    fault = by_name(examine_machine())["python"].fault
    assert fault is not None
    assert "got 3.9.1" in fault.message


def test_a_broken_torch_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libtorch.so: cannot open")

    monkeypatch.setattr(doctor, "import_module", broken)
    fault = by_name(examine_machine())["cpu"].fault
    assert fault is not None
    assert "libtorch.so" in fault.message


def test_gpus_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = importlib.import_module("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name=f"GPU {index}", total_memory=8 * 10**9)
    )
    found = by_name(examine_machine())
    assert found["cuda:1"].text == "GPU 1, 8.0 GB"


def test_a_full_disk_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    fault = by_name(examine_machine())["this folder"].fault
    assert isinstance(fault, StorageError)
    assert "Free some space" in fault.message


def test_a_cache_that_cannot_be_written_is_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TIDELOCK_CACHE", str(tmp_path / "file" / "cache"))
    fault = by_name(examine_machine())["tidelock cache"].fault
    assert isinstance(fault, StorageError)
    assert "TIDELOCK_CACHE" in fault.message


@pytest.mark.parametrize(
    ("head", "reached", "said"),
    [
        (lambda url, timeout: None, True, ": answers"),
        (OSError("no route"), False, r"does not answer \(OSError\)"),
        (None, False, "no answer within"),
    ],
)
def test_the_hub_is_asked_and_is_no_fault(monkeypatch: pytest.MonkeyPatch, head, reached: bool, said: str) -> None:
    def session() -> SimpleNamespace:
        def ask(url: str, timeout: float) -> None:
            if isinstance(head, Exception):
                raise head
            if head is None:
                time.sleep(1)

        return SimpleNamespace(head=ask)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "get_session", session)
    monkeypatch.setattr(doctor, "_HUB_SECONDS", 0.2)
    fact = by_name(examine_machine())["hub"]
    assert fact.value["answers"] is reached
    assert fact.fault is None
    assert re.search(said, fact.text)


def test_a_model_is_described(models: Path) -> None:
    found = by_name(examine_model(str(models / "llama"), all_sites=False))
    assert found["type"].value == "llama"
    assert found["verified"].value is True
    assert found["longest text"].value == 64
    assert found["widths"].value == {"blocks": 4, "embedding": 32, "head_input": 32, "vocabulary": 97}
    assert found["device holds"].value == {"parameters": 2 * 97 * 32, "fp32_bytes": 2 * 97 * 32 * 4}
    assert found["attn sites"].value == {"count": 4, "linears": ["q_proj", "k_proj", "v_proj"]}
    assert found["attn-out sites"].value == {"count": 4, "linears": ["o_proj"]}
    assert found["mlp sites"].value == {"count": 4, "linears": ["down_proj"]}


def test_a_tied_head_is_counted_once(models: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = by_name(examine_model(str(models / "llama_tied"), all_sites=False))
    whole = AutoModelForCausalLM.from_pretrained(models / "llama_tied")
    assert found["device holds"].value["parameters"] == 97 * 32
    assert found["cloud holds"].value["parameters"] == whole.num_parameters()


def test_all_sites_are_listed_on_request(models: Path) -> None:
    found = by_name(examine_model(str(models / "gpt2"), all_sites=True))
    assert found["blocks.3.attn"].value == {"width": 32, "linears": {"transformer.h.3.attn.c_attn": 96}}
    assert found["blocks.3.mlp"].value == {"width": 32, "linears": {"transformer.h.3.mlp.c_proj": 32}}
    assert "attn sites" not in found


def test_an_unverified_family_says_so(models: Path) -> None:
    found = by_name(examine_model(str(models / "phi"), all_sites=False))
    assert found["verified"].text.startswith("no")
    assert found["mlp sites"].value == {"count": 0, "linears": []}


def test_a_missing_model_is_a_fault(tmp_path: Path) -> None:
    fault = first_fault(examine_model(str(tmp_path / "nowhere"), all_sites=False))
    assert isinstance(fault, ModelError)


def test_a_cloud_is_described(cloud: str, token_file: Path, models: Path) -> None:
    facts = list(examine_cloud(cloud, token_file, None, str(models / "llama")))
    assert first_fault(facts) is None
    found = by_name(facts)
    assert found["model"].value == {"type": "llama", "blocks": 4, "dtype": "fp32"}
    assert found["tls"].value is False
    assert found["same model"].value is True
    assert found["round trip"].value["milliseconds"] > 0


@pytest.mark.parametrize(("name", "kind"), [("gpt2", ModelMismatch), ("nowhere", ModelError)])
def test_another_model_in_the_cloud_is_a_fault(cloud: str, token_file: Path, models: Path, name: str, kind) -> None:
    assert isinstance(first_fault(examine_cloud(cloud, token_file, None, str(models / name))), kind)


def test_a_wrong_token_is_a_fault(cloud: str, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("another token of sixteen")
    assert isinstance(first_fault(examine_cloud(cloud, tmp_path / "other", None, None)), TokenRefused)


def test_a_missing_token_file_is_a_fault(cloud: str, tmp_path: Path) -> None:
    for path in (None, tmp_path / "nowhere"):
        fault = first_fault(examine_cloud(cloud, path, None, None))
        assert isinstance(fault, ConfigError)
        assert "--token-file" in fault.message


def test_an_address_where_nobody_listens_is_a_fault(token_file: Path) -> None:
    assert isinstance(first_fault(examine_cloud("grpc://127.0.0.1:9", token_file, None, None)), CloudUnreachable)


def test_a_malformed_address_is_a_fault(token_file: Path) -> None:
    assert isinstance(first_fault(examine_cloud("localhost", token_file, None, None)), ConfigError)
