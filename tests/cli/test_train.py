from __future__ import annotations

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pyarrow import parquet
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.cli.conftest import CloudAccess
from tests.support.chat_model import POSITIONS, save_chat_model
from tests.support.tiny_models import save_tiny_model
from tidelock.cli.main import run
from tidelock.cli.progress import StepProgress

Capture = pytest.CaptureFixture[str]
QUICK = ("--max-steps", "2", "--batch-size", "2", "--threads", "1")


def train(*args: object) -> int:
    return run(["train", *map(str, args)])


def refused(capsys: Capture, *args: object) -> tuple[int, str]:
    """Return the exit code and the one error line of a `train` that must fail."""
    code = train(*args)
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert shown.out == ""
    last = shown.err.splitlines()[-1]
    assert last.startswith("error: ")
    return code, last


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return path


def _cell(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "jsonl": write_jsonl,
    "csv": write_csv,
    "parquet": write_parquet,
}
FORMS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "where?"}, {"role": "assistant", "content": "there"}]},
    "completion": {"prompt": "the old house ", "completion": "by the lake"},
    "text": {"text": "the old house, by the lake"},
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_from_every_kind_of_file(
    capsys: Capture, tmp_path: Path, chat_model: Path, form: str, kind: str
) -> None:
    data = WRITERS[kind](tmp_path / f"data.{kind}", [FORMS[form]] * 3)
    out = tmp_path / "run"
    assert train(data, "--model", chat_model, "--out", out, *QUICK, "--json") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    *steps, done = (json.loads(line) for line in shown.out.splitlines())
    assert [event["step"] for event in steps] == [1, 2]
    assert all(event["event"] == "step" and event["loss"] > 0 for event in steps)
    assert (done["event"], done["steps"], done["eval_loss"]) == ("done", 2, None)
    assert done["loss"] == steps[-1]["loss"]
    assert done["traffic_bytes"] == {"sent": {}, "received": {}}
    assert done["adapter"] == str(out / "adapter")
    assert {path.name for path in out.iterdir()} == {
        "adapter",
        "checkpoints",
        "facts.json",
        "ledger.json",
        "metrics.jsonl",
        "run.toml",
        "schedule.jsonl",
    }


def test_for_people_it_says_what_it_did(
    capsys: Capture, tmp_path: Path, chat_model: Path, cloud_access: CloudAccess, facts: Path
) -> None:
    out = tmp_path / "run"
    splits = ["--split", "train", "--eval-split", "held_out"]
    args = [facts, "--model", chat_model, *cloud_access.options(), *splits, "--out", out, *QUICK]
    assert train(*args) == 0
    shown = capsys.readouterr()
    assert "Data: 4 examples to learn from, 2 to measure on." in shown.err
    assert "Step 2/2" in shown.err
    assert shown.out.startswith("Done: 2 steps in ")
    assert "not measured" not in shown.out
    assert f"({out / 'ledger.json'})" in shown.out
    assert shown.out.endswith(f"Adapter: {out / 'adapter'}\n")
    ledger = json.loads((out / "ledger.json").read_text())
    assert ledger["sent"]["embedding"] > 0
    assert ledger["received"]["site_gradient"] > 0


