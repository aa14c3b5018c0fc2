"""The full configuration of a run: every knob declared once, with its default, its rule and its help line.

The command line makes its options from these fields, and `run.toml` is all of them written down. Light on purpose: the
command line imports it to print help. May import `schedule`, `units`, errors and small libraries.
"""

from __future__ import annotations

import math
import sys
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, final

import tomli_w

from tidelock.errors import CheckpointError, ConfigError
from tidelock.schedule.schedule import NORMS, SCHEDULES, Schedule
from tidelock.units import parse_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# ruff: noqa: RUF009, FBT003  (_knob is dataclasses.field with our metadata)

BACKBONES = ("local", "cloud")
TASKS = ("causal-lm", "text-to-text", "classification", "regression")
METHODS = ("lora", "adapter", "core", "side", "full")
PLACES = ("mlp", "attn-out")
CORE_FRAMES = ("seeded", "svd")
CODECS = ("fp32", "bf16", "int8", "int4")
CACHE_CODECS = ("fp32", "bf16", "int8")
SIDE_STARTS = ("fisher", "magnitude", "random")
UPSAMPLES = ("zero", "random")
SIDE_OUTPUTS = ("add", "alone")
LR_SCHEDULES = ("linear", "cosine", "constant")


_AT_SITES = ("lora", "adapter", "core")
_SCHEDULED = (
    *("schedule", "budget", "threshold", "warm_up", "warm_up_active", "period", "exchange", "longest_sleep", "norm"),
    *("per_learning_rate", "killed", "moments"),
)
_OF_PASSES = ("gradient_codec", "stochastic_rounding", "micro_batches", "no_share_prefix")
_OF_SIDE = (
    *("reduction", "side_init", "upsample", "side_output", "tap_width", "fisher_examples"),
    *("cache", "no_cache", "cache_codec", "cache_limit", "cache_key"),
)
# The knobs that not every method reads.
_METHODS_OF = {
    **dict.fromkeys(("rank", "alpha", "rslora"), ("lora",)),
    **dict.fromkeys(("bottleneck", "place", "activation"), ("adapter",)),
    **dict.fromkeys(("core_rank", "core_scale", "core_frames"), ("core",)),
    **dict.fromkeys((*_OF_PASSES, *_SCHEDULED), _AT_SITES),
    **dict.fromkeys(_OF_SIDE, ("side",)),
    "target": ("lora", "core"),
    "dropout": ("lora", "adapter", "side"),
    "layer": (*_AT_SITES, "side"),
}


@final
@dataclass(frozen=True, slots=True)
class Rule:
    """What a knob's value must be, in words and as a test."""

    text: str
    holds: Callable[[Any], bool]


_AT_LEAST_0 = Rule("0 or more, and finite", lambda value: 0 <= value < math.inf)
_AT_LEAST_1 = Rule("1 or more", lambda value: value >= 1)
_AT_LEAST_2 = Rule("2 or more", lambda value: value >= 2)
_POSITIVE = Rule("more than 0, and finite", lambda value: 0 < value < math.inf)
_SEED = Rule("from 0 to 4294967295", lambda value: 0 <= value < 1 << 32)  # what NumPy takes
_FRACTION = Rule("at least 0 and below 1", lambda value: 0 <= value < 1)


def _one_of(choices: tuple[str, ...]) -> Rule:
    return Rule(f"one of {', '.join(choices)}", lambda value: value in choices)


def _some_of(choices: tuple[str, ...]) -> Rule:
    return Rule(f"some of {', '.join(choices)}", lambda values: bool(values) and set(values) <= set(choices))


