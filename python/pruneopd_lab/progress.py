"""How far a run is, on stderr: a bar on a terminal, one line a step elsewhere."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from pruneopd_trainer.train import Watcher

HOUR = 3600.0
"""Over how many seconds of steps the time left is estimated."""


@contextmanager
def progress(steps: int, done: int = 0) -> Iterator["Lines"]:
    """Show how far a run of `steps` steps is; a run that is continued has `done` of them behind it."""
    console = Console(stderr=True)
    shown = Bar(steps, done, console) if console.is_interactive else Lines(steps)
    with shown:
        yield shown


class Lines(Watcher):
    """One line a step, for a log."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.accuracy: float | None = None  # the last one
        self.seconds: float | None = None

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *error: object) -> None:
        """Leave what has been shown."""

    def numbers(self, record: Mapping[str, Any]) -> str:
        """Return the numbers of a record, each with its name; an evaluation alone has only some."""
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

    def log(self, record: Mapping[str, Any]) -> None:
        """Print the step and its numbers."""
        step = f"step {record['step']:>{len(str(self.steps))}} of {self.steps}"
        seconds = f"{record['time_s']:.0f} s"
        print("  ".join(filter(None, [step, seconds, self.numbers(record)])), file=sys.stderr, flush=True)


class BarWithLine(Progress):
    """A bar, and below it a line that is cut off where the terminal ends."""

    line = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return what is drawn, from top to bottom."""
        yield from super().get_renderables()
        yield Text(self.line, no_wrap=True, overflow="ellipsis")


class Bar(Lines):
    """A bar with the numbers below it, drawn again and again in the same place."""

    def __init__(self, steps: int, done: int, console: Console) -> None:
        super().__init__(steps)
        self.last = self.doing = ""
        columns = BarColumn(bar_width=None), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
        self.bar = BarWithLine(
            TextColumn("step"),
            MofNCompleteColumn(),
            *columns,
            console=console,
            expand=True,
            speed_estimate_period=HOUR,
        )
        self.task = self.bar.add_task("", total=steps, completed=done)

    def __enter__(self) -> "Bar":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the last state of the bar on the terminal."""
        self.status("")
        self.bar.stop()

    def log(self, record: Mapping[str, Any]) -> None:
        """Move the bar to the record's step and show its numbers."""
        self.last = self.numbers(record)
        self.bar.update(self.task, completed=record["step"])
        self.status(self.doing)

    def status(self, text: str) -> None:
        """Show what is going on behind the numbers."""
        self.doing = text
        self.bar.line = "  ".join(filter(None, [self.last, text]))