@pytest.mark.parametrize("as_json", [False, True])
def test_rounding_is_stated_before_and_measured_after(
    capsys: Capture, tmp_path: Path, chat_model: Path, cloud_access: CloudAccess, facts: Path, as_json: bool
) -> None:
    out = tmp_path / "run"
    codecs = ["--codec", "int8", "--gradient-codec", "int4", "--stochastic-rounding"]
    args = [facts, "--model", chat_model, *cloud_access.options(), *codecs, "--out", out, *QUICK]
    assert train(*args, *(["--json"] if as_json else [])) == 0
    shown = capsys.readouterr()
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2
    assert set(last["codec_error"]) == {"activation", "gradient"}
    assert all(0 < error["mean"] <= error["max"] <= error["bound"] for error in last["codec_error"].values())
    if as_json:
        assert json.loads(shown.out.splitlines()[-1])["codec_error"] == last["codec_error"]
        return
    before = r"^On the wire: activations in int8, 3\.\d+ times smaller than fp32, .*int4 rounded"
    assert re.search(before, shown.err, re.MULTILINE)
    mean = last["codec_error"]["gradient"]["mean"]
    after = rf"^Rounded on the wire: a token's activations off by .*gradients off by {mean:.2%}"
    assert re.search(after, shown.out, re.MULTILINE)
    text = (out / "run.toml").read_text()
    assert 'codec = "int8"\ngradient_codec = "int4"\nstochastic_rounding = true\n' in text


def test_what_is_exact_has_no_error(
    capsys: Capture, tmp_path: Path, chat_model: Path, cloud_access: CloudAccess, facts: Path
) -> None:
    args = [facts, "--model", chat_model, *cloud_access.options(), "--out", tmp_path / "run", *QUICK]
    assert train(*args) == 0
    shown = capsys.readouterr()
    assert "On the wire: activations in fp32, exact; gradients in fp32, exact." in shown.err
    assert "Rounded" not in shown.out
    assert "codec_error" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_without_a_model_the_clouds_own_is_fetched(
    capsys: Capture, tmp_path: Path, chat_model: Path, cloud_access: CloudAccess, facts: Path
) -> None:
    common = [facts, *cloud_access.options(), *QUICK, "--json"]
    assert train(*common, "--out", tmp_path / "fetched") == 0
    assert train(*common, "--out", tmp_path / "own", "--model", chat_model) == 0
    fetched, own = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("fetched", "own")
    )
    assert fetched == own


def test_an_adapter_made_by_peft_is_continued(capsys: Capture, tmp_path: Path, chat_model: Path, facts: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(chat_model), config)
    assert isinstance(made, PeftModel)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    made.save_pretrained(str(tmp_path / "adapter"))
    common = [facts, "--model", chat_model, *QUICK, "--json"]
    # So small that nothing moves by more than rounding.
    still = ["--learning-rate", "1e-12", "--adapter", tmp_path / "adapter"]
    assert train(*common, *still, "--out", tmp_path / "run") == 0
    before, after = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (tmp_path, tmp_path / "run"))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)
    assert any(bool(before[name].any()) for name in before if "lora_B" in name)
    written = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (2, 6)
    assert train(*common, "--learning-rate", "0.1", "--adapter", tmp_path / "adapter", "--out", tmp_path / "moved") == 0
    moved = load_file(tmp_path / "moved" / "adapter" / "adapter_model.safetensors")
    assert not any(torch.allclose(before[name], moved[name], atol=1e-3) for name in before)


def test_an_example_too_long_is_refused_by_its_line_or_cut(capsys: Capture, tmp_path: Path, chat_model: Path) -> None:
    rows = [{"text": "short"}, {"text": "x" * (POSITIONS + 10)}]
    data = write_jsonl(tmp_path / "long.jsonl", rows)
    common = [data, "--model", chat_model, "--out", tmp_path / "run", *QUICK]
    code, line = refused(capsys, *common)
    assert code == 3
    assert f"expected at most {POSITIONS} tokens, got {POSITIONS + 11} (long.jsonl:2)" in line
    assert "--truncate" in line
    code, line = refused(capsys, *common, "--max-length", 20)
    assert code == 3
    assert "expected at most 20 tokens" in line
    # What was refused left no run behind: the same folder will do.
    assert train(*common, "--truncate") == 0


