"""A teacher served by vLLM: its `prompt_logprobs`, from the server's API or from `LLM.generate`, as tensors.

    server = Server("http://127.0.0.1:8000")
    teacher = vllm.score(server, prompt_ids, response_ids, model="teacher", vocab_size=49152)
    trust = reliability_from_topk(student_topk_ids, teacher.teacher_topk_ids, teacher.mask)

Needs nothing of vLLM where it is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from .server import BadAnswer, Request, Server, TeacherServerError, read_answer
from .topk import Asked, Ids, Scored, TeacherTopk, as_many_as_prompts, one_batch, scored

LOWEST = -9999.0
"""What vLLM's API sends in place of -inf, which JSON does not have."""


def score(
    server: Server,
    prompt_ids: Ids,
    response_ids: Ids,
    *,
    model: str,
    vocab_size: int,
    k: int = 16,
    length: int | None = None,
) -> TeacherTopk:
    """Has a vLLM server score responses, one request each, with the teacher's k candidates at every token.

    The server must allow k: `vllm serve ... --max-logprobs 16` (its own limit is 20). Each sequence must leave room for
    one token more in its `--max-model-len`, since it generates one. The log-probabilities are those of the model at
    temperature 1 (`--logprobs-mode raw_logprobs`, the default).

    Where candidates are equally probable, which of them are the server's k is its choice; these are put into the
    operators' order, the lower id first. The sampled token is among them only if it is one of the k.

    Args:
        server: Where, and how patiently.
        prompt_ids: B prompts as token ids, without padding, each of at least one token.
        response_ids: B responses; one without a token is not sent.
        model: The name under which the server knows the teacher.
        vocab_size: How many ids the student's tokenizer has.
        k: Candidates a token.
        length: T of the result. None: that of the longest response.

    Returns:
        `TeacherTopk`, for `reliability_from_topk`, `topk_forward_kl`, `linear_opd_loss` and, with its
        `teacher_token_logprobs`, `sampled_drift`.

    Raises:
        TeacherServerError: An answer did not come in time or is wrong; the batch can be asked again.
        ValueError: An argument is not allowed.
    """

    def ask(responses: Sequence[Asked]) -> list[Scored]:
        requests = []
        for one in responses:
            read = partial(_read_completion, one.prompt, one.response, k, vocab_size)
            requests.append(Request(one.name, _payload(model, one.prompt, one.response, k), read))
        return server.ask("vllm.score", "/v1/completions", requests)

    try:
        return one_batch("vllm.score", prompt_ids, response_ids, k, vocab_size, length, ask)
    except TeacherServerError as error:
        if "greater than max allowed" in str(error):
            raise TeacherServerError(f"{error}; start the server with --max-logprobs {k} or more") from None
        raise


def from_prompt_logprobs(
    prompt_logprobs: Sequence[Sequence[Mapping[Any, Any] | None]],
    prompt_ids: Ids,
    response_ids: Ids,
    *,
    vocab_size: int,
    k: int = 16,
    length: int | None = None,
) -> TeacherTopk:
    """The same from answers that you already have.

    Args:
        prompt_logprobs: One a sequence of prompt and response, made with `prompt_logprobs=k` or more: the field of that
            name of a `RequestOutput` of `LLM.generate`, or of a choice in an answer of the server.
        prompt_ids: As for `score`, and so are all that follow.
        response_ids: B responses.
        vocab_size: How many ids the student's tokenizer has.
        k: Candidates a token.
        length: T of the result.

    Returns:
        `TeacherTopk`.

    Raises:
        TeacherServerError: An answer is not what it should be.
        ValueError: An argument is not allowed.

    Examples:
        >>> from pruneopd_kernels.integrations.vllm import from_prompt_logprobs
        >>> def entry(logprob, rank):
        ...     return {"logprob": logprob, "rank": rank}
        >>> first = {"7": entry(-3.0, 9), "5": entry(-0.5, 1), "2": entry(-1.5, 2)}
        >>> second = {"5": entry(-0.1, 1), "3": entry(-2.5, 2)}
        >>> out = from_prompt_logprobs([[None, first, second]], [[1]], [[7, 5]], vocab_size=10, k=2)
        >>> out.teacher_topk_ids, out.teacher_token_logprobs
        (tensor([[[5, 2],
                 [5, 3]]]), tensor([[-3.0000, -0.1000]]))
    """
    op = "vllm.from_prompt_logprobs"
    as_many_as_prompts(op, "prompt_logprobs", prompt_logprobs, prompt_ids)

    def read(responses: Sequence[Asked]) -> list[Scored]:
        return [
            read_answer(op, one.name, partial(_read, one.prompt, one.response, k, vocab_size), prompt_logprobs[one.row])
            for one in responses
        ]

    return one_batch(op, prompt_ids, response_ids, k, vocab_size, length, read)


def _payload(model: str, prompt: Sequence[int], response: Sequence[int], k: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": [*prompt, *response],
        "prompt_logprobs": k,
        "max_tokens": 1,  # the least that the server accepts
        "temperature": 0.0,
    }


def _read_completion(prompt: Sequence[int], response: Sequence[int], k: int, vocab_size: int, answer: Any) -> Scored:
    return _read(prompt, response, k, vocab_size, answer["choices"][0]["prompt_logprobs"])


def _read(
    prompt: Sequence[int],
    response: Sequence[int],
    k: int,
    vocab_size: int,
    prompt_logprobs: Sequence[Mapping[Any, Any] | None] | None,
) -> Scored:
    """One response; each position's mapping holds the actual token and the candidates, by token id."""
    if prompt_logprobs is None or len(prompt_logprobs) != len(prompt) + len(response):
        rule = f"have prompt_logprobs of {len(prompt) + len(response)} tokens"
        raise BadAnswer(rule, "none" if prompt_logprobs is None else len(prompt_logprobs))
    topk_ids, topk_logprobs, token_logprobs = [], [], []
    for position, token in enumerate(response):
        entries = dict(_entries(prompt_logprobs[len(prompt) + position]))
        if token not in entries:
            rule = f"have the log-probability of token {position} of the response, {token}"
            raise BadAnswer(rule, f"those of {sorted(entries)[:k]}: is it another tokenizer's?")
        token_logprobs.append(entries[token][0])
        # The actual token is there whatever its rank, which is 0 where it is NaN; without it there are as many as were
        # asked for.
        candidates = [(token_id, logprob) for token_id, (logprob, rank) in entries.items() if 1 <= rank <= k]
        topk_ids.append([token_id for token_id, _ in candidates])
        topk_logprobs.append([logprob for _, logprob in candidates])
    out = scored(topk_ids, topk_logprobs, token_logprobs, k, vocab_size)
    return Scored(out.topk_ids, *(values.masked_fill(values <= LOWEST, -torch.inf) for values in out[1:]))


def _entries(at_position: Mapping[Any, Any] | None) -> Iterable[tuple[int, tuple[float | None, int]]]:
    """(id, (log-probability, rank)) of what JSON or vLLM's own `Logprob` objects say."""
    for token_id, entry in (at_position or {}).items():
        if isinstance(entry, Mapping):
            yield int(token_id), (entry["logprob"], entry["rank"])
        else:
            yield int(token_id), (entry.logprob, entry.rank)
