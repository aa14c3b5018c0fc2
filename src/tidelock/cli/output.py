"""The one place that prints: notices and progress on stderr, results on stdout, and with `--json` nothing but JSON.

May import errors, `units` and libraries; rich only when something is printed, so that `--help` stays quick.
"""

from __future__ import annotations

import json as json_format
import sys
import time
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, final

from tidelock.units import format_seconds

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.console import Console
    from rich.live import Live
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

# Where there is no terminal, one line in so many seconds.
_LINE_SECONDS = 10.0
_REFRESHES_A_SECOND = 10


class Progress(Protocol):
    """Shows how far some work is."""

    def advance(self, n: int = 1, **fields: object) -> None:
        """Say that `n` more units are done; the fields (a loss, say) are shown beside."""
        ...

    def below(self, lines: Sequence[str]) -> None:
        """Show lines below, in place of those before."""
        ...


@final
class Output:
    """What a command prints.

    Args:
        json: Print JSON objects on stdout, one a line, and nothing for people.
    """

    def __init__(self, json: bool = False) -> None:
        self.json = json
        self._stderr: Console | None = None

    def say(self, text: str) -> None:
        """Print a notice for people, on stderr."""
        if not self.json:
            self._notices().print(text)

    def event(self, values: Mapping[str, object]) -> None:
        """Print a JSON object on stdout at once; nothing for people."""
        if self.json:
            sys.stdout.write(json_format.dumps(values) + "\n")
            sys.stdout.flush()

    def result(self, values: Mapping[str, object], human: str) -> None:
        """Print what a command came to, on stdout: the values as JSON, or the text for people."""
        if self.json:
            self.event(values)
        else:
            # Not through rich, which would break long paths and commands into lines.
            sys.stdout.write(human + "\n")
            sys.stdout.flush()

    def quiet_libraries(self) -> None:
        """Leave out the bars that transformers draws when it loads and saves; call it once torch is loaded anyway."""
        import_module("transformers.utils.logging").disable_progress_bar()

    @contextmanager
    def progress(self, description: str, total: int, *, completed: int = 0) -> Iterator[Progress]:
        """Show a bar with rate and time left while the work inside goes on; without a terminal, a line now and then.

        Args:
            description: What is being done.
            total: How many units there are.
            completed: How many were done before, by an earlier part of the work.
        """
        if self.json:
            yield _Silent()
        elif not self._notices().is_terminal:
            yield _Lines(self, description, total, completed)
        else:
            from rich.live import Live

            bar = _rich_progress(self._notices())
            task = bar.add_task(description, total=total, completed=completed, fields="")
            with Live(bar, console=self._notices(), refresh_per_second=_REFRESHES_A_SECOND) as live:
                yield _Bar(bar, task, live)

    def _notices(self) -> Console:
        if self._stderr is None:
            from rich.console import Console

            # Text is printed as it is: no markup in it, no colours for numbers. rich itself honours NO_COLOR.
            self._stderr = Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)
        return self._stderr


def _rich_progress(console: Console) -> RichProgress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TaskProgressColumn(show_speed=True),
        TextColumn("{task.fields[fields]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


@final
class _Silent:
    """Shows nothing: machines read the output."""

    def advance(self, n: int = 1, **fields: object) -> None:
        """Take it in."""

    def below(self, lines: Sequence[str]) -> None:
        """Likewise."""


@final
class _Bar:
    """A bar on a terminal."""

    def __init__(self, bar: RichProgress, task: TaskID, live: Live) -> None:
        self._bar = bar
        self._task = task
        self._live = live

    def advance(self, n: int = 1, **fields: object) -> None:
        self._bar.update(self._task, advance=n, fields=_shown(fields))

    def below(self, lines: Sequence[str]) -> None:
        from rich.console import Group
        from rich.text import Text

        self._live.update(Group(self._bar, *(Text(line) for line in lines)))


@final
class _Lines:
    """Plain lines, some seconds apart, for a log file; the last unit always has one."""

    def __init__(self, output: Output, description: str, total: int, completed: int) -> None:
        self._output = output
        self._description = description
        self._total = total
        self._done = self._first = completed
        self._began = self._last = time.monotonic()
        self._below: Sequence[str] = ()

    def advance(self, n: int = 1, **fields: object) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._last < _LINE_SECONDS and self._done < self._total:
            return
        self._last = now
        rate = (self._done - self._first) / max(now - self._began, 1e-9)
        left = max(self._total - self._done, 0) / rate if rate > 0 else 0.0
        parts = [f"{self._description} {self._done:,}/{self._total:,}", f"{rate:.2g}/s", _shown(fields)]
        parts.append(f"{format_seconds(left)} left" if left else f"done in {format_seconds(now - self._began)}")
        self._output.say("\n".join([", ".join(part for part in parts if part), *self._below]))
        self._below = ()

    def below(self, lines: Sequence[str]) -> None:
        self._below = lines


def _shown(fields: Mapping[str, object]) -> str:
    return " ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in fields.items()
        if value is not None
    )
