"""`tidelock plan train`: its bytes are those of the run, to the byte; what it prints; how it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import CloudAccess
from tidelock.cli.main import run
from tidelock.errors import ConfigError, DataError

Capture = pytest.CaptureFixture[str]
# Two batches an epoch, of texts of different lengths; a batch of both has two micro-batches.
SIZES = ("--batch-size", "3", "--epochs", "2", "--micro-batches", "2", "--threads", "1")


def tide(*args: object) -> int:
    return run([str(arg) for arg in args])


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with five texts of different lengths to learn from and two to measure on."""
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    rows = [
        {"prompt": "the house " * (1 + number), "completion": "by the lake" * (1 + number % 2), "split": split}
        for split, count in (("train", 5), ("held_out", 2))
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def planned(capsys: Capture, *args: object) -> dict[str, Any]:
    assert tide("plan", "train", *args, "--json") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    values: dict[str, Any] = json.loads(shown.out)
    return values


def epochs_of(out: Path) -> list[dict[str, dict[str, int]]]:
    """Return what crossed in each epoch of a run."""
    epochs = json.loads((out / "ledger.json").read_text())["epochs"]
    return [{way: epoch[way] for way in ("sent", "received")} for epoch in epochs if epoch["epoch"]]


CASES = {
    "lora, fp32": (),
    "lora, int8 and int4 stochastic": ("--codec", "int8", "--gradient-codec", "int4", "--stochastic-rounding"),
    "lora, one projection of two blocks": ("--target", "v_proj", "--layer", "1", "--layer", "2"),
    "adapter, bf16": ("--method", "adapter", "--place", "mlp", "--place", "attn-out", "--codec", "bf16"),
    "core, int8": ("--method", "core", "--core-rank", "8", "--codec", "int8"),
    "length-grouped": ("--length-grouped",),
}


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_those_of_the_ledger(
    capsys: Capture, tmp_path: Path, chat_model: Path, cloud_access: CloudAccess, texts: Path, case: str
) -> None:
    args = [texts, "--split", "train", "--model", chat_model, *cloud_access.options(), *SIZES, *CASES[case]]
    (phase,) = planned(capsys, *args)["phases"]
    assert tide("train", *args, "--out", tmp_path / "run") == 0
    first, later = epochs_of(tmp_path / "run")
    assert phase["epoch"] == first
    # In another order examples meet in other batches, and a message more or less has a head of some bytes.
    assert {way: set(kinds) for way, kinds in later.items()} == {way: set(kinds) for way, kinds in first.items()}
    for way, kinds in later.items():
        for kind, size in kinds.items():
            assert size == pytest.approx(phase["epoch"][way][kind], rel=0.02, abs=100), kind


def test_bytes_of_a_prefix_that_all_share(
    capsys: Capture, tmp_path: Path, chat_model: Path, cloud_access: CloudAccess
) -> None:
    path = tmp_path / "texts.jsonl"
    rows = [{"prompt": "by the lake " * 5 + "the house " * number, "completion": "by"} for number in range(1, 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = [path, "--model", chat_model, *cloud_access.options(), *SIZES]
    sizes = []
    for option in ((), ("--no-share-prefix",)):
        (phase,) = planned(capsys, *args, *option)["phases"]
        out = tmp_path / f"run{len(option)}"
        assert tide("train", *args, *option, "--out", out) == 0
        capsys.readouterr()
        assert phase["epoch"] == epochs_of(out)[0]
        sizes.append(sum(phase["epoch"]["sent"].values()))
    assert sizes[0] < 0.9 * sizes[1]


def test_bytes_of_a_schedule(
    capsys: Capture, tmp_path: Path, chat_model: Path, cloud_access: CloudAccess, texts: Path
) -> None:
    """All modules in the warm-up, one after it, and one decision between the two."""
    options = ["--schedule", "kill-revive", "--budget", "1"]
    args = [texts, "--split", "train", "--model", chat_model, *cloud_access.options(), *SIZES, *options]
    warm_up, rest = planned(capsys, *args)["phases"]
    assert tide("train", *args, "--out", tmp_path / "run") == 0
    first, later = epochs_of(tmp_path / "run")
    # The period's decision is asked at its end, still in its epoch; that of a last period is not.
    assert warm_up["epoch"]["received"] == pytest.approx(first["received"], abs=20)
    assert rest["epoch"]["sent"]["norms"] == pytest.approx(first["sent"].pop("norms"), abs=30)
    assert warm_up["epoch"]["sent"] == first["sent"]
    assert (warm_up["active"], rest["active"]) == (3, 1)
    for kind, size in later["sent"].items():
        assert rest["epoch"]["sent"][kind] == pytest.approx(size, rel=0.02, abs=100)
    assert "input_gradient" not in rest["epoch"]["sent"]
    assert "input_gradient" not in later["sent"]


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_bytes_of_a_side_network(
    capsys: Capture, tmp_path: Path, chat_model: Path, cloud_access: CloudAccess, texts: Path, codec: str
) -> None:
    side = ["--method", "side", "--reduction", "4", "--tap-width", "16", "--codec", codec]
    sizes = ["--batch-size", "3", "--epochs", "2", "--threads", "1"]
    args = [texts, "--split", "train", "--model", chat_model, *cloud_access.options(), *sizes, *side]
    first, later = planned(capsys, *args)["phases"]
    assert tide("train", *args, "--out", tmp_path / "run") == 0
    (crossed, *others) = epochs_of(tmp_path / "run")
    # The connection for the taps is opened in the first epoch, and describes the model.
    description = crossed["received"].pop("control")
    assert description > 500
    assert first["epoch"] == crossed
    assert others == [{"sent": {}, "received": {}}] or not others
    assert later["epoch"] == {"sent": {}, "received": {}}


def test_bytes_of_whole_texts_and_of_an_evaluation(
    capsys: Capture, tmp_path: Path, chat_model: Path, cloud_access: CloudAccess
) -> None:
    """One state a text comes back; an evaluation crosses in the epoch after whose steps it is made."""
    data = tmp_path / "labelled.jsonl"
    rows = [
        {"text_a": "the old house " * (1 + number % 3), "label": number % 2, "split": "train" if number < 6 else "dev"}
        for number in range(9)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--task", "classification", "--split", "train", "--eval-split", "dev"]
    args = [data, *options, "--model", chat_model, *cloud_access.options(), *SIZES]
    values = planned(capsys, *args)
    (phase,), evaluation = values["phases"], values["evaluation"]
    assert tide("train", *args, "--out", tmp_path / "run") == 0
    first, _ = epochs_of(tmp_path / "run")
    together = {
        way: {kind: size + evaluation[way].get(kind, 0) for kind, size in phase["epoch"][way].items()}
        for way in ("sent", "received")
    }
    assert together == first
    assert values["labelled"] == values["examples"] == 6


def test_it_says_what_a_run_will_take(
    capsys: Capture, chat_model: Path, cloud_access: CloudAccess, texts: Path
) -> None:
    splits = ["--split", "train", "--eval-split", "held_out", "--link", "40ms,50mbit"]
    assert tide("plan", "train", texts, "--model", chat_model, *cloud_access.options(), *splits, *SIZES) == 0
    shown = capsys.readouterr()
    assert shown.err == "Timing a few steps.\n"
    assert shown.out.startswith("llama, lora, fp32: 5 examples, ")
    for words in (
        "\nLink: 40 ms there and back, 50 Mbit/s each way.\n",
        "\nAll steps: 4 steps, 3 active modules\n",
        "The link is the bottleneck, most of all its delay: 280 ms of a step at least.",
        "\nOne evaluation: ",
        "the cloud says its own when it starts.",
    ):
        assert words in shown.out


@pytest.mark.slow
def test_without_a_cloud_this_machine_plays_it(capsys: Capture, chat_model: Path, texts: Path) -> None:
    args = [texts, "--model", chat_model, *SIZES]
    values = planned(capsys, *args, "--link", "400ms,50mbit")
    assert values["cloud_memory_bytes"] > values["cloud_kept_bytes"] > 0
    (phase,) = values["phases"]
    # 7 round trips of a pass, at least.
    assert phase["seconds"] > 7 * 0.4
    assert phase["seconds"] == pytest.approx(sum(phase["split"].values()))
    assert values["link"]["round_trip_seconds"] == 0.4


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train", "DATA", "--link", "40ms"], "--link: expected RTT,RATE or RTT,UP/DOWN"),
        (["train", "DATA", "--batch-rows", "4"], "Plan: expected --batch-rows with plan pool only"),
        (["train", "DATA", "--method", "side", "--task", "text-to-text"], "Plan: expected a task of a decoder"),
        (["pool", "DATA", "--link", "40ms,1mbit"], "Plan: expected --link with plan train only"),
        (["pool", "DATA", "--codec", "int8"], "Plan: expected --codec with plan train only"),
        (["both", "DATA"], "Plan: expected one of train, pool, got 'both'"),
    ],
)
def test_what_it_cannot_take_is_refused(
    capsys: Capture, chat_model: Path, texts: Path, args: list[str], words: str
) -> None:
    what, _, *options = args
    model = ["--model", chat_model] if what == "train" else []
    assert tide("plan", what, texts, *model, *options) == ConfigError.exit_code
    assert capsys.readouterr().err.startswith(f"error: {words}")


def test_a_link_for_a_cloud_that_has_one_is_refused(capsys: Capture, texts: Path) -> None:
    cloud = ["--backbone", "cloud", "--cloud", "grpcs://cloud.example:7777", "--link", "40ms,1mbit"]
    assert tide("plan", "train", texts, *cloud) == ConfigError.exit_code
    assert "Leave out --link, or --cloud." in capsys.readouterr().err


def test_missing_data_is_an_error_of_data(capsys: Capture, chat_model: Path, tmp_path: Path) -> None:
    assert tide("plan", "train", tmp_path / "none.jsonl", "--model", chat_model, "--json") == DataError.exit_code
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "DataError"


def test_help_names_both(capsys: Capture) -> None:
    assert tide("plan", "--help") == 0
    shown = capsys.readouterr().out
    assert "--link" in shown
    assert "--batch-rows" in shown