BAD_DATA: dict[str, tuple[str, str]] = {
    "malformed": ('{"text": "a"}\n\n{"text": "secret-words\n', "JSON: expected one whole value, got"),
    "two forms": ('{"text": "a"}\n\n{"text": "secret-words", "prompt": "secret-words"}\n', "Row: expected exactly one"),
    "a list": ('{"text": "a"}\n\n["secret-words"]\n', "Row: expected an object"),
    "no text": ('{"text": "a"}\n\n{"text": 5, "x": "secret-words"}\n', "'text': expected text"),
    "a role": (
        '{"text": "a"}\n\n{"messages": [{"role": "secret-words", "content": "secret-words"}]}\n',
        "'role': expected one of",
    ),
    "no answer": (
        '{"text": "a"}\n\n{"messages": [{"role": "user", "content": "secret-words"}]}\n',
        "'messages': expected an assistant's turn",
    ),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_a_bad_row_is_named_by_its_line_and_not_quoted(
    capsys: Capture, tmp_path: Path, chat_model: Path, name: str
) -> None:
    text, said = BAD_DATA[name]
    (tmp_path / "bad.jsonl").write_text(text)
    code, line = refused(capsys, tmp_path / "bad.jsonl", "--model", chat_model, "--out", tmp_path / "run")
    assert code == 3
    assert said in line
    assert "bad.jsonl:3" in line
    assert "secret-words" not in line


def test_no_examples_are_refused(capsys: Capture, tmp_path: Path, chat_model: Path, facts: Path) -> None:
    common = ["--model", chat_model, "--out", tmp_path / "run"]
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert refused(capsys, tmp_path / "empty.jsonl", *common) == (
        3,
        "error: Data 'empty.jsonl': expected at least one row, got none. Give a file that has some.",
    )
    code, line = refused(capsys, tmp_path / "missing.jsonl", *common)
    assert code == 3
    assert "missing.jsonl': expected a file or a hub data set" in line
    code, line = refused(capsys, facts, *common, "--split", "nowhere")
    assert code == 3
    assert "expected rows with split 'nowhere', got only 'held_out', 'train'" in line
    code, line = refused(capsys, facts, *common, "--eval-data", tmp_path / "gone.csv")
    assert code == 3
    assert "gone.csv" in line


def test_a_cloud_that_cannot_be_used(
    capsys: Capture, tmp_path: Path, chat_model: Path, cloud_access: CloudAccess, facts: Path
) -> None:
    wrong_token = tmp_path / "token"
    wrong_token.write_text("0123456789abcdef-of-a-stranger")
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        free = nobody.getsockname()[1]
    plain = cloud_access.address.replace("grpcs://", "grpc://")
    changes: list[tuple[dict[str, object], int, str]] = [
        ({"token_file": wrong_token}, 13, "Token: expected one that this cloud knows, got another or none."),
        ({"token_file": None}, 13, "Token: expected one that this cloud knows, got another or none."),
        ({"ca": cloud_access.certificates.other_ca}, 12, "expected a trusted certificate, got one that is not"),
        ({"ca": None}, 12, "expected a trusted certificate, got one that is not"),
        ({"cloud": f"grpcs://127.0.0.1:{free}"}, 11, "Is it running, and reachable from here?"),
        ({"cloud": plain}, 11, "Is it running, and reachable from here?"),
        ({"cloud": "grpc://192.0.2.7:7777"}, 2, "expected grpcs:// to another machine"),
        ({"cloud": "http://127.0.0.1:7777"}, 2, "expected grpcs://HOST:PORT"),
        ({"ca": tmp_path / "gone.pem"}, 2, "gone.pem"),
        ({"token_file": tmp_path / "gone"}, 2, "--token-file: expected a readable text file"),
        ({"client_cert": cloud_access.certificates.client_cert}, 2, "got only one of them"),
    ]
    out = tmp_path / "run"
    for change, expected, said in changes:
        code, line = refused(capsys, facts, "--model", chat_model, "--out", out, *cloud_access.options(**change))
        assert (code, said in line) == (expected, True), line
        assert wrong_token.read_text() not in line
    # None of these left a run behind.
    assert train(facts, "--model", chat_model, "--out", out, *cloud_access.options(), *QUICK) == 0


def test_another_model_than_the_clouds(capsys: Capture, tmp_path: Path, cloud_access: CloudAccess, facts: Path) -> None:
    common = [facts, "--out", tmp_path / "run", *cloud_access.options()]
    other_type = save_tiny_model("gpt2", tmp_path)
    code, line = refused(capsys, *common, "--model", other_type)
    assert code == 14
    assert "to hold a 'gpt2' model like this device, got 'llama'" in line
    other_weights = save_chat_model(tmp_path / "other", seed=1)
    code, line = refused(capsys, *common, "--model", other_weights)
    assert code == 14
    assert "got others in" in line


def test_run_folders_that_do_not_fit(capsys: Capture, tmp_path: Path, chat_model: Path, facts: Path) -> None:
    out = tmp_path / "run"
    assert train(facts, "--model", chat_model, "--out", out, *QUICK) == 0
    capsys.readouterr()
    adapter = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    code, line = refused(capsys, facts, "--model", chat_model, "--out", out)
    assert code == 2
    assert line.endswith(
        f"got one with a run in it ({out}). Resume it (train --resume, or pool resume), or choose another --out."
    )
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    code, line = refused(capsys, "--resume", "--out", tmp_path / "nothing")
    assert code == 5
    assert "expected one with a run.toml, got none" in line
    (out / "run.toml").write_text("rank = 'eight'")
    code, line = refused(capsys, "--resume", "--out", out)
    assert code == 5
    assert "Restore the file" in line
    (tmp_path / "file").write_text("")
    code, line = refused(capsys, facts, "--model", chat_model, "--out", tmp_path / "file" / "run")
    assert code == 6
    assert "Not a directory" in line


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "--model with --backbone local, got none"),
        (("--model", "m", "--backbone", "cloud"), "got no --cloud"),
        (("--model", "m", "--cloud", "grpcs://x:1"), "got --cloud grpcs://x:1 with --backbone local"),
        (("--model", "m", "--backbone", "moon"), "--backbone: expected one of local, cloud, got 'moon'"),
        (
            ("--model", "m", "--method", "prompt"),
            "one of lora, adapter, core, side, full, got 'prompt'",
        ),
        (("--model", "m", "--codec", "int3"), "--codec: expected one of fp32, bf16, int8, int4, got 'int3'"),
        (("--model", "m", "--gradient-codec", ""), "--gradient-codec: expected one of fp32, bf16, int8, int4, got ''"),
        (
            ("--model", "m", "--stochastic-rounding"),
            "--stochastic-rounding: expected gradients in int8 or int4",
        ),
        (("--model", "m", "--rank", "0"), "--rank: expected 1 or more, got 0"),
        (("--model", "m", "--dropout", "1"), "--dropout: expected at least 0 and below 1, got 1.0"),
        (("--model", "m", "--epochs", "inf"), "--epochs: expected more than 0, and finite, got inf"),
        (("--model", "m", "--learning-rate", "nan"), "--learning-rate: expected more than 0, and finite, got nan"),
        (("--model", "m", "--seed", str(1 << 32)), "--seed: expected from 0 to 4294967295"),
        (("--model", "m", "--lr-schedule", "steep"), "--lr-schedule: expected one of linear, cosine, constant"),
        (("--model", "m", "--rank", "many"), "--rank"),
        (("--model", "m", "--bogus"), "No such option: --bogus"),
    ],
)
def test_options_that_cannot_be_honoured(capsys: Capture, tmp_path: Path, args: tuple[str, ...], said: str) -> None:
    code, line = refused(capsys, "facts.jsonl", "--out", tmp_path / "run", *args)
    assert code == 2
    assert said in line
    assert not (tmp_path / "run").exists()


