"""Memory: what a pass is said to cost is what it keeps, and passes come in first come first served."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.sites import attn
from tests.unit.hand_device import BLOCKS, WIDTH, wait_until
from tidelock.cloud.memory import MemoryBudget, PassCost, _ZeroSites, bytes_at_sites, measure_cost
from tidelock.model.cut import CutModel
from tidelock.model.frames import FrameChoice
from tidelock.model.geometry import Place
from tidelock.model.rows import Rows
from tidelock.model.walk import Batch, Walk


def cut_model(folder, attention):
    return CutModel(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention))


def full_rows(rows, width):
    return Rows((0,) * rows, (width,) * rows, width)


def really_kept(cut, active, rows, frames=None):
    """Return the bytes that a pass of some rows keeps, other than weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in cut.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = Batch(
        embeddings_NE=torch.randn(rows.num_tokens, WIDTH),
        rows=rows,
        select_M=torch.arange(rows.num_tokens),
        active=active,
        training=True,
        frames=frames,
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        walk = Walk(cut, batch, _ZeroSites(cut) if frames is None else Handing())
        walk.forward()
    for segment in walk._segments:
        for cut_at in segment.cuts:
            keep(cut_at.before_BTD)
            keep(cut_at.answer_NW)
    return sum(kept.values())


class Handing:
    """Answers with what it is asked, as many numbers as there are."""

    def forward(self, site, x_ND):
        return x_ND.clone()

    def backward(self, site, grad_NW, *, need_input):
        return grad_NW.clone() if need_input else None


def sites_at(cut, *places):
    return {
        site_id: tuple(projection.name for projection in site.projections)
        for site_id, site in cut.geometry.sites.items()
        if site_id.place in places
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("places", [(Place.ATTN,), (Place.MLP,), (Place.ATTN_OUT, Place.MLP)])
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (4, 24), (3, 60)])
def test_the_measured_cost_is_what_a_pass_keeps(tiny_folder, attention, places, rows, width):
    cut = cut_model(tiny_folder, attention)
    active = sites_at(cut, *places)
    measured = measure_cost(cut).bytes_for(rows, width, bytes_at_sites(cut.geometry, cut.dtype.itemsize, active))
    really = really_kept(cut, active, full_rows(rows, width))
    if Place.ATTN in places:
        assert measured == pytest.approx(really, rel=0.15)
    else:
        # Nothing of the lowest block is saved below its first site, which is further up.
        assert really <= measured <= really * BLOCKS / (BLOCKS - 1)


@pytest.mark.parametrize(("lengths", "shared"), [((24, 24), 8), ((60,) * 4, 40), ((60, 9, 31), 0), ((60, 58, 46), 0)])
def test_rows_that_are_joined_keep_hardly_more_than_padded_ones(tiny_folder, lengths, shared):
    cut = cut_model(tiny_folder, "sdpa")
    active, rows = sites_at(cut, Place.ATTN), Rows((0,) * len(lengths), lengths, max(lengths), shared)
    measured = measure_cost(cut).bytes_for(
        len(lengths), max(lengths), bytes_at_sites(cut.geometry, cut.dtype.itemsize, active)
    )
    # Rotary angles are those of all tokens, not of one row's.
    assert really_kept(cut, active, rows) <= 1.05 * measured


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 60)])
def test_so_it_is_through_frames(tiny_folder, rows, width):
    cut, frames = cut_model(tiny_folder, "sdpa"), FrameChoice("seeded", 8)
    active = sites_at(cut, Place.ATTN)
    measured = measure_cost(cut).bytes_for(
        rows, width, bytes_at_sites(cut.geometry, cut.dtype.itemsize, active, frames)
    )
    assert measured == pytest.approx(really_kept(cut, active, full_rows(rows, width), frames), rel=0.15)


