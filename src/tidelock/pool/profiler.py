"""Measures a pool: what each device takes for a block, and what the links between them carry.

PAC's calibration run (arXiv 2408.10746, section 4): seconds of each block forward and backward by rows of a
micro-batch, bytes of what is kept and sent, bandwidth. Blocks of a stack are alike but for what the first and the
last one have around them, and for whether they, or blocks before them, have a module: one of each kind is measured.

May import `pool`, `plan`, `model`, `peft`, errors and libraries.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, final

import torch
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from tidelock.errors import StorageError
from tidelock.model.cache_folder import cache_folder, write_atomically
from tidelock.model.ends import empty_model, read_config
from tidelock.model.geometry import geometry_of
from tidelock.model.memory import give_back_memory
from tidelock.model.sizes import sizes_of
from tidelock.peft.methods import targets_of
from tidelock.peft.side import SideConfig
from tidelock.plan.inputs import Block, Device, Link, LinkBetween, Links, Profile
from tidelock.pool.beside import side_stage
from tidelock.pool.block_stage import BlockStage
from tidelock.pool.example import Width
from tidelock.pool.full_part import FullConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from tidelock.pool.example import Example
    from tidelock.pool.job import PoolJob
    from tidelock.pool.peers import Peers
    from tidelock.pool.pipeline import StageCompute

_REPEATS = 5
_PROBE_FLOATS = 1 << 20
_PINGS = 10
# AdamW keeps two moments of each weight.
_MOMENTS = 2


@final
@dataclass(frozen=True, slots=True)
class _Measured:
    """One kind of block on this device: its bytes, and its seconds by rows."""

    block: Block
    forward_seconds: list[float]
    backward_seconds: list[float]
    spread: float


def measure_pool(peers: Peers, job: PoolJob, rows: Sequence[int], device: DeviceFacts) -> Profile:
    """Return the profile of a pool, the same on every peer; all of them call this at the same time.

    Args:
        peers: All peers.
        job: What is trained; examples of middling length are what is measured with.
        rows: Sizes of a micro-batch, ascending.
        device: This one.

    Raises:
        PeerError: A peer was lost.
        StorageError: What was measured cannot be kept.
    """
    found = _known_or_measured(job, rows, device)
    own = found.device.model_copy(update={"name": f"{peers.peer}: {device.name}", "memory_bytes": device.memory_bytes})
    peers.notices.tell(f"device {peers.peer}", own.model_dump_json())
    links = _measure_links(peers)
    devices = [Device.model_validate_json(peers.notices.ask(f"device {peer}")) for peer in range(peers.count)]
    between = [
        LinkBetween(devices=(devices[one].name, devices[other].name), **link.model_dump())
        for (one, other), link in links.items()
    ]
    slowest = min(links.values(), key=lambda link: link.bytes_per_second, default=_NO_LINK)
    profile = Profile(
        format="tidelock-pool-profile",
        version=1,
        title=f"measured with {len(job.examples)} examples",
        blocks=found.blocks,
        devices=tuple(devices),
        links=Links(default=slowest, between=tuple(between)),
    )
    # Measured bytes may differ in the last digits between devices: peer 0's count.
    if peers.peer == 0:
        peers.notices.tell("profile", profile.model_dump_json())
    return Profile.model_validate_json(peers.notices.ask("profile"))


# Of a pool of one device.
_NO_LINK = Link(bytes_per_second=1e12, latency_seconds=0.0)


@final
@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """A device, and all that its seconds depend on besides the job.

    Attributes:
        name: For people.
        memory_bytes: What it can give.
        key: Of the model's weights, the hardware, the threads and the libraries.
    """

    name: str
    memory_bytes: int
    key: str


@final
class MeasuredDevice(BaseModel):
    """What was measured of one device: kept for the next run that asks for the same."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    blocks: tuple[Block, ...]
    device: Device


def _known_or_measured(job: PoolJob, rows: Sequence[int], device: DeviceFacts) -> MeasuredDevice:
    """Return what is known of a device, or measure it; two processes of one device never measure at once."""
    lengths = [(len(each.input_ids), len(each.decoder_ids)) for each in _middling(job.examples, max(rows))]
    asked = [device.key, type(job.config).__name__, asdict(job.config), job.num_labels, list(rows), lengths]
    text = json.dumps(asked, default=sorted)  # a LoraConfig's names are sets
    path = cache_folder() / "profiles" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            try:
                return MeasuredDevice.model_validate_json(path.read_bytes())
            except (FileNotFoundError, ValidationError):
                found = measure_device(job, rows)
            write_atomically(path, found.model_dump_json().encode())
    except OSError as error:
        msg = (
            f"Keeping what was measured: expected the disk to take it, got {error.strerror} ({path}). Make room, or "
            "set TIDELOCK_CACHE to another folder."
        )
        raise StorageError(msg) from error
    return found


def measure_device(job: PoolJob, rows: Sequence[int]) -> MeasuredDevice:
    """Return all blocks of a model, and this device without a name; arguments as of `measure_pool`."""
    alike = _alike(job)
    kinds = {number: _measure_block(job, number, rows) for number in sorted(set(alike))}
    all_blocks = [kinds[number] for number in alike]
    blocks = [each.block.model_copy(update={"name": str(number)}) for number, each in enumerate(all_blocks)]
    device = Device(
        name="this device",
        memory_bytes=0,
        rows=tuple(rows),
        forward_seconds=tuple(tuple(each.forward_seconds[i] for each in all_blocks) for i in range(len(rows))),
        backward_seconds=tuple(tuple(each.backward_seconds[i] for each in all_blocks) for i in range(len(rows))),
        spread=max(each.spread for each in kinds.values()),
    )
    return MeasuredDevice(blocks=tuple(blocks), device=device)


