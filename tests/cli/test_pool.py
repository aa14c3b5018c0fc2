"""`tidelock pool`: a run on several peers, what comes of it, and what is refused."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from tests.support.answer_model import save_answer_model
from tests.support.chat_model import save_chat_model
from tests.support.tidelock_process import TidelockProcess
from tidelock.cli.main import run
from tidelock.errors import ConfigError, DataError, ListenRefused, MemoryExceeded, ModelMismatch, PeerError
from tidelock.run.folder import read_rows

Capture = pytest.CaptureFixture[str]
LEARN = ("--learning-rate", "0.02", "--epochs", "30", "--batch-size", "4", "--threads", "1", "--reduction", "2")


def tide(*args: object) -> int:
    return run([str(arg) for arg in args])


@pytest.fixture(autouse=True)
def _own_key(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the cache's key out of the user's folder."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp() / "config"))


def a_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl") if "loss" in row]


def test_a_pool_learns_what_one_process_learns(capsys: Capture, chat_model: Path, facts: Path, tmp_path: Path) -> None:
    data = ("pool", "train", facts, "--split", "train", "--model", chat_model, *LEARN)
    assert tide(*data, "--local", 2, "--stage", "0-1@1", "--stage", "2-2@0", "--out", tmp_path / "two") == 0
    printed = capsys.readouterr()
    assert f"Adapter: {tmp_path / 'two' / 'adapter'}" in printed.out
    assert "Pool: peer 0 of 2; blocks 0 to 1 on peers 1; blocks 2 to 2 on peers 0." in printed.err
    assert "Pool: peer 1 of 2" in (tmp_path / "two" / "peers" / "peer-1.log").read_text()
    assert tide(*data, "--local", 1, "--out", tmp_path / "one") == 0
    assert losses(tmp_path / "two")[:3] == pytest.approx(losses(tmp_path / "one")[:3], rel=1e-3)
    capsys.readouterr()
    for folder in ("one", "two"):
        assert tide("generate", tmp_path / folder, "--prompt", "where is key 1?", "--max-new-tokens", 12) == 0
        assert capsys.readouterr().out == "in the box\n"


def test_it_is_measured_on_what_it_does_not_learn_from(
    capsys: Capture, chat_model: Path, facts: Path, tmp_path: Path
) -> None:
    command = ("pool", "train", facts, "--split", "train", "--model", chat_model, *LEARN[:2], *LEARN[4:])
    stages = ("--local", 2, "--stage", "0-1@0", "--stage", "2-2@1", "--epochs", 2)
    assert tide(*command, *stages, "--eval-split", "held_out", "--json", "--out", tmp_path / "run") == 0
    *events, done = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (told,) = [event for event in events if event["event"] == "peers"]
    assert [(peer["peer"], peer["stage"]) for peer in told["peers"]] == [(0, None), (1, None)]  # cached
    assert all(0 < peer["computing"] <= 1 and 0 <= peer["idle"] < 1 for peer in told["peers"])
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in row]
    assert [row["epoch"] for row in rows] == [1.0, 2.0]
    assert done["eval_loss"] == rows[-1]["eval_loss"]
    assert tide("report", tmp_path / "run") == 0
    assert f"{rows[-1]['eval_loss']:.4f}" in (tmp_path / "run" / "report.html").read_text()
    capsys.readouterr()
    assert tide("eval", tmp_path / "run", "--data", facts, "--split", "held_out", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"]["loss"] == pytest.approx(done["eval_loss"], rel=1e-4)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return texts with a class each, to learn from and to measure on."""
    path = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    rows = [
        {"text_a": "the box " * (1 + number % 3) + ("is red" if number % 2 else "was lost"), "label": number % 2}
        for number in range(12)
    ]
    splits = ["train"] * 8 + ["held_out"] * 4
    path.write_text("".join(json.dumps({**row, "split": each}) + "\n" for row, each in zip(rows, splits, strict=True)))
    return path


