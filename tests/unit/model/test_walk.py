"""The walk: the same gradients as autograd through the whole, and nothing computed or asked for in vain."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.sites import attn
from tests.unit.hand_device import PROJECTIONS, WIDTH
from tidelock.errors import ModelError
from tidelock.model.cut import CutModel
from tidelock.model.rows import Rows
from tidelock.model.walk import Batch, Walk

ROWS = Rows((0, 1), (5, 4), 5)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def cut(tiny_folder):
    return CutModel(load(tiny_folder))


class LinearSites:
    """Answers with one matrix a block, and writes down what it is asked."""

    def __init__(self, active):
        generator = torch.Generator().manual_seed(3)
        widths = {"q_proj": 32, "k_proj": 16, "v_proj": 16}
        self.matrices = {
            block: (torch.randn(WIDTH, sum(widths[name] for name in names), generator=generator) * 0.1).requires_grad_()
            for block, names in active.items()
        }
        self.asked = []
        self.inputs = {}
        self.gradients = {}

    def forward(self, block, x_ND):
        assert not x_ND.requires_grad
        assert x_ND.shape == (9, WIDTH)
        self.asked.append(("forward", block))
        self.inputs[block] = x_ND
        return (x_ND @ self.matrices[block]).detach()

    def backward(self, block, grad_NW, *, need_input):
        self.asked.append(("backward", block, need_input))
        self.gradients[block] = self.inputs[block].T @ grad_NW
        return grad_NW @ self.matrices[block].T.detach() if need_input else None


def a_batch(active, **changes):
    generator = torch.Generator().manual_seed(5)
    values = {
        "embeddings_NE": torch.randn(9, WIDTH, generator=generator),
        "rows": ROWS,
        "select_M": torch.tensor([1, 4, 8]),
        "active": active,
        "training": True,
    }
    return Batch(**{**values, **changes})


def by_autograd(folder, active, sites, grad):
    """Return final states and matrix gradients by one graph through the whole model, answers added by hooks."""
    model = load(folder).requires_grad_(False)
    for site, names in active.items():
        attention, offset = model.model.layers[site.block].self_attn, 0
        for name in names:
            linear = getattr(attention, name)
            columns = slice(offset, offset + linear.out_features)
            linear.register_forward_hook(
                lambda module, args, y, site=site, columns=columns: y + args[0] @ sites.matrices[site][:, columns]
            )
            offset += linear.out_features
    batch = a_batch(active)
    padded = torch.zeros(10, WIDTH).index_copy(0, ROWS.indices(), batch.embeddings_NE).view(2, 5, WIDTH)
    states = model.model(inputs_embeds=padded, attention_mask=ROWS.mask()).last_hidden_state.view(10, WIDTH)
    final = states[ROWS.indices()[batch.select_M]]
    final.backward(grad)
    return final.detach(), {block: sites.matrices[block].grad for block in active}


@pytest.mark.parametrize(
    "active",
    [
        {attn(0): PROJECTIONS},
        {attn(2): ("k_proj",)},
        {attn(0): ("q_proj", "v_proj"), attn(1): PROJECTIONS, attn(2): ("v_proj",)},
        {attn(2): PROJECTIONS, attn(0): ("k_proj", "v_proj")},
    ],
)
def test_states_and_gradients_are_those_of_one_graph(tiny_folder, cut, active):
    grad = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)
    sites = LinearSites(active)
    walk = Walk(cut, a_batch(active), sites)
    final = walk.forward()
    walk.backward(grad)
    expected_final, expected = by_autograd(tiny_folder, active, LinearSites(active), grad)
    assert torch.allclose(final, expected_final, atol=1e-5)
    for block in active:
        assert torch.allclose(sites.gradients[block], expected[block], atol=1e-4)
        assert expected[block].abs().max() > 1e-3
    order = sorted(active)
    assert sites.asked == [("forward", block) for block in order] + [
        ("backward", block, block != order[0]) for block in reversed(order)
    ]


@pytest.mark.parametrize(
    "active", [{attn(2): ("k_proj",)}, {attn(0): ("q_proj", "v_proj"), attn(1): PROJECTIONS, attn(2): ("v_proj",)}]
)
def test_blocks_that_run_again_give_the_same_bits_and_ask_no_more(cut, active):
    grad = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)
    finals, all_sites = [], []
    for recompute in (False, True):
        sites = LinearSites(active)
        walk = Walk(cut, a_batch(active), sites, recompute=recompute)
        finals.append(walk.forward())
        assert [segment.end_BTD.requires_grad for segment in walk._segments].count(True) == (
            0 if recompute else len(walk._segments)
        )
        walk.backward(grad)
        assert walk._segments == []
        all_sites.append(sites)
    assert torch.equal(*finals)
    kept, again = all_sites
    assert kept.asked == again.asked
    for site in active:
        assert torch.equal(kept.gradients[site], again.gradients[site])


def test_blocks_below_the_lowest_site_are_not_walked_back(cut):
    walk = Walk(cut, a_batch({attn(1): PROJECTIONS}), LinearSites({attn(1): PROJECTIONS}))
    walk.forward()
    assert len(walk._segments) == 2
    walk.backward(torch.ones(3, WIDTH))
    assert walk._segments == []


def test_without_training_no_graph_is_kept(cut):
    sites = LinearSites({attn(0): PROJECTIONS})
    walk = Walk(cut, a_batch({attn(0): PROJECTIONS}, training=False), sites)
    assert not walk.forward().requires_grad
    assert walk._segments == []
    walk.backward(torch.ones(3, WIDTH))
    assert sites.gradients == {}


def test_backward_is_walked_once(cut):
    sites = LinearSites({attn(0): PROJECTIONS})
    walk = Walk(cut, a_batch({attn(0): PROJECTIONS}), sites)
    walk.forward()
    walk.backward(torch.ones(3, WIDTH))
    asked = list(sites.asked)
    walk.backward(torch.ones(3, WIDTH))
    assert sites.asked == asked


def test_others_are_let_in_between_blocks(cut):
    calls = []
    walk = Walk(cut, a_batch({attn(1): PROJECTIONS}), LinearSites({attn(1): PROJECTIONS}), lambda: calls.append(1))
    walk.forward()
    assert len(calls) == 2
    walk.backward(torch.ones(3, WIDTH))
    assert len(calls) == 4


def test_no_weight_of_the_model_gets_a_gradient(cut):
    walk = Walk(cut, a_batch({attn(0): PROJECTIONS}), LinearSites({attn(0): PROJECTIONS}))
    walk.forward()
    walk.backward(torch.ones(3, WIDTH))
    assert all(parameter.grad is None for parameter in cut.parameters())


def test_a_site_whose_projections_read_different_inputs_is_refused(tiny_folder):
    model = load(tiny_folder)
    for block in model.model.layers:
        # Runs before the cut's own hook: this projection reads something of its own.
        block.self_attn.k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    walk = Walk(CutModel(model), a_batch({attn(1): PROJECTIONS}), LinearSites({attn(1): PROJECTIONS}))
    with pytest.raises(
        ModelError, match=r"Site blocks.1.attn: expected its projections to read one and the same input"
    ):
        walk.forward()


def test_a_visit_that_was_not_begun_changes_nothing(cut):
    walk = Walk(cut, a_batch({attn(0): PROJECTIONS}), LinearSites({attn(0): PROJECTIONS}))
    x = torch.ones(2, 5, WIDTH)
    assert walk.enter_site(attn(0), x) is x
    assert walk.leave_projection(attn(0), "q_proj", x) is x


def test_half_precision_blocks_take_and_give_their_own_dtype(tiny_folder):
    cut = CutModel(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16))
    active = {attn(0): PROJECTIONS, attn(2): ("v_proj",)}

    class Single(LinearSites):
        def forward(self, block, x_ND):
            assert x_ND.dtype == torch.bfloat16
            return super().forward(block, x_ND.float())

        def backward(self, block, grad_NW, *, need_input):
            assert grad_NW.dtype == torch.bfloat16
            return super().backward(block, grad_NW.float(), need_input=need_input)

    sites = Single(active)
    walk = Walk(cut, a_batch(active), sites)
    assert walk.forward().dtype == torch.bfloat16
    walk.backward(torch.ones(3, WIDTH))
    assert set(sites.gradients) == {attn(0), attn(2)}
