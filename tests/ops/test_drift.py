"""Drift of sampled tokens, and the carry between chunks of a response."""

import pytest
import torch

from pruneopd_kernels import next_drift_count, reliability_from_drift, sampled_drift

INF = float("inf")


def test_sampled_drift():
    student = torch.tensor([[-1.0, -1.0, -1.0, -3.0, -2.0]])
    teacher = torch.tensor([[-1.5, -3.5, -INF, -1.0, -4.5]])
    result = sampled_drift(student, teacher, max_log_ratio=2.5)
    assert result.dtype == torch.bool
    assert result.tolist() == [[False, False, True, False, False]]  # 2.5 itself is no drift
    assert sampled_drift(student, teacher, max_log_ratio=2.0).tolist() == [[False, True, True, False, True]]
    assert sampled_drift(student, teacher, max_log_ratio=-2.5).tolist() == [[True, True, True, True, True]]
    mask = torch.tensor([[1, 1, 0, 1, 0]])
    assert sampled_drift(student, teacher, mask, max_log_ratio=2.0).tolist() == [[False, True, False, False, False]]
    assert sampled_drift(torch.tensor([[torch.nan]]), torch.zeros(1, 1), max_log_ratio=2.0).all()
    with pytest.raises(TypeError):
        sampled_drift(student, teacher)  # there is no default


def test_sampled_drift_bad_input():
    student, teacher = torch.zeros(2, 8), torch.zeros(2, 8)
    floats = "float32, bfloat16, float16 or float64"
    for change, words, error in (
        ({"teacher_logprobs": torch.zeros(2, 7)}, "teacher_logprobs must have shape [2, 8], got [2, 7]", ValueError),
        ({"mask": torch.zeros(8)}, "mask must have shape [2, 8], got [8]", ValueError),
        ({"student_logprobs": student.long()}, f"student_logprobs must have dtype {floats}, got int64", TypeError),
        ({"max_log_ratio": float("nan")}, "max_log_ratio must be finite, got nan", ValueError),
    ):
        with pytest.raises(error) as raised:
            sampled_drift(**{"student_logprobs": student, "teacher_logprobs": teacher, "max_log_ratio": 1.0} | change)
        assert str(raised.value) == f"sampled_drift: {words}"


def test_next_drift_count():
    counts = torch.tensor([[1, 1, 2], [0, 0, 0], [5, 6, 7]], dtype=torch.int32)
    carry = next_drift_count(counts)
    assert carry.dtype == torch.int32 and carry.tolist() == [2, 0, 7]
    assert next_drift_count(counts, drift_count_in=torch.tensor([9, 9, 9], dtype=torch.int32)).tolist() == [2, 0, 7]
    none = torch.zeros(3, 0, dtype=torch.int32)
    assert next_drift_count(none).tolist() == [0, 0, 0]
    assert next_drift_count(none, drift_count_in=torch.tensor([4, 0, 9], dtype=torch.int32)).tolist() == [4, 0, 9]
    assert next_drift_count(torch.zeros(0, 5, dtype=torch.int32)).tolist() == []
    ends, packed = torch.tensor([0, 0, 2, 2, 5], dtype=torch.int32), torch.tensor([3, 4, 0, 1, 2], dtype=torch.int32)
    assert next_drift_count(packed, ends).tolist() == next_drift_count(packed, ends.long()).tolist() == [0, 4, 0, 2]
    carry = next_drift_count(packed, ends, torch.tensor([7, 1, 8, 0], dtype=torch.int32))
    assert carry.dtype == torch.int32 and carry.tolist() == [7, 4, 8, 2]
    assert next_drift_count(packed[:0], ends[:1]).tolist() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_subnormal_mask_is_set(dtype):
    """Whatever the processor takes subnormal numbers for."""
    smallest = torch.ones((), dtype={8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]).view(dtype)
    mask = torch.stack([smallest, -smallest, smallest * 0, -(smallest * 0)])
    student, teacher = torch.zeros(4), torch.full((4,), -9.0)
    assert torch.set_flush_denormal(True)
    try:
        result = sampled_drift(student, teacher, mask, max_log_ratio=1.0)
    finally:
        torch.set_flush_denormal(False)
    assert result.tolist() == [True, True, False, False]


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


def test_next_drift_count_bad_input():
    counts = torch.zeros(2, 8, dtype=torch.int32)
    for args, words, error in (
        ((counts.long(),), "drift_count must have dtype int32, got int64", TypeError),
        ((torch.zeros(3, 2, 8).int(),), "drift_count must have shape [B, T] or [N], got [3, 2, 8]", ValueError),
        ((counts, None, torch.zeros(3).int()), "drift_count_in must have shape [2], got [3]", ValueError),
        ((counts[0],), "cu_seqlens must be given when drift_count is [N], got None", ValueError),
        ((counts, counts[0, :3]), "cu_seqlens must be None when drift_count is [B, T], got shape [3]", ValueError),
        ((counts[0], torch.tensor([0, 8]).short()), "cu_seqlens must have dtype int32 or int64, got int16", TypeError),
        ((counts[0], torch.tensor([0, 9, 8]).int()), "cu_seqlens must be non-decreasing, got 9 before 8", ValueError),
    ):
        with pytest.raises(error) as raised:
            next_drift_count(*args)
        assert str(raised.value) == f"next_drift_count: {words}"
