"""A run in a pool: peer 0 reads the data and says what is done; the others join it.

May import everything below `run`.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, cast, final

import psutil
import torch

from tidelock.cache.identity import CacheIdentity
from tidelock.data.encode import Encoder, encode_all
from tidelock.data.source import read_examples
from tidelock.errors import ConfigError, ModelMismatch
from tidelock.model.checkpoint import Checkpoint
from tidelock.model.ends import empty_model, read_config, tokenizer_sha256
from tidelock.model.geometry import geometry_of
from tidelock.pool.layout import PoolLayout, Stage
from tidelock.pool.peers import Peers
from tidelock.pool.pipeline import Example
from tidelock.pool.profiler import DeviceFacts, measure_pool
from tidelock.pool.recipe import Recipe
from tidelock.pool.train import PoolJob, train_in_pool
from tidelock.run.config import RunConfig
from tidelock.run.connect_side import model_hash
from tidelock.run.examples import longest_example
from tidelock.run.folder import RunFolder
from tidelock.run.open_model import cache_config_of, load_tokenizer, side_config_of
from tidelock.run.pool_checkpoint import load_progress, save_progress, shared_begin
from tidelock.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch._C._distributed_c10d import Store

    from tidelock.cache.store import ActivationCache
    from tidelock.plan.inputs import Profile
    from tidelock.pool.recipe import Progress
    from tidelock.run.trainer import Observer

_CONFIG, _LAYOUT, _MODEL, _MEASURES = "configuration", "layout", "model's fingerprint", "word whether to measure"


@final
@dataclass(frozen=True, slots=True)
class PoolResult:
    """What a run in a pool came to, as a peer sees it.

    Attributes:
        adapter: Folder of the trained side network; None on other peers than 0.
        steps: Optimizer steps.
        loss: Of the last batch, before its step.
        seconds: How long it took.
    """

    adapter: Path | None
    steps: int
    loss: float
    seconds: float


@final
@dataclass(frozen=True, slots=True)
class Seat:
    """A peer's place in a pool.

    Attributes:
        store: Where the peers meet.
        peer: This one's number.
        count: How many there are.
        host: Address on which this one listens for the others.
        timeout_s: Seconds after which a silent peer counts as lost.
    """

    store: Store
    peer: int
    count: int
    host: str
    timeout_s: float

    def open(self) -> Peers:
        """Return all peers, once they are there; errors as `Peers`."""
        return Peers(self.store, self.peer, self.count, host=self.host, timeout_s=self.timeout_s)


@final
class _Notes:
    """Writes metrics on peer 0, and tells the observer."""

    def __init__(self, folder: RunFolder | None, observer: Observer, job: PoolJob, keep: int) -> None:
        self.loss = float("nan")
        self.steps = job.begin.steps
        self.folder = folder
        self._observer = observer
        self._per_epoch = _steps_per_epoch(job)
        self._keep = keep
        self._began = time.monotonic()

    def step(self, step: int, loss: float) -> None:
        """Take a step."""
        now = time.monotonic()
        self.steps, self.loss = step, loss
        self._observer.step(step, loss)
        if self.folder is not None:
            row = {"step": step, "loss": loss, "epoch": step / self._per_epoch, "step_seconds": now - self._began}
            self.folder.append_metrics(row)
        self._began = now

    def save(self, progress: Progress) -> None:
        """Write a checkpoint, which is whole or not there."""
        if self.folder is not None:
            save_progress(progress, self.folder, self._keep)

    def redistributed(self, sent_bytes: int) -> None:
        """Say that the pipeline is done."""
        self._observer.say(
            f"The first epoch is done; this peer has sent {format_bytes(sent_bytes)} of outputs to those that learn "
            "from them. The frozen blocks are let go."
        )
        self._began = time.monotonic()


def lead(
    config: RunConfig,
    seat: Seat,
    layout_of: Callable[[int, Profile | None], PoolLayout | None],
    observer: Observer,
    on_ready: Callable[[], None],
) -> PoolResult:
    """Train in a pool, as peer 0.

    Args:
        config: The run; of method `side`, with its data.
        seat: Of peer 0.
        layout_of: Given the number of blocks and the pool's profile, returns who computes what. It is asked without a
            profile first; when it then returns None, the pool is measured.
        observer: Told how it gets on.
        on_ready: Called when nothing of this peer's own can be wrong any more, before it waits for the others.

    Raises:
        TidelockError: Any of its kinds.
    """
    _check(config)
    folder = RunFolder.new(Path(config.out))
    checkpoint = Checkpoint.open(str(config.model))
    checkpoint.materialise()
    num_blocks = geometry_of(empty_model(read_config(checkpoint.folder))).num_blocks
    layout = layout_of(num_blocks, None)
    if layout is not None:
        _require_peers(layout, seat)
    examples = _examples(config, checkpoint)
    folder.write_config(config)
    on_ready()
    peers = seat.open()
    _tell(peers, config, checkpoint, examples, measures=layout is None)
    job = _job(config, checkpoint, examples, folder.cache, shared_begin(peers, config, checkpoint, None))
    observer.say(f"Data: {len(examples)} examples to learn from.")
    if layout is None:
        observer.say("Measuring the devices and the links between them.")
        profile = _measure(peers, job)
        folder.write_profile(profile.model_dump_json(indent=2))
        layout = cast("PoolLayout", layout_of(num_blocks, profile))
    folder.write_layout(json.dumps(_to_values(layout)))
    peers.tell(_LAYOUT, folder.read_layout())
    return _train(job, peers, layout, _Notes(folder, observer, job, config.keep), observer)


def resume(path: Path, seat: Seat, observer: Observer, on_ready: Callable[[], None]) -> PoolResult:
    """Go on with a run in a pool that was broken off, as peer 0, with the same peers.

    Args:
        path: The run's folder.
        seat: As for `lead`.
        observer: Told how it gets on.
        on_ready: As for `lead`.

    Raises:
        CheckpointError: There is no run in a pool in the folder, or its checkpoint is damaged.
        TidelockError: Any of its kinds.
    """
    folder = RunFolder.open(path)
    config = folder.config()
    layout = _from_values(json.loads(folder.read_layout()))
    _require_peers(layout, seat)
    checkpoint = Checkpoint.open(str(config.model))
    checkpoint.materialise()
    examples = _examples(config, checkpoint)
    saved = folder.latest_checkpoint()
    found = None if saved is None else load_progress(saved)
    on_ready()
    peers = seat.open()
    _tell(peers, config, checkpoint, examples, measures=False)
    job = _job(config, checkpoint, examples, folder.cache, shared_begin(peers, config, checkpoint, found))
    folder.keep_until(job.begin.steps)
    observer.say(f"Going on from {saved or 'the beginning: there is no whole checkpoint yet'}.")
    peers.tell(_LAYOUT, folder.read_layout())
    return _train(job, peers, layout, _Notes(folder, observer, job, config.keep), observer)


def follow(own: RunConfig, seat: Seat, observer: Observer) -> PoolResult:
    """Train in a pool, as another peer than 0.

    Args:
        own: What is this device's own matter: `model`, `out`, `threads`, and where the cache's key is.
        seat: This peer's.
        observer: Told how it gets on.

    Raises:
        ModelMismatch: This peer has another model than peer 0.
        TidelockError: Any of its kinds.
    """
    checkpoint = Checkpoint.open(str(own.model))
    checkpoint.materialise()
    peers = seat.open()
    config = RunConfig.from_toml(peers.ask(_CONFIG), Path(_CONFIG))
    expected, found = peers.ask(_MODEL), str(checkpoint.fingerprint())
    if found != expected:
        msg = (
            f"Pool: expected the model with fingerprint {expected[:12]} that peer 0 has, got {found[:12]} "
            f"({own.model}). Give this peer the same model."
        )
        raise ModelMismatch(msg)
    config = replace(config, threads=own.threads, cache_key=own.cache_key, model=own.model)
    examples = _unpacked(peers.share(None))
    begin = shared_begin(peers, config, checkpoint, None)
    job = _job(config, checkpoint, examples, Path(own.out) / "cache", begin)
    if peers.ask(_MEASURES) == str(True):
        _measure(peers, job)
    layout = _from_values(json.loads(peers.ask(_LAYOUT)))
    return _train(job, peers, layout, _Notes(None, observer, job, config.keep), observer)


def _require_peers(layout: PoolLayout, seat: Seat) -> None:
    if layout.num_peers != seat.count:
        msg = f"Pool: expected {layout.num_peers} peers, as the stages have, got {seat.count}. Start as many."
        raise ConfigError(msg)


def _examples(config: RunConfig, checkpoint: Checkpoint) -> list[Example]:
    """Return a run's encoded examples."""
    limit = geometry_of(empty_model(read_config(checkpoint.folder))).max_positions
    max_length = longest_example(config, limit)
    encoder = Encoder(load_tokenizer(checkpoint.folder), max_length=max_length, truncate=config.truncate)
    rows = encode_all(encoder, read_examples(config.data, split=config.split))
    return [Example(tuple(row["input_ids"]), tuple(row["labels"])) for row in rows]


