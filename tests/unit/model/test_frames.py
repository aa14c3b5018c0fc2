"""Frames: orthonormal, the same in every process, and the first of a larger rank's; those of the SVD a weight's own."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.sites import attn
from tidelock.errors import ModelError
from tidelock.model.ends import empty_model, read_config
from tidelock.model.frames import FRAME_KINDS, MAX_RANK, FrameChoice, Frames, draw_frames, largest_rank, svd_frames
from tidelock.model.geometry import Geometry, SiteId, geometry_of

WIDTH = 32  # of the tiny model
PATH = "model.layers.0.self_attn.q_proj"
# Of that path, 8 numbers in, 5 out, rank 2.
EXPECTED_A = [
    [0.38448, -0.48694, 0.56415, -0.15429, -0.15312, -0.32933, -0.23390, -0.29390],
    [0.24763, 0.25107, -0.39916, -0.28822, -0.71635, -0.28876, -0.15472, 0.11296],
]
EXPECTED_B = [
    [0.48706, 0.42807],
    [-0.20662, -0.05739],
    [-0.80600, 0.28115],
    [-0.04180, -0.84967],
    [0.26209, -0.11167],
]


@pytest.fixture(scope="module")
def geometry(tiny_folder: Path) -> Geometry:
    return geometry_of(empty_model(read_config(tiny_folder)))


def a_weight(output_width: int, width: int) -> Tensor:
    return torch.randn(output_width, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("width", "output_width", "rank"), [(32, 16, 16), (300, 257, 40), (7, 9, 1)])
def test_they_are_orthonormal(width: int, output_width: int, rank: int) -> None:
    a_RD, b_WR = draw_frames(PATH, width, output_width, rank)
    assert (a_RD.shape, b_WR.shape) == ((rank, width), (output_width, rank))
    assert (a_RD.dtype, b_WR.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(a_RD @ a_RD.T, torch.eye(rank), atol=1e-5, rtol=0)
    torch.testing.assert_close(b_WR.T @ b_WR, torch.eye(rank), atol=1e-5, rtol=0)


def test_those_of_a_smaller_rank_are_the_first_of_a_larger_ones() -> None:
    (small_a, small_b), (large_a, large_b) = (draw_frames(PATH, 64, 48, rank) for rank in (3, 40))
    torch.testing.assert_close(small_a, large_a[:3], atol=1e-6, rtol=0)
    torch.testing.assert_close(small_b, large_b[:, :3], atol=1e-6, rtol=0)


def test_they_are_what_they_were_in_the_first_version() -> None:
    """A cloud and a device of other libraries must draw the same."""
    a_RD, b_WR = draw_frames(PATH, 8, 5, 2)
    torch.testing.assert_close(a_RD, torch.tensor(EXPECTED_A), atol=2e-5, rtol=0)
    torch.testing.assert_close(b_WR, torch.tensor(EXPECTED_B), atol=2e-5, rtol=0)


def test_each_projection_has_its_own() -> None:
    first, second = (draw_frames(f"model.layers.{block}.self_attn.q_proj", 32, 32, 4) for block in (0, 1))
    assert not torch.allclose(first[0], second[0], atol=0.1)
    assert not torch.allclose(first[0], first[1].T, atol=0.1)


@pytest.mark.parametrize("kind", FRAME_KINDS)
def test_a_models_frames_are_kept_and_cut_to_the_rank(geometry: Geometry, kind: str) -> None:
    weights: list[tuple[SiteId, str]] = []

    def weight_of(site: SiteId, name: str) -> Tensor:
        weights.append((site, name))
        return a_weight(16 if name == "v_proj" else 32, 32)

    frames = Frames(geometry, torch.device("cpu"), torch.bfloat16, weight_of)
    ((a_RD, b_WR), (other, _)) = frames.at(attn(1), ("q_proj", "v_proj"), FrameChoice(kind, 4))
    assert (a_RD.dtype, a_RD.shape, b_WR.shape, other.shape) == (torch.bfloat16, (4, 32), (32, 4), (4, 32))
    ((smaller, _),) = frames.at(attn(1), ("q_proj",), FrameChoice(kind, 3))
    assert smaller.data_ptr() == a_RD.data_ptr()
    assert weights == ([(attn(1), "q_proj"), (attn(1), "v_proj")] if kind == "svd" else [])
    # More than this projection has.
    ((widest, _),) = frames.at(attn(1), ("v_proj",), FrameChoice(kind, 16))
    assert widest.shape == (16, 32)


@pytest.mark.parametrize("kind", FRAME_KINDS)
def test_frames_do_not_depend_on_what_was_asked_before(geometry: Geometry, kind: str) -> None:
    fresh, used = (Frames(geometry, torch.device("cpu"), torch.float32, lambda *_: a_weight(32, 32)) for _ in range(2))
    for rank in (2, 16, 9):
        used.at(attn(0), ("q_proj",), FrameChoice(kind, rank))
    (there,), (expected,) = (frames.at(attn(0), ("q_proj",), FrameChoice(kind, 5)) for frames in (used, fresh))
    assert all(map(torch.equal, there, expected))


@pytest.mark.parametrize(("output_width", "width", "rank"), [(16, 32, 16), (32, 16, 5), (24, 24, 24), (9, 7, 1)])
def test_those_of_the_svd_are_the_weights_own(output_width: int, width: int, rank: int) -> None:
    weight_WD = a_weight(output_width, width)
    a_RD, b_WR = svd_frames(weight_WD, rank)
    assert (a_RD.shape, b_WR.shape) == ((rank, width), (output_width, rank))
    assert (a_RD.dtype, b_WR.dtype) == (torch.float32, torch.float32)
    values = torch.linalg.svdvals(weight_WD.bfloat16().float())
    torch.testing.assert_close(b_WR.T @ weight_WD.bfloat16().float() @ a_RD.T, values[:rank].diag(), atol=1e-5, rtol=0)
    torch.testing.assert_close(a_RD @ a_RD.T, torch.eye(rank), atol=1e-6, rtol=0)
    torch.testing.assert_close(b_WR.T @ b_WR, torch.eye(rank), atol=1e-6, rtol=0)


def test_opposite_directions_are_chosen_by_the_weight_alone() -> None:
    """A library gives a singular vector or its opposite; a cloud and who exports must have the same."""
    weight_WD = a_weight(16, 24).double()
    a_RD, b_WR = svd_frames(weight_WD, 8)
    largest_R = a_RD.gather(1, a_RD.abs().argmax(1, keepdim=True))[:, 0]
    short_R = b_WR.gather(0, b_WR.abs().argmax(0, keepdim=True))[0]
    assert bool((short_R > 0).all())
    assert not bool((largest_R > 0).all())
    # Another order of the same sums: whatever signs eigh has chosen, the frames are as before.
    again_a, again_b = svd_frames(weight_WD.flip(1), 8)
    torch.testing.assert_close(again_a.flip(1), a_RD, atol=1e-5, rtol=0)
    torch.testing.assert_close(again_b, b_WR, atol=1e-5, rtol=0)


def test_frames_of_the_svd_do_not_depend_on_what_the_weights_are_held_in() -> None:
    weight_WD = a_weight(16, 32)
    for a, b in itertools.combinations([weight_WD, weight_WD.bfloat16(), weight_WD.bfloat16().double()], 2):
        assert all(map(torch.equal, svd_frames(a, 4), svd_frames(b, 4)))


def test_a_weight_of_a_smaller_rank_still_has_orthonormal_frames() -> None:
    weight_WD = torch.zeros(16, 32)
    weight_WD[0, 0] = 3.0
    a_RD, b_WR = svd_frames(weight_WD, 4)
    torch.testing.assert_close(a_RD @ a_RD.T, torch.eye(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(b_WR.T @ b_WR, torch.eye(4), atol=1e-6, rtol=0)
    assert float(a_RD[0, 0]) == float(b_WR[0, 0]) == 1


def test_without_weights_there_are_no_frames_of_the_svd(geometry: Geometry) -> None:
    frames = Frames(geometry, torch.device("cpu"), torch.float32)
    with pytest.raises(ModelError, match=r"^Frames of the SVD at blocks.0.attn: expected the weights of the model"):
        frames.at(attn(0), ("q_proj",), FrameChoice("svd", 2))


def test_the_largest_rank_is_that_of_the_narrowest_projection(geometry: Geometry) -> None:
    assert largest_rank(geometry) == 16  # keys and values of two heads
    assert MAX_RANK >= 64


def test_a_narrowed_tap_is_the_tap_along_orthonormal_directions(geometry: Geometry) -> None:
    tap_ND = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    frames = Frames(geometry, torch.device("cpu"), torch.float32)
    assert frames.narrow(0, tap_ND, None) is tap_ND
    whole = frames.narrow(0, tap_ND, WIDTH)
    # As many directions as there are numbers turn the tap, and lose nothing.
    torch.testing.assert_close(whole @ whole.T, tap_ND @ tap_ND.T, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(frames.narrow(0, tap_ND, 3), whole[:, :3], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(frames.narrow(1, tap_ND, 3), whole[:, :3])


def test_a_narrowed_tap_does_not_depend_on_what_was_asked_before(geometry: Geometry) -> None:
    tap_ND = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    fresh, used = (Frames(geometry, torch.device("cpu"), torch.float32) for _ in range(2))
    for width in (2, WIDTH, 9):
        used.narrow(0, tap_ND, width)
    assert torch.equal(used.narrow(0, tap_ND, 5), fresh.narrow(0, tap_ND, 5))
