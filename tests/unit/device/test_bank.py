"""The bank: one module a block, its half of a pass, and dropout that can be repeated."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch.nn.functional import mse_loss

from tests.support.sites import attn
from tests.unit.hand_device import BLOCKS, WIDTH
from tidelock.device.bank import Bank, BankPass
from tidelock.errors import NonFiniteError, WireError
from tidelock.model.ends import empty_model, read_config
from tidelock.model.geometry import geometry_of


@pytest.fixture(scope="module")
def geometry(tiny_folder):
    return geometry_of(empty_model(read_config(tiny_folder)))


def make_bank(geometry, **settings):
    torch.manual_seed(1)
    bank = Bank(LoraConfig(r=4, **{"target_modules": ["q_proj", "k_proj", "v_proj"], **settings}), geometry)
    for name, parameter in bank.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return bank


def begin(bank, *, training=True, seed=None):
    return BankPass(bank, list(bank.parameters()), training=training, dropout_seed=seed).begin()


@pytest.fixture
def x():
    return torch.linspace(-1, 1, 50 * WIDTH).view(50, WIDTH)


def test_modules_are_only_where_there_are_targets(geometry):
    bank = make_bank(geometry, layers_to_transform=[1], target_modules=["v_proj"])
    assert bank.targets == {attn(1): ("v_proj",)}
    assert set(bank.blocks) == {"1"}
    assert bank.at(attn(1)).targets == ("v_proj",)


def test_whether_it_drops_out(geometry):
    assert not make_bank(geometry).has_dropout
    assert make_bank(geometry, lora_dropout=0.1).has_dropout


def test_the_answer_is_the_modules_and_carries_no_graph(geometry, x):
    bank = make_bank(geometry)
    half = begin(bank)
    answer = half.forward(attn(1), x)
    assert torch.equal(answer, bank.at(attn(1))(x, None))
    assert not answer.requires_grad


def test_gradients_are_those_of_autograd(geometry, x):
    bank = make_bank(geometry)
    half = begin(bank)
    grad = torch.randn(50, 64)
    inputs = {}
    for block in range(BLOCKS):
        half.forward(attn(block), x)
    for block in reversed(range(BLOCKS)):
        inputs[block] = half.backward(attn(block), grad, need_input=block != 0)
    ours = half.gradients()
    expected_input = x.detach().clone().requires_grad_()
    sum((bank.at(attn(block))(expected_input, None) * grad).sum() for block in range(BLOCKS)).backward()
    for parameter, gradient in zip(bank.parameters(), ours, strict=True):
        assert torch.allclose(gradient, parameter.grad, atol=1e-4)
    assert inputs.pop(0) is None
    one = x.detach().clone().requires_grad_()
    (bank.at(attn(2))(one, None) * grad).sum().backward()
    assert torch.allclose(inputs[2], one.grad, atol=1e-5)


def test_half_precision_from_the_wire_is_taken(geometry, x):
    half = begin(make_bank(geometry))
    assert half.forward(attn(0), x.bfloat16()).dtype == torch.float32
    half.backward(attn(0), torch.ones(50, 64, dtype=torch.bfloat16), need_input=False)


def test_beginning_again_forgets(geometry, x):
    half = begin(make_bank(geometry))
    half.forward(attn(0), x)
    half.backward(attn(0), torch.ones(50, 64), need_input=False)
    half.forward(attn(1), x)
    half.begin()
    with pytest.raises(WireError, match=r"expected a gradient for each of 18 PEFT tensors, got none for 18"):
        half.gradients()
    with pytest.raises(KeyError):
        half.backward(attn(1), torch.ones(50, 64), need_input=False)


def test_one_missing_gradient_is_told(geometry, x):
    half = begin(make_bank(geometry))
    for block in (0, 1):
        half.forward(attn(block), x)
        half.backward(attn(block), torch.ones(50, 64), need_input=False)
    with pytest.raises(WireError, match=r"got none for 6 of them. The step was not taken"):
        half.gradients()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_no_number_is_told(geometry, value, x):
    bank = make_bank(geometry, layers_to_transform=[0])
    half = begin(bank)
    half.forward(attn(0), x)
    grad = torch.ones(50, 64)
    grad[7, 63] = value
    half.backward(attn(0), grad, need_input=False)
    with pytest.raises(NonFiniteError, match="expected finite gradients"):
        half.gradients()


def test_without_training_no_graph_is_kept(geometry, x):
    half = begin(make_bank(geometry), training=False)
    half.forward(attn(0), x)
    with pytest.raises(KeyError):
        half.backward(attn(0), torch.ones(50, 64), need_input=False)


def masks(bank, seed, block=0):
    """Return which inputs each branch of a block reads, for matrices that hand their input on."""
    module = bank.at(attn(block))
    with torch.no_grad():
        for branch in module.branches.values():
            branch.lora_A.weight.copy_(torch.eye(WIDTH))
            branch.lora_B.weight.copy_(torch.eye(WIDTH)[: branch.lora_B.out_features])
            branch.scaling = 1.0
    answer = begin(bank, seed=seed).forward(attn(block), torch.ones(50, WIDTH))
    return answer.split([branch.lora_B.out_features for branch in module.branches.values()], dim=1)


@pytest.fixture
def dropping(geometry):
    return Bank(LoraConfig(r=WIDTH, lora_dropout=0.25, target_modules=["q_proj", "k_proj", "v_proj"]), geometry)


def test_masks_are_repeated_by_the_seed(dropping):
    for first, second in zip(masks(dropping, 7), masks(dropping, 7), strict=True):
        assert torch.equal(first, second)


def test_masks_differ_between_passes_sites_and_projections(dropping):
    q, k, v = masks(dropping, 7)
    assert not torch.equal(q[:, :16], k)
    assert not torch.equal(k, v)
    assert not torch.equal(q, masks(dropping, 1 << 40)[0])
    assert not torch.equal(q, masks(dropping, 7, block=1)[0])


def test_a_repeated_attempt_draws_the_same_masks_in_any_order(geometry, x):
    bank = make_bank(geometry, lora_dropout=0.5)
    half = begin(bank, seed=9)
    first = {block: half.forward(attn(block), x) for block in range(BLOCKS)}
    half.begin()
    for block in reversed(range(BLOCKS)):
        assert torch.equal(half.forward(attn(block), x), first[block])


def test_the_expectation_of_a_dropped_out_input_is_the_input(dropping):
    q, _, _ = masks(dropping, 7)
    assert q.unique().tolist() == pytest.approx([0, 1 / 0.75])
    many = torch.cat([masks(dropping, seed)[0] for seed in range(20)])
    # 32,000 draws: five standard deviations are 0.016.
    assert many.mean().item() == pytest.approx(1, abs=0.02)


def test_dropout_is_differentiated_through(geometry, x):
    bank = make_bank(geometry, lora_dropout=0.5, layers_to_transform=[0])
    half = begin(bank, seed=3)
    y = half.forward(attn(0), x)
    grad_x = half.backward(attn(0), torch.ones(50, 64), need_input=True)
    step = 1e-3
    moved = begin(bank, seed=3).forward(attn(0), x + step)
    assert torch.allclose(((moved - y) / step).sum(), grad_x.sum(), rtol=1e-2)
    assert mse_loss(y, bank.at(attn(0))(x, None)) > 0
