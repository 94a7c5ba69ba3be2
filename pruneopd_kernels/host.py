"""The operators over NumPy arrays, by the compiled core that the torch operators use; torch is not needed.

The functions take and return what their namesakes in `pruneopd_kernels` do, with NumPy arrays for tensors: bfloat16
logits are arrays of `ml_dtypes.bfloat16`. Results are the same, bit for bit, and do not depend on `num_threads`.
"""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from . import checks
from .checks import Metric, RewardWeight
from .results import Reliability, ReliabilityFromDrift, ReliabilityFromTopk, TokenStats
from .schemas import ARGUMENTS

Array = np.ndarray[Any, np.dtype[Any]]


def _load() -> tuple[ModuleType | None, str | None]:
    """The compiled module, or why it is not usable and what would help."""
    try:
        return import_module("._host", __package__), None
    except ImportError as error:
        return None, f"{error}; installing the package where a C++20 compiler is found builds it"


_HOST, WHY_NOT = _load()


def reliability(
    student_logits: Array,
    teacher_logits: Array,
    mask: Array | None = None,
    *,
    token_ids: Array | None = None,
    cu_seqlens: Array | None = None,
    drift_count: Array | None = None,
    k: int = 16,
    threshold: float = 0.7,
    w_drop: float = 0.01,
    w_base: float = 0.5,
    eps: float = 1e-8,
    metric: Metric = "overlap",
    top_p: float = 0.95,
    reward_weight: RewardWeight = "student",
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    vocab_size: int | None = None,
    num_threads: int | None = None,
) -> Reliability:
    """`pruneopd_kernels.reliability` over NumPy arrays (eq. 6-12, 14-16).

    Args:
        student_logits: float32, `ml_dtypes.bfloat16` or float16 `[B, T, V]` or `[N, V]`; stride 1 on the last axis.
        teacher_logits: the same but for V and the dtype, which may differ.
        mask: bool, integer or float `[B, T]` or `[N]`; non-zero where a position is valid.
        token_ids: int32 or int64 `[B, T]` or `[N]`; for `metric="top_p"`.
        cu_seqlens: int32 `[B + 1]`, required exactly when positions are packed.
        drift_count: int32 `[B]`, what C starts from.
        k: Candidates per position, 1 to min(vocab_size, 256).
        threshold: A position drifts where its overlap is below this, in (0, 1].
        w_drop: Reliability lost with each drift, >= 0.
        w_base: What is added to the reliability to give the weight, >= 0.
        eps: A position counts towards E where its R exceeds this, >= 0.
        metric: `"overlap"` or `"top_p"` decides about drift.
        top_p: Mass of the teacher's nucleus, in (0, 1].
        reward_weight: Rewards are weighted by the `"student"`'s or the `"teacher"`'s probabilities, or `"none"`.
        student_temperature: What the student's logits are divided by, > 0.
        teacher_temperature: The same for the teacher.
        vocab_size: Only ids below it exist; required where the last axes differ. None: V.
        num_threads: Threads to compute with, >= 1. None: one for every processor that this process may use.

    Returns:
        `Reliability` of NumPy arrays. Equal logits: the lower id first.

    Raises:
        ValueError: A shape or a value is not allowed.
        TypeError: A dtype is not allowed, or an argument is not an array.
        RuntimeError: The compiled module is not usable here.

    Examples:
        >>> import numpy as np
        >>> from pruneopd_kernels import host
        >>> student = np.random.default_rng(0).standard_normal((2, 5, 100), dtype=np.float32)
        >>> host.reliability(student, -student, k=4, w_drop=0.25).effective_length
        array([3, 3], dtype=int32)
    """
    outputs = _run(
        "reliability",
        num_threads,
        student_logits=student_logits,
        teacher_logits=teacher_logits,
        mask=mask,
        token_ids=token_ids,
        cu_seqlens=cu_seqlens,
        drift_count=drift_count,
        k=k,
        threshold=threshold,
        w_drop=w_drop,
        w_base=w_base,
        eps=eps,
        metric=metric,
        top_p=top_p,
        reward_weight=reward_weight,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        vocab_size=vocab_size,
    )
    return Reliability(*outputs)


