import pytest
import torch

from implementations import UNCHECKED, each_of
from operators import by_position

INF, NAN = float("inf"), float("nan")
OP = "reliability_from_topk"
run, check = by_position(OP)


@each_of(OP)
def test_at_every_k_the_threshold_itself_is_reached(impl):
    """Overlaps of 1 / k to 1, and a threshold of each count / k."""
    for k in (3, 7, 100, 256):
        ids = torch.arange(k).expand(1, k, k)
        teacher = torch.where(torch.arange(k) <= torch.arange(k)[:, None], ids, ids + 1000)
        for count in (1, k // 2, k - 1, k):
            result = run(impl, ids, teacher, threshold=count / k)
            assert result.drift.tolist() == [[c < count for c in range(1, k + 1)]], (k, count)


@each_of(OP)
def test_nucleus(impl):
    teacher = torch.tensor([7, 5, 3, -1]).expand(1, 9, 4)
    logprobs = torch.tensor([0.5, 0.25, 0.125, 1.0]).log().expand(1, 9, 4).clone()
    tokens = torch.tensor([[7, 5, 3, 8, -1, 7, 7, 7, 3]])
    logprobs[0, 5, 2] = NAN  # not accepted, although 7 leads
    logprobs[0, 6, 3] = NAN  # padding
    logprobs[0, 7, 0] = -INF  # an empty slot
    logprobs[0, 8] = torch.tensor([0.0, 0.0, 0.75, 0.0]).log()
    student = torch.arange(4).expand(1, 9, 4)
    kwargs = {"metric": "top_p", "teacher_topk_logprobs": logprobs, "token_ids": tokens}
    for top_p in (0.3, 0.9, 0.6, 0.75):
        accepted = ~check(impl, student, teacher, top_p=top_p, **kwargs).drift
    assert accepted.tolist() == [[True, True, False, False, False, False, True, False, True]]


@each_of(OP)
def test_many_small_masses_are_cumulated_in_float64(impl):
    """256 float32 masses whose float32 sum is wrong by more than the room for rounding."""
    masses = torch.full((256,), 1.0 / 300, dtype=torch.float64)
    masses[0] = 1.0 - 255.0 / 300
    bound = float(masses.cumsum(0)[200]) + 0.5 / 300  # between two prefixes
    ids, logprobs = torch.arange(256).expand(1, 256, 256), masses.log().expand(1, 256, 256)
    kwargs = {"metric": "top_p", "token_ids": torch.arange(256)[None], "teacher_topk_logprobs": logprobs}
    check(impl, ids, ids, top_p=bound, **kwargs)


@each_of(OP)
def test_empty_slots(impl):
    """The overlap is the share of the larger set: padding and what has a log-probability of -inf are in neither."""
    student, teacher = torch.tensor([[[4, 5, 6, -1]]]), torch.tensor([[[5, 4, 0, 0]]])
    log_p, log_q = torch.tensor([[[-1.0, -2.0, -INF, 0.0]]]), torch.tensor([[[-1.0, -2.0, -INF, -INF]]])
    for logprobs, overlap in ((None, 2 / 3), (log_p, 1), (torch.full((1, 1, 4), -INF), 0)):
        given = {"student_topk_logprobs": logprobs, "teacher_topk_logprobs": log_q}
        assert check(impl, student, teacher, **given).overlap == torch.tensor(overlap).float()


@pytest.mark.parametrize("impl", UNCHECKED)
def test_of_an_id_that_comes_twice_the_first_counts(impl):
    """Where Python does not look at values."""
    ids, log_q = torch.tensor([[[7, 5, 7, 3], [7, 7, 7, 7]]]), torch.tensor([0.1, 0.2, 0.6, 0.1]).log().expand(1, 2, 4)
    tokens = torch.tensor([[3, 7]])
    for metric in ("overlap", "top_p"):
        given = {"metric": metric, "teacher_topk_logprobs": log_q, "token_ids": tokens, "top_p": 0.31}
        check(impl, ids.flip(-1), ids, **given)
