"""Addresses: what people write is read whole or refused, never in part."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidelock.errors import ConfigError
from tidelock.wire.address import Address, parse_listen, parse_url


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("grpcs://cloud.example:7777", Address("cloud.example", 7777, tls=True)),
        ("grpc://127.0.0.1:7777/", Address("127.0.0.1", 7777, tls=False)),
        ("grpcs://[::1]:7777", Address("::1", 7777, tls=True)),
        ("GRPCS://Cloud:1", Address("cloud", 1, tls=True)),
    ],
)
def test_a_url_is_read(url, address):
    assert parse_url(url) == address


@pytest.mark.parametrize(
    "url",
    [
        "",
        "cloud:7777",
        "https://cloud:7777",
        "grpcs://cloud",
        "grpcs://:7777",
        "grpcs://cloud:0",
        "grpcs://cloud:99999",
        "grpcs://cloud:x",
        "grpcs://cloud:7777/path",
        "grpcs://cloud:7777?query",
        "grpcs://cloud:7777#fragment",
        "grpcs://user@cloud:7777",
        "grpcs://clo ud:7777",
        "grpcs://cloud\x00:7777",
        "grpcs://[::1",
        "grpcs://[::1]",
    ],
)
def test_another_form_of_url_is_refused(url):
    with pytest.raises(ConfigError, match="expected grpcs://HOST:PORT"):
        parse_url(url)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:0", Address("127.0.0.1", 0, tls=True)),
        ("[::]:7777", Address("::", 7777, tls=True)),
        ("localhost:1", Address("localhost", 1, tls=True)),
    ],
)
def test_a_listen_address_is_read(text, address):
    assert parse_listen(text, tls=True) == address


@pytest.mark.parametrize("text", ["", ":7777", "localhost", "localhost:", "::1:7777", "[::1", "u@h:1", "h:1/x", "h:-1"])
def test_another_form_of_listen_address_is_refused(text):
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        parse_listen(text, tls=False)


@given(st.text())
def test_no_text_raises_anything_else(text):
    for parse in (parse_url, lambda text: parse_url(f"grpcs://{text}"), lambda text: parse_listen(text, tls=True)):
        try:
            address = parse(text)
        except ConfigError:
            continue
        assert 0 <= address.port < 65536
        assert address.host


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.1", False),
        ("cloud.example", False),
        ("localhost.example", False),
    ],
)
def test_loopback_is_known_by_address_not_by_look(host, loopback):
    assert Address(host, 1, tls=False).is_loopback is loopback


def test_target_and_url_are_as_they_are_read():
    for url in ("grpcs://cloud:7777", "grpc://[::1]:7777"):
        assert parse_url(url).url == url
    assert parse_url("grpc://[::1]:7777").target == "[::1]:7777"
