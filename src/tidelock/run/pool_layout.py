"""Who computes what in a pool: as a person writes it, or as a plan has it. May import `plan`, `pool` and errors."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING

from tidelock.errors import ConfigError
from tidelock.pool.layout import PoolLayout, Stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidelock.plan.inputs import Profile
    from tidelock.plan.plan import Plan

_STAGE = re.compile(r"(\d+)-(\d+)@(\d+(?:\*\d+)?(?:,\d+(?:\*\d+)?)*)")


def written_layout(stages: Sequence[str], num_blocks: int, num_peers: int, micro_batches: int | None) -> PoolLayout:
    """Return the layout that `--stage` options give.

    Args:
        stages: One or more, each `FIRST-LAST@PEER,PEER*SHARE`.
        num_blocks: Of the model.
        num_peers: Of the pool.
        micro_batches: In a batch; None is as many as there are stages.

    Raises:
        ConfigError: One is malformed, or they do not hold each block and each peer once.
    """
    read = [_stage(text, len(stages) - number) for number, text in enumerate(stages)]
    layout = PoolLayout(tuple(read), micro_batches or len(stages))
    last = layout.stages[-1].blocks.stop
    if last != num_blocks or layout.num_peers != num_peers:
        msg = (
            f"--stage: expected all of the model's {num_blocks} blocks and {num_peers} peers in the stages, got "
            f"{last} blocks and {layout.num_peers} peers. Name each once."
        )
        raise ConfigError(msg)
    return layout


def planned_layout(plan: Plan, profile: Profile, num_blocks: int) -> PoolLayout:
    """Return the layout of a plan; a device's number in the profile is that of its peer.

    Raises:
        ConfigError: The profile is of another number of blocks.
    """
    if len(profile.blocks) != num_blocks:
        msg = (
            f"Profile: expected the model's {num_blocks} blocks, got {len(profile.blocks)} ({plan.title}). Count "
            "embedding and head into the first and the last block, or take the profile of this model."
        )
        raise ConfigError(msg)
    numbers = {device.name: number for number, device in enumerate(profile.devices)}
    return PoolLayout(
        tuple(
            Stage(
                range(stage.first_block, stage.last_block + 1),
                tuple(numbers[device.name] for device in stage.devices),
                tuple(device.rows for device in stage.devices),
                stage.in_flight,
            )
            for stage in plan.stages
        ),
        plan.micro_batches,
        tuple(numbers[name] for name in plan.left_out),
    )


def layout_to_json(layout: PoolLayout) -> str:
    """Return a layout as a run's folder has it, and as peers tell it each other."""
    stages = [{**asdict(stage), "blocks": [stage.blocks.start, stage.blocks.stop]} for stage in layout.stages]
    return json.dumps({"stages": stages, "micro_batches": layout.micro_batches, "idle": layout.idle})


def layout_from_json(text: str) -> PoolLayout:
    """Return what `layout_to_json` was given."""
    values = json.loads(text)
    stages = tuple(
        Stage(range(*stage["blocks"]), tuple(stage["peers"]), tuple(stage["shares"]), stage["in_flight"])
        for stage in values["stages"]
    )
    return PoolLayout(stages, values["micro_batches"], tuple(values["idle"]))


def described(layout: PoolLayout) -> str:
    """Return a layout for people."""
    stages = "; ".join(
        f"blocks {stage.blocks.start} to {stage.blocks.stop - 1} on peers {', '.join(map(str, stage.peers))}"
        for stage in layout.stages
    )
    return stages + (f"; without blocks: {', '.join(map(str, layout.idle))}" if layout.idle else "")


def _stage(text: str, in_flight: int) -> Stage:
    found = _STAGE.fullmatch(text)
    if found is None:
        msg = f"--stage: expected FIRST-LAST@PEER,PEER*SHARE such as 0-14@0,1*2, got {text!r}. Write it so."
        raise ConfigError(msg)
    members = [member.partition("*") for member in found[3].split(",")]
    return Stage(
        range(int(found[1]), int(found[2]) + 1),
        tuple(int(peer) for peer, _, _ in members),
        tuple(int(share or 1) for _, _, share in members),
        in_flight,
    )
