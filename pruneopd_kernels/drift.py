"""Drift where only a sampled token's log-probabilities are known, and the carry between chunks of a response."""

import torch
from torch import Tensor

from . import checks
from .formulas import has_values, response_ends, valid_positions


@torch.no_grad()
def sampled_drift(
    student_logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor | None = None, *, max_log_ratio: float
) -> Tensor:
    """Return where a response drifts, judged by the sampled tokens alone: the input of `reliability_from_drift`.

        B = log p(token) - log q(token) > max_log_ratio

    What remains possible where the teacher answers with the log-probability of the actual token only. It takes the
    place of eq. 7 and 14-16 of Prune-OPD (arXiv:2605.07804).

    Args:
        student_logprobs: float, any shape: log p of each token of the response, in nats.
        teacher_logprobs: float, the same shape: log q.
        mask: bool, integer or float, the same shape; non-zero where a position is valid. None: all positions are valid.
        max_log_ratio: The largest log p - log q that is not drift, in nats; finite.

    Returns:
        bool, the same shape; False where masked. Where a log-probability is NaN the token is not accepted: True.

    Raises:
        ValueError: A shape or a value is not allowed.
        TypeError: A dtype is not allowed.

    Examples:
        >>> import torch
        >>> from pruneopd_kernels import sampled_drift
        >>> sampled_drift(torch.tensor([[-1.0, -0.5]]), torch.tensor([[-1.5, -6.0]]), max_log_ratio=2.0)
        tensor([[False,  True]])
    """
    if not torch.compiler.is_compiling():
        op = "sampled_drift"
        checks.kind(op, "student_logprobs", student_logprobs, "Tensor", Tensor, "a tensor")
        checks.kind(op, "teacher_logprobs", teacher_logprobs, "Tensor", Tensor, "a tensor")
        checks.kind(op, "mask", mask, "Tensor?", Tensor, "a tensor")
        checks.kind(op, "max_log_ratio", max_log_ratio, "float")
        checks.has_dtype(op, "student_logprobs", student_logprobs, checks.FLOATS)
        checks.has_one_for_each(op, "teacher_logprobs", teacher_logprobs, student_logprobs, student_logprobs.shape)
        checks.mask_of_positions(op, mask, student_logprobs, student_logprobs.shape)
        checks.number(op, "max_log_ratio", max_log_ratio, "be finite")
    log_ratio = student_logprobs.to(torch.float64) - teacher_logprobs.to(torch.float64)
    accepted = log_ratio <= max_log_ratio
    return ~accepted & valid_positions(mask, student_logprobs, student_logprobs.shape)


@torch.no_grad()
def next_drift_count(
    drift_count: Tensor, cu_seqlens: Tensor | None = None, drift_count_in: Tensor | None = None
) -> Tensor:
    """Return what the next chunk of each response starts from: the last C (eq. 8) of this one.

    Args:
        drift_count: int32 `[B, T]` (padded) or `[N]` (packed): the field `drift_count` of this chunk's outputs.
        cu_seqlens: int32 or int64 `[B + 1]`, required exactly when positions are packed, as this chunk had it.
        drift_count_in: int32 `[B]`: what this chunk started from, which an empty response hands on. None: 0.

    Returns:
        int32 `[B]`: the argument `drift_count` of the next chunk.

    Raises:
        ValueError: A shape or a value is not allowed.
        TypeError: A dtype is not allowed.

    Examples:
        >>> import torch
        >>> from pruneopd_kernels import next_drift_count, reliability_from_drift
        >>> drift = torch.tensor([[True, False, True, True]])
        >>> first = reliability_from_drift(drift[:, :2])
        >>> second = reliability_from_drift(drift[:, 2:], drift_count=next_drift_count(first.drift_count))
        >>> second.drift_count
        tensor([[2, 3]], dtype=torch.int32)
    """
    if not torch.compiler.is_compiling():
        op = "next_drift_count"
        checks.kind(op, "drift_count", drift_count, "Tensor", Tensor, "a tensor")
        checks.kind(op, "cu_seqlens", cu_seqlens, "Tensor?", Tensor, "a tensor")
        checks.kind(op, "drift_count_in", drift_count_in, "Tensor?", Tensor, "a tensor")
        if drift_count.ndim not in (1, 2):
            checks.bad_value(op, "drift_count", "have shape [B, T] or [N]", list(drift_count.shape))
        checks.has_dtype(op, "drift_count", drift_count, ("int32",))
        shape, layout = drift_count.shape, "drift_count is {}]"
        checks.responses(op, cu_seqlens, drift_count_in, drift_count, shape, layout, carry="drift_count_in")
        if has_values(drift_count):
            checks.response_values(op, cu_seqlens, drift_count_in, shape, carry="drift_count_in")
    ends = response_ends(drift_count.shape, cu_seqlens, drift_count.device)
    if drift_count_in is None:
        drift_count_in = drift_count.new_zeros(len(ends) - 1)
    last = torch.cat([drift_count.new_zeros(1), drift_count.flatten()])[ends[1:]]
    return torch.where(ends[1:] > ends[:-1], last, drift_count_in)
