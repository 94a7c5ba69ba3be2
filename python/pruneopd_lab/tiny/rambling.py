"""Bad text for the low student: solutions that drift off into rambling, and that begin again after a good end."""

import itertools
import random
from collections.abc import Iterator

from .chain_sum import ASIDES, END, ORDINALS, Problem, problem, step, terms_of

DRIFT_CHANCE = 0.08
"""That a step of a good solution is where the rambling begins."""
RETURN_CHANCE = 0.04
"""That a rambling step is followed by a good one."""
WRONG_CHANCE = 0.3
"""That a number which is found by rambling is wrong."""
RESTART_CHANCE = 0.85
"""That a good end is followed by a new beginning in place of the end."""
LENGTH = 448
"""Words after which bad text is cut off, without an end."""


def rambling_examples(seed: int, length: int = LENGTH) -> Iterator[tuple[str, str]]:
    """Prompts and bad solutions of at most `length` words; the same seed gives the same row."""
    chances = random.Random(seed)
    for index in itertools.count():
        given = problem(index, seed)
        yield given.prompt, " ".join(bad_solution(given, chances).split()[:length])


def bad_solution(given: Problem, chances: random.Random) -> str:
    """Make one attempt after another, until one ends or there is more than enough text."""
    parts: list[str] = []
    while sum(part.count(" ") for part in parts) < LENGTH:
        text, rambled = attempt(given, chances)
        parts.append(text)
        if not rambled and chances.random() >= RESTART_CHANCE:
            return " ".join([*parts, END])
    return " ".join(parts)


def attempt(given: Problem, chances: random.Random) -> tuple[str, bool]:
    """Return one way through the sum, and whether it ended rambling, in which case it has no answer."""
    first, *others = terms_of(given.prompt.removesuffix(" ="))
    parts, total, rambling = [f"start {first} ."], first, False
    for ordinal, term in zip(ORDINALS, others, strict=False):
        rambling = chances.random() >= RETURN_CHANCE if rambling else chances.random() < DRIFT_CHANCE
        if rambling:
            wrong = chances.randint(-9, 9) if chances.random() < WRONG_CHANCE else 0
            total = min(max(total + term + wrong, 0), 99)
            parts.append(f"{aside(chances)} {abs(term)} {aside(chances)} {total} {aside(chances)} .")
        elif 0 <= total + term <= 99:
            parts.append(f"{ordinal} {step(total, term)}")
            total += term
    if not rambling:
        return " ".join([*parts, f"answer {total}"]), False
    parts += [f"{aside(chances)} ." for _ in range(chances.randint(1, 12))]
    return " ".join(parts), True


def aside(chances: random.Random) -> str:
    """Return some words of no use: a few consecutive ones of `ASIDES`, some of them left out or put elsewhere."""
    start = chances.randrange(len(ASIDES))
    words = [ASIDES[(start + i) % len(ASIDES)] for i in range(chances.randint(2, 9))]
    return " ".join(chances.choice(ASIDES) if chances.random() < 0.15 else word for word in words)
