"""A part of the PEFT modules: those at the sites of the consecutive blocks that one device of a pool holds.

There one device has block and module, so that both are one graph, and gradients go through the blocks to the device
before (Eco-FL's and EDDL's way, the baselines of PAC, arXiv 2408.10746, section 6.1).

Shapes: B rows, T positions, N real tokens, D hidden width, W numbers of an answer at a site. May import errors,
`model`, `peft` and libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast, final

import torch
from torch import nn

from tidelock.model.geometry import SiteId
from tidelock.peft.methods import module_at, targets_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from tidelock.model.geometry import Geometry
    from tidelock.model.rows import Layout
    from tidelock.peft.methods import ModuleConfig, SiteModule


@final
class SitePart(nn.Module):
    """The modules at the sites of blocks `first` to `end - 1`.

    Args:
        config: What the modules of all blocks are like.
        geometry: The whole model's.
        blocks: Numbers of the blocks, consecutive.

    Attributes:
        learns_before: Whether a block before these has a module, so that a gradient must go there.
        learns_until: Whether one of these has, or one before.

    Raises:
        ConfigError: The configuration targets nothing, or something that is not a site.
    """

    def __init__(self, config: ModuleConfig, geometry: Geometry, blocks: range) -> None:
        super().__init__()
        all_targets = targets_of(config, geometry)
        self.targets = {site: names for site, names in all_targets.items() if site.block in blocks}
        self.learns_before = any(site.block < blocks.start for site in all_targets)
        self.learns_until = any(site.block < blocks.stop for site in all_targets)
        self._first = blocks.start
        self._geometry = geometry
        # Under the names that a `Bank` of all modules has.
        self.blocks = nn.ModuleDict({str(site.block): nn.ModuleDict() for site in self.targets})
        for site, names in self.targets.items():
            self._module(site.block)[site.place.label] = module_at(site, names, config, geometry)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters by their names among all modules'."""
        return dict(self.named_parameters())

    @torch.no_grad()
    def load_whole(self, state: Mapping[str, Tensor]) -> None:
        """Take this part's parameters out of those of all modules."""
        for name, parameter in self.trained().items():
            parameter.copy_(state[name])

    def visitor(self, layout: Layout, drops: Sequence[tuple[int, int]] | None) -> AtSites:
        """Return who has the modules answer in one pass.

        Args:
            layout: How the pass's tokens lie in the padded batch.
            drops: For each row its number of tokens and the seed of its dropout masks; None leaves dropout off.
        """
        return AtSites(self, layout, drops)

    def at(self, site: SiteId) -> tuple[SiteModule | None, dict[str, int]]:
        """Return the module at a site, if there is one, and the widths of what it gives by linear, in their order.

        Args:
            site: Counted from the part's first block.
        """
        whole = self.in_whole(site)
        if whole not in self.targets:
            return None, {}
        widths = {projection.name: projection.width for projection in self._geometry.sites[whole].projections}
        names = self.targets[whole]
        return cast("SiteModule", self._module(whole.block)[whole.place.label]), {name: widths[name] for name in names}

    def in_whole(self, site: SiteId) -> SiteId:
        """Return a site, counted from the part's first block, as the whole model has it."""
        return SiteId(self._first + site.block, site.place)

    def _module(self, block: int) -> nn.ModuleDict:
        return cast("nn.ModuleDict", self.blocks[str(block)])


@final
class AtSites:
    """Has a part's modules answer in one pass, within autograd's graph; see `model.cut.SiteVisitor`.

    Args:
        part: The modules.
        layout: As for `SitePart.visitor`.
        drops: Likewise.
    """

    def __init__(self, part: SitePart, layout: Layout, drops: Sequence[tuple[int, int]] | None) -> None:
        self._part = part
        self._layout = layout
        self._drops = drops
        self._read_BTD: Tensor | None = None
        self._answers: dict[str, Tensor] = {}

    def enter_site(self, site: SiteId, x_BTD: Tensor) -> Tensor:
        """Have the module answer to what the projections read, once for all that read the same."""
        module, widths = self._part.at(site)
        if x_BTD is not self._read_BTD:
            self._read_BTD, self._answers = x_BTD, {}
            if module is not None:
                answer_NW = self._answer(site, module, self._layout.pack(x_BTD))
                self._answers = dict(zip(widths, answer_NW.split(list(widths.values()), dim=1), strict=True))
        return x_BTD

    def leave_projection(self, site: SiteId, projection: str, y_BTW: Tensor) -> Tensor:  # noqa: ARG002  (a protocol's)
        """Add the answer to a projection."""
        answer_NW = self._answers.get(projection)
        return y_BTW if answer_NW is None else y_BTW + self._layout.unpack(answer_NW)

    def leave_output(self, site: SiteId, y_BTD: Tensor) -> Tensor:
        """Add the module's answer to an output."""
        module, _ = self._part.at(site)
        if module is None:
            return y_BTD
        # Some blocks flatten rows and positions into one axis there.
        answer_ND = self._answer(site, module, self._layout.pack(y_BTD.view(*self._layout.shape_BT, -1)))
        return y_BTD + self._layout.unpack(answer_ND).view_as(y_BTD)

    def _answer(self, site: SiteId, module: SiteModule, x_ND: Tensor) -> Tensor:
        if self._drops is None or not module.dropout:
            return cast("Tensor", module(x_ND, None))
        # Row by row, so that its masks do not depend on which rows are computed together.
        number = self._part.in_whole(site).number
        rows = x_ND.split([tokens for tokens, _ in self._drops])
        return torch.cat([module(row, seed + number) for row, (_, seed) in zip(rows, self._drops, strict=True)])
