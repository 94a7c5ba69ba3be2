"""Tasks: which prompts a student is trained on, which ones are held out, and how a response is graded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from .errors import TrainerError, shown

Grader = Callable[[str, str], float]  # grader(answer, response) in [0, 1], of a decoded response
SURROGATES = re.compile("[\ud800-\udfff]")  # halves of characters, which JSON can hold but no tokenizer reads


class Example(NamedTuple):
    """A prompt, and the answer to it if there is one to grade by."""

    prompt: str
    answer: str | None


class Task(Protocol):
    """A source of prompts. The number of an example is all that identifies it: a run continues anywhere."""

    graded: bool  # whether responses can be graded
    held_out_count: int | None  # None: endless

    def example(self, index: int) -> Example:
        """Return the training example of any number from 0."""

    def held_out(self, index: int) -> Example:
        """Return the held-out example of a number from 0, less than `held_out_count`; never trained on."""

    def grade(self, example: Example, response: str, finished: bool) -> float:
        """Grade a decoded response in [0, 1]; `finished`: it ended by itself."""


class PromptFile:
    """A JSONL file: a line is an object with "prompt" and, in all lines or in none, "answer"; other keys are ignored.

    The last tenth of the lines (rounded down, at least one) is held out. The others are trained on in an order that is
    drawn anew for each epoch from the seed and the epoch's number.
    """

    def __init__(self, path: Path, seed: int, make_grader: Callable[[], Grader] | None = None) -> None:
        """Read and check the whole file; raise TrainerError for the first line that is not valid."""
        self.seed = seed
        lines = read_lines(path, ("prompt", "answer"))
        if len(lines) < 2:
            raise TrainerError(f"{path} must have at least two prompts, one of them to hold out, got {len(lines)}")
        answered = "answer" in lines[0].values
        for line in lines:
            if ("answer" in line.values) != answered:
                one, other = ("no answer", "one") if answered else ("an answer", "none")
                raise TrainerError(f"{path}, line {line.number}: there is {one}, but {other} in line {lines[0].number}")
        examples = [Example(line.values["prompt"], line.values.get("answer")) for line in lines]
        self.held_out_count: int | None = max(1, len(examples) // 10)
        self._training, self._held_out = examples[: -self.held_out_count], examples[-self.held_out_count :]
        self._grader = make_grader() if answered and make_grader else None
        self.graded = self._grader is not None

    def example(self, index: int) -> Example:
        """Return training example number `index`; after the last line, the next epoch begins."""
        epoch, place = divmod(index, len(self._training))
        return self._training[_order(self.seed, epoch, len(self._training))[place]]

    def held_out(self, index: int) -> Example:
        """Return held-out example number `index`, the same for every seed."""
        return self._held_out[index]

    def grade(self, example: Example, response: str, finished: bool) -> float:
        """Grade a finished response by the grader; 0.0 for one that was cut off."""
        if self._grader is None or example.answer is None:
            raise TrainerError("a file of prompts without answers is not graded")
        return self._grader(example.answer, response) if finished else 0.0


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    order: list[int] = np.random.default_rng([seed, epoch]).permutation(count).tolist()
    return order


class Line(NamedTuple):
    """A line of a JSONL file."""

    number: int  # from 1
    values: dict[str, str]


def read_lines(path: Path, keys: tuple[str, ...]) -> list[Line]:
    """Read some keys of a JSONL file, each a text; every line must have a "prompt", blank lines are skipped."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        reason = "it is no path" if "\0" in str(path) else reason
        raise TrainerError(f"the prompts {path} cannot be read: {reason}") from error
    lines = enumerate(text.split("\n"), start=1)
    return [Line(number, _parse(line, keys, f"{path}, line {number}")) for number, line in lines if line.strip()]


def _parse(line: str, keys: tuple[str, ...], place: str) -> dict[str, str]:
    def wrong(rule: str, found: object) -> TrainerError:
        return TrainerError(f"{place}: {rule}, got {shown(found)}")

    try:
        parsed: Any = json.loads(line)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise wrong("each line must be a JSON object", line)
    if "prompt" not in parsed:
        raise wrong('each line must have a "prompt"', line)
    values = {key: parsed[key] for key in keys if key in parsed}
    for key, value in values.items():
        if not isinstance(value, str) or not value.strip() or SURROGATES.search(value):
            raise wrong(f'"{key}" must be text', value)
    return values
