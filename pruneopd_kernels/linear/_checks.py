"""The rules for the arguments of the functions from hidden states, in the words of `pruneopd_kernels.checks`."""

from collections.abc import Callable, Sequence
from typing import Any

from .. import checks
from ..dispatch import implementations
from ..formulas import has_values


def check(op: str, a: Any, own: Callable[[str, Any], None] | None) -> None:
    """Check a record of arguments: those that functions share, of which some may be missing, and by `own` others."""
    first = "" if hasattr(a, "hidden") else "student_"
    hidden = getattr(a, f"{first}hidden")
    impl = implementations.choose(op, a.impl, hidden.device)
    implementations.require_usable(op, impl, hidden.device)
    if hidden.ndim not in (2, 3):
        checks.bad_value(op, f"{first}hidden", "have shape [B, T, H] or [N, H]", list(hidden.shape))
    dtypes = checks.FLOATS if impl == "reference" else checks.LOGITS
    _side(op, first, a, hidden, dtypes)
    from_server, weights = is_from_server(a), [getattr(a, f"{first}weight")]
    if from_server:
        _candidates(op, a)
    elif first:
        for name in ("teacher_hidden", "teacher_weight"):
            if getattr(a, name) is None:
                checks.bad_value(op, name, "be given when teacher_topk_ids are not", None)
        _side(op, "teacher_", a, hidden, dtypes)
        weights.append(a.teacher_weight)
    shape, has_responses = hidden.shape[:-1], hasattr(a, "cu_seqlens")
    checks.mask_of_positions(op, a.mask, hidden, shape)
    if first:
        checks.ids_of_positions(op, a.token_ids, hidden, shape)
    else:
        checks.candidates(op, "token_ids", a.token_ids, hidden, checks.MAX_POLICY_CANDIDATES, "m")
    if has_responses:
        checks.responses(op, a.cu_seqlens, a.drift_count, hidden, shape, "student_hidden is {}, H]")
    widths = [weight.shape[0] for weight in weights]
    vocab_size = checks.vocabulary(op, a.vocab_size, widths, "first axes of student_weight and teacher_weight")
    if a.chunk_size is not None:
        checks.at_least(op, "chunk_size", a.chunk_size, 1)
    if hasattr(a, "k"):
        checks.number_of_candidates(op, a.k, vocab_size)
    checks.scalars(op, a)
    if has_responses:
        checks.needed_by_top_p(op, a, "token_ids")
    if own is not None:
        own(op, a)
    if not has_values(hidden):
        return
    if not first:
        checks.candidate_values(op, "token_ids", a.token_ids, a.mask, vocab_size)
    elif has_responses:
        if a.metric == "top_p":
            checks.token_id_values(op, a.token_ids, a.mask, vocab_size)
        checks.response_values(op, a.cu_seqlens, a.drift_count, shape)
    if from_server:
        checks.candidate_values(op, "teacher_topk_ids", a.teacher_topk_ids, a.mask, vocab_size)
        checks.distinct(op, "teacher_topk_ids", a.teacher_topk_ids, a.teacher_topk_logprobs, a.mask)


def is_from_server(a: Any) -> bool:
    """Return whether the caller gives a server's candidates in place of the teacher."""
    return any(getattr(a, f"teacher_topk_{name}", None) is not None for name in ("ids", "logprobs"))


def _side(op: str, prefix: str, a: Any, first: Any, dtypes: Sequence[str]) -> None:
    """Check one model's hidden states, weight, bias and cap; `first` are the first model's hidden states."""
    tensors = {prefix + name: getattr(a, prefix + name) for name in ("hidden", "weight", "bias")}
    hidden, weight, bias = tensors.values()
    if hidden.ndim != first.ndim or hidden.shape[:-1] != first.shape[:-1]:
        words = ", ".join(map(str, [*first.shape[:-1], "H"]))
        checks.bad_value(op, f"{prefix}hidden", f"have shape [{words}]", list(hidden.shape))
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        checks.bad_value(op, f"{prefix}weight", f"have shape [V, {hidden.shape[-1]}]", list(weight.shape))
    if bias is not None:
        checks.has_shape(op, f"{prefix}bias", bias, weight.shape[:1])
    dtype = str(hidden.dtype).removeprefix("torch.")
    is_free = a.autocast is not None and dtype != "float64"
    for name, tensor in tensors.items():
        allowed, words = checks.LOGITS if is_free else dtypes, ""
        if not is_free and tensor is not hidden:
            allowed, words = (dtype,), f"{dtype}, as {prefix}hidden has without autocast"
        if tensor is not None:
            checks.has_dtype(op, name, tensor, allowed, words)
            checks.same_device(op, name, tensor, first)
    checks.number(op, f"{prefix}softcap", getattr(a, f"{prefix}softcap"), "be finite and > 0")


def _candidates(op: str, a: Any) -> None:
    """Check what a server sends in place of a teacher's hidden states."""
    for name, other in (("ids", "logprobs"), ("logprobs", "ids")):
        if getattr(a, f"teacher_topk_{name}") is None:
            checks.bad_value(op, f"teacher_topk_{name}", f"be given when teacher_topk_{other} are", None)
    for name in ("teacher_hidden", "teacher_weight", "teacher_bias"):
        if getattr(a, name) is not None:
            checks.bad_value(op, name, "be None when teacher_topk_ids are given", "a tensor")
    hidden, shape = a.student_hidden, (*a.student_hidden.shape[:-1], a.k)
    checks.has_one_for_each(op, "teacher_topk_ids", a.teacher_topk_ids, hidden, shape, checks.IDS)
    checks.has_one_for_each(op, "teacher_topk_logprobs", a.teacher_topk_logprobs, hidden, shape)
    if a.teacher_temperature != 1:
        checks.bad_value(op, "teacher_temperature", "be 1 when teacher_topk_ids are given", a.teacher_temperature)
