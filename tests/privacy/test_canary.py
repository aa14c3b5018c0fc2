"""No marked text, label or adapter weight is in any byte that leaves the device, or in any log."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.privacy.spellings import (
    found,
    spellings_of_ids,
    spellings_of_numbers,
    spellings_of_text,
    spellings_of_weights,
    windows,
)
from tests.support.chat_model import make_chat_tokenizer, save_chat_model
from tests.support.proxy import LinkProxy
from tests.support.tidelock_process import TidelockProcess

TOKEN = "0123456789abcdef-for-tests"
STEPS = 6
# One for each place in the data: what is asked, what is learned, what is only measured, what is asked afterwards.
CANARIES = {
    "system": "quokka-serval-ibex-41",
    "prompt": "otter-walrus-lynx-72",
    "label": "heron-badger-stoat-93",
    "completion": "marmot-gannet-vole-58",
    "evaluation": "puffin-weasel-hare-66",
    "question": "tapir-gibbon-kudu-17",
    "text_a": "lemur-osprey-bison-34",
    "text_b": "ferret-curlew-moose-85",
}
# Of every row, so that a batch of two has it twice, in whatever order.
CLASS, NUMBER = 311, 73912.625
TASKS = {"classification": ("classes.jsonl", CLASS), "regression": ("numbers.jsonl", NUMBER)}
WINDOW = 8


@dataclass(frozen=True)
class Recorded:
    """Everything that runs, evaluations and an answer left anywhere but in the data and on the person's screen.

    Attributes:
        sent: All bytes from the device to the cloud, as they are inside TLS.
        received: All bytes the other way.
        logs: What both processes have printed, all loggers at their most talkative.
        files: What is in the run folders, the caches and the temporary folder.
        model: Folder of the model.
        out: The run folder of the language model; those of the tasks with labels are beside it, by their names.
        fingerprint: What the cloud's model is known by.
    """

    sent: bytes
    received: bytes
    logs: dict[str, bytes]
    files: dict[str, bytes]
    model: Path
    out: Path
    fingerprint: str

    @property
    def places(self) -> dict[str, bytes]:
        return {"sent": self.sent, "received": self.received, **self.logs, **self.files}


def log_everything() -> None:
    logging.basicConfig(level=logging.DEBUG)
    logging.getLogger("tidelock").setLevel(logging.DEBUG)
    logging.getLogger("tidelock").debug("At its most talkative.")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    folder = tmp_path_factory.mktemp("canary")
    model = save_chat_model(folder / "model")
    (folder / "tokens").write_text(f"device {TOKEN}\n")
    (folder / "token").write_text(TOKEN)
    turns = [("system", "system"), ("user", "prompt"), ("assistant", "label")]
    rows = [
        {"messages": [{"role": role, "content": f"so {CANARIES[name]} it is"} for role, name in turns]},
        {"prompt": "", "completion": CANARIES["completion"]},
    ]
    (folder / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    (folder / "asked.jsonl").write_text(json.dumps({"text": CANARIES["evaluation"]}) + "\n")
    scratch = folder / "scratch"
    scratch.mkdir()
    env = {name: str(scratch) for name in ("TIDELOCK_CACHE", "TMPDIR", "HF_HOME", "HOME")}
    start = functools.partial(TidelockProcess, env=env, hook=log_everything)
    listen = ["--listen", "127.0.0.1:0", "--tokens", folder / "tokens", "--threads", 1, "--json"]
    out = folder / "run"
    with start("cloud", model, *listen, folder=folder / "cloud") as cloud:
        cloud.wait_until(cloud.events)
        port = int(cloud.events()[0]["address"].rpartition(":")[2])
        with LinkProxy(port, record=True) as proxy:
            access = ["--cloud", f"grpc://127.0.0.1:{proxy.port}", "--token-file", folder / "token"]
            data = [folder / "facts.jsonl", "--eval-data", folder / "asked.jsonl", "--out", out]
            size = ["--max-steps", STEPS, "--batch-size", 2, "--save-every", 1, "--keep", 99, "--threads", 1]
            train = start(
                "train", *data, "--backbone", "cloud", *access, *size, "--dropout", 0.2, folder=folder / "train"
            )
            assert train.wait() == 0, train.stderr
            ask = ["--prompt", CANARIES["question"], "--max-new-tokens", 4]
            generate = start("generate", out, *ask, *access, folder=folder / "generate")
            assert generate.wait() == 0, generate.stderr
            tasks = _train_and_measure_tasks(start, folder, access)
            sent, received = proxy.sent, proxy.received
        cloud.kill()
        logs = {f"log of the cloud {name}": text.encode() for name, text in (("", cloud.stderr), ("out", cloud.stdout))}
        logs |= {"train out": train.stdout.encode(), "train err": train.stderr.encode()}
        logs |= {"generate err": generate.stderr.encode(), **tasks}
        fingerprint = cloud.events()[0]["fingerprint"]
    kept = [
        path for top in (out, scratch, *(folder / task for task in TASKS)) for path in top.rglob("*") if path.is_file()
    ]
    files = {str(path.relative_to(folder)): path.read_bytes() for path in kept}
    return Recorded(sent, received, logs, files, model, out, fingerprint)


def _train_and_measure_tasks(
    start: Callable[..., TidelockProcess], folder: Path, access: list[object]
) -> dict[str, bytes]:
    """Train on labelled texts and measure what came of it; return what was printed."""
    printed: dict[str, bytes] = {}
    size = ["--max-steps", 2, "--batch-size", 2, "--threads", 1, "--json"]
    for task, (name, label) in TASKS.items():
        row = {"text_a": CANARIES["text_a"], "text_b": CANARIES["text_b"], "label": label}
        (folder / name).write_text((json.dumps(row) + "\n") * 4)
        classes = ["--num-labels", CLASS + 1] if task == "classification" else []
        learn = [folder / name, "--eval-data", folder / name, "--task", task, *classes, "--out", folder / task]
        for step, args in (
            ("train", [*learn, "--backbone", "cloud", *access, *size]),
            ("eval", [folder / task, "--data", folder / name, *access, "--json"]),
        ):
            process = start(step, *args, folder=folder / f"{task} {step}")
            assert process.wait() == 0, process.stderr
            printed |= {f"{task} {step} out": process.stdout.encode(), f"{task} {step} err": process.stderr.encode()}
    return printed


def test_the_recording_is_of_the_real_thing(recorded: Recorded) -> None:
    """What is known to be sent is found, or a search that finds nothing says nothing."""
    assert found(spellings_of_text(recorded.fingerprint), {"sent": recorded.sent}) == ["utf-8 in sent"]
    embedding = load_file(recorded.model / "model.safetensors")["model.embed_tokens.weight"]
    ids = make_chat_tokenizer()(CANARIES["prompt"], add_special_tokens=False)["input_ids"]
    embedded = spellings_of_weights({"embedding": embedding[ids]})
    seen = found(embedded, {"sent": recorded.sent})
    assert len(seen) > len(ids) / 2
    assert all("float32" in name for name in seen)
    assert len(recorded.received) > len(recorded.sent) / 10
    for name in ("log of the cloud ", "train err", "generate err"):
        assert b"At its most talkative." in recorded.logs[name]
    ledger = json.loads((recorded.out / "ledger.json").read_text())
    assert sum(ledger["sent"].values()) < len(recorded.sent)


@pytest.mark.parametrize("name", CANARIES)
def test_no_canary_is_anywhere_as_text(recorded: Recorded, name: str) -> None:
    assert found(spellings_of_text(CANARIES[name]), recorded.places) == []


@pytest.mark.parametrize("name", CANARIES)
def test_no_canary_is_anywhere_as_token_ids(recorded: Recorded, name: str) -> None:
    ids: list[int] = make_chat_tokenizer()(CANARIES[name], add_special_tokens=False)["input_ids"]
    assert len(ids) >= 2 * WINDOW
    for window in windows(ids, WINDOW):
        assert found(spellings_of_ids(window), recorded.places) == []


def test_no_weight_of_the_adapter_leaves_the_device(recorded: Recorded) -> None:
    crossed = {"sent": recorded.sent, "received": recorded.received, **recorded.logs}
    for step in range(1, STEPS + 1):
        weights = load_file(recorded.out / "checkpoints" / f"checkpoint-{step}" / "model.safetensors")
        assert any("lora_A" in name for name in weights)
        assert found(spellings_of_weights(weights), crossed) == []
    for out in (recorded.out, *(recorded.out.parent / task for task in TASKS)):
        trained = load_file(out / "adapter" / "adapter_model.safetensors")
        assert ("base_model.model.score.weight" in trained) is (out.name in TASKS)
        assert found(spellings_of_weights(trained), crossed) == []


def test_no_class_and_no_number_is_anywhere(recorded: Recorded) -> None:
    assert found(spellings_of_ids([CLASS] * 2), recorded.places) == []
    assert found(spellings_of_numbers([NUMBER] * 2), recorded.places) == []
    for task in TASKS:
        assert b'"event": "evaluated"' in recorded.logs[f"{task} eval out"]


def test_the_search_finds_every_spelling() -> None:
    text, ids = CANARIES["label"], list(range(100, 300, 7))
    weights = spellings_of_weights({"w": torch.randn(2, 4)})
    for spellings in (spellings_of_text(text), spellings_of_ids(ids), weights, spellings_of_numbers([0.5, -2e5])):
        for name, spelling in spellings.items():
            assert f"{name} in x" in found(spellings, {"x": b"before" + spelling + b"after"})
