"""A second language for chain sums, which the teacher has not learnt: other words and signs for the same steps."""

from .chain_sum import ASIDES, WORDS

DIALECT = dict(zip(WORDS, (word for word in dict.fromkeys(ASIDES) if word not in WORDS), strict=False))
"""For each word of a sum and its solution the one that stands for it."""

_OTHER = DIALECT | {theirs: ours for ours, theirs in DIALECT.items()}


def translate(text: str) -> str:
    """From either language into the other; digits are the same in both."""
    return " ".join(_OTHER.get(word, word) for word in text.split())
