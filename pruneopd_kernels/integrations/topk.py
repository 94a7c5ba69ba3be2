"""A teacher's answers as the tensors that the operators take: its candidates, and the sampled tokens."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence, Sized
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from .server import BadAnswer

Ids = Sequence[Sequence[int]]
ABOVE_0 = 1e-3
"""The most that rounding may add to a log-probability of 0."""


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


class Asked(NamedTuple):
    """A response that has a token, and its prompt."""

    row: int
    name: str
    """For errors."""
    prompt: list[int]
    response: list[int]


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
    answers: Callable[[Sequence[Asked]], list[Scored]],
) -> TeacherTopk:
    """Checks a batch, and puts the answers to it together.

    Args:
        op: Who asks, for errors.
        prompt_ids: As for `vllm.score`, and so are all that follow.
        response_ids: B responses.
        k: Candidates a token.
        vocab_size: How many ids the student's tokenizer has.
        length: T of the result.
        answers: Scores the responses that have at least one token.
    """
    prompts, responses = _lists(op, "prompt_ids", prompt_ids), _lists(op, "response_ids", response_ids)
    length = _check(op, prompts, responses, k, vocab_size, length)
    asked = [
        Asked(row, f"request {row} of {len(prompts)} ({len(prompt)} + {len(response)} tokens)", prompt, response)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        if response
    ]
    found = {one.row: answer for one, answer in zip(asked, answers(asked), strict=True)}
    return _stack([found.get(row) for row in range(len(prompts))], k, length)


def scored(
    topk_ids: Sequence[Sequence[int]],
    topk_logprobs: Sequence[Sequence[float | None]],
    token_logprobs: Sequence[float | None],
    k: int,
    vocab_size: int,
) -> Scored:
    """One response's candidates in the order of `TopK`; a log-probability that JSON has no number for is NaN.

    Raises:
        BadAnswer: Somewhere there are fewer than k candidates, or two are the same, an id is none of the student's, or
            a log-probability is above 0.
    """
    best = []
    for position, (ids, logprobs) in enumerate(zip(topk_ids, topk_logprobs, strict=True)):
        where = f"at token {position} of the response"
        if len(ids) < k:
            raise BadAnswer(f"have {k} candidates at each token", f"{len(ids)} {where}")
        if not all(isinstance(token_id, int) for token_id in ids) or len(set(ids)) < len(ids):
            raise BadAnswer("have whole numbers as ids, no two of them the same", f"{list(ids)[:k]} {where}")
        foreign = next((token_id for token_id in ids if not 0 <= token_id < vocab_size), None)
        if foreign is not None:
            rule = f"have ids in [0, vocab_size = {vocab_size})"
            raise BadAnswer(rule, f"{foreign} {where}: is it another tokenizer's?")
        best.append(sorted(zip(map(_number, logprobs), ids, strict=True), key=_order)[:k])
    out = Scored(
        torch.tensor([[token_id for _, token_id in row] for row in best]),
        torch.tensor([[logprob for logprob, _ in row] for row in best], dtype=torch.float32),
        torch.tensor([_number(value) for value in token_logprobs], dtype=torch.float32),
    )
    highest = torch.cat([out.topk_logprobs[:, :1], out.token_logprobs[:, None]], dim=-1)
    above = (highest > ABOVE_0).nonzero()
    if len(above):
        position, which = above[0].tolist()
        actual = f"{highest[position, which]:g} at token {position} of the response: are they logits?"
        raise BadAnswer("have log-probabilities, at most 0", actual)
    return out


def _order(candidate: tuple[float, int]) -> tuple[bool, float, int]:
    """That of `TopK`: a NaN comes before everything."""
    logprob, token_id = candidate
    return not math.isnan(logprob), -logprob, token_id


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


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


def as_many_as_prompts(op: str, name: str, batch: Sized, prompt_ids: Sized) -> None:
    """Checks an argument that has an entry a prompt."""
    if len(batch) != len(prompt_ids):
        checks.bad_value(op, name, f"be as many as prompt_ids ({len(prompt_ids)})", len(batch))


def _lists(op: str, name: str, batch: Ids) -> list[list[int]]:
    """Token ids as plain integers, of whatever sequences they came in."""
    lists = []
    for index, ids in enumerate(batch):
        try:
            lists.append([operator.index(token) for token in (ids.tolist() if hasattr(ids, "tolist") else ids)])
        except TypeError:
            checks.bad_type(op, f"{name}[{index}]", "be a sequence of integers", f"{ids!r:.80}")
    return lists


def _check(op: str, prompt_ids: Ids, response_ids: Ids, k: int, vocab_size: int, length: int | None) -> int:
    """Checks what a batch consists of, and returns T."""
    as_many_as_prompts(op, "response_ids", response_ids, prompt_ids)
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
