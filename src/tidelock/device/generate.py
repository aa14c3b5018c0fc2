"""Generates text over the cut: the blocks keep keys and values, the device chooses every token.

May import `backbone`, `model` and libraries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, final

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from tidelock.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import GenerationConfig

    from tidelock.backbone.protocol import Generation
    from tidelock.device.causal_lm import DeviceCausalLM
    from tidelock.model.rows import Rows


@final
@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How tokens are chosen and when to stop.

    Attributes:
        max_new_tokens: Most tokens to add to a row.
        temperature: 0 takes the likeliest token each time; larger values flatten the choice.
        top_p: Draw only among the likeliest tokens that together have this probability.
        stop_ids: A row that gives one of these is finished; None takes the model's own end-of-text ids.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    stop_ids: frozenset[int] | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            msg = (
                "Generation: expected max_new_tokens of at least 1, a temperature of at least 0 and top_p in (0, 1], "
                f"got {self.max_new_tokens}, {self.temperature} and {self.top_p}. Change the one that is out of range."
            )
            raise ConfigError(msg)


class TokenEnds(Protocol):
    """A model's embedding and head."""

    def embed(self, ids: Tensor) -> Tensor:
        """Return word embeddings, shape (*ids.shape, E)."""
        ...

    def logits(self, final_MD: Tensor) -> Tensor:
        """Return logits, shape (M, V)."""
        ...


@torch.no_grad()
def generate(model: DeviceCausalLM, ids_BT: Tensor, rows: Rows, settings: GenerationSettings) -> Iterator[Tensor]:
    """Yield one token id for each row, int64 of shape (B,), until all rows are finished.

    A finished row repeats its stop id.

    Raises:
        ConfigError: The rows are not padded at the left, or would grow beyond what the model was made for.
    """
    ends = [start + length for start, length in zip(rows.starts, rows.lengths, strict=True)]
    if any(end != rows.width for end in ends):
        msg = "Generation: expected prompts padded at the left, got padding at the right. Pad at the left."
        raise ConfigError(msg)
    limit = model.ends.geometry.max_positions
    if limit is not None and rows.width + settings.max_new_tokens > limit:
        msg = (
            f"Generation: expected prompt and new tokens to fit the model's {limit} positions, got {rows.width} and "
            f"{settings.max_new_tokens}. Shorten the prompt or ask for fewer tokens."
        )
        raise ConfigError(msg)
    last_N = torch.tensor(rows.lengths).cumsum(0) - 1
    run = model.open_generation(ids_BT, rows, last_N)
    yield from choose_tokens(run, model.ends, stop_ids(model.generation_config, settings), model.device, settings)


@torch.no_grad()
def choose_tokens(
    run: Generation,
    ends: TokenEnds,
    stop_ids: frozenset[int],
    device: torch.device,
    settings: GenerationSettings,
) -> Iterator[Tensor]:
    """Yield one token id for each row of a growing batch, until all rows are finished; then close it.

    Args:
        run: The batch, with a first final state in each row.
        ends: Embedding and head.
        stop_ids: A row that gives one of these is finished, and repeats it.
        device: Where the ends are.
        settings: How tokens are chosen, and how many at most.
    """
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    choose = _Chooser(settings)
    try:
        final_BD = run.final_BD
        finished_B = torch.zeros(len(final_BD), dtype=torch.bool, device=device)
        token_B = torch.zeros(len(final_BD), dtype=torch.long, device=device)
        for step in range(settings.max_new_tokens):
            chosen_B = choose(ends.logits(final_BD.to(device, torch.float32)))
            token_B = torch.where(finished_B, token_B, chosen_B)
            yield token_B
            finished_B = finished_B | torch.isin(token_B, stops)
            if bool(finished_B.all()) or step == settings.max_new_tokens - 1:
                return
            final_BD = run.extend(ends.embed(token_B))
    finally:
        run.close()


def stop_ids(defaults: GenerationConfig, settings: GenerationSettings) -> frozenset[int]:
    """Return the ids that end a row: the settings', or the model's own."""
    if settings.stop_ids is not None:
        return settings.stop_ids
    ids = defaults.eos_token_id
    return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])


@final
class _Chooser:
    """Chooses a token for each row from its logits."""

    def __init__(self, settings: GenerationSettings) -> None:
        self._greedy = settings.temperature == 0
        self._warpers = LogitsProcessorList()
        if not self._greedy:
            self._warpers.append(TemperatureLogitsWarper(settings.temperature))
            self._warpers.append(TopPLogitsWarper(settings.top_p))

    def __call__(self, logits_BV: Tensor) -> Tensor:
        if self._greedy:
            return logits_BV.argmax(1)
        no_ids = torch.empty(logits_BV.shape[0], 0, dtype=torch.long)
        scores_BV: Tensor = self._warpers(no_ids, logits_BV)  # type: ignore[arg-type]
        return torch.multinomial(scores_BV.softmax(1), 1).squeeze(1)
