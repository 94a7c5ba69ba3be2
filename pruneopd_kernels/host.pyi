# Written by scripts/stubs.py from the declarations in pruneopd_kernels/ops.
# fmt: off
from typing import Any

import numpy as np

from .checks import Metric, RewardWeight
from .ops import Reliability, ReliabilityFromDrift, ReliabilityFromTopk, TokenStats

Array = np.ndarray[Any, np.dtype[Any]]
WHY_NOT: str | None

def reliability(
    student_logits: Array, teacher_logits: Array, mask: Array | None = ..., *, token_ids: Array | None = ...,
    cu_seqlens: Array | None = ..., drift_count: Array | None = ..., k: int = ..., threshold: float = ...,
    w_drop: float = ..., w_base: float = ..., eps: float = ..., metric: Metric = ..., top_p: float = ...,
    reward_weight: RewardWeight = ..., student_temperature: float = ..., teacher_temperature: float = ...,
    vocab_size: int | None = ..., num_threads: int | None = ...,
) -> Reliability: ...
def reliability_from_drift(
    drift: Array, mask: Array | None = ..., *, cu_seqlens: Array | None = ..., drift_count: Array | None = ...,
    w_drop: float = ..., w_base: float = ..., eps: float = ..., num_threads: int | None = ...,
) -> ReliabilityFromDrift: ...
def reliability_from_topk(
    student_topk_ids: Array, teacher_topk_ids: Array, mask: Array | None = ..., *,
    student_topk_logprobs: Array | None = ..., teacher_topk_logprobs: Array | None = ...,
    token_ids: Array | None = ..., cu_seqlens: Array | None = ..., drift_count: Array | None = ...,
    threshold: float = ..., w_drop: float = ..., w_base: float = ..., eps: float = ..., metric: Metric = ...,
    top_p: float = ..., num_threads: int | None = ...,
) -> ReliabilityFromTopk: ...
def token_stats(
    student_logits: Array, teacher_logits: Array, mask: Array | None = ..., *, token_ids: Array | None = ...,
    k: int = ..., student_temperature: float = ..., teacher_temperature: float = ..., vocab_size: int | None = ...,
    num_threads: int | None = ...,
) -> TokenStats: ...
