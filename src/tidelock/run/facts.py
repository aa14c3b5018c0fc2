"""Notes what a run is made of, for whoever looks at it later.

May import everything below `run`.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from tidelock.device.beside_blocks import BesideBlocks
from tidelock.device.model import DeviceModel
from tidelock.model.ends import Ends, empty_model, read_config
from tidelock.model.geometry import geometry_of
from tidelock.model.sizes import sizes_of
from tidelock.peft.methods import targets_of
from tidelock.peft.side import SideConfig
from tidelock.pool.full_part import FullConfig
from tidelock.report.facts import DataFacts, ModelFacts, RunFacts, SiteFacts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tidelock.device.device_lm import DeviceLM
    from tidelock.model.frames import FrameChoice
    from tidelock.model.geometry import Geometry, SiteId
    from tidelock.pool.job import PoolJob
    from tidelock.run.examples import EncodedRows

_LIBRARIES = ("tidelock", "torch", "transformers", "peft", "grpcio", "protobuf", "safetensors")
_IGNORED = -100


def facts_of(model: DeviceLM, rows: EncodedRows, eval_rows: EncodedRows) -> RunFacts:
    """Return the facts of a run.

    Args:
        model: The device's model.
        rows: The encoded examples to learn from.
        eval_rows: Those to measure on.
    """
    ends = model.ends
    if isinstance(ends, Ends):
        geometry = ends.geometry
        num_blocks, widths = geometry.num_blocks, (geometry.embedding_width, geometry.final_width)
    else:
        num_blocks, widths = sum(ends.num_blocks), (ends.width, ends.width)
    sites: tuple[SiteFacts, ...] = ()
    if isinstance(model, DeviceModel):
        sites = _sites(model.bank.targets, model.ends.geometry, model.bank.frames)
    shape = ModelFacts(
        family=model.config.model_type,
        num_blocks=num_blocks,
        embedding_width=widths[0],
        final_width=widths[1],
        trained_parameters=sum(parameter.numel() for parameter in model.parameters()),
        sites=sites,
        tapped=model.tapped if isinstance(model, BesideBlocks) else (),
    )
    return _facts(shape, _size_of(model, rows), _size_of(model, eval_rows))


def facts_of_pool(job: PoolJob) -> RunFacts:
    """Return the facts of a run in a pool; the machine is that of peer 0."""
    config = read_config(job.source.folder)
    sizes = sizes_of(config)
    sites: tuple[SiteFacts, ...] = ()
    if not isinstance(job.config, SideConfig | FullConfig):
        geometry = geometry_of(empty_model(config))
        sites = _sites(targets_of(job.config, geometry), geometry, None)
    shape = ModelFacts(
        family=config.model_type,
        num_blocks=sizes.num_blocks,
        embedding_width=sizes.embedding_width,
        final_width=sizes.final_width,
        trained_parameters=sum(shape.numel() for shape in job.shapes().values()),
        sites=sites,
        tapped=tuple(range(sizes.num_blocks)) if isinstance(job.config, SideConfig) else (),
    )
    train, evaluation = (
        DataFacts(
            examples=len(examples),
            tokens=sum(len(example.input_ids) for example in examples),
            labelled=sum(example.num_labels for example in examples),
        )
        for examples in (job.examples, job.held_out.examples)
    )
    return _facts(shape, train, evaluation)


def _facts(model: ModelFacts, train: DataFacts, evaluation: DataFacts) -> RunFacts:
    return RunFacts(
        versions={"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        model=model,
        train=train,
        evaluation=evaluation,
    )


def _sites(
    targets: Mapping[SiteId, tuple[str, ...]], geometry: Geometry, frames: FrameChoice | None
) -> tuple[SiteFacts, ...]:
    sites = []
    for site, names in targets.items():
        read, given = geometry.sites[site].widths(names, frames)
        sites.append(SiteFacts(name=site.name, block=site.block, input_width=read, output_width=given))
    return tuple(sites)


def _size_of(model: DeviceLM, rows: EncodedRows) -> DataFacts:
    return DataFacts(
        examples=len(rows),
        tokens=sum(len(row["input_ids"]) for row in rows),
        labelled=sum(
            int((model.targets_of(torch.tensor([row["labels"]])) != _IGNORED).sum()) if "labels" in row else 1
            for row in rows
        ),
    )
