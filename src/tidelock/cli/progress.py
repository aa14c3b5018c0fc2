"""Draws a run's progress, in a pool too: the observer of `run.trainer` on a terminal, in a log, or as nothing.

May import `cli.output`.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from tidelock.cli.output import Output, Progress
    from tidelock.pool.timeline import Activity


@final
class StepProgress:
    """A bar of optimizer steps with the loss beside it; a context manager, which ends the bar.

    Args:
        output: Where it is drawn.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self._stack = ExitStack()
        self._bar: Progress | None = None

    def __enter__(self) -> StepProgress:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the bar."""
        self._stack.__exit__(kind, error, trace)

    def say(self, text: str) -> None:
        """Print a notice."""
        self._output.say(text)

    def start(self, total_steps: int, first_step: int) -> None:
        """Begin the bar."""
        self._bar = self._stack.enter_context(self._output.progress("Step", total_steps, completed=first_step))

    def step(self, step: int, loss: float | None) -> None:
        """Advance the bar; a JSON reader gets a line."""
        self._output.event({"event": "step", "step": step, "loss": loss})
        if self._bar is not None:
            self._bar.advance(loss=loss)

    def peers(self, step: int, of_peers: Sequence[Activity]) -> None:
        """Show below the bar what the peers of a pool do; a JSON reader gets shares of the step."""
        shown = [{**asdict(activity), "idle": activity.idle} for activity in of_peers]
        self._output.event({"event": "peers", "step": step, "peers": shown})
        if self._bar is not None:
            self._bar.below([activity.said() for activity in of_peers])

    def finish(self) -> None:
        """End the bar before what is printed next."""
        self._stack.close()
