"""What the parts of a side network have in common, whatever it stands beside: whose parameters are whose.

May import libraries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping


class NetworkPart(nn.Module, ABC):
    """The part of a side network that one device has, and what its parameters are called in the whole.

    Attributes:
        names: Of each own parameter that the outcome depends on, its name in the whole network.
        slices: Where in a parameter of the whole network this part's is, if it is not all of it.
    """

    names: Mapping[str, str]
    slices: Mapping[str, slice]

    @abstractmethod
    def outcome(self) -> Tensor:
        """Return what two tokens come to here; it depends on the parameters that this part trains, and on no others."""

    @abstractmethod
    def whole_name(self, own: str) -> str:
        """Return what an own parameter is called in the whole network."""

    def names_in_whole(self) -> dict[str, str]:
        """Return for each parameter that has a part in the outcome its name in the whole network."""
        parameters = dict(self.named_parameters())
        with torch.enable_grad():
            found = torch.autograd.grad(self.outcome().sum(), list(parameters.values()), allow_unused=True)
        used = [own for own, gradient in zip(parameters, found, strict=True) if gradient is not None]
        return {own: self.whole_name(own) for own in used}

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are this part's to train, under their names in the whole network."""
        parameters = dict(self.named_parameters())
        return {whole: parameters[own] for own, whole in self.names.items()}

    @torch.no_grad()
    def load_whole(self, state: Mapping[str, Tensor]) -> None:
        """Take this part's parameters out of those of the whole network."""
        own = self.own_of(state)
        for name, parameter in self.trained().items():
            parameter.copy_(own[name])

    def own_of(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is this part's of tensors that are shaped as the whole network's parameters, by their names."""
        return {name: whole[name][self.slices.get(name, ...)] for name in self.names.values()}
