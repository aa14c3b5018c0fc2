"""`tidelock cache`: what it says, what it finds, what it removes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.unit.cache.conftest import IDENTITY, entries_in, fill
from tidelock.cache.key import CacheKey
from tidelock.cache.store import ActivationCache
from tidelock.cli.main import run
from tidelock.errors import CacheError, ConfigError

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    made = ActivationCache(tmp_path / "cache", CacheKey.open(tmp_path / "key"), IDENTITY)
    fill(made, range(3))
    made.close()
    return tmp_path / "cache"


def tide(*args: object) -> int:
    return run(["cache", *map(str, args)])


def test_info_needs_no_key(capsys: Capture, cache: Path) -> None:
    assert tide("info", cache) == 0
    assert capsys.readouterr().out.startswith("3 examples, 948 B: model aaaaaaaaaaaa in fp32, 2 taps, whole, in fp32")
    assert tide("info", cache, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["entries"], values["taps"], values["wire_codec"]) == (3, [0, 2], "fp32")
    assert values["bytes"] == sum(path.stat().st_size for path in entries_in(cache))
    assert values["group"] == IDENTITY.group


def test_verify_finds_and_removes_what_is_damaged(capsys: Capture, cache: Path, tmp_path: Path) -> None:
    key = ("--cache-key", tmp_path / "key")
    assert tide("verify", cache, *key) == 0
    assert capsys.readouterr().out == "3 entries are right, 0 are damaged.\n"
    path = entries_in(cache)[0]
    path.write_bytes(b"damaged")
    assert tide("verify", cache, *key) == CacheError.exit_code
    shown = capsys.readouterr()
    assert shown.out == f"2 entries are right, 1 are damaged.\n{path}\n"
    assert f"got 1 damaged ones ({cache}). Remove them by --remove" in shown.err
    assert tide("verify", cache, *key, "--json") == CacheError.exit_code
    assert json.loads(capsys.readouterr().out.splitlines()[0])["left"] == [str(path)]
    assert tide("verify", cache, *key, "--remove", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["right"], values["damaged"], values["left"]) == (2, [str(path)], [])
    assert not path.exists()
    assert tide("verify", cache, *key) == 0


def test_verify_with_another_key_changes_nothing(capsys: Capture, cache: Path, tmp_path: Path) -> None:
    CacheKey.open(tmp_path / "other")
    assert tide("verify", cache, "--cache-key", tmp_path / "other", "--remove") == CacheError.exit_code
    assert tide("verify", cache, "--cache-key", tmp_path / "nowhere") == CacheError.exit_code
    assert "expected the file with which the cache was made, got none" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()
    assert len(entries_in(cache)) == 3


def test_clear_removes_a_cache_and_refuses_anything_else(capsys: Capture, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for action in ("clear", "info", "verify"):
        assert tide(action, tmp_path / "mine") == CacheError.exit_code
    assert (tmp_path / "mine").is_dir()
    capsys.readouterr()
    assert tide("clear", cache) == 0
    assert capsys.readouterr().out == "Removed 948 B of entries.\n"
    assert not cache.exists()


def test_clear_keeps_what_is_not_of_the_cache(capsys: Capture, cache: Path) -> None:
    (cache / "mine.txt").write_text("mine")
    assert tide("clear", cache) == 0
    assert capsys.readouterr().out.endswith("The folder has something else in it and stays.\n")
    assert [path.name for path in cache.iterdir()] == ["mine.txt"]


def test_info_of_what_cannot_be_read_and_of_nothing(capsys: Capture, cache: Path, tmp_path: Path) -> None:
    (identity,) = cache.glob("*/identity.json")
    identity.write_text("{")
    assert tide("info", cache) == 0
    assert capsys.readouterr().out.startswith("3 examples, 948 B: of what cannot be read")
    (entries, *_) = (path.parents[1] for path in entries_in(cache))
    shutil.rmtree(entries)
    assert tide("info", cache) == 0
    assert capsys.readouterr().out == "No entries.\n"


def test_damaged_entries_that_cannot_be_removed_are_an_error(
    capsys: Capture, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = entries_in(cache)[0]
    path.write_bytes(b"damaged")

    def refuse(_path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert tide("verify", cache, "--cache-key", tmp_path / "key", "--remove") == CacheError.exit_code
    assert "Check permissions." in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [("data.jsonl", "--remove"), ("info", "--remove"), ("clear", "--cache-key", "k"), ("verify", "--tap-width", 8)],
)
def test_other_actions_and_options_are_refused(capsys: Capture, cache: Path, args: tuple[str, ...]) -> None:
    action, *options = args
    assert tide(action, cache, *options) == ConfigError.exit_code
    assert "Cache: expected" in capsys.readouterr().err
    assert len(entries_in(cache)) == 3
