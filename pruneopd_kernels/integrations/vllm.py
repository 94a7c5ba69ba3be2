"""A teacher served by vLLM: its `prompt_logprobs`, from the server's API or from `LLM.generate`, as tensors.

    server = Server("http://127.0.0.1:8000")
    teacher = vllm.score(server, prompt_ids, response_ids, model="teacher", vocab_size=49152)
    trust = reliability_from_topk(student_topk_ids, teacher.teacher_topk_ids, teacher.mask)

vLLM itself is needed only where the server runs.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from .server import BadAnswer, Server, TeacherServerError
from .topk import Asked, Batch, Ids, Said, TeacherTopk

LOWEST = -9999.0
"""vLLM's API sends this in place of -inf, which JSON does not have."""


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
    """Return the teacher's k candidates at every token of the responses; each response is one request.

    The server must allow k: `vllm serve ... --max-logprobs 16` (its own limit is 20). It always generates one token, so
    each sequence must be shorter than its `--max-model-len`. The log-probabilities are those of the model at
    temperature 1 (`--logprobs-mode raw_logprobs`, the default).

    If candidates tie for the last place, the server chooses which of them it sends. The result is in the operators'
    order: of equal candidates the lower id comes first. The sampled token is a candidate only if it is one of the k.

    Args:
        server: The server's address and time limits.
        prompt_ids: B prompts as token ids, without padding, each of at least one token.
        response_ids: B responses; an empty one is not sent.
        model: The teacher's name on the server.
        vocab_size: The number of ids in the student's tokenizer.
        k: Candidates per token.
        length: T of the result. None: the length of the longest response.

    Returns:
        `TeacherTopk`, for the operators that take a teacher's top-k and, with its `teacher_token_logprobs`, for
        `sampled_drift`.

    Raises:
        TeacherServerError: An answer did not come in time or is wrong; the batch can be asked again.
        ValueError: An argument is not allowed.
    """

    def read(one: Asked, answer: Any) -> Said:
        return _read(one, answer["choices"][0]["prompt_logprobs"])

    batch = Batch("vllm.score", prompt_ids, response_ids, vocab_size, k, length)
    try:
        return batch.score(server, "/v1/completions", partial(_payload, model), read)
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
    """Return what `score` returns, from answers that you already have.

    There is one for each prompt, made with `prompt_logprobs=k` or more: the field of that name of a `RequestOutput` of
    `LLM.generate`, or of a choice in the server's answer. The other arguments and the errors are those of `score`.

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
    batch = Batch("vllm.from_prompt_logprobs", prompt_ids, response_ids, vocab_size, k, length)
    return batch.read("prompt_logprobs", prompt_logprobs, _read)


def _payload(model: str, one: Asked) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": [*one.prompt, *one.response],
        "prompt_logprobs": one.k,
        "max_tokens": 1,  # the server accepts no less
        "temperature": 0.0,
    }


def _read(one: Asked, prompt_logprobs: Sequence[Mapping[Any, Any] | None] | None) -> Said:
    """Read one sequence; each position maps the actual token and the candidates to log-probability and rank."""
    count = len(one.prompt) + len(one.response)
    if prompt_logprobs is None or len(prompt_logprobs) != count:
        actual = "none" if prompt_logprobs is None else len(prompt_logprobs)
        raise BadAnswer(f"have prompt_logprobs of {count} tokens", actual)
    said = Said([], [], [])
    for position, token in enumerate(one.response):
        at_position = prompt_logprobs[len(one.prompt) + position] or {}
        entries = {int(token_id): _entry(value) for token_id, value in at_position.items()}
        if token not in entries:
            rule = f"have the log-probability of token {position} of the response, {token}"
            raise BadAnswer(rule, f"those of {sorted(entries)[: one.k]}: is it another tokenizer's?")
        # The actual token is always there. Its rank is 0 if its value is NaN; the ranks of the candidates are 1 to k.
        candidates = {token_id: logprob for token_id, (logprob, rank) in entries.items() if 1 <= rank <= one.k}
        said.topk_ids.append(list(candidates))
        said.topk_logprobs.append(list(candidates.values()))
        said.token_logprobs.append(entries[token][0])
    return said


def _entry(value: Any) -> tuple[float | None, int]:
    """Return log-probability and rank of a JSON object, or of vLLM's own `Logprob`."""
    logprob, rank = (value["logprob"], value["rank"]) if isinstance(value, Mapping) else (value.logprob, value.rank)
    return -math.inf if logprob is not None and logprob <= LOWEST else logprob, rank
