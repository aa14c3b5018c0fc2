"""How a pool trains: who learns from which example when, and one optimizer over all peers' parameters.

Every peer does the same with the same random numbers, so that nobody has to be told what comes next.

May import `pool`, errors and libraries.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from transformers import get_scheduler

from tidelock.errors import NonFiniteError
from tidelock.pool.layout import divide

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from tidelock.pool.peers import Peers


MOMENTS = ("exp_avg", "exp_avg_sq")


@final
@dataclass(frozen=True, slots=True)
class Recipe:
    """How a pool trains; the same on every peer.

    Attributes:
        epochs: Passes over the examples.
        batch_size: Examples in an optimizer step.
        learning_rate: Peak of AdamW's.
        lr_schedule: How it falls, as `transformers` names it.
        warmup_steps: Over how many steps it rises.
        weight_decay: AdamW's.
        clip: Largest norm of all gradients; 0 does not clip.
        seed: Fixes the order of the examples, and dropout.
    """

    epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 3e-4
    lr_schedule: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0

    def steps_per_epoch(self, examples: int) -> int:
        """Return how many batches an epoch has."""
        return math.ceil(examples / self.batch_size)

    def order(self, examples: int, epoch: int) -> list[int]:
        """Return the numbers of the examples in the order of the pipeline's epoch."""
        numbers = list(range(examples))
        random.Random(f"{self.seed} {epoch}").shuffle(numbers)  # noqa: S311  (no secret)
        return numbers

    def dropout_seeds(self, step: int, numbers: Sequence[int]) -> list[int]:
        """Return for each example of a step what its dropout masks follow from, whoever computes it, and with whom.

        Args:
            step: How many steps are done.
            numbers: The examples'.
        """
        return [random.Random(f"dropout {self.seed} {step} {number}").getrandbits(62) for number in numbers]  # noqa: S311  (no secret)

    def shards(self, examples: int, epoch: int, peers: int) -> list[list[list[int]]]:
        """Return whose examples are whose in an epoch on what was cached: for each peer, for each step.

        Each example has a place in a batch that it keeps, and each peer some of the places. So a peer has the same
        examples in all of these epochs, in another order in each, and a step has the same ones for any number of peers.

        Args:
            examples: How many there are.
            epoch: Number of the epoch.
            peers: How many share them, evenly.
        """
        numbers, steps = self.order(examples, -1), self.steps_per_epoch(examples)
        places: list[list[int]] = []
        for place, some in enumerate(divide(range(examples), [1] * self.batch_size)):
            own = numbers[some.start : some.stop]
            random.Random(f"{self.seed} {epoch} {place}").shuffle(own)  # noqa: S311  (no secret)
            places.append(own)
        return [
            [[places[place][step] for place in own if step < len(places[place])] for step in range(steps)]
            for own in divide(range(self.batch_size), [1] * peers)
        ]

    def owners(self, examples: int, peers: int) -> list[int]:
        """Return for each example which peer learns from it in the epochs on what was cached."""
        found = [0] * examples
        for peer, steps in enumerate(self.shards(examples, 1, peers)):
            for number in (number for step in steps for number in step):
                found[number] = peer
        return found


@final
@dataclass(frozen=True, slots=True)
class Progress:
    """All that is trained, on its way; what a run begins or goes on with.

    Attributes:
        steps: Optimizer steps done.
        parameters: By name; none where all weights are trained and none has moved, or on another peer than 0.
        moments: Adam's, by kind (`MOMENTS`) and by the parameters' names; empty before the first step.
    """

    steps: int
    parameters: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]]


@final
class Optimizer:
    """AdamW over one peer's parameters, with the norm of all peers' gradients clipped.

    Args:
        peers: All peers.
        parameters: This peer's; none of an idle one.
        replicas: How many peers have the same, by name.
        recipe: The run's.
        steps: Optimizer steps of the whole run.

    Attributes:
        parameters: As given.
        steps: Those done.
    """

    def __init__(
        self,
        peers: Peers,
        parameters: dict[str, nn.Parameter],
        replicas: Mapping[str, int],
        recipe: Recipe,
        steps: int,
    ) -> None:
        self.parameters = parameters
        self._peers = peers
        self._replicas = replicas
        self._clip = recipe.clip
        self.steps = 0
        # As `transformers.Trainer` has it: all of hundreds of small parameters are moved in one operation.
        self._adam = torch.optim.AdamW(
            [{"params": list(parameters.values())}],
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        schedule: Any = get_scheduler(
            recipe.lr_schedule, self._adam, num_warmup_steps=recipe.warmup_steps, num_training_steps=steps
        )
        self._share_of_peak = schedule.lr_lambdas[0]
        self._peak = recipe.learning_rate
        self._set_rate()

    def step(self) -> None:
        """Move the parameters by their gradients, which are the same on all peers that have them.

        Raises:
            NonFiniteError: A gradient is infinite or not a number.
            PeerError: A peer was lost.
        """
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        squares = torch.zeros((), dtype=torch.float64)
        for name, gradient in gradients.items():
            squares += gradient.double().square().sum() / self._replicas[name]
        self._peers.sum(squares, range(self._peers.count))
        norm = float(squares.sqrt())
        if not math.isfinite(norm):
            msg = (
                f"Gradients: expected a finite norm, got {norm}. The optimizer was not moved. Lower the learning rate, "
                "or look for damaged examples."
            )
            raise NonFiniteError(msg)
        # As `torch.nn.utils.clip_grad_norm_`.
        factor = min(1.0, self._clip / (norm + 1e-6)) if self._clip else 1.0
        for gradient in gradients.values():
            gradient.mul_(factor)
        self._adam.step()
        self._adam.zero_grad()
        self.steps += 1
        self._set_rate()

    def progress(self) -> Progress:
        """Return these parameters and their moments, after one step or more."""
        moments = {kind: {name: self._adam.state[p][kind] for name, p in self.parameters.items()} for kind in MOMENTS}
        return Progress(self.steps, {name: p.detach() for name, p in self.parameters.items()}, moments)

    def go_on(self, steps: int, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on after so many steps with these moments of the parameters; without any, begin."""
        if moments:
            for name, parameter in self.parameters.items():
                own = {kind: moments[kind][name].clone() for kind in MOMENTS}
                self._adam.state[parameter] = {"step": torch.tensor(float(steps)), **own}
        self.steps = steps
        self._set_rate()

    def _set_rate(self) -> None:
        for group in self._adam.param_groups:
            group["lr"] = self._peak * self._share_of_peak(self.steps)
