"""Tokens: read strictly, compared as hashes, and never shown."""

from __future__ import annotations

import pytest

from tidelock.cloud.tenants import Tenants, new_token
from tidelock.errors import ConfigError

ANNA, BORIS = "anna-token-0123456789", "boris-token-0123456789"


def asking(token, key="authorization", scheme="Bearer "):
    return [("user-agent", "test"), (key, scheme + token if isinstance(token, str) else token)]


def test_a_token_names_its_tenant():
    tenants = Tenants({"anna": ANNA, "boris": BORIS})
    assert tenants.tenant_of(asking(ANNA)) == "anna"
    assert tenants.tenant_of(asking(BORIS)) == "boris"


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        asking(""),
        asking(ANNA[:-1]),
        asking(ANNA + "x"),
        asking(ANNA.upper()),
        asking(ANNA, key="x-authorization"),
        asking(ANNA, scheme=""),
        asking(ANNA, scheme="Basic "),
        asking(f"Bearer {ANNA}".encode()),
    ],
)
def test_anything_else_names_nobody(metadata):
    assert Tenants({"anna": ANNA}).tenant_of(metadata) is None


def test_a_second_header_can_hold_the_token():
    assert Tenants({"anna": ANNA}).tenant_of([*asking("wrong"), *asking(ANNA)]) == "anna"


@pytest.mark.parametrize(
    ("tokens", "got"),
    [
        ({}, "no tenant at all"),
        ({"anna": "brief-token"}, r"shorter ones for \['anna'\]"),
        ({"b": "x" * 15, "a": "", "c": ANNA}, r"shorter ones for \['a', 'b'\]"),
        ({"anna": ANNA, "boris": ANNA}, r"another's for \['anna'\]"),
    ],
)
def test_unsafe_tokens_are_refused(tokens, got):
    with pytest.raises(ConfigError, match=got) as caught:
        Tenants(tokens)
    assert not any(token in str(caught.value) for token in tokens.values() if token)


def test_sixteen_characters_are_enough():
    assert Tenants({"anna": "x" * 16}).tenant_of(asking("x" * 16)) == "anna"


def test_a_tokens_file_is_read(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(f"# who may call\n\n  anna   {ANNA}  \r\n\t# boris {ANNA}\nboris\t{BORIS}", encoding="utf-8")
    tenants = Tenants.from_file(path)
    assert [tenants.tenant_of(asking(token)) for token in (ANNA, BORIS)] == ["anna", "boris"]


def test_a_line_may_limit_its_tenant(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(f"anna {ANNA} max-active=12\nboris {BORIS}\n", encoding="utf-8")
    assert Tenants.from_file(path).max_active == {"anna": 12}


@pytest.mark.parametrize(
    ("line", "number"),
    [
        (f"boris {BORIS} max-active=0", 3),
        (f"boris {BORIS} max-active=two", 3),
        (f"boris {BORIS} max-active=2 more", 3),
        ("boris", 3),
        (f"boris {BORIS} more", 3),
        (f"anna {BORIS}", 3),
    ],
)
def test_a_line_of_another_form_is_named_by_its_number_only(tmp_path, line, number):
    path = tmp_path / "tokens"
    path.write_text(f"# comment\nanna {ANNA}\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"each name once, got another form .*tokens, line {number}") as caught:
        Tenants.from_file(path)
    assert ANNA not in str(caught.value)
    assert BORIS not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, got in ((tmp_path / "missing", "FileNotFoundError"), (tmp_path, "IsADirectory"), (binary, "Unicode")):
        with pytest.raises(ConfigError, match=f"expected a readable text file, got {got}.*{path.name}"):
            Tenants.from_file(path)


def test_tokens_are_not_kept():
    tenants = Tenants({"anna": ANNA})
    assert ANNA not in repr(tenants)
    assert ANNA not in repr(vars(tenants))


def test_a_new_token_is_long_and_never_the_same():
    assert len({new_token() for _ in range(20)}) == 20
    Tenants({"anna": new_token()})
