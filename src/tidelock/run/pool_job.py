"""What is trained in a pool: a run's configuration as every peer has it, its examples, and what a peer has cached.

May import everything below `run`, and `run`'s configuration and models.
"""

from __future__ import annotations

import json
import os
import platform
import socket
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import psutil
import torch

from tidelock.cache.folder import CacheFolder
from tidelock.cache.identity import CacheIdentity
from tidelock.model.ends import empty_model, read_config, tokenizer_sha256
from tidelock.model.sizes import sizes_of
from tidelock.peft.side import SideConfig
from tidelock.pool.example import Example
from tidelock.pool.full_part import FullConfig
from tidelock.pool.held_out import HeldOut
from tidelock.pool.job import PoolJob
from tidelock.pool.memory import MemoryLimit
from tidelock.pool.profiler import DeviceFacts, measure_pool
from tidelock.pool.recipe import Recipe
from tidelock.pool.redistribute import Kept
from tidelock.run.connect import num_outputs
from tidelock.run.connect_side import model_hash
from tidelock.run.examples import encode_for, read_run_examples, with_classes_counted
from tidelock.run.open_model import cache_config_of, load_tokenizer, method_config_of
from tidelock.units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidelock.cache.store import ActivationCache
    from tidelock.data.encode import TokenRow
    from tidelock.data.encode_pair import PairRow
    from tidelock.data.encode_sequence import SequenceRow
    from tidelock.model.checkpoint import Checkpoint
    from tidelock.peft.methods import MethodConfig
    from tidelock.plan.inputs import Profile
    from tidelock.pool.peers import Peers
    from tidelock.pool.recipe import Progress
    from tidelock.run.config import RunConfig

# How much of a limit is planned with: a profile does not count all (docs/pool.md, "How much quicker").
_PLANNED_SHARE = 0.85


@final
@dataclass(frozen=True, slots=True)
class PoolData:
    """A run's encoded examples.

    Attributes:
        examples: To learn from.
        held_out: To measure on; none where the run does not say any.
    """

    examples: Sequence[Example]
    held_out: Sequence[Example]


@final
@dataclass(frozen=True, slots=True)
class Holdings:
    """What a peer has of its own through all rounds.

    Attributes:
        cache: Folder of its cache.
        memory: What it may take.
    """

    cache: Path
    memory: MemoryLimit

    @classmethod
    def of(cls, config: RunConfig, cache: Path) -> Holdings:
        """Return a peer's, whose memory counts from now on."""
        return cls(cache, MemoryLimit(None if config.memory_limit is None else parse_bytes(config.memory_limit)))


def read_data(config: RunConfig, checkpoint: Checkpoint) -> tuple[RunConfig, PoolData]:
    """Return a run with its classes counted, and its examples; errors as those of the data."""
    examples, held_out = read_run_examples(config)
    config = with_classes_counted(config, [*examples, *held_out])
    model_config = read_config(checkpoint.folder)
    limit = sizes_of(model_config).max_positions
    num_labels, tokenizer = num_outputs(config.task, config.num_labels), load_tokenizer(checkpoint.folder)
    # It knows what its decoder is given to predict labels.
    decoder = empty_model(model_config) if model_config.is_encoder_decoder else None
    encoded = (
        [_example(row, decoder) for row in encode_for(config, num_labels, limit, tokenizer, some)]
        for some in (examples, held_out)
    )
    return config, PoolData(*encoded)


def _example(row: TokenRow | PairRow | SequenceRow, decoder: Any) -> Example:  # noqa: ANN401  (no type says so)
    if "label" in row:
        return Example(tuple(row["input_ids"]), row["label"])
    decoder_ids: list[int] = []
    if decoder is not None:
        (decoder_ids,) = decoder.prepare_decoder_input_ids_from_labels(torch.tensor([row["labels"]])).tolist()
    return Example(tuple(row["input_ids"]), tuple(row["labels"]), tuple(decoder_ids))


def shared_data(peers: Peers, data: PoolData | None) -> PoolData:
    """Return the examples that peer 0 gives, on every peer; the others give None.

    Raises:
        PeerError: A peer was lost.
    """
    given = (None, None) if data is None else (data.examples, data.held_out)
    return PoolData(*(_unpacked(peers.share(None if some is None else _packed(some))) for some in given))


