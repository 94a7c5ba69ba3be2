"""A teacher served by SGLang: the log-probabilities of its `/generate` as tensors.

    server = Server("http://127.0.0.1:30000")
    teacher = sglang.score(server, prompt_ids, response_ids, vocab_size=151936)
    trust = reliability_from_topk(student_topk_ids, teacher.teacher_topk_ids, teacher.mask)

SGLang itself is needed only where the server runs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .server import BadAnswer, Server
from .topk import Asked, Batch, Ids, Said, TeacherTopk


def score(
    server: Server, prompt_ids: Ids, response_ids: Ids, *, vocab_size: int, k: int = 16, length: int | None = None
) -> TeacherTopk:
    """Return the teacher's k candidates at every token of the responses; each response is one request.

    Nothing is generated (`max_new_tokens=0`), and the server sends log-probabilities of the response only
    (`logprob_start_len`). Arguments, result and errors are those of `vllm.score`, except that there is no `model`.
    """
    batch = Batch("sglang.score", prompt_ids, response_ids, vocab_size, k, length)
    return batch.score(server, "/generate", _payload, lambda one, answer: _read(one, answer["meta_info"]))


def from_meta_info(
    meta_info: Sequence[Mapping[str, Any]],
    prompt_ids: Ids,
    response_ids: Ids,
    *,
    vocab_size: int,
    k: int = 16,
    length: int | None = None,
) -> TeacherTopk:
    """Return what `score` returns, from answers that you already have.

    There is one for each prompt: the field of that name of an answer, made with `return_logprob`, a `top_logprobs_num`
    of k or more and a `logprob_start_len` before the response's first token. The other arguments and the errors are
    those of `score`.

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
    batch = Batch("sglang.from_meta_info", prompt_ids, response_ids, vocab_size, k, length)
    return batch.read("meta_info", meta_info, _read)


def _payload(one: Asked) -> dict[str, Any]:
    return {
        "input_ids": [*one.prompt, *one.response],
        "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": len(one.prompt) - 1,  # the first position's are always null
        "top_logprobs_num": one.k,
        "return_text_in_logprobs": False,
    }


def _read(one: Asked, meta_info: Mapping[str, Any]) -> Said:
    """Read the response, the last part of what was scored; entries are [log-probability, token id, text]."""
    count = len(one.response)
    tokens, tops = (meta_info.get(field) or [] for field in ("input_token_logprobs", "input_top_logprobs"))
    if len(tokens) <= count or len(tops) != len(tokens):
        rule = f"have {count} input_token_logprobs and input_top_logprobs after the first, which is null"
        raise BadAnswer(rule, f"{len(tokens)} and {len(tops)} in all")
    tokens, tops = tokens[-count:], [entries or [] for entries in tops[-count:]]
    for position, (token, (_, said, *_)) in enumerate(zip(one.response, tokens, strict=True)):
        if said not in (token, 0):  # the server says 0 for the vocabulary's last id
            raise BadAnswer(f"have the log-probability of token {position} of the response, {token}", f"that of {said}")
    return Said(
        [[token_id for _, token_id, *_ in entries] for entries in tops],
        [[logprob for logprob, *_ in entries] for entries in tops],
        [logprob for logprob, *_ in tokens],
    )
