"""The bank of PEFT modules on the device, and its half of a pass: answering at the sites.

May import `peft`, `model` and libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from tidelock.errors import NonFiniteError, WireError
from tidelock.model.frames import FrameChoice
from tidelock.peft.core import CoreConfig
from tidelock.peft.methods import SiteModule, at_sites, module_at, targets_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from tidelock.device.kill_revive import Activity
    from tidelock.model.geometry import Geometry, SiteId
    from tidelock.peft.core import CoreConfig
from tidelock.peft.methods import MethodConfig


@final
class Bank(nn.Module):
    """All PEFT modules of a model, one a block, and nothing else: these are the parameters that training moves.

    Args:
        config: The checked configuration of a method.
        geometry: The model's sites.

    Attributes:
        targets: The targeted linears of every site at which a module attaches, in the order of the sites.
        blocks: The PEFT modules by block; each has what is at its sites, by place.
        active: As `targets`, but only the sites that are asked in a pass.
        frames: Those between which all modules are; None where they read and give whole states.
        activity: What a schedule knows of the modules; saved with them.

    Raises:
        ConfigError: The configuration targets nothing, or something that is not a site, or is that of a side network.
    """

    def __init__(self, config: MethodConfig, geometry: Geometry) -> None:
        super().__init__()
        config = at_sites(config)
        self.targets = targets_of(config, geometry)
        self.blocks = nn.ModuleDict({str(block): nn.ModuleDict() for block in self.numbers})
        for site, names in self.targets.items():
            self.module(site.block)[site.place.label] = module_at(site, names, config, geometry)
        self.frames = FrameChoice(config.frames, config.rank) if isinstance(config, CoreConfig) else None
        self.active: Mapping[SiteId, tuple[str, ...]] = self.targets
        self.activity: Activity | None = None

    @property
    def numbers(self) -> tuple[int, ...]:
        """The blocks that have a PEFT module, ascending."""
        return tuple(sorted({site.block for site in self.targets}))

    @property
    def active_numbers(self) -> tuple[int, ...]:
        """The blocks whose modules are asked in a pass, ascending."""
        return tuple(sorted({site.block for site in self.active}))

    def activate(self, blocks: Collection[int], *, frozen: bool = False) -> None:
        """Have the modules of these blocks learn, and no others.

        A killed module keeps its weights; without a gradient, no optimizer moves them.

        Args:
            blocks: Those of the active modules.
            frozen: The others still answer, with the weights that they have; else they are left out of every pass.
        """
        for block in self.numbers:
            self.module(block).requires_grad_(block in blocks)
        self.active = {site: names for site, names in self.targets.items() if frozen or site.block in blocks}

    @property
    def learns_from(self) -> int | None:
        """The lowest active block whose module learns, or None."""
        learning = (b for b in self.active_numbers if any(p.requires_grad for p in self.module(b).parameters()))
        return min(learning, default=None)

    def module(self, block: int) -> nn.ModuleDict:
        """Return the PEFT module of a block: what is at its sites, by place."""
        return cast("nn.ModuleDict", self.blocks[str(block)])

    def at(self, site: SiteId) -> SiteModule:
        """Return the part of a PEFT module that attaches at a site."""
        return cast("SiteModule", self.module(site.block)[site.place.label])

    @property
    def has_dropout(self) -> bool:
        """Whether a training pass draws random numbers."""
        return any(self.at(site).dropout > 0 for site in self.targets)


@final
class BankPass:
    """The bank's half of one pass; can begin again when an attempt is lost, with the same dropout masks.

    Args:
        bank: The PEFT modules.
        parameters: The parameters whose gradients are wanted, in the order in which they are returned.
        training: Whether graphs are kept for backward.
        dropout_seed: Fixes every dropout mask of the pass; None leaves dropout off.
    """

    def __init__(
        self, bank: Bank, parameters: Sequence[nn.Parameter], *, training: bool, dropout_seed: int | None
    ) -> None:
        self._bank = bank
        self._parameters = parameters
        self._training = training
        self._dropout_seed = dropout_seed
        # Where no gradient comes, no graph is kept.
        self._learns_from = bank.learns_from if training else None
        self._graphs: dict[SiteId, tuple[Tensor, GradientEdge]] = {}
        self._grads: dict[int, Tensor] = {}

    def begin(self) -> BankPass:
        """Forget what an earlier attempt computed."""
        self._graphs.clear()
        self._grads.clear()
        return self

    def forward(self, site: SiteId, x_ND: Tensor) -> Tensor:
        """Return the module's addition at a site, shape (N, W), detached."""
        module = self._bank.at(site)
        parameter = next(module.parameters())
        keeps_graph = self._learns_from is not None and site.block >= self._learns_from
        x_ND = x_ND.to(parameter).requires_grad_(keeps_graph)
        # One seed a pass and one step of it a site: the same masks whatever is repeated or re-ordered.
        seed = None if self._dropout_seed is None else self._dropout_seed + site.number
        with torch.set_grad_enabled(keeps_graph):
            y_NW = module(x_ND, seed)
        if keeps_graph:
            # Not y itself: its graph is wanted, its numbers are on their way and need not be kept here.
            self._graphs[site] = (x_ND, get_gradient_edge(y_NW))
        return cast("Tensor", y_NW.detach())

    def backward(self, site: SiteId, grad_NW: Tensor, *, need_input: bool) -> Tensor | None:
        """Keep the gradients of a site's parameters; return that of its input, shape (N, D), if it is needed."""
        x_ND, edge = self._graphs.pop(site)
        parameters = [p for p in self._bank.at(site).parameters() if p.requires_grad]
        wanted = [*parameters, x_ND] if need_input else parameters
        if not wanted:  # a module that its user has frozen, below all others
            return None
        grads = torch.autograd.grad([edge], wanted, grad_NW.to(x_ND))
        self._grads.update({id(p): grad for p, grad in zip(parameters, grads, strict=False)})
        return grads[-1] if need_input else None

    def gradients(self) -> list[Tensor]:
        """Return the gradient of each wanted parameter, in order.

        Raises:
            WireError: A parameter got no gradient.
            NonFiniteError: A gradient is infinite or not a number.
        """
        missing = [index for index, p in enumerate(self._parameters) if id(p) not in self._grads]
        if missing:
            msg = (
                f"Backward pass: expected a gradient for each of {len(self._parameters)} PEFT tensors, got none for "
                f"{len(missing)} of them. The step was not taken; please report this."
            )
            raise WireError(msg)
        grads = [self._grads[id(p)] for p in self._parameters]
        if not all(bool(torch.isfinite(grad).all()) for grad in grads):
            msg = (
                "Backward pass: expected finite gradients, got an infinite or undefined one. The step was not taken. "
                "Lower the learning rate, or use fp32 on the wire and in the cloud."
            )
            raise NonFiniteError(msg)
        return grads
