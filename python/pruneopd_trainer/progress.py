"""How far a run is, on stderr: a bar on a terminal, one line a step elsewhere."""

import sys
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from .config import TrainConfig

HOUR = 3600.0
"""Over how many seconds of steps the time left is estimated."""


def progress(config: TrainConfig, silent: bool, done: int = 0) -> "Silent":
    """A context manager that shows how far a run is.

    Args:
        config: Says how many steps there are.
        silent: Whether it shows nothing: on every rank but the first.
        done: The steps that a run which is continued has behind it.
    """
    if silent:
        return Silent()
    console = Console(stderr=True)
    return Bar(config.steps, done, console) if console.is_interactive else Lines(config.steps)


class Silent:
    """Shows nothing."""

    def __enter__(self) -> "Silent":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves what has been shown."""

    def update(self, record: Mapping[str, Any]) -> None:
        """Shows the record of a step, as metrics.jsonl has it."""

    def status(self, text: str) -> None:
        """Shows what is going on, such as `sampling`."""


class Summary:
    """The numbers of the last step, and the last accuracy there was."""

    def __init__(self) -> None:
        self.accuracy: float | None = None
        self.seconds: float | None = None

    def line(self, record: Mapping[str, Any]) -> str:
        """The numbers of a record, each with its name; an evaluation alone has only some."""
        if record.get("accuracy") is not None:
            self.accuracy = record["accuracy"]
        last, self.seconds = self.seconds, record.get("time_s")
        parts = [] if self.accuracy is None else [f"accuracy {self.accuracy:.1%}"]
        if record.get("overlap") is not None:
            parts.append(f"overlap {record['overlap']:.2f}")
        if record.get("budget") is not None:
            parts.append(f"M {record['budget']}")
        if last is not None and self.seconds is not None and self.seconds > last and "tokens_generated" in record:
            parts.append(f"{record['tokens_generated'] / (self.seconds - last):.0f} tokens/s")
        return "  ".join(parts)


class Lines(Silent):
    """One line a step, for a log."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.summary = Summary()

    def update(self, record: Mapping[str, Any]) -> None:
        """Prints the step and its numbers."""
        step = f"step {record['step']:>{len(str(self.steps))}} of {self.steps}"
        seconds = f"{record['time_s']:.0f} s"
        print("  ".join(filter(None, [step, seconds, self.summary.line(record)])), file=sys.stderr, flush=True)


class BarWithLine(Progress):
    """A bar, and below it a line that is cut off where the terminal ends."""

    line = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is drawn, from top to bottom."""
        yield from super().get_renderables()
        yield Text(self.line, no_wrap=True, overflow="ellipsis")


class Bar(Silent):
    """A bar with the numbers below it, drawn again and again in the same place."""

    def __init__(self, steps: int, done: int, console: Console) -> None:
        self.summary = Summary()
        self.numbers = self.doing = ""
        self.bar = BarWithLine(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            speed_estimate_period=HOUR,
        )
        self.task = self.bar.add_task("", total=steps, completed=done)

    def __enter__(self) -> "Bar":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves the last state of the bar on the terminal."""
        self.status("")
        self.bar.stop()

    def update(self, record: Mapping[str, Any]) -> None:
        """Moves the bar to the record's step and shows its numbers."""
        self.numbers = self.summary.line(record)
        self.bar.update(self.task, completed=record["step"])
        self.status(self.doing)

    def status(self, text: str) -> None:
        """Shows what is going on behind the numbers."""
        self.doing = text
        self.bar.line = "  ".join(filter(None, [self.numbers, text]))
