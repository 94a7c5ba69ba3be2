"""A teacher served by SGLang: the log-probabilities of its `/generate` as tensors.

    server = Server("http://127.0.0.1:30000")
    teacher = sglang.score(server, prompt_ids, response_ids, vocab_size=151936)
    trust = reliability_from_topk(student_topk_ids, teacher.teacher_topk_ids, teacher.mask)

Needs nothing of SGLang where it is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from .server import BadAnswer, Request, Server, read_answer
from .topk import Asked, Ids, Scored, TeacherTopk, as_many_as_prompts, one_batch, scored


def score(
    server: Server,
    prompt_ids: Ids,
    response_ids: Ids,
    *,
    vocab_size: int,
    k: int = 16,
    length: int | None = None,
) -> TeacherTopk:
    """Has an SGLang server score responses, one request each, with the teacher's k candidates at every token.

    Nothing is generated (`max_new_tokens=0`), and log-probabilities are asked for from the response on only
    (`logprob_start_len`). Ties and the sampled token are as in `vllm.score`.

    Args:
        server: Where, and how patiently.
        prompt_ids: B prompts as token ids, without padding, each of at least one token.
        response_ids: B responses; one without a token is not sent.
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
            read = partial(_read_generated, one.response, k, vocab_size)
            requests.append(Request(one.name, _payload(one.prompt, one.response, k), read))
        return server.ask("sglang.score", "/generate", requests)

    return one_batch("sglang.score", prompt_ids, response_ids, k, vocab_size, length, ask)


def from_meta_info(
    meta_info: Sequence[Mapping[str, Any]],
    prompt_ids: Ids,
    response_ids: Ids,
    *,
    vocab_size: int,
    k: int = 16,
    length: int | None = None,
) -> TeacherTopk:
    """The same from answers that you already have.

    Args:
        meta_info: One a sequence of prompt and response, the field of that name of an answer, made with
            `return_logprob`, `top_logprobs_num` of k or more and a `logprob_start_len` before the response's first
            token.
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
        >>> from pruneopd_kernels.integrations.sglang import from_meta_info
        >>> meta_info = {
        ...     "input_token_logprobs": [[None, 1, None], [-3.0, 7, None], [-0.1, 5, None]],
        ...     "input_top_logprobs": [None, [[-0.5, 5, None], [-1.5, 2, None]], [[-0.1, 5, None], [-2.5, 3, None]]],
        ... }
        >>> out = from_meta_info([meta_info], [[1]], [[7, 5]], vocab_size=10, k=2)
        >>> out.teacher_topk_ids, out.teacher_token_logprobs
        (tensor([[[5, 2],
                 [5, 3]]]), tensor([[-3.0000, -0.1000]]))
    """
    op = "sglang.from_meta_info"
    as_many_as_prompts(op, "meta_info", meta_info, prompt_ids)

    def read(responses: Sequence[Asked]) -> list[Scored]:
        return [
            read_answer(op, one.name, partial(_read, one.response, k, vocab_size), meta_info[one.row])
            for one in responses
        ]

    return one_batch(op, prompt_ids, response_ids, k, vocab_size, length, read)


def _payload(prompt: Sequence[int], response: Sequence[int], k: int) -> dict[str, Any]:
    return {
        "input_ids": [*prompt, *response],
        "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": len(prompt) - 1,  # the first position's are null, whatever comes before it
        "top_logprobs_num": k,
        "return_text_in_logprobs": False,
    }


def _read_generated(response: Sequence[int], k: int, vocab_size: int, answer: Any) -> Scored:
    return _read(response, k, vocab_size, answer["meta_info"])


def _read(response: Sequence[int], k: int, vocab_size: int, meta_info: Mapping[str, Any]) -> Scored:
    """One response, at the end of what was scored; entries are [log-probability, token id, text]."""
    count = len(response)
    tokens, tops = (meta_info.get(field) or [] for field in ("input_token_logprobs", "input_top_logprobs"))
    if len(tokens) <= count or len(tops) != len(tokens):
        rule = f"have {count} input_token_logprobs and input_top_logprobs after the first, which is null"
        raise BadAnswer(rule, f"{len(tokens)} and {len(tops)} in all")
    tokens, tops = tokens[-count:], [entries or [] for entries in tops[-count:]]
    for position, (token, (_, said, *_)) in enumerate(zip(response, tokens, strict=True)):
        if said not in (token, 0):  # the server says 0 for the vocabulary's last id
            raise BadAnswer(f"have the log-probability of token {position} of the response, {token}", f"that of {said}")
    return scored(
        [[token_id for _, token_id, *_ in entries] for entries in tops],
        [[logprob for logprob, *_ in entries] for entries in tops],
        [logprob for logprob, *_ in tokens],
        k,
        vocab_size,
    )
