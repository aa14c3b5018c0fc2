"""The source tree of tidelock as syntax trees, for the tests of this folder. It reads files and imports none."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src"
TOP = "tidelock"


@final
@dataclass(frozen=True, slots=True)
class Module:
    """One module: its dotted name, where it is, its text and its tree."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def is_generated(self) -> bool:
        return self.name.endswith(("_pb2", "_pb2_grpc"))

    @property
    def where(self) -> str:
        return self.path.relative_to(ROOT).as_posix() if self.path.is_absolute() else self.path.as_posix()


def module_from_text(name: str, text: str) -> Module:
    """Return a module that is not on disk, for trying a rule on an example."""
    return Module(name, Path(f"{name}.py"), text, ast.parse(text))


@cache
def all_modules() -> tuple[Module, ...]:
    """Return every module of the package, generated ones included."""
    found = []
    for path in sorted((SRC / TOP).rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        found.append(Module(name, path, text, ast.parse(text)))
    return tuple(found)


@cache
def written_modules() -> tuple[Module, ...]:
    """Return every module that a person wrote."""
    return tuple(module for module in all_modules() if not module.is_generated)


@cache
def _known_names() -> frozenset[str]:
    return frozenset(module.name for module in all_modules())


def statements(tree: ast.AST, *, typing_only: bool) -> Iterator[ast.AST]:
    """Yield every node, without what stands under `if TYPE_CHECKING:` unless `typing_only` is asked for too."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and not typing_only and "TYPE_CHECKING" in ast.unparse(child.test):
            nodes: list[ast.AST] = list(child.orelse)
        else:
            nodes = [child]
        for node in nodes:
            yield node
            yield from statements(node, typing_only=typing_only)


def imports(module: Module, *, typing_only: bool = True) -> set[tuple[str, int]]:
    """Return the dotted names that the module imports anywhere, each with its line.

    Args:
        module: The module to read.
        typing_only: Whether imports under `if TYPE_CHECKING:` count.
    """
    found: set[tuple[str, int]] = set()
    for node in statements(module.tree, typing_only=typing_only):
        if isinstance(node, ast.Import):
            found.update((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level or node.module is None:
                msg = f"{module.where}:{node.lineno}: relative import"
                raise ValueError(msg)
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add((inner if inner in _known_names() else node.module, node.lineno))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                found.add((name.value, node.lineno))
    return found


def folder(name: str) -> str:
    """Return the part of tidelock that a dotted name lies in, such as `wire`; `tidelock` for the package itself."""
    parts = name.split(".")
    return TOP if len(parts) == 1 or parts[1] == "__main__" else parts[1]


def is_ours(name: str) -> bool:
    """Return whether the dotted name is tidelock or lies in it (`peft` is a library, `tidelock.peft` is ours)."""
    return name == TOP or name.startswith(f"{TOP}.")