def _knob(default: Any, text: str, rule: Rule | None = None) -> Any:  # noqa: ANN401  (as dataclasses.field)
    return field(default=default, metadata={"help": text, "rule": rule})


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that decides a run's result, and where it runs.

    Raises:
        ConfigError: A value breaks its rule, or two contradict each other.
    """

    data: str = _knob(MISSING, "Examples to learn from: a .jsonl, .csv or .parquet file, or a hub data set.")
    out: str = _knob(MISSING, "Run folder to write.")
    split: str | None = _knob(None, "Only rows whose 'split' is this (of a hub data set: its split).")
    eval_data: str | None = _knob(None, "Examples to measure the loss on, not learned from.")
    eval_split: str | None = _knob(None, "Likewise: only rows of this split (of --eval-data, or else of DATA).")
    task: str = _knob("causal-lm", "What is learned: to go on with a text, an answer, or a label.", _one_of(TASKS))
    num_labels: int | None = _knob(None, "Classes there are; by default as the data has.", _AT_LEAST_2)
    model: str | None = _knob(None, "Model folder or hub name; left out, a cloud's own model is used.")
    backbone: str = _knob("local", "Where the frozen blocks run: local or cloud.", _one_of(BACKBONES))
    cloud: str | None = _knob(None, "The cloud's address, grpcs://HOST:PORT.")
    token_file: str | None = _knob(None, "File with the bearer token for the cloud.")
    ca: str | None = _knob(None, "PEM file with the authority, or the cloud's certificate, to trust.")
    client_cert: str | None = _knob(None, "PEM file with this device's certificate, if the cloud wants one.")
    client_key: str | None = _knob(None, "PEM file with its key.")
    insecure: bool = _knob(False, "Allow grpc:// without TLS to another machine (inside a tunnel).")
    codec: str = _knob("fp32", "Numbers on the wire: fp32, or fewer bytes with bf16, int8, int4.", _one_of(CODECS))
    gradient_codec: str | None = _knob(None, "Likewise, for gradients; as --codec by default.", _one_of(CODECS))
    stochastic_rounding: bool = _knob(False, "Round int8 or int4 gradients at random, right on average.")
    in_flight: int | None = _knob(
        None, "Micro-batches (side: examples) on their way at once; by default as the link needs, side 2.", _AT_LEAST_1
    )
    micro_batches: int | None = _knob(
        None, "Micro-batches that a batch is split into; 4, or fewer of 64 tokens or more, by default.", _AT_LEAST_1
    )
    patience: float = _knob(120.0, "Seconds to wait for a cloud that went away.", _AT_LEAST_0)
    method: str = _knob(
        "lora",
        "What is trained: lora, adapter (serial), core (few bytes), side (no backward pass); in a pool, full.",
        _one_of(METHODS),
    )
    rank: int = _knob(8, "LoRA rank r.", _AT_LEAST_1)
    alpha: float = _knob(16.0, "LoRA alpha; the branch is scaled by alpha / r.", _POSITIVE)
    rslora: bool = _knob(False, "Scale by alpha / sqrt(r) instead.")
    target: list[str] | None = _knob(None, "LoRA, core: projections to adapt (repeat); all of q, k and v by default.")
    bottleneck: int = _knob(128, "Adapter: width of its bottleneck.", _AT_LEAST_1)
    place: list[str] | None = _knob(
        None, f"Adapter: after {' or '.join(PLACES)} (repeat for both); mlp by default.", _some_of(PLACES)
    )
    activation: str = _knob("tanh", "Adapter: its non-linearity, by transformers' name.")
    core_rank: int = _knob(32, "Core: side r of the trained matrices.", _AT_LEAST_1)
    core_scale: float = _knob(16.0, "Core: the factor of what they add.", _POSITIVE)
    core_frames: str = _knob(
        "seeded", "Core: around them are random directions (seeded), or the weights' own (svd).", _one_of(CORE_FRAMES)
    )
    dropout: float = _knob(0.0, "LoRA, adapter: dropout on what they read. Side: inside of its blocks.", _FRACTION)
    layer: list[int] | None = _knob(None, "Blocks to adapt, or to read by side (repeat); all by default.")
    reduction: int = _knob(8, "Side: every width of the model is divided by this.", _AT_LEAST_1)
    side_init: str | None = _knob(
        None,
        f"Side: where its weights come from: {', '.join(SIDE_STARTS)}; magnitude by default, random with a cloud.",
        _one_of(SIDE_STARTS),
    )
    fisher_examples: int = _knob(32, "Side: examples that Fisher scores are taken from.", _AT_LEAST_1)
    upsample: str | None = _knob(
        None, "Side: its output starts at zero or random; zero by default, unless it stands alone.", _one_of(UPSAMPLES)
    )
    side_output: str = _knob(
        "add", "Side: what it gives is added to the model's last state, or stands alone.", _one_of(SIDE_OUTPUTS)
    )
    tap_width: int | None = _knob(
        None, "Side: numbers a token to which a block's output is projected; all of them by default.", _AT_LEAST_1
    )
    cache: str | None = _knob(None, "Side: folder of the activation cache; in the run folder by default.")
    no_cache: bool = _knob(False, "Side: keep no outputs of blocks; each epoch computes them.")
    cache_codec: str = _knob("fp32", "Side: how they are kept; fewer bytes with bf16, int8.", _one_of(CACHE_CODECS))
    cache_limit: str | None = _knob(None, "Side: the most that the cache may take, such as 20GB.")
    cache_key: str | None = _knob(None, "Side: file with the cache's secret; the user's own by default.")
    memory_limit: str | None = _knob(None, "What this device can give, such as 2GB; by default what is free.")
    adapter: str | None = _knob(None, "Continue the adapter in this folder; it is kept as it was configured.")
    # The rules of these are Schedule's own.
    schedule: str = _knob("full", f"Which modules are active when: {', '.join(SCHEDULES)}.")
    budget: int | None = _knob(None, "Modules active at once after the warm-up; half of them by default.")
    threshold: float | None = _knob(None, "For early-kill, instead: kill modules below this share of the mean score.")
    warm_up: int = _knob(1, "Periods before the first module is killed.")
    warm_up_active: int | None = _knob(None, "Modules active at once in them, in turns of a step; all by default.")
    period: int | None = _knob(None, "Steps in a period; an epoch by default.")
    exchange: float = _knob(0.25, "For kill-revive: share of the budget exchanged after a period.")
    longest_sleep: int | None = _knob(None, "For kill-revive: periods until a module returns whatever its score.")
    norm: str = _knob("saliency", f"A module's score: {', '.join(NORMS)}.")
    per_learning_rate: bool = _knob(False, "Divide a score by the mean learning rate of its period.")
    killed: str = _knob("bypass", "A killed module is left out (bypass), or answers unchanged (frozen).")
    moments: str = _knob("reset", "Adam's moments of a revived module begin at zero (reset), or go on (keep).")
    epochs: float = _knob(3.0, "Passes over the data.", _POSITIVE)
    max_steps: int | None = _knob(None, "Stop after so many optimizer steps instead.", _AT_LEAST_1)
    batch_size: int = _knob(8, "Examples in a batch.", _AT_LEAST_1)
    length_grouped: bool = _knob(False, "Put examples of like length in a batch.")
    no_share_prefix: bool = _knob(False, "Compute for each example what all of a micro-batch begin with, not once.")
    accumulate: int = _knob(1, "Batches in an optimizer step.", _AT_LEAST_1)
    learning_rate: float = _knob(3e-4, "Peak learning rate of AdamW.", _POSITIVE)
    lr_schedule: str = _knob("linear", "How it falls: linear, cosine or constant.", _one_of(LR_SCHEDULES))
    warmup_steps: int = _knob(0, "Steps over which it rises first.", _AT_LEAST_0)
    weight_decay: float = _knob(0.0, "Weight decay of AdamW.", _AT_LEAST_0)
    clip: float = _knob(1.0, "Largest norm of all gradients together; 0 does not clip.", _AT_LEAST_0)
    max_length: int | None = _knob(
        None, "Most tokens an example may have; the model's own limit by default.", _AT_LEAST_1
    )
    truncate: bool = _knob(False, "Cut longer examples instead of refusing them.")
    seed: int = _knob(0, "Seed of every random choice.", _SEED)
    log_every: int = _knob(1, "Steps between lines of metrics.jsonl.", _AT_LEAST_1)
    save_every: int = _knob(50, "Steps between checkpoints.", _AT_LEAST_1)
    eval_every: int | None = _knob(None, "Steps between evaluations; once an epoch by default.", _AT_LEAST_1)
    report_to: list[str] | None = _knob(
        None, "Trackers to send metrics to as well (repeat): tensorboard, wandb, mlflow and others of Trainer's."
    )
    keep: int = _knob(2, "Checkpoints to keep.", _AT_LEAST_1)
    threads: int | None = _knob(None, "CPU threads of this process; PyTorch's choice by default.", _AT_LEAST_1)

    def __post_init__(self) -> None:
        for knob in fields(self):
            rule: Rule | None = knob.metadata["rule"]
            value = getattr(self, knob.name)
            if rule is not None and value is not None and not rule.holds(value):
                msg = f"--{knob.name.replace('_', '-')}: expected {rule.text}, got {value!r}. Change it."
                raise ConfigError(msg)
        if (self.backbone == "cloud") != (self.cloud is not None):
            got = "no --cloud" if self.backbone == "cloud" else f"--cloud {self.cloud} with --backbone {self.backbone}"
            msg = f"Backbone: expected --backbone cloud together with --cloud grpcs://HOST:PORT, got {got}. Give both."
            raise ConfigError(msg)
        gradient_codec = self.gradient_codec or self.codec
        if self.stochastic_rounding and gradient_codec not in {"int8", "int4"}:
            msg = (
                f"--stochastic-rounding: expected gradients in int8 or int4, got {gradient_codec}, which is rounded to "
                "the nearest. Choose another --gradient-codec, or leave it out."
            )
            raise ConfigError(msg)
        if self.backbone == "local" and self.model is None:
            msg = "Backbone: expected --model with --backbone local, got none. Name a model folder or a hub model."
            raise ConfigError(msg)
        self._refuse_knobs_of_others()
        if self.no_cache and any((self.cache, self.cache_limit, self.cache_key)):
            msg = "--no-cache: expected no other option of a cache, got one. Leave one of them out."
            raise ConfigError(msg)
        for size in (self.cache_limit, self.memory_limit):
            if size is not None:
                parse_bytes(size)
        self.to_schedule()

    def _refuse_knobs_of_others(self) -> None:
        """Refuse a knob that the method or the task would not read."""
        if self.num_labels is not None and self.task != "classification":
            msg = f"--num-labels: expected it with --task classification only, got --task {self.task}. Leave it out."
            raise ConfigError(msg)
        for knob in fields(self):
            methods = _METHODS_OF.get(knob.name, METHODS)
            if self.method not in methods and getattr(self, knob.name) != knob.default:
                msg = (
                    f"--{knob.name.replace('_', '-')}: expected it with --method {' or '.join(methods)} only, got "
                    f"--method {self.method}. Leave it out."
                )
                raise ConfigError(msg)

    def to_schedule(self) -> Schedule:
        """Return which modules are active when."""
        return Schedule(
            self.schedule,
            budget=self.budget,
            threshold=self.threshold,
            warm_up=self.warm_up,
            warm_up_active=self.warm_up_active,
            period=self.period,
            exchange=self.exchange,
            longest_sleep=self.longest_sleep,
            norm=self.norm,
            per_learning_rate=self.per_learning_rate,
            killed=self.killed,
            moments=self.moments,
            seed=self.seed,
        )

    def elsewhere(self, cloud: str | None, token_file: Path | None, ca: Path | None) -> RunConfig:
        """Return this configuration with what is given in place of its own.

        Raises:
            ConfigError: They contradict the rest.
        """
        given = {
            "cloud": cloud,
            "backbone": None if cloud is None else "cloud",
            "token_file": None if token_file is None else str(token_file),
            "ca": None if ca is None else str(ca),
        }
        return replace(self, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]

    def to_toml(self) -> str:
        """Return every knob that has a value, as TOML."""
        return tomli_w.dumps({name: value for name, value in asdict(self).items() if value is not None})

    @classmethod
    def from_toml(cls, text: str, where: Path) -> RunConfig:
        """Return the configuration that `to_toml` wrote.

        Raises:
            CheckpointError: The text is no such configuration.
        """
        try:
            return cls(**tomllib.loads(text))
        except (tomllib.TOMLDecodeError, TypeError, ConfigError) as error:
            msg = f"Run configuration: expected what tidelock wrote, got: {error} ({where}). Restore the file."
            raise CheckpointError(msg) from error
