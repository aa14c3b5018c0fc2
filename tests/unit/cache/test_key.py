"""The key's file: made once, for its owner only, and refused when it is not what it should be."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tidelock.cache.key import CacheKey, default_key_path
from tidelock.errors import ConfigError, StorageError


def test_it_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cache.key"
    first = CacheKey.open(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert CacheKey.open(path) == first
    assert len(first.secret) == 32
    assert first.secret.hex() not in repr(first)
    assert [item.name for item in path.parent.iterdir()] == ["cache.key"]


def test_many_at_once_get_the_same(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: CacheKey.open(tmp_path / "cache.key").secret, range(16)))
    assert len(keys) == 1


def test_one_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache.key"
    CacheKey.open(path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"only its owner may read, got mode 640 .* chmod 600"):
        CacheKey.open(path)


@pytest.mark.parametrize("text", ["", "no key", "a" * 63, "A" * 64, "é" * 64])
def test_a_file_without_a_key_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cache.key"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"Cache key: expected 64 hex digits, got something else"):
        CacheKey.open(path)


def test_a_place_where_no_file_can_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"Cache key: expected a file that can be read or made"):
        CacheKey.open(tmp_path / "file" / "cache.key")


def test_purposes_have_secrets_of_their_own(tmp_path: Path) -> None:
    key = CacheKey.open(tmp_path / "cache.key")
    derived = {key.derive(purpose) for purpose in ("names", "entries")} | {key.secret}
    assert len(derived) == 3
    assert key.derive("names") == key.derive("names")


def test_the_users_key_is_with_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_key_path() == tmp_path / "tidelock" / "cache.key"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert default_key_path() == Path.home() / ".config" / "tidelock" / "cache.key"
