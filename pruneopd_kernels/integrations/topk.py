"""A teacher's answers as the tensors that the operators take: its candidates and the sampled tokens."""

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from .server import BadAnswer, Request, Server, read_answer

Ids = Sequence[Sequence[int]]
ABOVE_0 = 1e-3
"""Rounding adds at most this much to a log-probability of 0."""
EMPTY = -math.inf, -1
"""Log-probability and id in a slot without a candidate."""


class TeacherTopk(NamedTuple):
    """What a teacher says about B responses of up to T tokens, padded on the right; on the CPU."""

    teacher_topk_ids: Tensor
    """int64 `[B, T, k]`: its candidates by descending log-probability; the lower id first if two are equal; -1 in an
    empty slot: where there is no token, and behind fewer than k candidates with a log-probability above -inf."""
    teacher_topk_logprobs: Tensor
    """float32 `[B, T, k]`, in nats; -inf in an empty slot."""
    teacher_token_logprobs: Tensor
    """float32 `[B, T]`: of the response's own tokens, whether or not they are candidates; 0 where there is no token."""
    mask: Tensor
    """bool `[B, T]`: True at a response's tokens."""


class Asked(NamedTuple):
    """A response with at least one token, its prompt and the number of candidates."""

    row: int
    name: str  # for errors
    prompt: list[int]
    response: list[int]
    k: int


class Said(NamedTuple):
    """An answer's values by position of the response; None is a log-probability for which JSON has no number."""

    topk_ids: list[list[int]]
    topk_logprobs: list[list[float | None]]
    token_logprobs: list[float | None]


Read = Callable[[Asked, Any], Said]


class Batch:
    """The prompts and responses of one call, checked. The arguments are those of `vllm.score`; `op` is for errors."""

    def __init__(
        self, op: str, prompt_ids: Ids, response_ids: Ids, vocab_size: int, k: int, length: int | None
    ) -> None:
        self.op, self.vocab_size, self.k = op, vocab_size, k
        prompts, responses = _lists(op, "prompt_ids", prompt_ids), _lists(op, "response_ids", response_ids)
        self._check_count("response_ids", len(responses), len(prompts))
        for index, prompt in enumerate(prompts):
            if not prompt:  # nothing says how probable a text's first token is
                checks.bad_value(op, f"prompt_ids[{index}]", "have at least one token", "none")
        checks.at_least(op, "vocab_size", vocab_size, 1)
        checks.number_of_candidates(op, k, vocab_size)
        for name, batch in (("prompt_ids", prompts), ("response_ids", responses)):
            for index, ids in enumerate(batch):
                if (wrong := self._unknown(ids)) is not None:
                    checks.bad_value(op, f"{name}[{index}]", f"have ids in [0, vocab_size = {vocab_size})", wrong)
        longest = max(map(len, responses), default=0)
        if length is not None and length < longest:
            checks.bad_value(op, "length", f"be at least the longest response's {longest}", length)
        self.shape = len(prompts), longest if length is None else length
        self.asked = [
            Asked(row, f"request {row} of {len(prompts)} ({len(prompt)} + {len(response)} tokens)", prompt, response, k)
            for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
            if response
        ]

    def score(self, server: Server, path: str, payload: Callable[[Asked], dict[str, Any]], read: Read) -> TeacherTopk:
        """Ask a server about each response and return what it says."""
        requests = [Request(one.name, payload(one), partial(self._tensors, read, one)) for one in self.asked]
        return self._padded(server.ask(self.op, path, requests))

    def read(self, name: str, answers: Sequence[Any], read: Read) -> TeacherTopk:
        """Return what `answers`, the argument `name`, say; there is one for each prompt."""
        self._check_count(name, len(answers), self.shape[0])
        reads = [(one.name, partial(self._tensors, read, one), answers[one.row]) for one in self.asked]
        return self._padded([read_answer(self.op, *each) for each in reads])

    def _check_count(self, name: str, count: int, prompts: int) -> None:
        if count != prompts:
            checks.bad_value(self.op, name, f"be as many as prompt_ids ({prompts})", count)

    def _unknown(self, ids: Sequence[int]) -> int | None:
        """Return the first id that the student does not have."""
        return next((token_id for token_id in ids if not 0 <= token_id < self.vocab_size), None)

    def _tensors(self, read: Read, one: Asked, answer: Any) -> tuple[Tensor, ...]:
        """Check an answer; return ids and log-probabilities `[n, k]` in the order of `TopK`, and the tokens' `[n]`."""
        said, best = read(one, answer), []
        for position, (ids, logprobs) in enumerate(zip(said.topk_ids, said.topk_logprobs, strict=True)):
            where = f"at token {position} of the response"
            if not all(isinstance(token_id, int) for token_id in ids) or len(set(ids)) < len(ids):
                raise BadAnswer("have whole numbers as ids, no two of them the same", f"{list(ids)[: self.k]} {where}")
            if (foreign := self._unknown(ids)) is not None:
                rule = f"have ids in [0, vocab_size = {self.vocab_size})"
                raise BadAnswer(rule, f"{foreign} {where}: is it another tokenizer's?")
            candidates = sorted(zip(map(_number, logprobs), ids, strict=True), key=_order)[: self.k]
            filled = [candidate for candidate in candidates if candidate[0] != -math.inf]
            if not filled:
                raise BadAnswer("have a candidate at each token", f"none {where}")
            best.append(filled + [EMPTY] * (self.k - len(filled)))
        topk_logprobs = torch.tensor([[logprob for logprob, _ in row] for row in best], dtype=torch.float32)
        token_logprobs = torch.tensor([_number(value) for value in said.token_logprobs], dtype=torch.float32)
        highest = torch.cat([topk_logprobs[:, :1], token_logprobs[:, None]], dim=-1)
        above = (highest > ABOVE_0).nonzero()
        if len(above):
            position, which = above[0].tolist()
            actual = f"{highest[position, which]:g} at token {position} of the response: are they logits?"
            raise BadAnswer("have log-probabilities, at most 0", actual)
        return torch.tensor([[token_id for _, token_id in row] for row in best]), topk_logprobs, token_logprobs

    def _padded(self, answers: Sequence[tuple[Tensor, ...]]) -> TeacherTopk:
        candidates = *self.shape, self.k
        batch = TeacherTopk(
            torch.full(candidates, -1),
            torch.full(candidates, -torch.inf),
            torch.zeros(self.shape),
            torch.zeros(self.shape, dtype=torch.bool),
        )
        for one, answer in zip(self.asked, answers, strict=True):
            at = one.row, slice(len(one.response))
            batch.mask[at] = True
            for padded, values in zip(batch[:3], answer, strict=True):
                padded[at] = values
        return batch


def _order(candidate: tuple[float, int]) -> tuple[bool, float, int]:
    """Return a candidate's key in the order of `TopK`: NaN comes first."""
    logprob, token_id = candidate
    return not math.isnan(logprob), -logprob, token_id


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _lists(op: str, name: str, batch: Ids) -> list[list[int]]:
    """Return token ids as plain integers, from sequences of any kind."""
    lists = []
    for index, ids in enumerate(batch):
        try:
            lists.append([operator.index(token) for token in (ids.tolist() if hasattr(ids, "tolist") else ids)])
        except TypeError:
            checks.bad_type(op, f"{name}[{index}]", "be a sequence of integers", f"{ids!r:.80}")
    return lists
