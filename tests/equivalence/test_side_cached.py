"""With a cache, a side network learns what it learns without one: bit for bit in fp32, within a bound else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.parity import TokenBatch, relative_error, token_batch
from tests.support.plain_side import randomise_side
from tests.support.tiny_models import ALL_MODELS, BLOCKS
from tidelock.backbone.local import LocalBackbone
from tidelock.cache.config import CacheConfig
from tidelock.device.side_model import SideModel
from tidelock.errors import StorageError
from tidelock.peft.side import SideConfig
from tidelock.run.connect_side import connect_side
from tidelock.wire.codec import Codec

Connect = Callable[..., SideModel]
LENGTHS = (11, 7, 9, 8)


@pytest.fixture
def connect(tiny_models: Path, tmp_path: Path) -> Connect:
    def made(name: str, *, cached: bool = True, codec: str = "fp32", **settings: object) -> SideModel:
        config = SideConfig(init="random", zero_upsample=False, **settings)  # type: ignore[arg-type]
        cache = CacheConfig(tmp_path / "taps", codec=codec, key=tmp_path / "key") if cached else None
        model = connect_side("local", model=tiny_models / name, side_config=config, cache=cache)
        assert isinstance(model, SideModel)
        randomise_side(model)
        return model.eval()  # some families' side blocks drop out

    return made


def gradients(model: SideModel, batch: TokenBatch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch.arguments()).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def rows_of(batch: TokenBatch, rows: tuple[int, ...]) -> TokenBatch:
    """Return some rows of a batch padded at the right, no wider than they need."""
    width = int(batch.attention_mask[list(rows)].sum(1).max())
    return TokenBatch(*(tensor[list(rows), :width] for tensor in batch.arguments().values()))


@pytest.mark.parametrize("name", ALL_MODELS)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_cached_gradients_are_the_uncached_ones_bit_for_bit(name: str, padding: str, connect: Connect):
    batch = token_batch(padding, lengths=LENGTHS)
    expected = gradients(connect(name, cached=False), batch)
    model = connect(name)
    assert_equal(gradients(model, batch), expected)
    assert model.source.computed == len(LENGTHS)
    again = connect(name)
    assert_equal(gradients(again, batch), expected)
    assert again.source.computed == 0
    assert not again.source.has_blocks


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "opt", "bloom"])
def test_order_and_size_of_batches_change_nothing(name: str, connect: Connect):
    whole, model = token_batch("right", lengths=LENGTHS), connect(name)
    for first in ((0, 1, 2), (3,)):
        gradients(model, rows_of(whole, first))
    plain = connect(name, cached=False)
    orders: tuple[tuple[int, ...], ...] = ((3, 1), (2, 0, 1, 3), (2,), (0, 0, 3))
    for rows in orders:
        assert_equal(gradients(model, rows_of(whole, rows)), gradients(plain, rows_of(whole, rows)))
    assert model.source.computed == len(LENGTHS)


@pytest.mark.parametrize(("codec", "bound"), [("bf16", 0.01), ("int8", 0.05)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lossy_codecs_stay_within_a_bound_and_change_something(name: str, codec: str, bound: float, connect: Connect):
    batch = token_batch("right", lengths=LENGTHS)
    exact = gradients(connect(name, cached=False), batch)
    first = gradients(connect(name, codec=codec), batch)
    assert_equal(gradients(connect(name, codec=codec), batch), first)  # the first epoch learns from what is kept
    ours, theirs = (torch.cat([value.flatten() for value in each.values()]) for each in (first, exact))
    assert 0 < relative_error(ours, theirs) <= bound


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_a_kept_tap_is_off_by_no_more_than_the_codec_says(codec: str, connect: Connect):
    batch = token_batch("right", lengths=LENGTHS)
    exact, model = connect("llama"), connect("llama", codec=codec)
    for each in (exact, model):
        gradients(each, batch)
    (ids, *_) = model.examples_of(batch.arguments())
    assert exact.source.cache is not None
    assert model.source.cache is not None
    ours, theirs = model.source.cache.get(ids), exact.source.cache.get(ids)
    assert ours is not None
    assert theirs is not None
    for kept, true in zip(ours, theirs, strict=True):
        error = (kept.float() - true).norm(dim=1) / true.norm(dim=1)
        assert 0 < float(error.max()) <= Codec(codec).error_bound(true.shape[1], stochastic=False)


def test_an_example_added_later_is_computed_once(connect: Connect):
    whole, model = token_batch("right", lengths=LENGTHS), connect("llama")
    gradients(model, rows_of(whole, (0, 1)))
    model.source.release()
    gradients(model, rows_of(whole, (1, 2, 0)))
    gradients(model, rows_of(whole, (2, 1)))
    assert model.source.computed == 3


def test_what_an_entry_is_of_decides(connect: Connect):
    batch = token_batch("right", lengths=LENGTHS)
    gradients(connect("llama"), batch)
    others = [
        connect("llama", taps=(0, 2)),
        connect("llama", tap_width=5),
        connect("llama", codec="bf16"),
        connect("mistral"),
    ]
    for model in others:
        gradients(model, batch)
        assert model.source.computed == len(LENGTHS)
    # A row that is cut elsewhere, that begins elsewhere or has other labels is another example; wider padding is not.
    model = connect("llama")
    shorter = TokenBatch(*(tensor[:1, :10] for tensor in batch.arguments().values()))
    fewer = TokenBatch(batch.input_ids[:1], batch.attention_mask[:1], batch.labels[:1].clone().fill_(-100))
    fewer.labels[0, 5] = batch.labels[0, 5]
    for changed in (shorter, fewer, token_batch("left", lengths=(11, 7))):
        before = model.source.computed
        gradients(model, changed)
        assert model.source.computed == before + 1
    wider = TokenBatch(*(torch.nn.functional.pad(tensor[1:2], (0, 4)) for tensor in batch.arguments().values()))
    wider.labels[0, -4:] = -100
    before = model.source.computed
    gradients(model, wider)
    assert model.source.computed == before


def test_a_damaged_entry_is_computed_again(connect: Connect, tmp_path: Path):
    batch, model = token_batch("right", lengths=LENGTHS), connect("llama")
    expected = gradients(model, batch)
    entries = sorted(path for path in (tmp_path / "taps").rglob("*") if len(path.name) == 64)
    content = bytearray(entries[1].read_bytes())
    content[len(content) // 2] ^= 1
    entries[1].write_bytes(content)
    again = connect("llama")
    assert_equal(gradients(again, batch), expected)
    assert again.source.computed == 1
    assert again.source.cache is not None
    assert again.source.cache.damaged == 1


def test_announced_batches_are_read_before_they_are_asked_for(connect: Connect, monkeypatch: pytest.MonkeyPatch):
    whole, model = token_batch("right", lengths=LENGTHS), connect("llama")
    expected = [gradients(model, rows_of(whole, rows)) for rows in ((0, 1), (2, 3))]
    cache = model.source.cache
    assert cache is not None
    for rows in ((0, 1), (1, 2), (2, 3)):  # the second is never asked for, as when an evaluation ends early
        model.announce(rows_of(whole, rows).arguments())
    assert len(cache._ahead) == len(LENGTHS)
    for future, _ in list(cache._ahead.values()):
        future.result()
    reads: list[object] = []
    monkeypatch.setattr(cache, "_read", reads.append)
    assert_equal(gradients(model, rows_of(whole, (0, 1))), expected[0])
    assert_equal(gradients(model, rows_of(whole, (2, 3))), expected[1])
    assert reads == []
    assert model.source._announced == []


def test_released_blocks_are_opened_again_when_they_are_needed(connect: Connect, monkeypatch: pytest.MonkeyPatch):
    batch, model = token_batch("right", lengths=LENGTHS), connect("llama")
    gradients(model, batch)
    assert isinstance(model.source._blocks, LocalBackbone)
    closed: list[bool] = []
    monkeypatch.setattr(LocalBackbone, "close", lambda _self: closed.append(True))
    model.source.release()
    assert closed == [True]
    gradients(model, batch)
    assert not model.source.has_blocks
    model(**token_batch("right", seed=7).arguments())
    assert model.source.has_blocks


def test_a_cache_without_room_is_refused_and_keeps_what_it_has(tiny_models: Path, tmp_path: Path):
    batch = token_batch("right", lengths=LENGTHS)
    config = CacheConfig(tmp_path / "taps", limit_bytes=12_000, key=tmp_path / "key")
    model = connect_side("local", model=tiny_models / "llama", side_config=SideConfig(init="random"), cache=config)
    with pytest.raises(StorageError, match=r"within its limit of 12.0 kB"):
        model(**batch.arguments())
    examples = model.examples_of(batch.arguments())
    assert model.source.cache is not None
    assert 0 < len(list(model.source.cache.missing(examples))) < len(LENGTHS)


def test_the_size_of_an_entry_is_known_before(connect: Connect, tmp_path: Path):
    batch, model = token_batch("right", lengths=LENGTHS), connect("llama")
    gradients(model, batch)
    cache = model.source.cache
    assert cache is not None
    expected = sorted(cache.entry_bytes(model.tap_shapes(ids)) for ids in model.examples_of(batch.arguments()))
    sizes = sorted(path.stat().st_size for path in (tmp_path / "taps").rglob("*") if len(path.name) == 64)
    assert sizes == expected
    assert len(model.network.blocks) == BLOCKS