@pytest.mark.parametrize(
    "method", ["side", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "adapter", "full"))]
)
def test_a_pool_learns_classes(method: str, capsys: Capture, chat_model: Path, reviews: Path, tmp_path: Path) -> None:
    command = ("pool", "train", reviews, "--split", "train", "--model", chat_model, "--task", "classification")
    learn = ("--method", method, "--epochs", 3, "--batch-size", 4, "--threads", 1, "--learning-rate", 0.02)
    held_out = ("--eval-split", "held_out", "--json", *(("--reduction", 2) if method == "side" else ()))
    stages = ("--local", 2, "--stage", "0-1@1", "--stage", "2-2@0")
    assert tide(*command, *learn, *held_out, *stages, "--out", tmp_path / "two") == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert tide(*command, *learn, *held_out, "--local", 1, "--stage", "0-2@0", "--out", tmp_path / "one") == 0
    assert losses(tmp_path / "two")[:4] == pytest.approx(losses(tmp_path / "one")[:4], rel=1e-3)
    measured = [row for row in read_rows(tmp_path / "two" / "metrics.jsonl") if "eval_loss" in row]
    assert [row["epoch"] for row in measured] == [1.0, 2.0, 3.0]
    capsys.readouterr()
    assert tide("eval", tmp_path / "two", "--data", reviews, "--split", "held_out", "--json") == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    assert found.keys() == {"loss", "accuracy", "matthews", "f1", "mean_of_accuracy_and_f1"}
    assert found["loss"] == pytest.approx(done["eval_loss"], rel=1e-4)
    assert found == pytest.approx({name: measured[-1][f"eval_{name}"] for name in found}, rel=1e-4, abs=1e-6)
    forms = {"lora": ("peft", "merged"), "full": ()}.get(method, ("adapter",))
    for form in forms:
        assert tide("export", tmp_path / "two", tmp_path / form, "--to", form) == 0
    assert tide("report", tmp_path / "two") == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "adapter", "full"])
def test_what_is_in_the_blocks_is_trained_too(
    method: str, capsys: Capture, chat_model: Path, facts: Path, tmp_path: Path
) -> None:
    run_folder, log = tmp_path / "run", tmp_path / "run" / "peers" / "peer-1.log"
    command = ("pool", "train", facts, "--split", "train", "--model", chat_model, "--method", method, "--local", 2)
    assert tide(*command, "--stage", "0-1@1", "--stage", "2-2@0", *LEARN[:-2], "--out", run_folder) == 0
    trained = "model" if method == "full" else "adapter"
    assert f"{trained.capitalize()}: {run_folder / trained}" in capsys.readouterr().out
    assert "without the frozen blocks" not in log.read_text()
    assert not (run_folder / "cache").exists()
    assert tide("generate", run_folder, "--prompt", "where is key 1?", "--max-new-tokens", 12) == 0
    assert capsys.readouterr().out == "in the box\n"
    assert tide("report", run_folder) == 0
    code = tide("export", run_folder, tmp_path / "out", "--to", "peft" if method == "lora" else "adapter")
    assert code == (ConfigError.exit_code if method == "full" else 0)
    one = ("pool", "train", facts, "--split", "train", "--model", chat_model, "--method", method, "--local", 1)
    assert tide(*one, *LEARN[:-2], "--out", tmp_path / "one") == 0
    assert losses(run_folder)[:4] == pytest.approx(losses(tmp_path / "one")[:4], rel=1e-3)
    assert tide("plan", "pool", tmp_path / "one" / "profile.json", "--batch-rows", 4) == 0


@pytest.fixture(scope="module")
def answer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_answer_model(tmp_path_factory.mktemp("answer") / "model")


@pytest.fixture
def facts_to_answer(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"where is key {number}?", "completion": "in the box"} for number in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_encoder_decoder_learns_in_a_pool(
    capsys: Capture, answer_model: Path, facts_to_answer: Path, tmp_path: Path
) -> None:
    run_folder = tmp_path / "run"
    command = ("pool", "train", facts_to_answer, "--task", "text-to-text", "--model", answer_model, *LEARN)
    stages = ("--local", 2, "--stage", "0-1@1", "--stage", "2-4@0", "--eval-data", facts_to_answer)
    assert tide(*command, *stages, "--out", run_folder) == 0
    assert "blocks 0 to 1 on peers 1; blocks 2 to 4 on peers 0." in capsys.readouterr().err
    measured = [row["eval_loss"] for row in read_rows(run_folder / "metrics.jsonl") if "eval_loss" in row]
    # Here the pool is measured and planned.
    assert tide(*command, "--local", 1, "--out", tmp_path / "one") == 0
    assert losses(run_folder)[:3] == pytest.approx(losses(tmp_path / "one")[:3], rel=1e-3)
    capsys.readouterr()
    assert tide("plan", "pool", tmp_path / "one" / "profile.json", "--batch-rows", 4, "--json") == 0
    assert json.loads(capsys.readouterr().out)["stages"][-1]["last_block"] == 4
    assert tide("generate", run_folder, "--prompt", "where is key 1?", "--max-new-tokens", 12) == 0
    assert capsys.readouterr().out == "in the box\n"
    assert tide("eval", run_folder, "--data", facts_to_answer, "--json") == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["loss"] == pytest.approx(measured[-1], rel=1e-4)
    assert tide("export", run_folder, "--to", "adapter", tmp_path / "out") == 0
    assert tide("report", run_folder) == 0


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("answer_model", (), "an encoder-decoder (t5) in a pool: expected --task text-to-text, got --task causal-lm"),
        ("answer_model", ("--task", "text-to-text", "--method", "lora"), "expected --method side, got --method lora"),
        ("answer_model", ("--task", "regression"), "expected --task text-to-text, got --task regression"),
        ("chat_model", ("--task", "text-to-text"), "a decoder (llama) in a pool: expected --task causal-lm, classif"),
    ],
)
def test_a_task_of_the_other_kind_of_model_is_refused(
    capsys: Capture,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    kind: str,
    options: tuple[str, ...],
    expected: str,
) -> None:
    command = ("pool", "train", tmp_path / "data.jsonl", "--model", request.getfixturevalue(kind), "--local", 1)
    assert tide(*command, "--out", tmp_path / "run", *options) == ConfigError.exit_code
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.toml").exists()


