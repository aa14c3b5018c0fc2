"""Serial adapters on an ordinary `transformers` model, for whoever wants a trained one without tidelock's split.

What `peft.PeftModel.from_pretrained` is for LoRA. May import `peft`, `model`, errors and libraries.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from tidelock.errors import ConfigError
from tidelock.model.ends import empty_model
from tidelock.model.geometry import geometry_of
from tidelock.peft.adapter import AdapterConfig, SerialAdapter, adapter_targets
from tidelock.peft.export import apply_adapter, load_adapter
from tidelock.peft.side import SideConfig

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel


def attach_adapter(model: PreTrainedModel, folder: str | os.PathLike[str]) -> nn.ModuleDict:
    """Put a serial adapter on an ordinary model, which computes with it from then on.

    Args:
        model: The whole model that the adapter was trained on; its forward is not replaced, it gets hooks. For an
            adapter with a head for whole texts, an `AutoModelForSequenceClassification` with as many labels, whose
            `score` becomes that head; else an `AutoModelForCausalLM`.
        folder: The adapter's, as `DeviceModel.save_adapter` or `tidelock export --to adapter` wrote it.

    Returns:
        The adapters by site, `blocks_7_mlp`, on the model's device; they have no dropout here.

    Raises:
        CheckpointError: The folder has no readable adapter, or it does not fit the model.
        ConfigError: It is no serial adapter, or the model's family is not known.

    Example::

        model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        tidelock.attach_adapter(model, "my-run/adapter")
    """
    adapter = load_adapter(Path(folder))
    if not isinstance(adapter.config, AdapterConfig):
        got, reader = (
            ("a side network", "tidelock.attach_side(model, folder)")
            if isinstance(adapter.config, SideConfig)
            else ("LoRA", "PeftModel.from_pretrained(model, folder)")
        )
        msg = f"Attaching an adapter: expected a serial one, got {got} ({folder}). What reads that is {reader}."
        raise ConfigError(msg)
    # The places of blocks and linears are the causal model's, whatever head this one has.
    geometry = geometry_of(empty_model(model.config))
    score = getattr(model, "score", None)
    sites = adapter_targets(adapter.config, geometry)
    modules = {site: SerialAdapter(geometry.sites[site].width, adapter.config) for site in sites}
    apply_adapter(adapter, modules, geometry, score if isinstance(score, nn.Linear) else None)
    for site, module in modules.items():
        linear = model.get_submodule(geometry.output_path(site))
        module.to(next(linear.parameters()))
        linear.register_forward_hook(_adding(module))
    return nn.ModuleDict({site.name.replace(".", "_"): module for site, module in modules.items()})


def _adding(module: SerialAdapter) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
    def hook(_linear: nn.Module, _args: tuple[Tensor], output: Tensor) -> Tensor:
        added: Tensor = module(output, None)
        return output + added

    return hook
