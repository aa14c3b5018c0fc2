"""Notes what a run is made of, for whoever looks at it later.

May import everything below `run`.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import TYPE_CHECKING

from tidelock.device.model import DeviceModel
from tidelock.device.side_model import SideModel
from tidelock.report.facts import DataFacts, ModelFacts, RunFacts, SiteFacts

if TYPE_CHECKING:
    from tidelock.device.causal_lm import DeviceCausalLM
    from tidelock.run.examples import EncodedRows

_LIBRARIES = ("tidelock", "torch", "transformers", "peft", "grpcio", "protobuf", "safetensors")
_IGNORED = -100


def facts_of(model: DeviceCausalLM, rows: EncodedRows, eval_rows: EncodedRows) -> RunFacts:
    """Return the facts of a run.

    Args:
        model: The device's model.
        rows: The encoded examples to learn from.
        eval_rows: Those to measure on.
    """
    geometry = model.ends.geometry
    return RunFacts(
        versions={"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        model=ModelFacts(
            family=geometry.family.name,
            num_blocks=geometry.num_blocks,
            embedding_width=geometry.embedding_width,
            final_width=geometry.final_width,
            trained_parameters=sum(parameter.numel() for parameter in model.parameters()),
            sites=_sites_of(model) if isinstance(model, DeviceModel) else (),
            tapped=model.network.blocks if isinstance(model, SideModel) else (),
        ),
        train=_size_of(rows),
        evaluation=_size_of(eval_rows),
    )


def _sites_of(model: DeviceModel) -> tuple[SiteFacts, ...]:
    sites = []
    for site, names in model.bank.targets.items():
        read, given = model.ends.geometry.sites[site].widths(names, model.bank.rank)
        sites.append(SiteFacts(name=site.name, block=site.block, input_width=read, output_width=given))
    return tuple(sites)


def _size_of(rows: EncodedRows) -> DataFacts:
    return DataFacts(
        examples=len(rows),
        tokens=sum(len(row["input_ids"]) for row in rows),
        # No token of its row comes before the first, to predict it.
        labelled=sum(sum(label != _IGNORED for label in row["labels"][1:]) if "labels" in row else 1 for row in rows),
    )
