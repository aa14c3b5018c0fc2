"""Core: one small square matrix between two frozen frames, beside each of a block's attention projections.

For a projection P with frozen weight W: `P x = W x + s B R A x`, with the frames A (r x D) and B (W x r) of
`model.frames` and only R (r x r) trained, which begins at zero. LoRA-XS (Balazy et al., arXiv 2405.17604, equation 2)
has this form with frames from the SVD of W; random orthonormal ones need no W.

Whoever holds W computes A x and takes up B's product, so that only r numbers for each token and projection cross each
way where LoRA's cross D and W. A core of rank r is a LoRA branch of rank r, and is written as one.

Shapes: N tokens, P targeted projections, r rank. May import errors, `model` and libraries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, final

import torch
from torch import Tensor, nn

from tidelock.errors import ConfigError
from tidelock.model.frames import FRAME_KINDS, largest_rank
from tidelock.model.geometry import Place, SiteId

if TYPE_CHECKING:
    from tidelock.model.geometry import Geometry


@final
@dataclass(frozen=True, slots=True)
class CoreConfig:
    """What cores are and where they are.

    Attributes:
        rank: Side r of the trained matrices.
        scaling: The factor s.
        frames: `seeded`, orthonormal and random, or `svd`, the singular vectors of the frozen weight.
        targets: Names of the projections that have one; None is all of query, key and value.
        layers: Blocks that have some; None is all.

    Raises:
        ConfigError: A value breaks its rule.
    """

    rank: int = 32
    scaling: float = 16.0
    frames: str = "seeded"
    targets: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool)
        _require(whole and self.rank >= 1, "rank", "a whole number of 1 or more", self.rank)
        _require(0 < self.scaling < math.inf, "scaling", "more than 0, and finite", self.scaling)
        _require(self.frames in FRAME_KINDS, "frames", f"one of {', '.join(FRAME_KINDS)}", self.frames)


def core_targets(config: CoreConfig, geometry: Geometry) -> dict[SiteId, tuple[str, ...]]:
    """Return the targeted projections of each attention that has any, in the order of the sites.

    Raises:
        ConfigError: A block or a projection is not there, or the rank is more than the model's projections bear.
    """
    known, blocks = geometry.family.projections, range(geometry.num_blocks)
    names = known if config.targets is None else tuple(name for name in known if name in config.targets)
    _require(bool(names) and set(config.targets or ()) <= set(known), "targets", f"some of {known}", config.targets)
    layers = blocks if config.layers is None else sorted(set(config.layers))
    inside = bool(layers) and all(layer in blocks for layer in layers)
    _require(inside, "layers", f"some of 0 to {geometry.num_blocks - 1}", config.layers)
    most = largest_rank(geometry)
    _require(config.rank <= most, "rank", f"at most {most}, as this model's projections bear", config.rank)
    return {SiteId(layer, Place.ATTN): names for layer in layers}


@final
class CoreModule(nn.Module):
    """All cores at one site.

    Args:
        targets: The projections that have one, in the site's order.
        config: Rank and scaling.

    Attributes:
        cores: By projection, a linear without bias, weight R (r, r), zero at the start.
    """

    dropout = 0.0

    def __init__(self, targets: tuple[str, ...], config: CoreConfig) -> None:
        super().__init__()
        self.targets = targets
        self.rank = config.rank
        self.scaling = float(config.scaling)
        self.cores = nn.ModuleDict({name: nn.Linear(config.rank, config.rank, bias=False) for name in targets})
        for name in targets:
            nn.init.zeros_(self.core(name).weight)

    def core(self, name: str) -> nn.Linear:
        """Return the core beside a projection."""
        return cast("nn.Linear", self.cores[name])

    def forward(self, z_NZ: Tensor, _dropout_seed: int | None) -> Tensor:
        """Return what goes through the frames B, side by side, shape (N, P r).

        Args:
            z_NZ: What came through the frames A, side by side, shape (N, P r).
        """
        parts = z_NZ.split(self.rank, dim=1)
        answers = [core(part) for core, part in zip(self.cores.values(), parts, strict=True)]
        return torch.cat(answers, dim=1) * self.scaling


def _require(holds: bool, what: str, expected: str, got: object) -> None:  # noqa: FBT001
    if not holds:
        msg = f"Core's {what}: expected {expected}, got {got!r}. Change it."
        raise ConfigError(msg)