def test_without_data_there_is_nothing_to_learn(capsys: Capture, tmp_path: Path) -> None:
    code, line = refused(capsys, "--model", "m", "--out", tmp_path / "run")
    assert code == 2
    assert "expected DATA to learn from, got none" in line


@pytest.mark.parametrize(
    ("option", "value", "refusal"),
    [
        ("--layer", "3", (2, "expected")),
        ("--target", "o_proj", (2, "o_proj")),
        ("--max-length", "1", (2, "expected at least 2 tokens, got 1")),
        ("--adapter", "nowhere", (5, "nowhere")),
    ],
)
def test_settings_that_do_not_fit_the_model(
    capsys: Capture, chat_model: Path, facts: Path, option: str, value: str, refusal: tuple[int, str]
) -> None:
    out = facts.parent / "refused"
    code, line = refused(capsys, facts, "--model", chat_model, "--out", out, option, value)
    assert (code, refusal[1] in line) == (refusal[0], True), line
    assert not (out / "run.toml").exists()


def test_models_that_cannot_be_used(capsys: Capture, tmp_path: Path, facts: Path) -> None:
    code, line = refused(capsys, facts, "--model", tmp_path / "gone", "--out", tmp_path / "run")
    assert code == 4
    assert "gone" in line
    without_tokenizer = save_tiny_model("llama", tmp_path)
    code, line = refused(capsys, facts, "--model", without_tokenizer, "--out", tmp_path / "run")
    assert code == 2
    assert "Tokenizer: expected one beside the model's configuration" in line


