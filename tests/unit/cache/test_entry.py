"""An entry's bytes: any tensors come back, and bytes that none were written as are refused without much memory."""

from __future__ import annotations

import os
import struct

import pytest
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from tidelock.cache.entry import DamagedEntryError, entry_bytes, seal, unseal
from tidelock.wire.codec import Codec

KEY, LABEL = bytes(range(32)), b"of something"
SHAPES = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=4)


@given(SHAPES, st.sampled_from(list(Codec)), st.integers(0, 2**32))
def test_any_tensors_come_back(shapes: list[tuple[int, int]], codec: Codec, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    data = seal(tensors, codec, KEY, LABEL)
    assert len(data) == entry_bytes(shapes, codec)
    back = unseal(memoryview(data), codec, KEY, LABEL)
    assert [tuple(tensor.shape) for tensor in back] == shapes
    for ours, theirs in zip(back, tensors, strict=True):
        bound = codec.error_bound(theirs.shape[1], stochastic=False) + 1e-6
        assert bool(((ours.float() - theirs).norm(dim=1) <= bound * theirs.norm(dim=1)).all())


def test_two_entries_of_one_example_have_no_bytes_in_common() -> None:
    first, second = (seal([torch.ones(4, 4)], Codec.FP32, KEY, LABEL) for _ in range(2))
    assert first[:4] == second[:4]
    assert sum(a == b for a, b in zip(first[4:], second[4:], strict=True)) < len(first) // 8


@pytest.mark.parametrize(("key", "label"), [(bytes(32), LABEL), (KEY, b"of something else")])
def test_another_key_or_label_opens_nothing(key: bytes, label: bytes) -> None:
    data = seal([torch.ones(4, 4)], Codec.FP32, KEY, LABEL)
    with pytest.raises(DamagedEntryError):
        unseal(memoryview(data), Codec.FP32, key, label)


PLAIN = {
    "too many tensors": struct.pack("<I", 2**31),
    "shapes that are not there": struct.pack("<III", 2, 4, 4),
    "numbers that are not there": struct.pack("<III", 1, 2**32 - 1, 2**32 - 1) + bytes(64),
    "numbers too many": struct.pack("<III", 1, 1, 1) + bytes(8),
}


@pytest.mark.parametrize("case", PLAIN)
def test_a_plain_text_that_none_wrote_is_refused(case: str) -> None:
    """Only whoever has the key could write one; it must not be believed all the same."""
    nonce = os.urandom(12)
    data = b"TLC1" + nonce + AESGCM(KEY).encrypt(nonce, PLAIN[case], b"TLC1" + LABEL)
    with pytest.raises(DamagedEntryError):
        unseal(memoryview(data), Codec.FP32, KEY, LABEL)


def test_integers_that_no_codec_writes_are_refused() -> None:
    nonce = os.urandom(12)
    plain = struct.pack("<III", 1, 1, 4) + bytes(8)  # a scale of zero
    data = b"TLC1" + nonce + AESGCM(KEY).encrypt(nonce, plain, b"TLC1" + LABEL)
    with pytest.raises(DamagedEntryError):
        unseal(memoryview(data), Codec.INT8, KEY, LABEL)


@given(st.binary(max_size=80))
def test_random_bytes_raise_nothing_else(data: bytes) -> None:
    with pytest.raises(DamagedEntryError):
        unseal(memoryview(data), Codec.FP32, KEY, LABEL)
