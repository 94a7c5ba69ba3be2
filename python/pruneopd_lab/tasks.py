"""The tasks of the presets, endless both, from reasoning-gym: chain sums in one or two languages, and word problems."""

import re
from functools import lru_cache

from reasoning_gym.arithmetic.chain_sum import ChainSumConfig, ChainSumDataset
from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import GSMSymbolicDataset, GSMSymbolicDatasetConfig

from pruneopd_trainer.data import Example
from pruneopd_trainer.errors import TrainerError

from .tiny.chain_sum import problem
from .tiny.dialect import translate

HELD_OUT_ROW, TRAINING_ROWS = 999, 1000
"""The seed of the held-out examples; a run trains on those of seed TRAINING_ROWS + its own.

The tiny teacher and its students have learnt from those of the seeds 1 to 9.
"""
CHUNK = 1000
"""Word problems that share reasoning-gym's data set, whose seed numbers all of them."""


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
        """Return training example number `index`."""
        return Example(*problem(index, TRAINING_ROWS + self.seed))

    def held_out(self, index: int) -> Example:
        """Return held-out example number `index`, the same for every seed."""
        return Example(*problem(index, HELD_OUT_ROW))

    def grade(self, example: Example, response: str, finished: bool) -> float:
        """Return 1.0 or 0.0."""
        match = re.search(r"(?:^|\s)answer((?:\s\d)+)\s*$", response)
        if not finished or match is None:
            return 0.0
        given = re.sub(r"\s", "", match[1])
        return float(self._grader.score_answer(given, {"answer": example.answer}) == 1.0)


class BilingualSums(ChainSums):
    """The same task, every other prompt in the second language of tiny/dialect.py; held out is each sum in both.

    A response may be in either language: it is right if `ChainSums` accepts it in one of them.
    """

    def example(self, index: int) -> Example:
        """Return training example number `index`."""
        return self._in_its_language(super().example(index), index)

    def held_out(self, index: int) -> Example:
        """Return held-out example number `index`, the same for every seed."""
        return self._in_its_language(super().held_out(index // 2), index)

    @staticmethod
    def _in_its_language(example: Example, index: int) -> Example:
        return example._replace(prompt=translate(example.prompt)) if index % 2 else example

    def grade(self, example: Example, response: str, finished: bool) -> float:
        """Return 1.0 or 0.0."""
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
        """Return training example number `index`."""
        return self._problem(index, TRAINING_ROWS + self.seed)

    def held_out(self, index: int) -> Example:
        """Return held-out example number `index`, the same for every seed."""
        return self._problem(index, HELD_OUT_ROW)

    @staticmethod
    def _problem(index: int, row: int) -> Example:
        chunk, place = divmod(index, CHUNK)
        return Example(_word_problems(row * 10**12 + chunk * CHUNK)[place]["question"], None)

    def grade(self, example: Example, response: str, finished: bool) -> float:
        """Raise TrainerError: a small model gets hardly any of them right, and its grades would say nothing."""
        raise TrainerError("the task of the preset smollm2 is not graded")


@lru_cache(maxsize=4)
def _word_problems(seed: int) -> GSMSymbolicDataset:
    return GSMSymbolicDataset(GSMSymbolicDatasetConfig(seed=seed, size=CHUNK))
