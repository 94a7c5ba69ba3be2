"""Drift of sampled tokens, and the carry between chunks of a response."""

import pytest
import torch

from pruneopd_kernels import next_drift_count, reliability_from_drift, sampled_drift

INF = float("inf")
COUNTS = torch.tensor([3, 4, 0, 1, 2], dtype=torch.int32)


def test_sampled_drift():
    student = torch.tensor([[-1.0, -1.0, -1.0, -3.0, -2.0]])
    teacher = torch.tensor([[-1.5, -3.5, -INF, -1.0, -4.5]])
    result = sampled_drift(student, teacher, max_log_ratio=2.5)
    assert result.dtype == torch.bool
    assert result.tolist() == [[False, False, True, False, False]]  # 2.5 itself is no drift
    assert sampled_drift(student, teacher, max_log_ratio=2.0).tolist() == [[False, True, True, False, True]]
    mask = torch.tensor([[1, 1, 0, 1, 0]])
    assert sampled_drift(student, teacher, mask, max_log_ratio=2.0).tolist() == [[False, True, False, False, False]]
    assert sampled_drift(torch.tensor([[torch.nan]]), torch.zeros(1, 1), max_log_ratio=2.0).all()


def test_next_drift_count():
    counts = torch.tensor([[1, 1, 2], [0, 0, 0], [5, 6, 7]], dtype=torch.int32)
    carry = next_drift_count(counts)
    assert carry.dtype == torch.int32 and carry.tolist() == [2, 0, 7]
    assert next_drift_count(counts, drift_count_in=torch.tensor([9, 9, 9], dtype=torch.int32)).tolist() == [2, 0, 7]
    none = torch.zeros(3, 0, dtype=torch.int32)
    assert next_drift_count(none).tolist() == [0, 0, 0]
    assert next_drift_count(none, drift_count_in=torch.tensor([4, 0, 9], dtype=torch.int32)).tolist() == [4, 0, 9]
    assert next_drift_count(torch.zeros(0, 5, dtype=torch.int32)).tolist() == []
    ends = torch.tensor([0, 0, 2, 2, 5], dtype=torch.int32)
    assert next_drift_count(COUNTS, ends).tolist() == next_drift_count(COUNTS, ends.long()).tolist() == [0, 4, 0, 2]
    carry = next_drift_count(COUNTS, ends, torch.tensor([7, 1, 8, 0], dtype=torch.int32))
    assert carry.dtype == torch.int32 and carry.tolist() == [7, 4, 8, 2]


def test_next_drift_count_is_the_carry_of_packed_chunks():
    """Three responses in two packed chunks, the middle one over before the second begins."""
    drift = torch.rand(3, 10) < 0.5
    lengths = [10, 4, 7]
    whole = reliability_from_drift(drift).drift_count
    first = torch.cat([drift[b, : min(5, n)] for b, n in enumerate(lengths)])
    ends = torch.tensor([0, 5, 9, 14], dtype=torch.int32)
    carry = next_drift_count(reliability_from_drift(first, cu_seqlens=ends).drift_count, ends)
    second = torch.cat([drift[b, 5:n] for b, n in enumerate(lengths)])
    ends = torch.tensor([0, 5, 5, 7], dtype=torch.int32)
    result = reliability_from_drift(second, cu_seqlens=ends, drift_count=carry)
    assert result.drift_count.tolist() == [*whole[0, 5:].tolist(), *whole[2, 5:7].tolist()]
    carry = next_drift_count(result.drift_count, ends, carry)
    assert carry.tolist() == [whole[0, 9], whole[1, 3], whole[2, 6]]


@pytest.mark.parametrize(("function", "args", "words", "error"), [
    (sampled_drift, (torch.zeros(2, 8), torch.zeros(2, 7)), "teacher_logprobs must have shape [2, 8], got [2, 7]",
     ValueError),
    (sampled_drift, (torch.zeros(2), torch.zeros(2), torch.zeros(3)), "mask must have shape [2], got [3]", ValueError),
    (sampled_drift, (torch.zeros(2).long(), torch.zeros(2)),
     "student_logprobs must have dtype float32, bfloat16, float16 or float64, got int64", TypeError),
    (next_drift_count, (torch.zeros(2, 8),), "drift_count must have dtype int32, got float32", TypeError),
    (next_drift_count, (COUNTS[None, None],), "drift_count must have shape [B, T] or [N], got [1, 1, 5]", ValueError),
    (next_drift_count, (COUNTS[None], None, COUNTS), "drift_count_in must have shape [1], got [5]", ValueError),
    (next_drift_count, (COUNTS,), "cu_seqlens must be given when drift_count is [N], got None", ValueError),
    (next_drift_count, (COUNTS, COUNTS - 1), "cu_seqlens must start at 0, got 2", ValueError),
])  # fmt: skip
def test_bad_input(function, args, words, error):
    with pytest.raises(error) as raised:
        function(*args, **{"max_log_ratio": 1.0} if function is sampled_drift else {})
    assert str(raised.value) == f"{function.__name__}: {words}"


def test_a_bound_that_is_not_finite():
    with pytest.raises(ValueError, match=r"^sampled_drift: max_log_ratio must be finite, got nan$"):
        sampled_drift(torch.zeros(2), torch.zeros(2), max_log_ratio=float("nan"))
