"""The names that `import tidelock` offers: `__all__` lists them all, and every one is there."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.architecture.source import TOP, all_modules, is_ours

if TYPE_CHECKING:
    from pathlib import Path

# Not as an import statement: a type checker does not know the names that appear on use.
tidelock = importlib.import_module(TOP)


def names_that_a_type_checker_sees() -> set[str]:
    """Return the public names bound in `tidelock/__init__.py`, under `if TYPE_CHECKING:` too."""
    (package,) = [module for module in all_modules() if module.name == TOP]
    found: set[str] = set()
    blocks = [node.body for node in package.tree.body if isinstance(node, ast.If)]
    for node in [*package.tree.body, *(inner for block in blocks for inner in block)]:
        if isinstance(node, ast.ImportFrom) and is_ours(node.module or ""):
            found.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update(target.id for target in targets if isinstance(target, ast.Name))
    return {name for name in found if not name.startswith("_")}


def test_all_lists_every_public_name() -> None:
    assert {name for name in tidelock.__all__ if not name.startswith("_")} == names_that_a_type_checker_sees()


def test_all_lists_each_name_once() -> None:
    assert len(set(tidelock.__all__)) == len(tidelock.__all__)


def test_every_public_name_is_there_and_says_what_it_is() -> None:
    for name in tidelock.__all__:
        value = getattr(tidelock, name)
        assert name.startswith("_") or (value.__doc__ or "").strip(), name


def test_dir_lists_every_public_name_before_it_is_used(tmp_path: Path) -> None:
    code = "import tidelock\nassert set(tidelock.__all__) <= set(dir(tidelock))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = tidelock.no_such_name
