"""SmolLM2-135M-Instruct for tests that need a model with something to say; all others make a tiny random one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidelock.errors import ModelError
from tidelock.model.smollm2 import fetch_smollm2


def smollm2_folder() -> Path:
    """Return the model's local folder, fetched once per machine; skip the test where it cannot be had.

    For the body of a session fixture; the test should be marked slow, because the first call downloads.
    """
    try:
        return fetch_smollm2(on_progress=lambda _: None)
    except ModelError as error:
        pytest.skip(f"SmolLM2-135M-Instruct is not here and cannot be fetched: {error}")