class Weighing:
    """Weighs, whenever a pass waits for its device on the way back, what autograd has of it besides weights."""

    def __init__(self, cut):
        self._answers = _ZeroSites(cut)
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in cut.parameters()}
        self._saved: weakref.WeakSet[Saved] = weakref.WeakSet()
        self.walk: Any = None
        self.most = 0

    def save(self, tensor):
        saved = Saved(tensor)
        self._saved.add(saved)
        return saved

    def forward(self, site, x_ND):
        return self._answers.forward(site, x_ND)

    def backward(self, site, grad_NW, *, need_input):
        kept = [saved.tensor for saved in self._saved]
        for segment in self.walk._segments:
            kept += [segment.start_BTD, *segment.answers.values()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
        self.most = max(self.most, sum(size for at, size in storages.items() if at not in self._weights))
        return self._answers.backward(site, grad_NW, need_input=need_input)


@dataclass(eq=False)
class Saved:
    tensor: torch.Tensor


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 60)])
def test_where_blocks_run_again_it_is_what_one_keeps_and_what_all_were_given(tiny_folder, attention, rows, width):
    cut = cut_model(tiny_folder, attention)
    active = sites_at(cut, Place.ATTN)
    sites = Weighing(cut)
    batch = Batch(
        embeddings_NE=torch.randn(rows * width, WIDTH),
        rows=Rows((0,) * rows, (width,) * rows, width),
        select_M=torch.arange(rows * width),
        active=active,
        training=True,
    )
    with torch.autograd.graph.saved_tensors_hooks(sites.save, lambda saved: saved.tensor):
        sites.walk = Walk(cut, batch, sites, recompute=True)
        final_MD = sites.walk.forward()
        sites.walk.backward(torch.ones_like(final_MD))
    measured = measure_cost(cut, recompute=True).bytes_for(
        rows, width, bytes_at_sites(cut.geometry, cut.dtype.itemsize, active)
    )
    assert sites.most <= measured <= sites.most * 1.6
    whole = measure_cost(cut).bytes_for(rows, width, bytes_at_sites(cut.geometry, cut.dtype.itemsize, active))
    assert measured < whole * 0.75  # of only three blocks


def test_only_attention_that_keeps_its_scores_costs_by_the_square(tiny_folder):
    eager = measure_cost(cut_model(tiny_folder, "eager"))
    # At least the softmax of 4 heads in each block, 4 bytes a number.
    assert eager.per_token_squared >= BLOCKS * 4 * 4
    assert measure_cost(cut_model(tiny_folder, "sdpa")).per_token_squared < 1


def test_a_cost_grows_with_rows_and_with_the_square_of_the_width():
    cost = PassCost(per_token=10, per_token_squared=2)
    assert cost.bytes_for(1, 1) == 12
    assert cost.bytes_for(3, 5) == 3 * (50 + 50)


def test_the_probe_answers_backward_too(tiny_folder):
    sites = _ZeroSites(cut_model(tiny_folder, "sdpa"))
    gradient = sites.backward(attn(0), torch.ones(2, 64), need_input=True)
    assert gradient is not None
    assert gradient.shape == (2, WIDTH)
    assert sites.backward(attn(0), torch.ones(2, 64), need_input=False) is None


def test_what_fits():
    budget = MemoryBudget(10)
    assert [budget.fits(size) for size in (0, 10, 11)] == [True, True, False]
    assert MemoryBudget(None).fits(1 << 60)


def test_without_a_limit_nobody_waits():
    budget = MemoryBudget(None)
    with budget.reserve(1 << 60), budget.reserve(1 << 60):
        pass
    assert budget._used == 0


def test_memory_comes_back_after_an_error():
    budget = MemoryBudget(10)
    with pytest.raises(ZeroDivisionError), budget.reserve(10):
        raise ZeroDivisionError
    with budget.reserve(10):
        assert budget._used == 10
    assert budget._used == 0


def test_passes_that_do_not_fit_wait_in_the_order_in_which_they_came():
    budget, order, go_on = MemoryBudget(10), [], threading.Event()

    def run(name, size):
        with budget.reserve(size):
            order.append(name)
            go_on.wait(20)

    def start(name, size, in_line):
        thread = threading.Thread(target=run, args=(name, size))
        thread.start()
        wait_until(lambda: len(budget._line) == in_line and len(order) >= 1, f"{name} in line")
        return thread

    threads = [start("large", 8, 0), start("middle", 6, 1), start("small", 1, 2)]
    # The small one would fit, but it does not overtake: else the middle one could wait for ever.
    assert order == ["large"]
    go_on.set()
    for thread in threads:
        thread.join()
    assert order == ["large", "middle", "small"]
    assert (budget._used, budget._line) == (0, [])


def test_what_fits_together_runs_together():
    budget, inside = MemoryBudget(10), threading.Barrier(2, timeout=20)

    def run():
        with budget.reserve(5):
            inside.wait()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not inside.broken
