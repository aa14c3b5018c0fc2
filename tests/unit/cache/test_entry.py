"""An entry's bytes: any tensors come back, and bytes that none were written as are refused without much memory."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tidelock.cache import entry
from tidelock.cache.entry import CODECS, DamagedEntryError, check_tensors, encode, entry_bytes, read_entry, write_entry
from tidelock.errors import ConfigError, NonFiniteError
from tidelock.wire.codec import Codec

KEY, NAME = bytes(range(32)), "5" * 64
SHAPES = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), min_size=1, max_size=4)


def written(tensors: Sequence[Tensor], codec: Codec = Codec.FP32) -> bytes:
    file = BytesIO()
    write_entry(file, encode(tensors, codec), codec, KEY, NAME)
    return file.getvalue()


def read(data: bytes, key: bytes = KEY, name: str = NAME) -> tuple[Tensor, ...]:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        return read_entry(file, key, name)


def sealed(plain: bytes, head: bytes = b"TLC1fp32") -> bytes:
    """Return what only whoever has the key could write, laid out as the page of the module says."""
    nonce = os.urandom(12)
    return head + nonce + AESGCM(KEY).encrypt(nonce, plain, head + NAME.encode())


@given(SHAPES, st.sampled_from(CODECS), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**32))
def test_any_tensors_come_back(shapes: list[tuple[int, int]], codec: Codec, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    check_tensors(tensors, codec)
    data = written(tensors, codec)
    assert len(data) == entry_bytes(shapes, codec)
    back = read(data)
    assert [tuple(tensor.shape) for tensor in back] == shapes
    assert {tensor.dtype for tensor in back} == {torch.bfloat16 if codec is Codec.BF16 else torch.float32}
    for ours, theirs in zip(back, tensors, strict=True):
        bound = codec.error_bound(theirs.shape[1], stochastic=False) * (1 + 1e-6) + 1e-7 * (codec is not Codec.FP32)
        assert bool(((ours.float() - theirs.float()).norm(dim=1) <= bound * theirs.float().norm(dim=1)).all())


def test_it_is_what_its_layout_says_and_larger_than_a_piece() -> None:
    tensor = torch.arange(3 * 200_000, dtype=torch.float32).view(3, 200_000)
    data = written([tensor])
    plain = AESGCM(KEY).decrypt(data[8:20], data[20:], b"TLC1fp32" + NAME.encode())
    assert plain == struct.pack("<III", 1, 3, 200_000) + tensor.numpy().tobytes()
    assert len(plain) > 2 * entry._PIECE_BYTES
    (back,) = read(data)
    assert torch.equal(back, tensor)
    assert torch.equal(read(sealed(plain))[0], tensor)


def test_an_entry_takes_what_the_page_says() -> None:
    page = (Path(__file__).parents[3] / "docs" / "cache.md").read_text(encoding="utf-8")
    assert entry_bytes([(1, 576)] * 30, Codec.FP32) == 69_120 + 40 + 8 * 30
    assert "69 kB a token" in page
    assert "40 bytes an entry and 8 a tensor" in page


def test_rounding_changes_something() -> None:
    tensor = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    for codec in (Codec.BF16, Codec.INT8):
        assert not torch.equal(read(written([tensor], codec))[0].float(), tensor)


def test_two_entries_of_one_example_have_no_bytes_in_common() -> None:
    first, second = (written([torch.ones(4, 4)]) for _ in range(2))
    assert first[:8] == second[:8]
    assert sum(a == b for a, b in zip(first[8:], second[8:], strict=True)) < len(first) // 8


@pytest.mark.parametrize(("key", "name"), [(bytes(32), NAME), (KEY, "6" * 64)])
def test_another_key_or_name_opens_nothing(key: bytes, name: str) -> None:
    with pytest.raises(DamagedEntryError):
        read(written([torch.ones(4, 4)]), key, name)


def test_no_byte_can_be_changed() -> None:
    data = written([torch.ones(2, 3), torch.ones(1, 2)], Codec.INT8)
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        with pytest.raises(DamagedEntryError):
            read(bytes(changed))


def test_no_byte_can_be_missing_or_too_many() -> None:
    data = written([torch.ones(2, 3)])
    for size in range(len(data)):
        with pytest.raises(DamagedEntryError):
            read(data[:size])
    with pytest.raises(DamagedEntryError):
        read(data + b"\0")


PLAIN = {
    "too many tensors": struct.pack("<I", 2**31),
    "more tensors than shapes": struct.pack("<III", 2, 4, 4),
    "numbers that are not there": struct.pack("<III", 1, 2**32 - 1, 2**32 - 1) + bytes(64),
    "numbers too many": struct.pack("<III", 1, 1, 1) + bytes(8),
    "nothing": b"",
}


@pytest.mark.parametrize("case", PLAIN)
def test_a_plain_text_that_none_wrote_is_refused(case: str) -> None:
    """Only whoever has the key could write one; it must not be believed all the same."""
    with pytest.raises(DamagedEntryError):
        read(sealed(PLAIN[case]))


def test_a_length_that_is_not_the_files_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, empty = [], torch.empty

    def counted(size: int, *, dtype: torch.dtype) -> Tensor:
        taken.append(size)
        return empty((size,), dtype=dtype)

    monkeypatch.setattr(torch, "empty", counted)
    read(written([torch.ones(2, 3)]))
    assert taken == [2 * 3 * 4 + 15]
    taken.clear()
    with pytest.raises(DamagedEntryError):
        read(sealed(PLAIN["numbers that are not there"]))
    assert taken == []


@pytest.mark.parametrize("head", [b"TLC2fp32", b"TLC1int4", b"TLC1\0\0\0\0"])
def test_another_version_or_codec_is_refused(head: bytes) -> None:
    with pytest.raises(DamagedEntryError):
        read(sealed(struct.pack("<III", 1, 1, 1) + bytes(4), head))


def test_integers_that_no_codec_writes_are_refused() -> None:
    plain = struct.pack("<III", 1, 1, 4) + bytes(8)  # a scale of zero
    with pytest.raises(DamagedEntryError):
        read(sealed(plain, b"TLC1int8"))


@given(st.binary(max_size=120))
def test_random_bytes_raise_nothing_else(data: bytes) -> None:
    for start in (b"", b"TLC1fp32"):
        with pytest.raises(DamagedEntryError):
            read(start + data)


@pytest.mark.parametrize(
    "tensors",
    [
        [],
        [torch.ones(1, 1)] * 4097,
        [torch.ones(3)],
        [torch.ones(1, 2, 3)],
        [torch.ones(())],
        [torch.ones(2, 3, dtype=torch.int64)],
        [torch.empty(2**15, 2**14, device="meta")],
    ],
    ids=["none", "many", "1-d", "3-d", "0-d", "integers", "large"],
)
def test_what_an_entry_cannot_keep_is_refused(tensors: list[Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"^Caching .*: expected .*, got "):
        check_tensors(tensors, Codec.FP32)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused_whatever_the_codec(codec: Codec, value: float) -> None:
    with pytest.raises(NonFiniteError, match=r"Caching tensor 1 of an example: expected finite numbers"):
        check_tensors([torch.ones(2, 2), torch.tensor([[1.0, value]])], codec)