def test_an_error_is_a_json_object_too(capsys: Capture, tmp_path: Path, chat_model: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{")
    code = train(tmp_path / "bad.jsonl", "--model", chat_model, "--out", tmp_path / "run", "--json")
    (line,) = capsys.readouterr().out.splitlines()
    error = json.loads(line)["error"]
    assert (code, error["type"], error["exit_code"]) == (3, "DataError", 3)
    assert "bad.jsonl:1" in error["message"]


def test_ctrl_c_says_how_to_go_on(
    capsys: Capture, tmp_path: Path, chat_model: Path, facts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = StepProgress.step

    def step(progress: StepProgress, number: int, loss: float | None) -> None:
        draw(progress, number, loss)
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StepProgress, "step", step)
    out = tmp_path / "run"
    args = [facts, "--model", chat_model, "--out", out, "--batch-size", 2, "--max-steps", 4, "--threads", 1]
    assert train(*args) == 130
    stopped = capsys.readouterr()
    advice = f"Go on with: tidelock train --resume --out {out}"
    assert stopped.out.startswith(f"Stopped after step 2; all up to it is saved. {advice}\n")
    assert "Stopping after this step; Ctrl-C again stops at once.\n" in stopped.err
    assert train("--resume", "--out", out) == 0
    resumed = capsys.readouterr()
    assert f"Going on from {out / 'checkpoints' / 'checkpoint-2'}." in resumed.err
    assert resumed.out.startswith("Done: 4 steps in ")


def test_a_process_that_a_shell_starts_stops_at_ctrl_c_and_goes_on(
    tmp_path: Path, chat_model: Path, facts: Path
) -> None:
    """All else here shares a process or forks it; this is the whole thing, imports, threads and exit included."""
    out = tmp_path / "run"
    many = ["--epochs", "2000", "--batch-size", "2", "--threads", "1", "--save-every", "5000"]
    command = [
        sys.executable,
        "-m",
        "tidelock",
        "train",
        str(facts),
        "--model",
        str(chat_model),
        "--out",
        str(out),
        *many,
    ]
    process = subprocess.Popen(
        [*command, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TIDELOCK_CACHE": str(tmp_path / "cache")},
    )
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["event"] == "step"
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors == ""
    *steps, last = (json.loads(line) for line in printed.splitlines())
    assert last["event"] == "interrupted"
    assert last["steps"] == (steps[-1]["step"] if steps else 1)
    assert (out / "checkpoints" / f"checkpoint-{last['steps']}" / "COMPLETE").is_file()
