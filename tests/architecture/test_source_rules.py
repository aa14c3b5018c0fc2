"""Rules about every written file of src that no linter of ours holds: sizes, final classes, nothing left half done."""

from __future__ import annotations

import ast
import builtins
import doctest
import importlib
import re
from functools import cache

import pytest

from tests.architecture.source import Module, folder, module_from_text, written_modules

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")

# A class is open to subclasses only when it is one of these; every other one says @final.
ABSTRACT = {"Protocol", "ABC", "ABCMeta"}
BUILTIN_ERRORS = {
    name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)
}
INHERITED_OPEN = BUILTIN_ERRORS | {
    "Enum",
    "IntEnum",
    "StrEnum",
    "Flag",
    "IntFlag",
    "BaseModel",
    "TypedDict",
    "NamedTuple",
}

every_module = pytest.mark.parametrize("module", written_modules(), ids=lambda module: module.name)


def last_name(node: ast.expr) -> str:
    """Return `Protocol` for `typing.Protocol[T]`."""
    while isinstance(node, ast.Subscript | ast.Call):
        node = node.value if isinstance(node, ast.Subscript) else node.func
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def classes(module: Module) -> list[ast.ClassDef]:
    return [node for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)]


def parents(node: ast.ClassDef) -> set[str]:
    return {last_name(base) for base in [*node.bases, *(keyword.value for keyword in node.keywords)]}


@cache
def our_open_classes() -> frozenset[str]:
    """Return the names of our exceptions, enums and pydantic models, children of children included."""
    known = {node.name: parents(node) for module in written_modules() for node in classes(module)}
    found: set[str] = set()
    while more := {name for name, bases in known.items() if bases & (INHERITED_OPEN | found)} - found:
        found |= more
    return frozenset(found)


def neither_final_nor_abstract(module: Module) -> list[str]:
    allowed = ABSTRACT | INHERITED_OPEN | our_open_classes()
    return [
        f"{module.where}:{node.lineno}: class {node.name}"
        for node in classes(module)
        if not parents(node) & allowed and "final" not in {last_name(mark) for mark in node.decorator_list}
    ]


def names(module: Module, wanted: str) -> list[str]:
    """Return where the module uses a name that it should not."""
    return [
        f"{module.where}:{node.lineno}"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Name) and node.id == wanted
    ]


def long_functions(module: Module) -> list[str]:
    return [
        f"{module.where}:{node.lineno}: {node.name} has {length} lines"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]


@every_module
def test_classes_are_final_or_abstract(module: Module) -> None:
    assert neither_final_nor_abstract(module) == []


def test_the_class_rule_sees_an_open_class() -> None:
    text = "class Open: ...\nclass Child(Open, metaclass=Odd): ...\n@dataclass\nclass Data: ..."
    assert len(neither_final_nor_abstract(module_from_text("tidelock.example", text))) == 3


def test_the_class_rule_allows_the_kinds_meant_to_be_open() -> None:
    text = (
        "@final\nclass Closed: ...\nclass Door(Protocol[T]): ...\nclass Base(nn.Module, abc.ABC): ...\n"
        "class Meta(metaclass=ABCMeta): ...\nclass Odd(ValueError): ...\nclass Kind(enum.Enum): ...\n"
        "class Settings(BaseModel): ...\nclass Leaf(WireError): ..."
    )
    assert neither_final_nor_abstract(module_from_text("tidelock.example", text)) == []


@every_module
def test_files_and_functions_are_short(module: Module) -> None:
    assert len(module.text.splitlines()) <= MAX_FILE_LINES
    assert long_functions(module) == []


def test_the_size_rule_sees_a_long_function() -> None:
    text = "def long():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
    assert long_functions(module_from_text("tidelock.example", text)) == ["tidelock.example.py:1: long has 61 lines"]


@every_module
def test_nothing_is_left_half_done(module: Module) -> None:
    assert names(module, "NotImplementedError") == []
    assert UNFINISHED.findall(module.text) == []


@every_module
def test_no_assert(module: Module) -> None:
    assert [f"{module.where}:{node.lineno}" for node in ast.walk(module.tree) if isinstance(node, ast.Assert)] == []


@pytest.mark.parametrize(
    "module", [module for module in written_modules() if folder(module.name) != "cli"], ids=lambda module: module.name
)
def test_only_the_command_line_prints(module: Module) -> None:
    assert names(module, "print") == []


@pytest.mark.parametrize(
    "module",
    [module for module in written_modules() if re.search(r"^\s*>>> ", module.text, re.MULTILINE)],
    ids=lambda module: module.name,
)
def test_docstring_examples_are_true(module: Module) -> None:
    result = doctest.testmod(importlib.import_module(module.name))
    assert result.attempted > 0
    assert result.failed == 0
