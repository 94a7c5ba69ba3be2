"""Tasks: which prompts a student is trained on, which ones are held out, and how a response is graded."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from reasoning_gym.arithmetic.chain_sum import ChainSumConfig, ChainSumDataset
from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import GSMSymbolicDataset, GSMSymbolicDatasetConfig

from .config import TrainConfig
from .errors import TrainerError
from .math_answers import MathAnswers
from .tiny.chain_sum import problem
from .tiny.dialect import translate

HELD_OUT_ROW, TRAINING_ROWS = 999, 1000
"""Endless tasks: the seed of the held-out examples; a run trains on those of seed TRAINING_ROWS + its own.

The tiny teacher and its students have learnt from those of the seeds 1 to 9.
"""
LONGEST_ANSWER = 1000
"""Characters in a box that are still compared with an answer."""


class Example(NamedTuple):
    """A prompt, and the answer to it where there is one to grade by."""

    prompt: str
    answer: str | None


class Task(Protocol):
    """Where prompts come from. Every example can be had by its number alone: a run continues anywhere."""

    graded: bool
    """Whether responses can be graded."""
    held_out_count: int | None
    """How many held-out examples there are; None: endless."""

    def example(self, index: int) -> Example:
        """The training example of any number from 0."""

    def held_out(self, index: int) -> Example:
        """The held-out example of a number from 0, less than `held_out_count`; never trained on."""

    def grade(self, example: Example, response: str, finished: bool) -> float:
        """The grade in [0, 1] of a decoded response; `finished`: it ended by itself."""


def load_task(config: TrainConfig) -> Task:
    """The task of a run: the file `config.data`, or that of the preset.

    Raises:
        TrainerError: The file is not as it should be, or the method needs grades and there are none.
    """
    task = preset_task(config) if config.data is None else PromptFile(config.data, config.seed)
    if config.method == "prune+grpo" and not task.graded:
        source = f"the preset {config.preset}" if config.data is None else config.data
        raise TrainerError(f"TrainConfig: method prune+grpo needs answers to grade by, got none from {source}")
    return task


def preset_task(config: TrainConfig) -> Task:
    """The task of a preset, which is in two languages for a student who knows two."""
    if config.preset == "smollm2":
        return WordProblems(config.seed)
    return BilingualSums(config.seed) if config.pair == "bilingual" else ChainSums(config.seed)


class ChainSums:
    """The tiny task: reasoning-gym's chain sums, to be worked out in words and digits.

    A response is right (1.0, else 0.0) if it has ended by itself and its last words are `answer` and digits that
    reasoning-gym's grader takes for the sum. The digits are tokens of their own: `answer 5 7` says 57.
    """

    graded = True
    held_out_count: int | None = None

    def __init__(self, seed: int) -> None:
        """The seed decides about the training examples."""
        self.seed = seed
        self._grader = ChainSumDataset(ChainSumConfig(seed=0))

    def example(self, index: int) -> Example:
        """Training example number `index`."""
        return Example(*problem(index, TRAINING_ROWS + self.seed))

    def held_out(self, index: int) -> Example:
        """Held-out example number `index`, the same for every seed."""
        return Example(*problem(index, HELD_OUT_ROW))

    def grade(self, example: Example, response: str, finished: bool) -> float:
        """1.0 or 0.0."""
        match = re.search(r"(?:^|\s)answer((?:\s\d)+)\s*$", response)
        if not finished or match is None:
            return 0.0
        given = re.sub(r"\s", "", match[1])
        return float(self._grader.score_answer(given, {"answer": example.answer}) == 1.0)


class BilingualSums(ChainSums):
    """The same task, every other prompt in the second language of tiny/dialect.py; held out is each sum in both.

    A response may be in either language: one is right in which `ChainSums` takes it to be.
    """

    def example(self, index: int) -> Example:
        """Training example number `index`."""
        return self._in_its_language(super().example(index), index)

    def held_out(self, index: int) -> Example:
        """Held-out example number `index`, the same for every seed."""
        return self._in_its_language(super().held_out(index // 2), index)

    @staticmethod
    def _in_its_language(example: Example, index: int) -> Example:
        return example._replace(prompt=translate(example.prompt)) if index % 2 else example

    def grade(self, example: Example, response: str, finished: bool) -> float:
        """1.0 or 0.0."""
        grade = super().grade
        return max(grade(example, response, finished), grade(example, translate(response), finished))


class WordProblems:
    """The task of the preset smollm2: reasoning-gym's variations of grade school word problems; not graded.

    They are 85 texts with other names and numbers, so a held-out one is new in its numbers only.
    """

    graded = False
    held_out_count: int | None = None

    def __init__(self, seed: int) -> None:
        """The seed decides about the training examples."""
        self.seed = seed

    def example(self, index: int) -> Example:
        """Training example number `index`."""
        return _word_problem(index, TRAINING_ROWS + self.seed)

    def held_out(self, index: int) -> Example:
        """Held-out example number `index`, the same for every seed."""
        return _word_problem(index, HELD_OUT_ROW)

    def grade(self, example: Example, response: str, finished: bool) -> float:
        """Raises TrainerError: a small model gets hardly any of them right, and its grades would say nothing."""
        raise TrainerError("the task of the preset smollm2 is not graded")


CHUNK = 1000
"""Word problems that share reasoning-gym's data set, whose seed numbers all of them."""


