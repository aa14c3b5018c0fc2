"""LoRA at a block's attention: its low-rank branches beside query, key and value, in the device's hands.

For each targeted projection P with frozen weight W: `P x = W x + s B A dropout(x)`, with A (r x D) and B (W x r)
trained and `s = alpha / r`, or `alpha / sqrt(r)` with rsLoRA (Hu et al., arXiv 2106.09685, equation 3; Kalajdzievski,
arXiv 2312.03732). Only the second term is here.

Shapes: N tokens, D site width, W the targeted projections' widths together, r rank.
May import errors, `model` and libraries.
"""

from __future__ import annotations

import copy
import math
from dataclasses import fields
from typing import TYPE_CHECKING, cast, final

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from tidelock.errors import ConfigError
from tidelock.model.geometry import Place, SiteId

if TYPE_CHECKING:
    from tidelock.model.geometry import Geometry

# Fields that are honoured, or that say nothing about the maths. Any other field must keep its default.
_HONOURED = frozenset(
    {
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "init_lora_weights",
        "fan_in_fan_out",  # about how W is stored, which only merging asks
        "task_type",
        "inference_mode",
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "peft_type",
        "peft_version",
        "runtime_config",
    }
)
_INITS = (True, "gaussian")

# As the only one of `target_modules`: all projections of every site, whatever the family calls them.
ALL_PROJECTIONS = "*"


def check_lora_config(config: LoraConfig) -> None:
    """Refuse, by name, every setting that cannot be honoured when the frozen weights are elsewhere.

    Raises:
        ConfigError: A field that needs the frozen weights, or that trains something else than q, k and v, is set.
    """
    default = LoraConfig()
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in _HONOURED and value != getattr(default, field.name) and value:
            msg = (
                f"LoraConfig.{field.name}: expected {getattr(default, field.name)!r}, got {value!r}. tidelock trains "
                "plain LoRA on q, k and v, whose frozen weights may be on another machine. Leave this one out."
            )
            raise ConfigError(msg)
    if not 0 <= config.lora_dropout < 1:
        msg = f"LoraConfig.lora_dropout: expected at least 0 and below 1, got {config.lora_dropout!r}. Change it."
        raise ConfigError(msg)
    if config.init_lora_weights not in _INITS:
        msg = (
            f"LoraConfig.init_lora_weights: expected one of {_INITS}, got {config.init_lora_weights!r}, which needs "
            "the frozen weights or is not a start from zero. Use True."
        )
        raise ConfigError(msg)


def lora_targets(config: LoraConfig, geometry: Geometry) -> dict[SiteId, tuple[str, ...]]:
    """Return the targeted projections of each site that has any, chosen by `peft`'s own name rules.

    Raises:
        ConfigError: Nothing is targeted, or a target is not at a site.
    """
    config = copy.copy(config)
    if config.target_modules is None:
        defaults = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(geometry.family.name)
        config.target_modules = list(defaults or geometry.family.projections)
    if set(config.target_modules) == {ALL_PROJECTIONS}:
        config.target_modules = list(geometry.family.projections)
    _refuse_foreign_targets(config, geometry)
    targets: dict[SiteId, tuple[str, ...]] = {}
    for site_id, site in geometry.sites.items():
        names = tuple(
            projection.name
            for projection in site.projections
            if site_id.place is Place.ATTN
            and check_target_module_exists(config, geometry.projection_path(site_id.block, projection.name))
        )
        if names:
            targets[site_id] = names
    if not targets:
        msg = (
            f"LoraConfig.target_modules: expected to match some of {geometry.family.projections} in blocks 0 to "
            f"{geometry.num_blocks - 1}, got no match for {config.target_modules!r}"
            f" (layers_to_transform {config.layers_to_transform!r}). Name projections that the model has."
        )
        raise ConfigError(msg)
    return targets


def _refuse_foreign_targets(config: LoraConfig, geometry: Geometry) -> None:
    """Refuse names and patterns that reach beyond the sites: `peft` would train there, and we would not."""
    known = geometry.family.projections
    foreign = [name for name in geometry.other_linears if check_target_module_exists(config, name)]
    if not isinstance(config.target_modules, str):
        foreign += sorted(name for name in config.target_modules or () if name.rpartition(".")[2] not in known)
    if foreign:
        msg = (
            f"LoraConfig.target_modules: expected names out of {known}, got {foreign[:4]}. LoRA is trained on "
            "the attention's query, key and value projections only; leave the others out."
        )
        raise ConfigError(msg)


@final
class LoraBranch(nn.Module):
    """The low-rank branch beside one projection.

    Attributes:
        lora_A: Linear without bias, weight (r, D).
        lora_B: Linear without bias, weight (W, r), zero at the start.
        scaling: The factor s.
    """

    def __init__(self, width: int, output_width: int, config: LoraConfig, path: str) -> None:
        super().__init__()
        ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
        rank = ranks.get(get_pattern_key(list(ranks), path), config.r)
        alpha = alphas.get(get_pattern_key(list(alphas), path), config.lora_alpha)
        self.lora_A = nn.Linear(width, rank, bias=False)
        self.lora_B = nn.Linear(rank, output_width, bias=False)
        self.scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A.weight, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Return what is added to the projection, shape (N, W)."""
        return cast("Tensor", self.lora_B(self.lora_A(x_ND)) * self.scaling)


@final
class LoraModule(nn.Module):
    """All LoRA branches at one site.

    Args:
        site_id: Where it attaches.
        targets: The projections that have a branch, in the site's order.
        config: Rank, alpha, dropout, scaling and initialisation.
        geometry: Gives the site's widths, and the projections' full names, which rank and alpha patterns match on.
    """

    def __init__(self, site_id: SiteId, targets: tuple[str, ...], config: LoraConfig, geometry: Geometry) -> None:
        super().__init__()
        site = geometry.sites[site_id]
        widths = {projection.name: projection.width for projection in site.projections}
        self.targets = targets
        self.dropout = float(config.lora_dropout)
        self.branches = nn.ModuleDict(
            {
                name: LoraBranch(site.width, widths[name], config, geometry.projection_path(site_id.block, name))
                for name in targets
            }
        )

    def forward(self, x_ND: Tensor, dropout_seed: int | None) -> Tensor:
        """Return what is added to the targeted projections, side by side, shape (N, W).

        Args:
            x_ND: The site's input at the real tokens.
            dropout_seed: Fixes the dropout masks, one per projection as in `peft`; None leaves dropout off.
        """
        if dropout_seed is None or not self.dropout:
            return torch.cat([branch(x_ND) for branch in self.branches.values()], dim=1)
        generator = torch.Generator(x_ND.device).manual_seed(dropout_seed)
        keep = 1 - self.dropout
        outputs = []
        for branch in self.branches.values():
            mask_ND = torch.rand(x_ND.shape, generator=generator, device=x_ND.device) < keep
            outputs.append(branch(x_ND * mask_ND / keep))
        return torch.cat(outputs, dim=1)
