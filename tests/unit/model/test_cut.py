"""The cut: the model's own forward around its own blocks gives what the whole model gives, from any thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from tests.support.sites import attn
from tests.unit.hand_device import BLOCKS, WIDTH
from tidelock.errors import ModelError
from tidelock.model.cut import BlockCall, CutModel, visiting
from tidelock.model.geometry import Place, SiteId
from tidelock.model.rows import Layout


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load(tiny_folder)


@pytest.fixture(scope="module")
def cut(model):
    return CutModel(model)


def run_all(calls, hidden_BTD):
    for call in calls:
        hidden_BTD = call(hidden_BTD)
    return hidden_BTD


X = torch.linspace(-1, 1, 2 * 6 * WIDTH).view(2, 6, WIDTH)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
LAYOUT = Layout(MASK, None, None, (2, 6))


def test_the_blocks_one_by_one_are_the_whole_decoder(model, cut):
    whole = model.model(inputs_embeds=X, attention_mask=MASK).last_hidden_state
    assert torch.equal(cut.run(X, LAYOUT, run_all), whole)


def test_whoever_runs_the_blocks_gets_all_calls_in_order(cut, model):
    seen: list[nn.Module] = []

    def look(calls, hidden_BTD):
        seen.extend(call.block for call in calls)
        assert torch.equal(hidden_BTD, X)
        return hidden_BTD

    out = cut.run(X, LAYOUT, look)
    assert seen == list(model.model.layers)
    assert torch.equal(out, model.model.norm(X))


def test_positions_and_cache_are_handed_on(model, cut):
    positions = torch.tensor([[3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5]])
    whole = model.model(inputs_embeds=X, attention_mask=MASK, position_ids=positions).last_hidden_state
    assert torch.equal(cut.run(X, Layout(MASK, positions, None, (2, 6)), run_all), whole)
    cache = DynamicCache(config=cut.config)
    cut.run(X, LAYOUT, run_all, cache)
    assert cache.get_seq_length() == 6


def test_a_family_without_position_ids_is_not_given_any():
    config = AutoConfig.for_model("bloom", hidden_size=32, n_layer=2, n_head=4, vocab_size=64)
    cut = CutModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    placed = Layout(MASK, torch.zeros(2, 6).long(), None, (2, 6))
    assert torch.equal(cut.run(X, placed, run_all), cut.run(X, LAYOUT, run_all))


def test_the_model_is_frozen_and_never_drops_out(tiny_folder):
    model = load(tiny_folder).train()
    cut = CutModel(model)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert len(list(cut.parameters())) == 1 + 1 + 9 * BLOCKS
    assert (cut.dtype, cut.device) == (torch.float32, torch.device("cpu"))


class Doubling:
    """A visitor that doubles what projections read, adds one to what linears give, and remembers where it was."""

    def __init__(self):
        self.entered = []
        self.left = []

    def enter_site(self, site, x_BTD):
        self.entered.append(site)
        return 2 * x_BTD

    def leave_projection(self, site, projection, y_BTW):
        self.left.append((site, projection))
        return y_BTW + 1

    def leave_output(self, site, y_BTD):
        self.left.append((site, "output"))
        return y_BTD + 1


def test_a_visitor_is_asked_at_the_site_of_the_block_that_it_visits(cut, model):
    visitor = Doubling()
    given: dict[str, torch.Tensor] = {}
    linear = model.model.layers[1].self_attn.v_proj
    handle = linear.register_forward_hook(lambda module, args, output: given.update(x=args[0], y=output))

    def run(calls, hidden_BTD):
        for block, call in enumerate(calls):
            hidden_BTD = visiting(visitor, call, hidden_BTD) if block == 1 else call(hidden_BTD)
        return hidden_BTD

    try:
        changed = cut.run(X, LAYOUT, run)
    finally:
        handle.remove()
    names = ("q_proj", "k_proj", "v_proj")
    assert visitor.entered == [attn(1)] * 3
    outputs = [(SiteId(1, Place.ATTN_OUT), "output"), (SiteId(1, Place.MLP), "output")]
    assert sorted(visitor.left) == sorted([*((attn(1), name) for name in names), *outputs])
    assert torch.allclose(given["y"], linear(given["x"]) + 1, atol=1e-6)
    assert not torch.equal(changed, cut.run(X, LAYOUT, run_all))


def test_the_visit_ends_with_the_block_even_when_it_fails(cut):
    def fail(hidden_BTD):
        raise ZeroDivisionError

    visitor = Doubling()
    with pytest.raises(ZeroDivisionError):
        visiting(visitor, fail, X)  # type: ignore[arg-type]
    cut.run(X, LAYOUT, run_all)
    assert visitor.entered == []


def test_threads_do_not_see_each_other(cut):
    inputs = [X * factor for factor in range(1, 9)]
    expected = [cut.run(x, LAYOUT, run_all) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            given = list(pool.map(lambda x: cut.run(x, LAYOUT, run_all), inputs))
            assert all(torch.equal(one, other) for one, other in zip(given, expected, strict=True))


def test_a_block_may_take_its_state_by_name_and_return_a_tuple():
    class Block(nn.Module):
        def forward(self, hidden_states, mask, scale=1):
            return hidden_states * scale + mask, "weights"

    x = torch.ones(1, 2, 3)
    by_name = BlockCall(Block(), (), {"scale": 2, "mask": 1}, state_is_keyword=True)
    by_place = BlockCall(Block(), (1,), {"scale": 2}, state_is_keyword=False)
    assert torch.equal(by_name(x), x * 3)
    assert torch.equal(by_place(x), x * 3)


class CalledByName(nn.ModuleList):
    """Blocks whose decoder seems to have written `block(hidden_states=...)`."""

    def __getitem__(self, index):
        return [
            lambda state, *args, block=block, **kwargs: block(*args, hidden_states=state, **kwargs)
            for block in list(self)[index]
        ]


def test_a_decoder_that_names_the_state_is_cut_too(model, tiny_folder):
    cut = CutModel(load(tiny_folder))
    cut._skeleton._modules["layers"] = CalledByName(cut._skeleton.get_submodule("layers").children())
    seen: list[BlockCall] = []

    def run(calls, x):
        seen.extend(calls)
        return run_all(calls, x)

    out = cut.run(X, LAYOUT, run)
    assert [call.state_is_keyword for call in seen] == [True] * BLOCKS
    assert torch.equal(out, model.model(inputs_embeds=X, attention_mask=MASK).last_hidden_state)


def test_a_decoder_that_leaves_its_blocks_out_is_refused(tiny_folder):
    model = load(tiny_folder)
    decoder = model.model
    decoder.forward = lambda inputs_embeds=None, **kwargs: decoder.norm(
        decoder.layers[0](inputs_embeds, **rope(decoder))
    )
    with pytest.raises(ModelError, match="expected it to call each of its 3 blocks once, got 1 calls"):
        CutModel(model)


def rope(decoder):
    positions = torch.arange(2)[None]
    return {"position_embeddings": decoder.rotary_emb(torch.zeros(1, 2, WIDTH), positions)}


def test_facts_are_read_off_the_real_blocks(cut, model):
    stub = cut._skeleton._modules["layers"][0]
    assert stub.hidden_size == model.model.layers[0].hidden_size
    with pytest.raises(AttributeError):
        stub.no_such_fact  # noqa: B018


@pytest.mark.parametrize("tuples", [True, False])
def test_a_decoder_gets_tuples_exactly_if_its_blocks_return_them(tiny_folder, tuples):
    if tuples:
        config = AutoConfig.for_model("bloom", hidden_size=32, n_layer=2, n_head=4, vocab_size=64)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        decoder = model.transformer
    else:
        model = load(tiny_folder)
        decoder = model.model
    whole = decoder(inputs_embeds=X, attention_mask=MASK).last_hidden_state
    cut = CutModel(model)
    assert cut._blocks_return_tuples() is tuples
    assert torch.allclose(cut.run(X, LAYOUT, run_all), whole, atol=1e-6)
