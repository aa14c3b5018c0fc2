"""Which number a peer of a pool had."""

from __future__ import annotations

import pytest

from tidelock.errors import StorageError
from tidelock.run.pool_processes import remember_number, remembered_number


def test_a_folder_remembers_its_number(tmp_path):
    assert remembered_number(tmp_path / "new") is None
    remember_number(tmp_path / "new", 2)
    assert remembered_number(tmp_path / "new") == 2
    (tmp_path / "new" / "peer").write_text("no number")
    assert remembered_number(tmp_path / "new") is None
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="expected one that can be written, got File exists"):
        remember_number(tmp_path / "file", 1)
