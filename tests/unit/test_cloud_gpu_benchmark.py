"""Many devices on one GPU: the benchmark runs wherever it is told to, and its table says what was measured."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.architecture.source import ROOT

_FILE = ROOT / "benchmarks" / "cloud_gpu.py"


@pytest.mark.slow
def test_two_devices_beside_peft(tmp_path):
    out = tmp_path / "results.json"
    options = ["--geometry", "tiny", "--torch-device", "cpu", "--dtype", "fp32", "--rows", "2", "--length", "16"]
    options += ["--devices", "2", "1", "--seconds", "1", "--variants", "core, int8", "lora in 4 blocks, int8"]
    done = subprocess.run(
        [sys.executable, str(_FILE), *options, "--out", str(out)], capture_output=True, text=True, check=True
    )
    result = json.loads(out.read_text())
    runs = [(run["variant"], run["devices"]) for run in result["runs"]]
    assert runs == [("core, int8", 1), ("core, int8", 2), ("lora in 4 blocks, int8", 1), ("lora in 4 blocks, int8", 2)]
    assert all(0 < run["slowest"] <= run["fastest"] <= run["tokens_per_second"] for run in result["runs"])
    assert all(run["memory_bytes"] > 0 for run in [result["peft"], *result["runs"]])
    shown = subprocess.run(
        [sys.executable, str(_FILE), "--show", "--out", str(out)], capture_output=True, text=True, check=True
    ).stdout
    assert shown in done.stdout
    assert "| `peft` alone | | " in shown
    share = result["runs"][0]["tokens_per_second"] / result["peft"]["tokens_per_second"]
    assert f"| core, int8 | 1 | {result['runs'][0]['tokens_per_second']:,.0f} | {share:.2f} | 1.00 |" in shown