def reliability_from_topk(
    student_topk_ids: Array,
    teacher_topk_ids: Array,
    mask: Array | None = None,
    *,
    teacher_topk_logprobs: Array | None = None,
    token_ids: Array | None = None,
    cu_seqlens: Array | None = None,
    drift_count: Array | None = None,
    threshold: float = 0.7,
    w_drop: float = 0.01,
    w_base: float = 0.5,
    eps: float = 1e-8,
    metric: Metric = "overlap",
    top_p: float = 0.95,
    num_threads: int | None = None,
) -> ReliabilityFromTopk:
    """`pruneopd_kernels.reliability_from_topk` over NumPy arrays (eq. 6-10, 12, 14-16).

    Args:
        student_topk_ids: int32 or int64 `[B, T, k]` or `[N, k]`; an id below 0 is padding.
        teacher_topk_ids: int32 or int64 of the same shape.
        mask: bool, integer or float `[B, T]` or `[N]`; non-zero where a position is valid.
        teacher_topk_logprobs: float `[..., k]`, natural logarithms; for `metric="top_p"`.
        token_ids: int32 or int64 `[B, T]` or `[N]`; for `metric="top_p"`.
        cu_seqlens: int32 `[B + 1]`, required exactly when positions are packed.
        drift_count: int32 `[B]`, what C starts from.
        threshold: A position drifts where its overlap is below this, in (0, 1].
        w_drop: Reliability lost with each drift, >= 0.
        w_base: What is added to the reliability to give the weight, >= 0.
        eps: A position counts towards E where its R exceeds this, >= 0.
        metric: `"overlap"` or `"top_p"` decides about drift.
        top_p: Mass of the teacher's nucleus, in (0, 1].
        num_threads: Threads to compute with, >= 1. None: one for every processor that this process may use.

    Returns:
        `ReliabilityFromTopk` of NumPy arrays.

    Raises:
        ValueError: A shape or a value is not allowed.
        TypeError: A dtype is not allowed, or an argument is not an array.
        RuntimeError: The compiled module is not usable here.

    Examples:
        >>> import numpy as np
        >>> from pruneopd_kernels import host
        >>> host.reliability_from_topk(np.array([[[4, 2], [7, 1]]]), np.array([[[2, 4], [7, 0]]])).overlap
        array([[1. , 0.5]], dtype=float32)
    """
    outputs = _run(
        "reliability_from_topk",
        num_threads,
        student_topk_ids=student_topk_ids,
        teacher_topk_ids=teacher_topk_ids,
        mask=mask,
        teacher_topk_logprobs=teacher_topk_logprobs,
        token_ids=token_ids,
        cu_seqlens=cu_seqlens,
        drift_count=drift_count,
        threshold=threshold,
        w_drop=w_drop,
        w_base=w_base,
        eps=eps,
        metric=metric,
        top_p=top_p,
    )
    return ReliabilityFromTopk(*outputs)


