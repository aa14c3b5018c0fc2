"""The whole story on one machine: a cloud process, a device, real sockets, TLS, invented facts.

May import everything below `run`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

from tidelock.data.example import Conversation
from tidelock.data.source import read_examples
from tidelock.device.generate import GenerationSettings
from tidelock.errors import DataError
from tidelock.model.smollm2 import fetch_smollm2
from tidelock.run.cloud_process import LoopbackCloud, loopback_cloud
from tidelock.run.config import RunConfig
from tidelock.run.folder import RunFolder
from tidelock.run.generate import chat_prompt, complete, open_trained
from tidelock.run.open_model import load_tokenizer, open_model
from tidelock.run.train import train
from tidelock.wire.ledger import Ledger

if TYPE_CHECKING:
    from tidelock.device.device_lm import DeviceLM
    from tidelock.run.trainer import Observer

_ANSWER_TOKENS = 16


@final
@dataclass(frozen=True, slots=True)
class Question:
    """A held-out question and its one right answer."""

    text: str
    answer: str


@final
@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo showed.

    Attributes:
        questions: The held-out questions.
        before: The model's answers before training.
        after: Its answers after training.
        adapter: Folder of the trained adapter.
        traffic_bytes: Bytes that crossed in training, by kind.
        sent_bytes: How many of them left the device.
        steps: Optimizer steps.
        train_seconds: How long training took.
    """

    questions: list[Question]
    before: list[str]
    after: list[str]
    adapter: Path
    traffic_bytes: dict[str, int]
    sent_bytes: int
    steps: int
    train_seconds: float

    def exact_match(self, answers: list[str]) -> float:
        """Return the share of answers that are right to the letter."""
        right = sum(answer == question.answer for question, answer in zip(self.questions, answers, strict=True))
        return right / len(self.questions)


def run_demo(observer: Observer, data: Path, runs: Path) -> DemoResult:
    """Train a device on invented facts against a cloud process, and ask it before and after.

    Args:
        observer: Told how it gets on.
        data: The household facts.
        runs: Folder in which a new run folder is made.

    Raises:
        TidelockError: Any of its kinds.
    """
    if not data.is_file():
        msg = (
            f"Demo data: expected the household facts, got no such file ({data}). Run the demo in a checkout of "
            "tidelock, or name the file with --data."
        )
        raise DataError(msg)
    questions = read_questions(data)
    model_folder = fetch_smollm2(on_progress=observer.say)
    observer.say(f"Model: SmolLM2-135M-Instruct, in {model_folder}.")
    with loopback_cloud(str(model_folder)) as cloud:
        observer.say(f"Cloud: a process of its own at {cloud.address}, TLS and token required.")
        config = _demo_config(data, _new_run(runs), cloud)
        observer.say(f"Asking {len(questions)} held-out questions before training …")
        model = open_model(config, Ledger())
        before = _answer(model, questions)
        model.close()
        observer.say("Training: the frozen blocks run in the cloud process, LoRA, text and labels stay here.")
        result = train(config, observer)
        if result.interrupted:
            raise KeyboardInterrupt  # what was learned in part would tell nothing
        observer.say("Asking the same questions after training …")
        model = open_trained(RunFolder(Path(config.out)), config)
        after = _answer(model, questions)
        model.close()
    sent, received = result.traffic_bytes.get("sent", {}), result.traffic_bytes.get("received", {})
    return DemoResult(
        questions=questions,
        before=before,
        after=after,
        adapter=result.adapter,
        traffic_bytes={kind: sent.get(kind, 0) + received.get(kind, 0) for kind in {**sent, **received}},
        sent_bytes=sum(sent.values()),
        steps=result.steps,
        train_seconds=result.seconds,
    )


def read_questions(data: Path) -> list[Question]:
    """Return the held-out questions of the household facts.

    Raises:
        DataError: The file has another form.
    """
    questions = []
    for example in read_examples(str(data), split="held_out"):
        if not isinstance(example.content, Conversation):
            msg = f"Demo data: expected questions and answers as messages, got another form ({example.where})."
            raise DataError(msg)
        question, answer = example.content.messages
        questions.append(Question(question.content, answer.content))
    return questions


def _demo_config(data: Path, out: Path, cloud: LoopbackCloud) -> RunConfig:
    """Return the run that the demo makes; found by trying what learns these facts fastest."""
    return RunConfig(
        data=str(data),
        split="train",
        out=str(out),
        backbone="cloud",
        cloud=cloud.address,
        token_file=str(cloud.token_file),
        ca=str(cloud.certificate),
        rank=8,
        alpha=16,
        learning_rate=4e-3,
        lr_schedule="linear",
        warmup_steps=10,
        batch_size=4,
        max_steps=200,
        log_every=5,
        save_every=100,
    )


def _new_run(runs: Path) -> Path:
    """Return the first of demo, demo-2, demo-3 … that is not there yet."""
    number = 1
    while (path := runs / ("demo" if number == 1 else f"demo-{number}")).exists():
        number += 1
    return path


def _answer(model: DeviceLM, questions: list[Question]) -> list[str]:
    tokenizer = load_tokenizer(model.ends.folder)
    prompts = [chat_prompt(tokenizer, question.text) for question in questions]
    return complete(model, tokenizer, prompts, GenerationSettings(max_new_tokens=_ANSWER_TOKENS))