def job_of(config: RunConfig, checkpoint: Checkpoint, data: PoolData, holdings: Holdings, begin: Progress) -> PoolJob:
    """Return what is trained, once this process is set up for it.

    Args:
        config: The run.
        checkpoint: The model's.
        data: All examples.
        holdings: This peer's.
        begin: From where.

    Raises:
        CacheError: The cache has another key.
        StorageError: The file system refused.
    """
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
    model, method = model_hash(str(checkpoint.fingerprint()), model_config), pool_method_of(config)
    every = config.eval_every or recipe.steps_per_epoch(len(data.examples))
    return PoolJob(
        model=model,
        source=checkpoint,
        config=method,
        begin=begin,
        examples=data.examples,
        recipe=recipe,
        save_every=config.save_every,
        kept=_kept_of(config, checkpoint, holdings.cache, model) if isinstance(method, SideConfig) else None,
        held_out=HeldOut(data.held_out, config.batch_size, every),
        memory=holdings.memory,
        num_labels=num_outputs(config.task, config.num_labels),
    )


def pool_method_of(config: RunConfig) -> MethodConfig | FullConfig:
    """Return what a run in a pool trains."""
    return FullConfig() if config.method == "full" else method_config_of(config)


def _kept_of(config: RunConfig, checkpoint: Checkpoint, cache: Path, model: str) -> Kept:
    """Return what this peer has of the outputs of a model's blocks."""
    identity = CacheIdentity(
        model=model,
        tokenizer=tokenizer_sha256(checkpoint.folder),
        dtype="fp32",
        taps=(0,),
        tap_width=None,
        codec=config.cache_codec,
    )

    def open_cache(taps: tuple[int, ...]) -> ActivationCache:
        return cache_config_of(config, cache).open(replace(identity, taps=taps))

    num_blocks = sizes_of(read_config(checkpoint.folder)).num_blocks
    return Kept(open_cache, _kept_blocks(cache, identity), num_blocks)


def measured_profile(peers: Peers, job: PoolJob, config: RunConfig) -> Profile:
    """Return the pool's profile, the same on every peer; errors as of `measure_pool`."""
    given = psutil.virtual_memory().available
    if config.memory_limit is not None:
        given = min(given, int(_PLANNED_SHARE * parse_bytes(config.memory_limit)))
    rows = sorted({1, max(1, job.recipe.batch_size // 4), job.recipe.batch_size})
    threads = torch.get_num_threads()
    hardware = [platform.machine(), platform.processor(), os.cpu_count(), threads]
    libraries = [f"{name} {version(name)}" for name in ("tidelock", "torch", "transformers")]
    device = DeviceFacts(
        name=f"{socket.gethostname()} ({threads} thread{'s' if threads > 1 else ''})",
        memory_bytes=given,
        key=json.dumps([job.model, "fp32", hardware, libraries]),
    )
    return measure_pool(peers, job, rows, device)


def _kept_blocks(cache: Path, identity: CacheIdentity) -> list[range]:
    """Return of which consecutive blocks a cache has something, whatever the taps of the identity."""
    found = []
    for _, other in CacheFolder(cache).groups():
        if other is not None and replace(other, taps=identity.taps) == identity:
            blocks = range(other.taps[0], other.taps[-1] + 1)
            if other.taps == tuple(blocks):
                found.append(blocks)
    return found


def _packed(examples: Sequence[Example]) -> torch.Tensor:
    """Return examples as one int64 vector: the bytes of their JSON, which may end with blanks."""
    text = json.dumps([(each.input_ids, each.labels, each.decoder_ids) for each in examples]).encode()
    return torch.frombuffer(bytearray(text.ljust(-(-len(text) // 8) * 8)), dtype=torch.int64)


def _unpacked(numbers: torch.Tensor) -> list[Example]:
    rows = json.loads(numbers.numpy().tobytes())
    return [
        Example(tuple(ids), tuple(labels) if isinstance(labels, list) else labels, tuple(decoder_ids))
        for ids, labels, decoder_ids in rows
    ]
