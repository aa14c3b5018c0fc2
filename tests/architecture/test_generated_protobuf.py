"""The committed protobuf code is what `make proto` would write, and the declared dependencies can run it."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import requires
from typing import TYPE_CHECKING

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.architecture.source import ROOT, SRC

if TYPE_CHECKING:
    from pathlib import Path

PROTO = "tidelock/wire/tidelock.proto"
GENERATED = ("tidelock_pb2.py", "tidelock_pb2.pyi", "tidelock_pb2_grpc.py")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the code generated now."""
    out = tmp_path_factory.mktemp("proto")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", "-I", "src"),
            *(f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}", PROTO),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out / "tidelock" / "wire"


@pytest.mark.parametrize("name", GENERATED)
def test_generated_code_is_current(fresh: Path, name: str) -> None:
    committed = SRC / "tidelock" / "wire" / name
    assert committed.exists(), "run `make proto`"
    assert committed.read_text(encoding="utf-8") == (fresh / name).read_text(encoding="utf-8"), "run `make proto`"


def test_nothing_else_is_generated(fresh: Path) -> None:
    assert sorted(path.name for path in fresh.iterdir()) == sorted(GENERATED)


def test_generated_code_imports_absolutely(fresh: Path) -> None:
    assert "\nfrom tidelock.wire import tidelock_pb2 as " in (fresh / "tidelock_pb2_grpc.py").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("library", "name", "pattern"),
    [
        ("protobuf", "tidelock_pb2.py", r"# Protobuf Python Version: (\S+)"),
        ("grpcio", "tidelock_pb2_grpc.py", r"GRPC_GENERATED_VERSION = '([^']+)'"),
    ],
)
def test_no_allowed_release_is_too_old_for_the_generated_code(
    fresh: Path, library: str, name: str, pattern: str
) -> None:
    match = re.search(pattern, (fresh / name).read_text(encoding="utf-8"))
    assert match is not None
    (declared,) = [one for one in map(Requirement, requires("tidelock") or []) if one.name == library]
    lowest = [Version(bound.version) for bound in declared.specifier if bound.operator == ">="]
    assert lowest == [Version(match[1])]
