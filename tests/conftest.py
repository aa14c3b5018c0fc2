"""What every test shares: no network, repeatable hypothesis runs, and the folder of real data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Set before anything imports huggingface_hub, which reads them once. Tests make their models; they load none.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

DATA_VARIABLE = "TIDELOCK_DATA"

# No deadline: how long an example takes says more about the machine than about the code.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="session")
def task_data() -> Path:
    """Return the folder of real task data, one folder per task; skip where the machine has none."""
    value = os.environ.get(DATA_VARIABLE)
    if not value:
        pytest.skip(f"no real data here: set {DATA_VARIABLE} to a folder with one folder of *.jsonl.gz per task")
    folder = Path(value)
    if not folder.is_dir():
        pytest.fail(f"{DATA_VARIABLE}: expected a folder, got {value!r}. Correct it or unset it.")
    return folder