def _alike(job: PoolJob) -> list[int]:
    """Return for each block the first one of its kind."""
    model_config = read_config(job.source.folder)
    sizes = sizes_of(model_config)
    learning = set(range(sizes.num_blocks))
    if not isinstance(job.config, SideConfig | FullConfig):
        learning = {site.block for site in targets_of(job.config, geometry_of(empty_model(model_config)))}
    seam, last = sizes.num_encoder_blocks, sizes.num_blocks - 1
    kinds = [(n in {0, seam}, n == last, n < seam, n in learning, n > min(learning)) for n in range(sizes.num_blocks)]
    return [kinds.index(kind) for kind in kinds]


def _measure_block(job: PoolJob, number: int, rows: Sequence[int]) -> _Measured:
    blocks = range(number, number + 1)
    stage: StageCompute
    if isinstance(job.config, SideConfig):
        stage = side_stage(job.source, job.config, blocks, job.num_labels)
    else:
        stage = BlockStage.load(job.source, job.config, blocks, job.num_labels)
    trained = _bytes_of(stage.trained().values())
    forward_seconds: list[float] = []
    backward_seconds: list[float] = []
    spreads: list[float] = []
    for size in rows:
        examples = _middling(job.examples, size)
        times = [_time(stage, examples) for _ in range(_REPEATS + 1)][1:]  # the first one warms up
        for seconds, found in zip((forward_seconds, backward_seconds), zip(*times, strict=True), strict=True):
            seconds.append(statistics.median(found))
            spreads.append((max(found) - min(found)) / statistics.median(found))
    examples = _middling(job.examples, rows[-1])
    block = Block(
        name=str(number),
        parameter_bytes=_bytes_of(stage.weights()),
        gradient_bytes=trained,
        optimizer_bytes=_MOMENTS * trained,
        kept_bytes_per_row=_kept_bytes(stage, examples) // len(examples),
        working_bytes_per_row=_bytes_per_row(Width(*stage.part.working_widths), examples),
        forward_bytes_per_row=_bytes_per_row(stage.after.forward, examples),
        backward_bytes_per_row=_bytes_per_row(stage.after.backward, examples),
    )
    give_back_memory()
    return _Measured(block, forward_seconds, backward_seconds, statistics.median(spreads))


def _middling(examples: Sequence[Example], count: int) -> list[Example]:
    """Return so many examples, of about the median length."""
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    first = max(0, (len(ordered) - count) // 2)
    some = ordered[first : first + count]
    return [some[number % len(some)] for number in range(count)]


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return what tensors take, those that share their memory once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _bytes_per_row(width: Width | None, examples: Sequence[Example]) -> int:
    """Return the bytes of an fp32 message, in the mean over examples."""
    return 0 if width is None else int(4 * _numbers(width, examples) / len(examples))


def _numbers(width: Width, examples: Sequence[Example]) -> int:
    return sum(width.numbers(example) for example in examples)


def _inputs(stage: StageCompute, examples: Sequence[Example]) -> tuple[Tensor | None, Tensor | None]:
    """Return what another stage would have sent: forward, and back."""
    received = None if stage.part.is_first else torch.randn(_numbers(stage.before.forward, examples))
    back = None if stage.part.is_last else stage.after.backward
    return received, None if back is None else torch.randn(_numbers(back, examples))


def _time(stage: StageCompute, examples: Sequence[Example]) -> tuple[float, float]:
    received, gradient = _inputs(stage, examples)
    began = time.perf_counter()
    kept, _ = stage.forward(examples, received, 1, range(len(examples)))
    half = time.perf_counter()
    stage.backward(kept, gradient)
    return half - began, time.perf_counter() - half


def _kept_bytes(stage: StageCompute, examples: Sequence[Example]) -> int:
    """Return the bytes of what autograd keeps for the backward, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in stage.weights()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    received, _ = _inputs(stage, examples)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = stage.forward(examples, received, 1, range(len(examples)))
    del held
    return sum(kept.values())


def _measure_links(peers: Peers) -> dict[tuple[int, int], Link]:
    """Return the link of each pair; one pair after another, the others wait."""
    found: dict[tuple[int, int], Link] = {}
    for tag, (one, other) in enumerate(combinations(range(peers.count), 2)):
        if peers.peer in {one, other}:
            partner, leads = (other, True) if peers.peer == one else (one, False)
            latency = statistics.median(_ping(peers, partner, tag, 1, leads=leads) for _ in range(_PINGS)) / 2
            seconds = (
                statistics.median(_ping(peers, partner, tag, _PROBE_FLOATS, leads=leads) for _ in range(_REPEATS)) / 2
            )
            speed = 4 * _PROBE_FLOATS / max(seconds - latency, 1e-9)
            if leads:
                link = Link(bytes_per_second=speed, latency_seconds=latency)
                peers.notices.tell(f"link {one} {other}", link.model_dump_json())
        found[one, other] = Link(**json.loads(peers.notices.ask(f"link {one} {other}")))
    return found


def _ping(peers: Peers, partner: int, tag: int, size: int, *, leads: bool) -> float:
    """Return the seconds that a message there and back takes."""
    message = torch.zeros(size)
    began = time.perf_counter()
    steps = [peers.send, peers.receive] if leads else [peers.receive, peers.send]
    for step in steps:
        step(message, partner, tag).wait()
    return time.perf_counter() - began
