"""A teacher's answers as the tensors that the operators take: its candidates, and the sampled tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from .server import BadAnswer

Ids = Sequence[Sequence[int]]


class TeacherTopk(NamedTuple):
    """What a teacher says of B responses of up to T tokens, padded on the right; on the CPU."""

    teacher_topk_ids: Tensor
    """int64 `[B, T, k]`: its candidates by descending log-probability, of equal ones the lower id first; -1 where there
    is no token."""
    teacher_topk_logprobs: Tensor
    """float32 `[B, T, k]`, in nats; -inf where there is no token."""
    teacher_token_logprobs: Tensor
    """float32 `[B, T]`: of the response's own tokens, which may be none of the candidates; 0 where there is none."""
    mask: Tensor
    """bool `[B, T]`: True at a response's tokens."""


class Scored(NamedTuple):
    """One response of n tokens, n at least 1."""

    topk_ids: Tensor
    """int64 `[n, k]`."""
    topk_logprobs: Tensor
    """float32 `[n, k]`."""
    token_logprobs: Tensor
    """float32 `[n]`."""


def one_batch(
    op: str,
    prompt_ids: Ids,
    response_ids: Ids,
    k: int,
    vocab_size: int,
    length: int | None,
    answers: Callable[[Sequence[int], Sequence[str]], list[Scored]],
) -> TeacherTopk:
    """Checks a batch, and puts the answers to it together.

    Args:
        op: Who asks, for errors.
        prompt_ids: As for `vllm.score`, and so are all that follow.
        response_ids: B responses.
        k: Candidates a token.
        vocab_size: How many ids the student's tokenizer has.
        length: T of the result.
        answers: Scores the responses of the given numbers, which have at least one token; errors call them by the
            given names.
    """
    length = _check(op, prompt_ids, response_ids, k, vocab_size, length)
    rows = [row for row, response in enumerate(response_ids) if len(response)]
    names = [
        f"request {row} of {len(prompt_ids)} ({len(prompt_ids[row])} + {len(response_ids[row])} tokens)" for row in rows
    ]
    found = dict(zip(rows, answers(rows, names), strict=True))
    return _stack([found.get(row) for row in range(len(prompt_ids))], k, length)


def scored(
    topk_ids: Sequence[Sequence[int]],
    topk_logprobs: Sequence[Sequence[float | None]],
    token_logprobs: Sequence[float | None],
    k: int,
    vocab_size: int,
) -> Scored:
    """One response's candidates in the order of `TopK`; a log-probability that JSON has no number for is NaN.

    Raises:
        BadAnswer: Somewhere there are fewer than k candidates, or an id is none of the student's.
    """
    for position, candidates in enumerate(topk_ids):
        if len(candidates) < k:
            actual = f"{len(candidates)} at token {position} of the response"
            raise BadAnswer(f"have {k} candidates at each token", actual)
    ids = torch.tensor(topk_ids, dtype=torch.int64)
    foreign = (ids < 0) | (ids >= vocab_size)
    if foreign.any():
        position = int(foreign.any(-1).nonzero()[0])
        rule = f"have ids in [0, vocab_size = {vocab_size})"
        actual = f"{int(ids[foreign][0])} at token {position} of the response: is it another tokenizer's?"
        raise BadAnswer(rule, actual)
    logprobs = torch.tensor([[_number(value) for value in row] for row in topk_logprobs], dtype=torch.float32)
    ids, by_id = ids.sort()
    logprobs, by_logprob = logprobs.gather(-1, by_id).sort(stable=True, descending=True)
    tokens = torch.tensor([_number(value) for value in token_logprobs], dtype=torch.float32)
    return Scored(ids.gather(-1, by_logprob)[:, :k], logprobs[:, :k], tokens)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _stack(responses: Sequence[Scored | None], k: int, length: int) -> TeacherTopk:
    """Responses of their own lengths as padded tensors; None is a response without a token."""
    shape = (len(responses), length)
    batch = TeacherTopk(
        torch.full((*shape, k), -1),
        torch.full((*shape, k), -torch.inf),
        torch.zeros(shape),
        torch.zeros(shape, dtype=torch.bool),
    )
    for row, response in enumerate(responses):
        if response is not None:
            end = len(response.token_logprobs)
            batch.teacher_topk_ids[row, :end] = response.topk_ids
            batch.teacher_topk_logprobs[row, :end] = response.topk_logprobs
            batch.teacher_token_logprobs[row, :end] = response.token_logprobs
            batch.mask[row, :end] = True
    return batch


def _check(op: str, prompt_ids: Ids, response_ids: Ids, k: int, vocab_size: int, length: int | None) -> int:
    """Checks what a batch consists of, and returns T."""
    if len(prompt_ids) != len(response_ids):
        checks.bad_value(op, "response_ids", f"be as many as prompt_ids ({len(prompt_ids)})", len(response_ids))
    for index, prompt in enumerate(prompt_ids):
        if len(prompt) == 0:  # nothing says how probable a text's first token is
            checks.bad_value(op, f"prompt_ids[{index}]", "have at least one token", "none")
    checks.at_least(op, "vocab_size", vocab_size, 1)
    checks.number_of_candidates(op, k, vocab_size)
    for name, batch in (("prompt_ids", prompt_ids), ("response_ids", response_ids)):
        for index, ids in enumerate(batch):
            wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
            if wrong is not None:
                checks.bad_value(op, f"{name}[{index}]", f"have ids in [0, vocab_size = {vocab_size})", wrong)
    longest = max(map(len, response_ids), default=0)
    if length is not None and length < longest:
        checks.bad_value(op, "length", f"be at least the longest response's {longest}", length)
    return longest if length is None else length
