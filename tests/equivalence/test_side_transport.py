"""Taps over the wire: what they are in this process, in fp32 bit for bit; asked once, and never again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.equivalence.test_side_cached import assert_equal, gradients, rows_of
from tests.support.cloud_process import TOKEN, CloudProcess, Service
from tests.support.http2 import message_sizes
from tests.support.parity import relative_error, token_batch
from tests.support.plain_side import randomise_side
from tests.support.proxy import LinkProxy
from tests.support.tiny_models import ALL_MODELS
from tidelock.backbone.pass_stream import PassStream
from tidelock.backbone.remote import RemoteBackbone
from tidelock.cache.config import CacheConfig
from tidelock.device.generate import GenerationSettings
from tidelock.device.side_model import SideModel
from tidelock.errors import CloudUnreachable, ConfigError, ModelMismatch, WireError
from tidelock.model.rows import Rows
from tidelock.peft.side import SideConfig
from tidelock.run.connect_side import connect_side
from tidelock.wire.codec import Codec
from tidelock.wire.ledger import Ledger

LENGTHS = (11, 7, 9, 8)
Join = Callable[..., SideModel]


@pytest.fixture
def join(tiny_models: Path, tmp_path: Path) -> Iterator[Join]:
    """Return `join(where, name, ...)`: a side model with frozen blocks there."""
    opened: list[SideModel] = []

    def join(
        where: str, name: str = "llama", *, cached: bool = False, settings: dict[str, Any] | None = None, **more: Any
    ) -> SideModel:
        config = SideConfig(init="random", zero_upsample=False, **(settings or {}))
        cache = CacheConfig(tmp_path / "taps", key=tmp_path / "key") if cached else None
        token = None if where == "local" else TOKEN
        more = {"model": tiny_models / name, "patience_seconds": 60, **more}
        model = connect_side(where, side_config=config, cache=cache, token=token, **more)
        assert isinstance(model, SideModel)
        randomise_side(model)
        opened.append(model)
        return model.eval()

    yield join
    for model in opened:
        model.close()


@pytest.mark.parametrize("name", ALL_MODELS)
def test_fp32_over_the_wire_is_the_local_result_bit_for_bit(name: str, cloud: CloudProcess, join: Join):
    remote, local = join(cloud.url(name), name), join("local", name)
    for padding in ("right", "left"):
        batch = token_batch(padding, lengths=LENGTHS)
        assert_equal(gradients(remote, batch), gradients(local, batch))
    assert isinstance(remote.source.blocks(), RemoteBackbone)


@pytest.mark.parametrize("settings", [{"tap_width": 5}, {"taps": (1, 3)}, {"taps": (0,), "tap_width": 32}])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "opt_projected", "bloom"])
def test_chosen_and_narrow_taps_too(name: str, settings: dict[str, Any], cloud: CloudProcess, join: Join):
    batch = token_batch("right", lengths=LENGTHS)
    remote, local = (join(where, name, settings=settings) for where in (cloud.url(name), "local"))
    assert_equal(gradients(remote, batch), gradients(local, batch))


@pytest.mark.parametrize("settings", [{}, {"tap_width": 5, "taps": (0, 2)}])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_answers_as_it_does_here(name: str, settings: dict[str, Any], cloud: CloudProcess, join: Join):
    batch = token_batch("left", seed=9, lengths=(9, 5))
    greedy = GenerationSettings(max_new_tokens=8)
    answers = [
        join(where, name, settings=settings).generate(batch.input_ids, batch.attention_mask, greedy)
        for where in (cloud.url(name), "local")
    ]
    assert torch.equal(*answers)


def test_a_head_for_whole_texts_asks_for_one_state_a_text(cloud: CloudProcess, join: Join):
    ledger = Ledger()
    batch = token_batch("right", lengths=LENGTHS)
    labels = torch.tensor([0, 2, 1, 0])
    losses = []
    for where, more in ((cloud.url("llama"), {"ledger": ledger}), ("local", {})):
        torch.manual_seed(0)  # the head begins by the global generator
        model = join(where, task="classification", num_labels=3, **more)
        losses.append(model(batch.input_ids, batch.attention_mask, labels=labels).loss)
    assert torch.equal(*losses)
    assert ledger.tokens() == {"evaluated": sum(LENGTHS), "evaluated_selected": len(LENGTHS)}


@pytest.mark.parametrize(("codec", "bound"), [("bf16", 0.05), ("int8", 0.15), ("int4", 1.0)])
def test_rounded_taps_stay_within_a_bound_and_change_something(
    codec: str, bound: float, cloud: CloudProcess, join: Join
):
    batch = token_batch("right", lengths=LENGTHS)
    exact, lossy = (gradients(join(cloud.url("llama"), codec=name), batch) for name in ("fp32", codec))
    ours, theirs = (torch.cat([value.flatten() for value in each.values()]) for each in (lossy, exact))
    assert 0 < relative_error(ours, theirs) <= bound


def test_how_taps_crossed_is_part_of_what_a_cache_is_of(cloud: CloudProcess, join: Join):
    batch = token_batch("right", lengths=LENGTHS)
    gradients(join("local", cached=True), batch)
    # What crossed in fp32 is what is computed here.
    exact = join(cloud.url("llama"), cached=True)
    gradients(exact, batch)
    assert exact.source.computed == 0
    for codec in ("bf16", "int8"):
        lossy = join(cloud.url("llama"), cached=True, codec=codec)
        gradients(lossy, batch)
        assert lossy.source.computed == len(LENGTHS)


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_only_embeddings_leave_once_and_the_ledger_is_what_a_proxy_counts(codec: str, cloud: CloudProcess, join: Join):
    ledger, batch = Ledger(), token_batch("right", lengths=LENGTHS)
    with LinkProxy(cloud.port("llama"), record=True) as proxy:
        model = join(f"grpc://127.0.0.1:{proxy.port}", cached=True, codec=codec, ledger=ledger)
        for _ in range(3):
            gradients(model, batch)
        model.close()
        sent, received = (sum(message_sizes(stream)) for stream in (proxy.sent, proxy.received))
    totals = ledger.totals()
    assert sent == sum(totals["sent"].values())
    assert received == sum(totals["received"].values())
    # No label, no gradient, no trained weight has a kind.
    assert totals["sent"].keys() == {"embedding", "control"}
    assert totals["received"].keys() == {"tap", "final_state", "control"}
    geometry, tokens = model.ends.geometry, sum(LENGTHS)
    row = Codec(codec).size_bytes((1, geometry.block_width))
    assert tokens * len(model.tapped) * row <= totals["received"]["tap"] <= tokens * len(model.tapped) * row * 1.2
    assert ledger.tokens()["evaluated"] == tokens


@pytest.fixture
def proxy(cloud: CloudProcess) -> Iterator[LinkProxy]:
    with LinkProxy(cloud.port("llama")) as proxy:
        yield proxy


@pytest.mark.parametrize("at", [1, 3])
def test_a_pass_cut_among_its_taps_is_repeated(at: int, proxy: LinkProxy, join: Join, monkeypatch: pytest.MonkeyPatch):
    batch = token_batch("right", lengths=LENGTHS)
    expected = gradients(join("local"), batch)
    model = join(f"grpc://127.0.0.1:{proxy.port}", in_flight=1)
    receive, seen = PassStream.receive, 0

    def cut_then_receive(stream: PassStream, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if seen == at:
            assert proxy.cut() > 0
        return receive(stream, *args, **kwargs)

    model.source.blocks()
    monkeypatch.setattr(PassStream, "receive", cut_then_receive)
    assert_equal(gradients(model, batch), expected)
    assert proxy.cuts == 1
    # Taps of four blocks and the final state. What is small may have come whole before a cut that is not at its first.
    assert seen >= 5 * len(LENGTHS) + (at == 1)


def test_after_the_first_epoch_the_network_may_be_unplugged(proxy: LinkProxy, join: Join):
    whole = token_batch("right", lengths=LENGTHS)
    model, local = join(f"grpc://127.0.0.1:{proxy.port}", cached=True), join("local")
    assert_equal(gradients(model, whole), gradients(local, whole))
    model.source.release()
    proxy.close()
    for rows in ((3, 1), (2, 0)):
        assert_equal(gradients(model, rows_of(whole, rows)), gradients(local, rows_of(whole, rows)))
    model.source._open_blocks = partial(pytest.fail, "the cloud was asked")
    assert_equal(gradients(model, whole), gradients(local, whole))


def test_an_upload_that_broke_off_goes_on_where_it_was(
    tiny_models: Path, tmp_path: Path, join: Join, monkeypatch: pytest.MonkeyPatch
):
    whole, asked = token_batch("right", lengths=LENGTHS), 0
    expected = gradients(join("local"), whole)
    read = RemoteBackbone.read_taps

    def counted(backbone: RemoteBackbone, *args: Any, **kwargs: Any) -> Any:
        nonlocal asked
        asked += 1
        return read(backbone, *args, **kwargs)

    monkeypatch.setattr(RemoteBackbone, "read_taps", counted)
    with CloudProcess([Service("llama", str(tiny_models / "llama"))], tmp_path / "log") as cloud:
        model = join(cloud.url("llama"), cached=True, patience_seconds=0.0)
        gradients(model, rows_of(whole, (0, 1)))
        cloud.kill()
        with pytest.raises(CloudUnreachable):
            gradients(model, whole)
        asked = 0
        cloud.start()
        # It loads for some seconds; the device goes on when it is there.
        model.source._open_blocks._patience_seconds = 60.0  # type: ignore[attr-defined]
        model.source.release()
        assert_equal(gradients(model, whole), expected)
    assert asked == 2


def test_a_cloud_that_comes_back_with_another_model_is_refused(
    tiny_models: Path, cloud: CloudProcess, join: Join, monkeypatch: pytest.MonkeyPatch
):
    model = join(cloud.url("llama"))
    model.source._open_blocks.fingerprint = "0" * 64  # type: ignore[attr-defined]
    with pytest.raises(ModelMismatch, match="expected the model with fingerprint 000000000000 that it held before"):
        gradients(model, token_batch("right"))


def test_what_a_cloud_cannot_give_is_refused(cloud: CloudProcess, tiny_models: Path, tmp_path: Path, join: Join):
    with pytest.raises(ConfigError, match="expected the whole model on this device for init='magnitude', got none"):
        connect_side(cloud.url("llama"), token=TOKEN)
    with pytest.raises(ModelMismatch):
        join(cloud.url("llama"), "gpt2")
    remote = join(cloud.url("llama"))
    batch = remote._open_batch(torch.arange(4), Rows((0,), (4,), 4), torch.arange(4))
    for blocks, width in (((4,), None), ((1, 0), None), ((0,), 33), ((), None)):
        with pytest.raises(WireError, match="Opening a pass: expected ta"):
            remote.source.blocks().read_taps(batch, blocks, width)
