"""Chain sums of reasoning-gym, worked out in words and digits: problems, solutions, a tokenizer for both, a grader."""

import itertools
import re
from functools import cache
from typing import NamedTuple

from reasoning_gym.arithmetic.chain_sum import ChainSumConfig, ChainSumDataset

LARGEST = 99
"""Problems whose partial sums leave 0..99 are passed over: about four of five."""

ENTRIES = 1000
"""reasoning-gym's entries for each problem, of which the first that will do is taken."""

ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh".split()
"""One for each number that is added or taken away: a sum has at most twelve terms."""

ASIDES = """
hmm well now let me think about this for a moment because i am not quite sure what comes next here and it could be
that the number before was wrong or maybe right so we look at it again from the other side which is often better than
to go on too fast then again if you see how long they have been counting in their heads all these small steps may just
as soon lead us nowhere at last wait actually
""".split()
"""The words of a student that rambles; a good solution needs none of them."""

PAD, END = "<pad>", "<end>"
WORDS = [
    *"+ - = : , .".split(),
    *"start add take ones tens plus minus is carry borrow answer".split(),
    *ORDINALS,
]


def vocabulary() -> list[str]:
    """Every token, at the place of its id."""
    return list(dict.fromkeys([PAD, END, *"0123456789", *WORDS, *ASIDES]))


class Problem(NamedTuple):
    """A chain sum, such as `4 + 17 - 9 =`."""

    prompt: str
    answer: str


def problem(index: int, seed: int, terms: tuple[int, int] = (8, 12)) -> Problem:
    """Problem number `index` of an endless row; the same seed gives the same row.

    Args:
        index: Counts from 0.
        seed: Two seeds give two rows without a common problem, as far as chance allows.
        terms: The fewest and the most terms of a sum.
    """
    dataset = _dataset(seed, terms)
    for entry_index in itertools.count(index * ENTRIES):
        entry = dataset[entry_index]
        expression = entry["metadata"]["expression"]
        if all(0 <= total <= LARGEST for total in partial_sums(expression)):
            return Problem(f"{expression} =", entry["answer"])
    raise AssertionError("unreachable")


@cache
def _dataset(seed: int, terms: tuple[int, int]) -> ChainSumDataset:
    fewest, most = terms
    return ChainSumDataset(
        ChainSumConfig(min_terms=fewest, max_terms=most, min_digits=1, max_digits=2, seed=seed * 10**12, size=10**12)
    )


def terms_of(expression: str) -> list[int]:
    """Return the signed terms of an expression such as `4 + 17 - 9`."""
    return [int(term) for term in re.sub(r"([+-]) ", r"\1", expression).split()]


def partial_sums(expression: str) -> list[int]:
    """Return the sum of the first term, of the first two, and so on."""
    return list(itertools.accumulate(terms_of(expression)))


def solution(problem: Problem) -> str:
    """Return the problem worked out, one step a term."""
    first, *others = terms_of(problem.prompt.removesuffix(" ="))
    steps, total = [f"start {first} ."], first
    for ordinal, term in zip(ORDINALS, others, strict=False):
        steps.append(f"{ordinal} {step(total, term)}")
        total += term
    return " ".join([*steps, f"answer {total}"])


def step(total: int, term: int) -> str:
    """Return one addition or subtraction in columns, such as `add 18 : ones 7 plus 8 is 5 carry , tens 5 ...`."""
    tens, ones = divmod(total, 10)
    term_tens, term_ones = divmod(abs(term), 10)
    if term >= 0:
        sum_of_ones = ones + term_ones
        carry = sum_of_ones // 10
        columns = f"ones {ones} plus {term_ones} is {sum_of_ones % 10}" + " carry" * carry
        columns += f" , tens {tens} plus {term_tens}" + " plus 1" * carry + f" is {tens + term_tens + carry}"
        return f"add {term} : {columns} : {total + term} ."
    borrow = int(ones < term_ones)
    columns = f"ones {ones} minus {term_ones} is {ones - term_ones + 10 * borrow}" + " borrow" * borrow
    columns += f" , tens {tens} minus {term_tens}" + " minus 1" * borrow + f" is {tens - term_tens - borrow}"
    return f"take {-term} : {columns} : {total + term} ."