def _word_problem(index: int, row: int) -> Example:
    chunk, place = divmod(index, CHUNK)
    return Example(_word_problems(row * 10**12 + chunk * CHUNK)[place]["question"], None)


@lru_cache(maxsize=4)
def _word_problems(seed: int) -> GSMSymbolicDataset:
    return GSMSymbolicDataset(GSMSymbolicDatasetConfig(seed=seed, size=CHUNK))


class PromptFile:
    r"""A JSONL file: a line is an object with "prompt" and, in all lines or in none, "answer"; other keys are ignored.

    The last tenth of the lines (rounded down, at least one) is held out. The others are trained on in an order that is
    drawn anew for each epoch from the seed and the epoch's number.

    A response is right (1.0, else 0.0) if it has ended by itself and the content of its last closed \boxed{...} equals
    the answer: literally but for blanks around it, or to math-verify. Of an answer that has a \boxed{...} itself, the
    content of the last one counts.
    """

    def __init__(self, path: Path, seed: int) -> None:
        """Reads and checks the whole file.

        Raises:
            TrainerError: The file cannot be read, a line is not as it should be, or there are fewer than two.
        """
        self.seed = seed
        lines = read_lines(path, ("prompt", "answer"))
        if len(lines) < 2:
            raise TrainerError(f"{path} must have at least two prompts, one of them to hold out, got {len(lines)}")
        self.graded = "answer" in lines[0].values
        for line in lines:
            if ("answer" in line.values) != self.graded:
                one, other = ("no answer", "one") if self.graded else ("an answer", "none")
                raise TrainerError(f"{path}, line {line.number}: there is {one}, but {other} in line {lines[0].number}")
        examples = [Example(line.values["prompt"], line.values.get("answer")) for line in lines]
        self.held_out_count: int | None = max(1, len(examples) // 10)
        self._training, self._held_out = examples[: -self.held_out_count], examples[-self.held_out_count :]
        self._answers = MathAnswers() if self.graded else None

    def example(self, index: int) -> Example:
        """Training example number `index`; after as many as there are, the next epoch begins."""
        epoch, place = divmod(index, len(self._training))
        return self._training[_order(self.seed, epoch, len(self._training))[place]]

    def held_out(self, index: int) -> Example:
        """Held-out example number `index`, the same for every seed."""
        return self._held_out[index]

    def grade(self, example: Example, response: str, finished: bool) -> float:
        """1.0 or 0.0.

        Raises:
            TrainerError: The file has no answers.
        """
        if self._answers is None or example.answer is None:
            raise TrainerError("a file of prompts without answers is not graded")
        given = boxed(response)
        if not finished or given is None or len(given) > LONGEST_ANSWER:
            return 0.0
        answer = boxed(example.answer) or example.answer.strip()
        return float(given == answer or self._answers.equal(answer, given))


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    order: list[int] = np.random.default_rng([seed, epoch]).permutation(count).tolist()
    return order


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} that is closed, without blanks around it; None if there is none."""
    opened: list[re.Match[str]] = []
    last: tuple[int, int] | None = None
    for token in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        if token[0].endswith("{") and token[0] != r"\{":
            opened.append(token)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start[0] != "{" and (last is None or start.end() > last[0]):
                last = (start.end(), token.start())
    return None if last is None else text[slice(*last)].strip()


SURROGATES = re.compile("[\ud800-\udfff]")
"""Halves of characters, which JSON can hold but no tokenizer reads."""


class Line(NamedTuple):
    """A line of a JSONL file."""

    number: int
    """Counts from 1."""
    values: dict[str, str]


def read_lines(path: Path, keys: tuple[str, ...]) -> list[Line]:
    """Reads a JSONL file of prompts; lines that are blank are passed over.

    Args:
        path: The file.
        keys: What is read of each line, all of it text: "prompt", which each must have, and others.

    Raises:
        TrainerError: The file cannot be read, or a line is not as it should be.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise TrainerError(f"the prompts {path} cannot be read: {reason}") from error
    lines = enumerate(text.split("\n"), start=1)
    return [Line(number, _parse(line, keys, f"{path}, line {number}")) for number, line in lines if line.strip()]


def _parse(line: str, keys: tuple[str, ...], place: str) -> dict[str, str]:
    try:
        parsed: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TrainerError(f"{place}: each line must be a JSON object, got {_short(line)}") from error
    if not isinstance(parsed, dict):
        raise TrainerError(f"{place}: each line must be a JSON object, got {_short(line)}")
    if "prompt" not in parsed:
        raise TrainerError(f'{place}: each line must have a "prompt", got {_short(line)}')
    values = {key: parsed[key] for key in keys if key in parsed}
    for key, value in values.items():
        if not isinstance(value, str) or not value.strip() or SURROGATES.search(value):
            raise TrainerError(f'{place}: "{key}" must be text, got {_short(value)}')
    return values


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
