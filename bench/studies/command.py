"""The command line that the measurements beside the operators' share: sizes, rounds, rows, where they are written."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench.report import rows as results

Options = argparse.Namespace


@dataclass(frozen=True)
class Study:
    """A measurement: `run` returns its rows, or what is wrong with the answers."""

    name: str
    doc: str
    size: Any  # a dataclass with the default sizes, each an option
    run: Callable[[Any, Options], tuple[list[results.Row], list[str]]]
    shown: tuple[str, ...]  # the fields that are printed
    seconds: float
    rounds: int
    package: str = ""  # without which there is nothing to compare with
    memory: Callable[[dict[str, Any]], int] | None = None  # what a process of its own measures and prints

    def main(self, arguments: Sequence[str] | None, *, save: bool = True, **more: dict[str, Any]) -> int:
        """Run the command line; `more` are its further options, with argparse's words."""
        parser = argparse.ArgumentParser(prog=f"python -m bench {self.name}", description=self.doc,
                                         formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
        for name, default in asdict(self.size).items():
            parser.add_argument(f"--{name}", type=int, default=default)
        for name, words in more.items():
            parser.add_argument(f"--{name}", **words)
        parser.add_argument("--threads", type=int, default=2)
        parser.add_argument(
            "--seconds", type=float, default=self.seconds, help="all take turns so long, if that is enough"
        )
        parser.add_argument("--rounds", type=int, default=self.rounds, help="rounds at least")
        parser.add_argument("--no-save", dest="save", action="store_false", default=save)
        parser.add_argument("--file", type=Path, help="the results to write")
        parser.add_argument("--memory", help=argparse.SUPPRESS)
        options = parser.parse_args(arguments)
        if options.memory and self.memory:
            description = json.loads(options.memory)
            torch.set_num_threads(description.pop("threads"))
            print(self.memory(description))
            return 0
        if self.package and find_spec(self.package) is None:
            print(f"bench: {self.package} is not installed here, so its losses were not measured")
            return 0
        torch.set_num_threads(options.threads)
        rows, wrong = self.run(type(self.size)(**{name: getattr(options, name) for name in asdict(self.size)}), options)
        for complaint in wrong:
            print(f"NOT TIMED: {complaint}", file=sys.stderr)
        for row in rows:
            print(", ".join(f"{name} {row[name]}" for name in self.shown if name in row), flush=True)
        if rows and not wrong and (options.save or options.file):
            results.save(rows, options.file or results.file_of(getattr(options, "device", "cpu")))
        return 1 if wrong else 0