def test_an_unknown_pool_is_measured_and_planned(
    capsys: Capture, chat_model: Path, facts: Path, tmp_path: Path
) -> None:
    command = ("pool", "train", facts, "--model", chat_model, "--out", tmp_path / "run", "--local", 2, *LEARN[2:])
    assert tide(*command, "--epochs", 1) == 0
    assert "Measuring the devices and the links between them." in capsys.readouterr().err
    assert tide("report", tmp_path / "run") == 0
    assert "in a pool (blocks 0 to 2 on peers" in (tmp_path / "run" / "report.html").read_text()
    assert (tmp_path / "run" / "report" / "pipeline.png").stat().st_size > 5000
    capsys.readouterr()
    assert tide("plan", "pool", tmp_path / "run" / "profile.json", "--batch-rows", 4, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    layout = "; ".join(
        f"blocks {stage['first_block']} to {stage['last_block']} on peers "
        + ", ".join(device["name"].partition(":")[0] for device in stage["devices"])
        for stage in plan["stages"]
    )
    # A model as small as this one is computed before a second device could have helped.
    idle = ", ".join(name.partition(":")[0] for name in plan["left_out"])
    layout += f"; without blocks: {idle}" if idle else ""
    assert f"; {layout}.\n" in (tmp_path / "run" / "peers" / "peer-1.log").read_text()


def test_a_peer_keeps_to_what_its_device_can_give(
    capsys: Capture, chat_model: Path, facts: Path, tmp_path: Path
) -> None:
    command = ("pool", "train", facts, "--model", chat_model, *LEARN[2:], "--epochs", 1, "--memory-limit", "2KB")
    assert tide(*command, "--local", 2, "--out", tmp_path / "none") == ConfigError.exit_code
    assert "too little" in capsys.readouterr().err
    profile = json.loads((tmp_path / "none" / "profile.json").read_text())
    assert [device["memory_bytes"] for device in profile["devices"]] == [1700, 1700]
    told = ("--local", 1, "--stage", "0-2@0", "--out", tmp_path / "told")
    with TidelockProcess(*command, *told, folder=tmp_path / "0") as process:  # this one has memory left to use again
        assert process.wait() == MemoryExceeded.exit_code, process.stderr
        assert "Memory of this peer: expected at most 2.0 kB beside Python" in process.stderr
    assert tide("pool", "resume", tmp_path / "told", "--local", 1, "--memory-limit", "2GB") == 0


def test_devices_join_one_by_one(chat_model: Path, facts: Path, tmp_path: Path) -> None:
    port, shared = a_port(), ("--model", chat_model, "--timeout", 60, "--json")
    where = f"127.0.0.1:{port}"
    lead = ("pool", "train", facts, "--listen", where, "--peers", 3, *LEARN[2:], "--epochs", 2)
    stages = ("--stage", "0-0@0", "--stage", "1-2@1,2*2")
    with (
        TidelockProcess(*lead, *stages, *shared, "--out", tmp_path / "run", folder=tmp_path / "0") as first,
        TidelockProcess("pool", "join", where, *shared, "--out", tmp_path / "b", folder=tmp_path / "1") as second,
        TidelockProcess("pool", "join", where, *shared, "--out", tmp_path / "c", folder=tmp_path / "2") as third,
    ):
        assert first.wait() == 0, first.stderr
        assert (second.wait(), third.wait()) == (0, 0), second.stderr + third.stderr
        done = [process.events()[-1] for process in (first, second, third)]
    assert [event["steps"] for event in done] == [4, 4, 4]
    assert len({event["loss"] for event in done}) == 1
    assert [event["adapter"] is None for event in done] == [False, True, True]


def test_another_model_is_refused(chat_model: Path, facts: Path, tmp_path: Path) -> None:
    other_model = save_chat_model(tmp_path / "other", seed=1)
    where = f"127.0.0.1:{a_port()}"
    lead = ("pool", "train", facts, "--listen", where, "--peers", 2, "--model", chat_model, "--timeout", 10)
    with (
        TidelockProcess(*lead, "--out", tmp_path / "run", folder=tmp_path / "0") as first,
        TidelockProcess(
            *("pool", "join", where, "--model", other_model, "--timeout", 60, "--out", tmp_path / "b"),
            folder=tmp_path / "1",
        ) as other,
    ):
        assert other.wait() == ModelMismatch.exit_code, other.stderr
        assert "that peer 0 has, got " in other.stderr
        assert first.wait() == PeerError.exit_code, first.stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param((), "with --peers N, or torchrun, got neither", id="no peers"),
        pytest.param(("--local", 2, "--stage", "0-2"), "expected FIRST-LAST@PEER,PEER*SHARE", id="no peer in a stage"),
        pytest.param(
            ("--local", 2, "--stage", "0-0@0", "--stage", "1-1@1"), "all of the model's 3 blocks", id="too few blocks"
        ),
        pytest.param(
            ("--local", 2, "--stage", "0-1@0", "--stage", "1-2@1"), "each block in one stage", id="a block twice"
        ),
        pytest.param(
            ("--listen", "0.0.0.0:29400", "--peers", 2), "say --trust-network", id="a network that nobody trusts"
        ),
        pytest.param(("--local", 1, "--epochs", 0.5), "expected whole epochs, got --epochs 0.5", id="half an epoch"),
        pytest.param(
            ("--local", 1, "--side-init", "fisher"),
            "expected --side-init magnitude or random",
            id="a start of the whole",
        ),
        pytest.param(("--local", 1, "--layer", 1), "every block to be read with --method side", id="some blocks"),
        pytest.param(
            ("--local", 1, "--method", "core"), "expected --method side or lora or adapter or full", id="another method"
        ),
        pytest.param(
            ("--local", 1, "--method", "full", "--weight-decay", 0.1),
            "expected no weight decay with --method full",
            id="weight decay of all weights",
        ),
        pytest.param(("--local", 1, "--dropout", 0.1), "expected no dropout with --method side", id="side dropout"),
        pytest.param(("--local", 1, "--task", "text-to-text"), "got --task text-to-text", id="another task"),
        pytest.param(("--local", 1, "--rank", 4), "--rank: expected it with --method lora only", id="of LoRA"),
        pytest.param(
            ("--local", 1, "--method", "lora", "--reduction", 4),
            "--reduction: expected it with --method side only",
            id="of a side network",
        ),
        pytest.param(("--local", 0), "expected at least 1 peer, got 0", id="nobody"),
        pytest.param(("--local", 2, "--peers", 3), "got neither or both", id="two numbers of peers"),
        pytest.param(("--local", 1, "--timeout", 0), "--timeout: expected seconds above 0", id="no time"),
        pytest.param(("--local", 1, "--peer", 1), "--peer with pool join only", id="an option of join"),
    ],
)
def test_refused(
    capsys: Capture, chat_model: Path, facts: Path, tmp_path: Path, options: tuple[object, ...], expected: str
) -> None:
    command = ("pool", "train", facts, "--model", chat_model, "--out", tmp_path / "run", *options)
    assert tide(*command) == ConfigError.exit_code
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.toml").exists()


def test_a_mistake_in_the_data_starts_nobody(capsys: Capture, chat_model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{no json\n")
    command = ("pool", "train", tmp_path / "bad.jsonl", "--model", chat_model, "--out", tmp_path / "run")
    assert tide(*command, "--local", 2) == DataError.exit_code
    assert "(bad.jsonl:1)" in capsys.readouterr().err
    assert not (tmp_path / "run" / "peers").exists()


def test_a_port_that_is_taken(capsys: Capture, chat_model: Path, facts: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        command = ("pool", "train", facts, "--model", chat_model, "--out", tmp_path / "run", "--listen", where)
        assert tide(*command, "--peers", 2) == ListenRefused.exit_code
    assert f"expected to listen at {where}, got Address already in use" in capsys.readouterr().err


def test_nobody_to_join(capsys: Capture, chat_model: Path, tmp_path: Path) -> None:
    command = ("pool", "join", f"127.0.0.1:{a_port()}", "--model", chat_model, "--timeout", 1)
    assert tide(*command, "--out", tmp_path) == PeerError.exit_code
    assert "looking for peer 0" in capsys.readouterr().err
