"""`tidelock cache`: what it says, what it finds, what it removes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.cache.conftest import IDENTITY, example, taps_of
from tidelock.cache.key import CacheKey
from tidelock.cache.store import ActivationCache, entries_of
from tidelock.cli.main import run
from tidelock.errors import CacheError, ConfigError

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    made = ActivationCache(tmp_path / "cache", CacheKey.open(tmp_path / "key"), IDENTITY)
    for number in range(3):
        made.put(example(number), taps_of(number))
    made.close()
    return tmp_path / "cache"


def tide(*args: object) -> int:
    return run(["cache", *map(str, args)])


def test_info_needs_no_key(capsys: Capture, cache: Path) -> None:
    assert tide("info", cache) == 0
    assert capsys.readouterr().out.startswith("3 examples, 936 B: model aaaaaaaaaaaa in fp32, 2 taps, whole, in fp32")
    assert tide("info", cache, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["entries"], values["taps"], values["max_length"]) == (3, [0, 2], 128)
    assert values["bytes"] == sum(size for _, size in entries_of(cache))


def test_verify_finds_and_removes_what_is_damaged(capsys: Capture, cache: Path, tmp_path: Path) -> None:
    key = ("--key", tmp_path / "key")
    assert tide("verify", cache, *key) == 0
    assert capsys.readouterr().out == "3 entries are right, 0 are damaged.\n"
    path = min(path for path, _ in entries_of(cache))
    path.write_bytes(b"damaged")
    assert tide("verify", cache, *key) == CacheError.exit_code
    shown = capsys.readouterr()
    assert shown.out == "2 entries are right, 1 are damaged.\n"
    assert f"got 1 damaged ones, such as {path}" in shown.err
    assert tide("verify", cache, *key, "--remove", "--json") == 0
    assert json.loads(capsys.readouterr().out)["damaged"] == [str(path)]
    assert tide("verify", cache, *key) == 0


def test_verify_with_another_key_changes_nothing(capsys: Capture, cache: Path, tmp_path: Path) -> None:
    CacheKey.open(tmp_path / "other")
    assert tide("verify", cache, "--key", tmp_path / "other", "--remove") == CacheError.exit_code
    assert tide("verify", cache, "--key", tmp_path / "nowhere") == CacheError.exit_code
    assert "expected the file with which the cache was made, got none" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()
    assert len(list(entries_of(cache))) == 3


def test_clear_removes_a_cache_and_refuses_anything_else(capsys: Capture, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for action in ("clear", "info", "verify"):
        assert tide(action, tmp_path / "mine") == CacheError.exit_code
    assert (tmp_path / "mine").is_dir()
    capsys.readouterr()
    assert tide("clear", cache) == 0
    assert capsys.readouterr().out == "Removed 936 B of entries.\n"
    assert not cache.exists()


@pytest.mark.parametrize("args", [("shrink",), ("info", "--remove"), ("clear", "--key", "k")])
def test_other_actions_and_options_are_refused(capsys: Capture, cache: Path, args: tuple[str, ...]) -> None:
    action, *options = args
    assert tide(action, cache, *options) == ConfigError.exit_code
    assert "Cache: expected" in capsys.readouterr().err
    assert len(list(entries_of(cache))) == 3