def _tell(
    peers: Peers, config: RunConfig, checkpoint: Checkpoint, examples: Sequence[Example], *, measures: bool
) -> None:
    """Tell the other peers what is done."""
    peers.tell(_CONFIG, config.to_toml())
    peers.tell(_MODEL, str(checkpoint.fingerprint()))
    peers.tell(_MEASURES, str(measures))
    peers.share(_packed(examples))


def _job(
    config: RunConfig, checkpoint: Checkpoint, examples: Sequence[Example], cache: Path, begin: Progress
) -> PoolJob:
    """Return what is trained, once this process is set up for it."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model_config = read_config(checkpoint.folder)
    recipe = Recipe(
        epochs=int(config.epochs),
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_schedule=config.lr_schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        clip=config.clip,
        seed=config.seed,
    )
    side_config = side_config_of(config)
    identity = CacheIdentity(
        model=model_hash(str(checkpoint.fingerprint()), model_config),
        tokenizer=tokenizer_sha256(checkpoint.folder),
        dtype="fp32",
        taps=(0,),
        tap_width=None,
        codec=config.cache_codec,
    )

    def open_cache(taps: tuple[int, ...]) -> ActivationCache:
        return cache_config_of(config, cache).open(replace(identity, taps=taps))

    return PoolJob(identity.model, checkpoint, side_config, begin, examples, recipe, config.save_every, open_cache)


def _train(job: PoolJob, peers: Peers, layout: PoolLayout, notes: _Notes, observer: Observer) -> PoolResult:
    began = time.monotonic()
    observer.say(f"Pool: peer {peers.peer} of {peers.count}; {_described(layout)}.")
    observer.start(job.recipe.epochs * _steps_per_epoch(job), job.begin.steps)
    model = train_in_pool(peers, layout, job, notes)
    observer.finish()
    adapter = None if notes.folder is None else notes.folder.adapter
    try:
        if notes.folder is not None and adapter is not None:
            model.save_adapter(adapter, notes.folder.config().model)
    finally:
        model.close()
    return PoolResult(adapter, notes.steps, notes.loss, time.monotonic() - began)


def _measure(peers: Peers, job: PoolJob) -> Profile:
    """Return the pool's profile."""
    rows = sorted({1, max(1, job.recipe.batch_size // 4), job.recipe.batch_size})
    threads = torch.get_num_threads()
    hardware = [platform.machine(), platform.processor(), os.cpu_count(), threads]
    libraries = [f"{name} {version(name)}" for name in ("tidelock", "torch", "transformers")]
    device = DeviceFacts(
        name=f"{socket.gethostname()} ({threads} thread{'s' if threads > 1 else ''})",
        memory_bytes=psutil.virtual_memory().available,
        key=json.dumps([job.model, "fp32", hardware, libraries]),
    )
    return measure_pool(peers, job, rows, device)


def _steps_per_epoch(job: PoolJob) -> int:
    return job.recipe.steps_per_epoch(len(job.examples))


def _check(config: RunConfig) -> None:
    """Refuse what a pool does not do."""
    rules = (
        ("--method side", config.method == "side", f"--method {config.method}"),
        ("--task causal-lm", config.task == "causal-lm", f"--task {config.task}"),
        ("whole epochs", config.epochs == int(config.epochs) >= 1, f"--epochs {config.epochs}"),
        ("--side-init magnitude or random", config.side_init != "fisher", "--side-init fisher"),
    )
    for expected, holds, got in rules:
        if not holds:
            msg = f"Training in a pool: expected {expected}, got {got}. Change it, or train on one device."
            raise ConfigError(msg)


def _described(layout: PoolLayout) -> str:
    stages = "; ".join(
        f"blocks {stage.blocks.start} to {stage.blocks.stop - 1} on peers {', '.join(map(str, stage.peers))}"
        for stage in layout.stages
    )
    return stages + (f"; without blocks: {', '.join(map(str, layout.idle))}" if layout.idle else "")


def _to_values(layout: PoolLayout) -> dict[str, object]:
    stages = [{**asdict(stage), "blocks": [stage.blocks.start, stage.blocks.stop]} for stage in layout.stages]
    return {"stages": stages, "micro_batches": layout.micro_batches, "idle": layout.idle}


def _from_values(values: dict[str, list[dict[str, list[int]]]]) -> PoolLayout:
    stages = tuple(
        Stage(range(*stage["blocks"]), tuple(stage["peers"]), tuple(stage["shares"]), int(stage["in_flight"]))  # type: ignore[call-overload]
        for stage in values["stages"]
    )
    return PoolLayout(stages, int(values["micro_batches"]), tuple(values["idle"]))  # type: ignore[call-overload, arg-type]


def _packed(examples: Sequence[Example]) -> torch.Tensor:
    """Return examples as one vector: how many there are, their lengths, their ids, their labels."""
    lengths = [len(example.input_ids) for example in examples]
    ids = [token for example in examples for token in example.input_ids]
    labels = [label for example in examples for label in example.labels]
    return torch.tensor([len(examples), *lengths, *ids, *labels])


def _unpacked(numbers: torch.Tensor) -> list[Example]:
    values = numbers.tolist()
    count = values[0]
    lengths, tokens = values[1 : 1 + count], values[1 + count :]
    half, found, first = len(tokens) // 2, [], 0
    for length in lengths:
        end = first + length
        found.append(Example(tuple(tokens[first:end]), tuple(tokens[half + first : half + end])))
        first = end
    return found
