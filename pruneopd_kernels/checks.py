"""Whether arguments are what an operator takes, and if not: `<op>: <argument> must <rule>, got <actual>`.

One function per operator, shared by the raw operator, its fake, the reference and `host`. No torch here: of a tensor,
torch's or NumPy's, they ask its shape, dtype, device and strides. What is inside is looked at only with `values=True`,
for those who know that looking neither waits for a GPU nor breaks a trace.

The order is that of the signature: tensors, then scalars, then values inside tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NoReturn, get_args

from .errors import InvalidType, InvalidValue
from .schemas import ARGUMENTS

Metric = Literal["overlap", "top_p"]
RewardWeight = Literal["student", "teacher", "none"]

METRICS = get_args(Metric)
REWARD_WEIGHTS = get_args(RewardWeight)
MAX_K = 256
MAX_POLICY_CANDIDATES = 512
LOGITS = ("float32", "bfloat16", "float16")
FLOATS = (*LOGITS, "float64")
IDS = ("int32", "int64")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def reliability(
    *,
    student_logits: Any,
    teacher_logits: Any,
    mask: Any,
    token_ids: Any,
    cu_seqlens: Any,
    drift_count: Any,
    k: int,
    threshold: float,
    w_drop: float,
    w_base: float,
    eps: float,
    metric: str,
    top_p: float,
    reward_weight: str,
    student_temperature: float,
    teacher_temperature: float,
    vocab_size: int | None,
    float64: bool = False,
    values: bool = False,
) -> None:
    op = "reliability"
    if student_logits.ndim not in (2, 3):
        bad_value(op, "student_logits", "have shape [B, T, V] or [N, V]", list(student_logits.shape))
    _logits(op, student_logits, teacher_logits, float64)
    per_position = student_logits.shape[:-1]
    mask_of_positions(op, mask, student_logits, per_position)
    ids_of_positions(op, token_ids, student_logits, per_position)
    responses(op, cu_seqlens, drift_count, student_logits, per_position, "student_logits are {}, V]")
    vocab_size = _vocab_size(op, student_logits, teacher_logits, vocab_size)
    number_of_candidates(op, k, vocab_size)
    unit(op, "threshold", threshold)
    not_negative(op, w_drop=w_drop, w_base=w_base, eps=eps)
    metric_and_its_needs(op, metric, token_ids=token_ids)
    unit(op, "top_p", top_p)
    one_of(op, "reward_weight", reward_weight, REWARD_WEIGHTS)
    positive(op, student_temperature=student_temperature, teacher_temperature=teacher_temperature)
    if values:
        if metric == "top_p":
            token_id_values(op, token_ids, mask, vocab_size)
        response_values(op, cu_seqlens, drift_count, per_position)


def reliability_from_topk(
    *,
    student_topk_ids: Any,
    teacher_topk_ids: Any,
    mask: Any,
    teacher_topk_logprobs: Any,
    token_ids: Any,
    cu_seqlens: Any,
    drift_count: Any,
    threshold: float,
    w_drop: float,
    w_base: float,
    eps: float,
    metric: str,
    top_p: float,
    values: bool = False,
) -> None:
    op = "reliability_from_topk"
    ids = student_topk_ids
    if ids.ndim not in (2, 3) or not 1 <= ids.shape[-1] <= MAX_K:
        rule = f"have shape [B, T, k] or [N, k] with 1 <= k <= {MAX_K}"
        bad_value(op, "student_topk_ids", rule, list(ids.shape))
    has_dtype(op, "student_topk_ids", ids, IDS)
    has_shape(op, "teacher_topk_ids", teacher_topk_ids, ids.shape)
    has_dtype(op, "teacher_topk_ids", teacher_topk_ids, IDS)
    same_device(op, "teacher_topk_ids", teacher_topk_ids, ids)
    per_position = ids.shape[:-1]
    mask_of_positions(op, mask, ids, per_position)
    if teacher_topk_logprobs is not None:
        has_shape(op, "teacher_topk_logprobs", teacher_topk_logprobs, ids.shape)
        has_dtype(op, "teacher_topk_logprobs", teacher_topk_logprobs, FLOATS)
        same_device(op, "teacher_topk_logprobs", teacher_topk_logprobs, ids)
    ids_of_positions(op, token_ids, ids, per_position)
    responses(op, cu_seqlens, drift_count, ids, per_position, "student_topk_ids are {}, k]")
    unit(op, "threshold", threshold)
    not_negative(op, w_drop=w_drop, w_base=w_base, eps=eps)
    metric_and_its_needs(op, metric, teacher_topk_logprobs=teacher_topk_logprobs, token_ids=token_ids)
    unit(op, "top_p", top_p)
    if values:
        response_values(op, cu_seqlens, drift_count, per_position)


def reliability_from_drift(
    *,
    drift: Any,
    mask: Any,
    cu_seqlens: Any,
    drift_count: Any,
    w_drop: float,
    w_base: float,
    eps: float,
    values: bool = False,
) -> None:
    op = "reliability_from_drift"
    if drift.ndim not in (1, 2):
        bad_value(op, "drift", "have shape [B, T] or [N]", list(drift.shape))
    has_dtype(op, "drift", drift, ("bool",))
    mask_of_positions(op, mask, drift, drift.shape)
    responses(op, cu_seqlens, drift_count, drift, drift.shape, "drift is {}]")
    not_negative(op, w_drop=w_drop, w_base=w_base, eps=eps)
    if values:
        response_values(op, cu_seqlens, drift_count, drift.shape)


def token_stats(
    *,
    student_logits: Any,
    teacher_logits: Any,
    mask: Any,
    token_ids: Any,
    k: int,
    student_temperature: float,
    teacher_temperature: float,
    vocab_size: int | None,
    float64: bool = False,
    values: bool = False,
) -> None:
    op = "token_stats"  # a negative token id is as good as none, so there are no values to look at
    _logits(op, student_logits, teacher_logits, float64)
    per_position = student_logits.shape[:-1]
    mask_of_positions(op, mask, student_logits, per_position)
    ids_of_positions(op, token_ids, student_logits, per_position)
    vocab_size = _vocab_size(op, student_logits, teacher_logits, vocab_size)
    number_of_candidates(op, k, vocab_size)
    positive(op, student_temperature=student_temperature, teacher_temperature=teacher_temperature)


def topk_policy_loss(
    *,
    student_logits: Any,
    topk_ids: Any,
    advantages: Any,
    mask: Any,
    old_logprobs: Any,
    clip_low: float,
    clip_high: float,
    clip_dual: float,
    student_temperature: float,
    vocab_size: int | None,
    float64: bool = False,
    values: bool = False,
) -> None:
    op = "topk_policy_loss"
    _student_logits(op, student_logits, float64)
    per_position = student_logits.shape[:-1]
    _candidates(op, "topk_ids", topk_ids, student_logits, MAX_POLICY_CANDIDATES, "m")
    _floats(op, "advantages", advantages, topk_ids)
    mask_of_positions(op, mask, student_logits, per_position)
    if old_logprobs is not None:
        _floats(op, "old_logprobs", old_logprobs, topk_ids)
    if not 0 <= clip_low <= 1:
        bad_value(op, "clip_low", "be in [0, 1]", clip_low)
    not_negative(op, clip_high=clip_high)
    if not clip_dual > 1:
        bad_value(op, "clip_dual", "be > 1", clip_dual)
    positive(op, student_temperature=student_temperature)
    vocab_size = _student_vocab_size(op, student_logits, vocab_size)
    if values:
        candidate_values(op, "topk_ids", topk_ids, mask, vocab_size)


def reverse_kl(
    *,
    student_logits: Any,
    teacher_logits: Any,
    mask: Any,
    weight: Any,
    student_temperature: float,
    teacher_temperature: float,
    vocab_size: int | None,
    float64: bool = False,
    values: bool = False,
) -> None:
    op = "reverse_kl"  # a weight may be anything, so there are no values to look at
    _logits(op, student_logits, teacher_logits, float64)
    per_position = student_logits.shape[:-1]
    mask_of_positions(op, mask, student_logits, per_position)
    if weight is not None:
        has_shape(op, "weight", weight, per_position)
        has_dtype(op, "weight", weight, FLOATS)
        same_device(op, "weight", weight, student_logits)
    positive(op, student_temperature=student_temperature, teacher_temperature=teacher_temperature)
    _vocab_size(op, student_logits, teacher_logits, vocab_size)


def topk_forward_kl(
    *,
    student_logits: Any,
    teacher_topk_ids: Any,
    teacher_topk_logprobs: Any,
    mask: Any,
    logprob_min: float | None,
    student_temperature: float,
    vocab_size: int | None,
    float64: bool = False,
    values: bool = False,
) -> None:
    op = "topk_forward_kl"
    _student_logits(op, student_logits, float64)
    per_position = student_logits.shape[:-1]
    _candidates(op, "teacher_topk_ids", teacher_topk_ids, student_logits, MAX_K, "k")
    _floats(op, "teacher_topk_logprobs", teacher_topk_logprobs, teacher_topk_ids)
    mask_of_positions(op, mask, student_logits, per_position)
    if logprob_min is not None and not math.isfinite(logprob_min):
        bad_value(op, "logprob_min", "be finite", logprob_min)
    positive(op, student_temperature=student_temperature)
    vocab_size = _student_vocab_size(op, student_logits, vocab_size)
    k = teacher_topk_ids.shape[-1]
    if k > vocab_size:
        bad_value(op, "teacher_topk_ids", f"have at most vocab_size = {vocab_size} candidates", k)
    if values:
        candidate_values(op, "teacher_topk_ids", teacher_topk_ids, mask, vocab_size)


def kinds(op: str, arguments: Mapping[str, Any], array: type, noun: str) -> None:
    """Whether every argument is of the kind that the schema says: what the dispatcher refuses in words of its own."""
    for argument, value in arguments.items():
        kind(op, argument, value, ARGUMENTS[op][argument], array, noun)


def kind(op: str, argument: str, value: Any, wanted: str, array: type = object, noun: str = "") -> None:
    """Whether one argument is of a kind as schemas name them; `noun` is what a Tensor is called here."""
    if value is None and wanted.endswith("?"):
        return
    if wanted.startswith("Tensor"):
        held = isinstance(value, array)
    elif wanted == "str":
        held, noun = isinstance(value, str), "a str"
    elif wanted == "bool":
        held, noun = isinstance(value, bool), "a bool"
    elif wanted.startswith("float"):
        held, noun = hasattr(value, "__float__"), "a float"
    else:
        held, noun = hasattr(value, "__index__"), "an int"
    if not held:
        bad_type(op, argument, f"be {noun}", type(value).__name__)


# One argument each: shapes, dtypes, devices.


def has_shape(op: str, argument: str, array: Any, shape: Sequence[int]) -> None:
    if list(array.shape) != list(shape):
        bad_value(op, argument, f"have shape {list(shape)}", list(array.shape))


def has_dtype(op: str, argument: str, array: Any, allowed: Sequence[str], words: str = "") -> None:
    dtype = str(array.dtype).removeprefix("torch.")
    if dtype not in allowed:
        bad_type(op, argument, f"have dtype {words or _either(allowed)}", dtype)


def same_device(op: str, argument: str, array: Any, like: Any) -> None:
    device, wanted = (getattr(tensor, "device", "cpu") for tensor in (array, like))  # NumPy 1 knows no devices
    if device != wanted:
        bad_value(op, argument, f"be on {wanted}", device)


def _logits(op: str, student_logits: Any, teacher_logits: Any, float64: bool) -> None:
    _student_logits(op, student_logits, float64)
    leading = list(student_logits.shape[:-1])
    if teacher_logits.ndim != student_logits.ndim or list(teacher_logits.shape[:-1]) != leading:
        words = ", ".join(str(size) for size in [*leading, "V"])
        bad_value(op, "teacher_logits", f"have shape [{words}]", list(teacher_logits.shape))
    has_dtype(op, "teacher_logits", teacher_logits, FLOATS if float64 else LOGITS)
    same_device(op, "teacher_logits", teacher_logits, student_logits)
    _contiguous_rows(op, "teacher_logits", teacher_logits)


def _student_logits(op: str, student_logits: Any, float64: bool) -> None:
    if student_logits.ndim < 1:
        bad_value(op, "student_logits", "have shape [..., V]", list(student_logits.shape))
    has_dtype(op, "student_logits", student_logits, FLOATS if float64 else LOGITS)
    _contiguous_rows(op, "student_logits", student_logits)


def _candidates(op: str, argument: str, ids: Any, student_logits: Any, most: int, letter: str) -> None:
    leading = list(student_logits.shape[:-1])
    if ids.ndim != student_logits.ndim or list(ids.shape[:-1]) != leading or not 1 <= ids.shape[-1] <= most:
        words = ", ".join(str(size) for size in [*leading, letter])
        bad_value(op, argument, f"have shape [{words}] with 1 <= {letter} <= {most}", list(ids.shape))
    has_dtype(op, argument, ids, IDS)
    same_device(op, argument, ids, student_logits)


def _floats(op: str, argument: str, array: Any, like: Any) -> None:
    """One float for each candidate."""
    has_shape(op, argument, array, like.shape)
    has_dtype(op, argument, array, FLOATS)
    same_device(op, argument, array, like)


def _contiguous_rows(op: str, argument: str, array: Any) -> None:
    if array.shape[-1] > 1:
        stride = array.stride(-1) if hasattr(array, "stride") else array.strides[-1] // array.itemsize
        if stride != 1 and 0 not in array.shape:  # an empty array may have any strides
            bad_value(op, argument, "have stride 1 on its last axis", stride)


def mask_of_positions(op: str, mask: Any, like: Any, shape: Sequence[int]) -> None:
    if mask is not None:
        has_shape(op, "mask", mask, shape)
        has_dtype(op, "mask", mask, ("bool", *INTEGERS, *FLOATS), "bool, integer or float")
        same_device(op, "mask", mask, like)


def ids_of_positions(op: str, token_ids: Any, like: Any, shape: Sequence[int]) -> None:
    if token_ids is not None:
        has_shape(op, "token_ids", token_ids, shape)
        has_dtype(op, "token_ids", token_ids, IDS)
        same_device(op, "token_ids", token_ids, like)


def responses(
    op: str, cu_seqlens: Any, drift_count: Any, like: Any, shape: Sequence[int], layout: str, carry: str = "drift_count"
) -> None:
    """Whether positions of this shape make up responses; `layout` says in words which tensor decides about packing."""
    if len(shape) == 1:
        if cu_seqlens is None:
            bad_value(op, "cu_seqlens", f"be given when {layout.format('[N')}", None)
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
            bad_value(op, "cu_seqlens", "have shape [B + 1]", list(cu_seqlens.shape))
        has_dtype(op, "cu_seqlens", cu_seqlens, ("int32",))
        same_device(op, "cu_seqlens", cu_seqlens, like)
    elif cu_seqlens is not None:
        bad_value(op, "cu_seqlens", f"be None when {layout.format('[B, T')}", f"shape {list(cu_seqlens.shape)}")
    if drift_count is not None:
        has_shape(op, carry, drift_count, [shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1])
        has_dtype(op, carry, drift_count, ("int32",))
        same_device(op, carry, drift_count, like)


# One scalar each.


def one_of(op: str, argument: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        bad_value(op, argument, f"be one of {', '.join(map(repr, allowed))}", repr(value))


def between(op: str, argument: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        bad_value(op, argument, f"be between {lowest} and {highest}", value)


def at_least(op: str, argument: str, value: int, lowest: int, what: str = "") -> None:
    if not value >= lowest:
        bad_value(op, argument, f"be >= {what}{lowest}", value)


def unit(op: str, argument: str, value: float) -> None:
    if not 0 < value <= 1:
        bad_value(op, argument, "be in (0, 1]", value)


def not_negative(op: str, **arguments: float) -> None:
    for argument, value in arguments.items():
        if not (math.isfinite(value) and value >= 0):
            bad_value(op, argument, "be finite and >= 0", value)


def positive(op: str, **arguments: float) -> None:
    for argument, value in arguments.items():
        if not (math.isfinite(value) and value > 0):
            bad_value(op, argument, "be finite and > 0", value)


def _vocab_size(op: str, student_logits: Any, teacher_logits: Any, vocab_size: int | None) -> int:
    student_width, teacher_width = student_logits.shape[-1], teacher_logits.shape[-1]
    if vocab_size is None:
        if student_width != teacher_width:
            rule = "be given when the last axes of student_logits and teacher_logits differ"
            bad_value(op, "vocab_size", rule, f"{student_width} and {teacher_width}")
        vocab_size = student_width
    width = min(student_width, teacher_width)
    if not 1 <= vocab_size <= width:
        bad_value(op, "vocab_size", f"be between 1 and min(student, teacher) width = {width}", vocab_size)
    return vocab_size


def _student_vocab_size(op: str, student_logits: Any, vocab_size: int | None) -> int:
    width: int = student_logits.shape[-1]
    if vocab_size is None:
        vocab_size = width
    if not 1 <= vocab_size <= width:
        bad_value(op, "vocab_size", f"be between 1 and the student's width = {width}", vocab_size)
    return vocab_size


def number_of_candidates(op: str, k: int, vocab_size: int) -> None:
    largest = min(vocab_size, MAX_K)
    if not 1 <= k <= largest:
        bad_value(op, "k", f"be between 1 and min(vocab_size, {MAX_K}) = {largest}", k)


def metric_and_its_needs(op: str, metric: str, **needed_by_top_p: Any) -> None:
    one_of(op, "metric", metric, METRICS)
    for argument, value in needed_by_top_p.items():
        if metric == "top_p" and value is None:
            bad_value(op, argument, "be given when metric is 'top_p'", None)


# Values inside tensors.


def token_id_values(op: str, token_ids: Any, mask: Any, vocab_size: int) -> None:
    outside = (token_ids < 0) | (token_ids >= vocab_size)
    if mask is not None:
        outside = outside & (mask != 0)
    if outside.any():
        rule = f"be between 0 and vocab_size - 1 = {vocab_size - 1} where the position is valid"
        bad_value(op, "token_ids", rule, int(token_ids[outside][0]))


def candidate_values(op: str, argument: str, ids: Any, mask: Any, vocab_size: int) -> None:
    outside = ids >= vocab_size  # below 0 is padding
    if mask is not None:
        outside = outside & (mask != 0)[..., None]
    if outside.any():
        rule = f"be below vocab_size = {vocab_size} where the position is valid"
        bad_value(op, argument, rule, int(ids[outside][0]))


def response_values(
    op: str, cu_seqlens: Any, drift_count: Any, shape: Sequence[int], carry: str = "drift_count"
) -> None:
    if cu_seqlens is not None:
        ends, positions = cu_seqlens.tolist(), shape[0]
        if ends[0] != 0:
            bad_value(op, "cu_seqlens", "start at 0", ends[0])
        if ends[-1] != positions:
            bad_value(op, "cu_seqlens", f"end at N = {positions}", ends[-1])
        for before, after in pairwise(ends):
            if after < before:
                bad_value(op, "cu_seqlens", "be non-decreasing", f"{before} before {after}")
    if drift_count is not None and (drift_count < 0).any():
        bad_value(op, carry, "be >= 0", int(drift_count.min()))


# The words.


def bad_value(op: str, argument: str, rule: str, actual: object) -> NoReturn:
    raise InvalidValue(f"{op}: {argument} must {rule}, got {actual}")


def bad_type(op: str, argument: str, rule: str, actual: object) -> NoReturn:
    raise InvalidType(f"{op}: {argument} must {rule}, got {actual}")


def _either(words: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
