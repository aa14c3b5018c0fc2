"""Frames: orthonormal, the same in every process, and the first of a larger rank's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.sites import attn
from tidelock.model.ends import empty_model, read_config
from tidelock.model.frames import MAX_RANK, Frames, draw_frames, largest_rank
from tidelock.model.geometry import Geometry, geometry_of

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


def test_a_models_frames_are_kept_and_grow(geometry: Geometry) -> None:
    frames = Frames(geometry, torch.device("cpu"), torch.bfloat16)
    ((a_RD, b_WR), (other, _)) = frames.at(attn(1), ("q_proj", "v_proj"), 4)
    assert (a_RD.dtype, a_RD.shape, b_WR.shape, other.shape) == (torch.bfloat16, (4, 32), (32, 4), (4, 32))
    kept = frames._drawn[attn(1), "q_proj"][0]
    ((smaller, _),) = frames.at(attn(1), ("q_proj",), 2)
    assert frames._drawn[attn(1), "q_proj"][0] is kept
    assert torch.equal(smaller, a_RD[:2])
    ((larger, _),) = frames.at(attn(1), ("q_proj",), 9)
    assert larger.shape == (9, 32)
    torch.testing.assert_close(larger[:4].float(), a_RD.float(), atol=1e-2, rtol=0)


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