def reliability_from_drift(
    drift: Array,
    mask: Array | None = None,
    *,
    cu_seqlens: Array | None = None,
    drift_count: Array | None = None,
    w_drop: float = 0.01,
    w_base: float = 0.5,
    eps: float = 1e-8,
    num_threads: int | None = None,
) -> ReliabilityFromDrift:
    """`pruneopd_kernels.reliability_from_drift` over NumPy arrays (eq. 8-10, 12).

    Args:
        drift: bool `[B, T]` or `[N]`.
        mask: bool, integer or float of drift's shape; non-zero where a position is valid.
        cu_seqlens: int32 `[B + 1]`, required exactly when drift is packed.
        drift_count: int32 `[B]`, what C starts from.
        w_drop: Reliability lost with each drift, >= 0.
        w_base: What is added to the reliability to give the weight, >= 0.
        eps: A position counts towards E where its R exceeds this, >= 0.
        num_threads: Threads to compute with, >= 1. None: one for every processor that this process may use.

    Returns:
        `ReliabilityFromDrift` of NumPy arrays.

    Raises:
        ValueError: A shape or a value is not allowed.
        TypeError: A dtype is not allowed, or an argument is not an array.
        RuntimeError: The compiled module is not usable here.

    Examples:
        >>> import numpy as np
        >>> from pruneopd_kernels import host
        >>> host.reliability_from_drift(np.array([[True, False, True]]), w_drop=0.5).reliability
        array([[0.5, 0.5, 0. ]], dtype=float32)
    """
    outputs = _run(
        "reliability_from_drift",
        num_threads,
        drift=drift,
        mask=mask,
        cu_seqlens=cu_seqlens,
        drift_count=drift_count,
        w_drop=w_drop,
        w_base=w_base,
        eps=eps,
    )
    return ReliabilityFromDrift(*outputs)


def token_stats(
    student_logits: Array,
    teacher_logits: Array,
    mask: Array | None = None,
    *,
    token_ids: Array | None = None,
    k: int = 16,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    vocab_size: int | None = None,
    num_threads: int | None = None,
) -> TokenStats:
    """`pruneopd_kernels.token_stats` over NumPy arrays (eq. 6).

    Args:
        student_logits: float32, `ml_dtypes.bfloat16` or float16 `[..., V]`; stride 1 on the last axis.
        teacher_logits: the same but for V and the dtype, which may differ.
        mask: bool, integer or float `[...]`; non-zero where a position is valid.
        token_ids: int32 or int64 `[...]`; a negative one means that there is none.
        k: Candidates per position, 1 to min(vocab_size, 256).
        student_temperature: What the student's logits are divided by, > 0.
        teacher_temperature: The same for the teacher.
        vocab_size: Only ids below it exist; required where the last axes differ. None: V.
        num_threads: Threads to compute with, >= 1. None: one for every processor that this process may use.

    Returns:
        `TokenStats` of NumPy arrays. Equal logits: the lower id first.

    Raises:
        ValueError: A shape or a value is not allowed.
        TypeError: A dtype is not allowed, or an argument is not an array.
        RuntimeError: The compiled module is not usable here.

    Examples:
        >>> import numpy as np
        >>> from pruneopd_kernels import host
        >>> student, teacher = np.array([[0, 2, 1]], np.float32), np.array([[1, 2, 0]], np.float32)
        >>> host.token_stats(student, teacher, k=2).student_topk_ids
        array([[1, 2]])
    """
    outputs = _run(
        "token_stats",
        num_threads,
        student_logits=student_logits,
        teacher_logits=teacher_logits,
        mask=mask,
        token_ids=token_ids,
        k=k,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        vocab_size=vocab_size,
    )
    return TokenStats(*outputs)


def _run(op: str, num_threads: int | None, **arguments: Any) -> Any:
    checks.kinds(op, arguments, np.ndarray, "an array")
    checks.kind(op, "num_threads", num_threads, "int?")
    for name, value in arguments.items():
        if isinstance(value, np.ndarray) and not value.flags.aligned:
            checks.bad_value(op, name, "be aligned to its elements in memory", "an unaligned array")
    getattr(checks, op)(**arguments, values=True)
    if num_threads is None:
        num_threads = _processors()
    checks.at_least(op, "num_threads", num_threads, 1)
    if WHY_NOT is not None:
        raise RuntimeError(f"{op}: pruneopd_kernels.host is not usable here: {WHY_NOT}")
    if arguments.get("vocab_size", 0) is None:
        arguments["vocab_size"] = arguments["student_logits"].shape[-1]
    tensors = [value for name, value in arguments.items() if ARGUMENTS[op][name].startswith("Tensor")]
    scalars = {name: value for name, value in arguments.items() if not ARGUMENTS[op][name].startswith("Tensor")}
    return getattr(_HOST, op)(*tensors, **scalars, num_threads=num_threads)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
