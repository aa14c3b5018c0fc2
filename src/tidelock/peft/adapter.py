"""Serial bottleneck adapters: two small layers after the last linear of a block's MLP, or of its attention too.

`h <- h + s U f(D dropout(h))`, with D (r x D) and U (D x r) trained, r the bottleneck and f a non-linearity (Houlsby et
al., arXiv 1902.00751, figure 2, whose layers are after the attention and after the MLP; after the MLP only is the
"series adapter" of LLM-Adapters, Hu et al., arXiv 2304.01933, equation 3, which DLoRA trains with a bottleneck of
128). As in LLM-Adapters' code the layers have no biases, and the block adds its residual, or a norm comes, only
afterwards. Here is only what is added to h.

Shapes: N tokens, D width of the linear's output, r bottleneck. May import errors, `model` and libraries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, final

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from tidelock.errors import ConfigError
from tidelock.model.geometry import Place, SiteId

if TYPE_CHECKING:
    from tidelock.model.geometry import Geometry

# By the names that files and options use.
PLACES = {place.label: place for place in (Place.ATTN_OUT, Place.MLP)}
INITS = ("zero", "bert")


@final
@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What serial adapters are and where they are.

    Attributes:
        bottleneck: Width r of the bottleneck.
        places: `mlp` (one adapter a block), `attn-out`, or both (the Houlsby form).
        layers: Blocks that have one; None is all.
        activation: The non-linearity f, by its name in `transformers.activations.ACT2FN`.
        scaling: The factor s.
        dropout: Of the adapter's input, in training.
        init: `zero`: U begins at zero, so that a fresh adapter changes nothing. `bert`: D and U begin normally
            distributed with a deviation of 0.02, as in LLM-Adapters.

    Raises:
        ConfigError: A value breaks its rule.
    """

    bottleneck: int = 128
    places: tuple[str, ...] = ("mlp",)
    layers: tuple[int, ...] | None = None
    activation: str = "tanh"
    scaling: float = 1.0
    dropout: float = 0.0
    init: str = "zero"

    def __post_init__(self) -> None:
        whole = isinstance(self.bottleneck, int) and not isinstance(self.bottleneck, bool)
        _require(whole and self.bottleneck >= 1, "bottleneck", "a whole number of 1 or more", self.bottleneck)
        known = bool(self.places) and len(set(self.places)) == len(self.places) and set(self.places) <= PLACES.keys()
        _require(known, "places", f"some of {', '.join(PLACES)}, each once", self.places)
        _require(self.activation in ACT2FN, "activation", "one that transformers knows", self.activation)
        _require(0 < self.scaling < math.inf, "scaling", "more than 0, and finite", self.scaling)
        _require(0 <= self.dropout < 1, "dropout", "at least 0 and below 1", self.dropout)
        _require(self.init in INITS, "init", f"one of {', '.join(INITS)}", self.init)


def adapter_targets(config: AdapterConfig, geometry: Geometry) -> dict[SiteId, tuple[str, ...]]:
    """Return the linear at each site that has an adapter, in the order of the sites.

    Raises:
        ConfigError: A block is not there, or the family's outputs are not known.
    """
    layers = range(geometry.num_blocks) if config.layers is None else sorted(set(config.layers))
    unknown = [layer for layer in layers if not 0 <= layer < geometry.num_blocks]
    if unknown or not layers:
        msg = (
            f"Adapter's layers: expected some of 0 to {geometry.num_blocks - 1}, got {unknown or 'none'}. Name blocks "
            "that the model has."
        )
        raise ConfigError(msg)
    places = sorted(PLACES[name] for name in config.places)
    sites = [SiteId(layer, place) for layer in layers for place in places]
    if any(site not in geometry.sites for site in sites):
        msg = (
            f"Adapter: expected a model family whose blocks' outputs are known, got {geometry.family.name!r}, which "
            "was cut by its structure. Use lora, or one of the verified families."
        )
        raise ConfigError(msg)
    return {site: tuple(projection.name for projection in geometry.sites[site].projections) for site in sites}


@final
class SerialAdapter(nn.Module):
    """The adapter at one site.

    Args:
        width: Numbers per token that it reads and gives, D.
        config: Its bottleneck, non-linearity, scaling, dropout and initialisation.

    Attributes:
        down: Linear without bias, weight (r, D).
        up: Linear without bias, weight (D, r).
    """

    def __init__(self, width: int, config: AdapterConfig) -> None:
        super().__init__()
        self.dropout = float(config.dropout)
        self.scaling = float(config.scaling)
        self.down = nn.Linear(width, config.bottleneck, bias=False)
        self.activation: nn.Module = ACT2FN[config.activation]
        self.up = nn.Linear(config.bottleneck, width, bias=False)
        if config.init == "bert":
            nn.init.normal_(self.down.weight, std=0.02)
            nn.init.normal_(self.up.weight, std=0.02)
        else:
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)

    def forward(self, x_ND: Tensor, dropout_seed: int | None) -> Tensor:
        """Return what is added to the linear's output, shape (N, D).

        Args:
            x_ND: That output at the real tokens.
            dropout_seed: Fixes the dropout mask; None leaves dropout off.
        """
        if dropout_seed is not None and self.dropout:
            generator = torch.Generator(x_ND.device).manual_seed(dropout_seed)
            keep = 1 - self.dropout
            x_ND = x_ND * (torch.rand(x_ND.shape, generator=generator, device=x_ND.device) < keep) / keep
        return cast("Tensor", self.up(self.activation(self.down(x_ND))) * self.scaling)


def _require(holds: bool, what: str, expected: str, got: object) -> None:  # noqa: FBT001
    if not holds:
        msg = f"Adapter's {what}: expected {expected}, got {got!r}. Change it."
        raise ConfigError(msg)
