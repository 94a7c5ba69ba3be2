import pytest
import torch

from implementations import UNCHECKED, each_of
from operators import by_position

INF, NAN = float("inf"), float("nan")
OP = "reliability_from_topk"
run, check = by_position(OP)


@each_of(OP)
def test_drift_is_decided_on_the_exact_count(impl):
    """k=10, count=7, threshold=0.7 is not drift, though 7/10 and 0.7 are no exact floats; one less is."""
    student = torch.arange(10).expand(1, 11, 10)
    counts = torch.arange(11)
    teacher = torch.where(torch.arange(10) < counts[:, None], torch.arange(10), torch.arange(10) + 100)[None]
    result = run(impl, student, teacher)
    assert result.drift.tolist() == [[count < 7 for count in range(11)]]
    for k in (3, 7, 10, 100, 256):  # at every k the threshold count / k itself is reached
        ids = torch.arange(k).expand(1, k, k)
        teacher = torch.where(torch.arange(k) <= torch.arange(k)[:, None], torch.arange(k), torch.arange(k) + 1000)[
            None
        ]
        for count in (1, k // 2, k - 1, k):
            result = run(impl, ids, teacher, threshold=max(count, 1) / k)
            assert result.drift.tolist() == [[c < max(count, 1) for c in range(1, k + 1)]], (k, count)


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
    for top_p in (0.75, 0.3, 0.9, 0.6):
        check(impl, student, teacher, top_p=top_p, **kwargs)
    accepted = ~run(impl, student, teacher, top_p=0.75, **kwargs).drift
    assert accepted.tolist() == [[True, True, False, False, False, False, True, False, True]]


@each_of(OP)
def test_nucleus_reaches_its_bound_with_room_for_rounding(impl):
    """19 of 20 equal tokens hold 0.95 but for rounding: the bound lies 1e-6 lower, so that all agree."""
    teacher = torch.arange(20).expand(1, 20, 20)
    kwargs = {"metric": "top_p", "top_p": 0.95, "token_ids": torch.arange(20)[None]}
    for dtype in (torch.float32, torch.float64):
        logprobs = torch.full((1, 20, 20), 0.05, dtype=torch.float64).log().to(dtype)
        result = run(impl, teacher, teacher, teacher_topk_logprobs=logprobs, **kwargs)
        assert result.drift.tolist() == [[False] * 19 + [True]]


@each_of(OP)
def test_many_small_masses_are_cumulated_in_float64(impl):
    """256 float32 masses whose float32 sum is wrong by more than the room for rounding."""
    masses = torch.full((256,), 1.0 / 300, dtype=torch.float64)
    masses[0] = 1.0 - 255.0 / 300
    logprobs = masses.log()
    bound = float(logprobs.exp().cumsum(0)[200]) + 0.5 / 300  # between two prefixes
    teacher = torch.arange(256).expand(1, 256, 256)
    kwargs = {
        "metric": "top_p",
        "top_p": bound,
        "token_ids": torch.arange(256)[None],
        "teacher_topk_logprobs": logprobs.expand(1, 256, 256),
    }
    check(impl, teacher, teacher, **kwargs)


@each_of(OP)
def test_empty_slots(impl):
    """The overlap is the share of the larger set: padding and what has a log-probability of -inf are in neither."""
    student, teacher = torch.tensor([[[4, 5, 6, -1]]]), torch.tensor([[[5, 4, 0, 0]]])
    log_p, log_q = torch.tensor([[[-1.0, -2.0, -INF, 0.0]]]), torch.tensor([[[-1.0, -2.0, -INF, -INF]]])
    for logprobs, overlap in (
        ({"teacher_topk_logprobs": log_q}, 2 / 3),
        ({"student_topk_logprobs": log_p, "teacher_topk_logprobs": log_q}, 1),
        ({"student_topk_logprobs": torch.full((1, 1, 4), -INF), "teacher_topk_logprobs": log_q}, 0),
    ):
        result = check(impl, student, teacher, threshold=0.7, **logprobs)
        assert result.overlap == torch.tensor(overlap).float() and result.drift == (overlap < 0.7)


@pytest.mark.parametrize("impl", UNCHECKED)
def test_of_an_id_that_comes_twice_the_first_counts(impl):
    """Where Python does not look at values."""
    ids, log_q = torch.tensor([[[7, 5, 7, 3], [7, 7, 7, 7]]]), torch.tensor([0.1, 0.2, 0.6, 0.1]).log().expand(1, 2, 4)
    tokens = torch.tensor([[3, 7]])
    for metric in ("overlap", "top_p"):
        given = {"metric": metric, "teacher_topk_logprobs": log_q, "token_ids": tokens, "top_p": 0.31}
        check(impl, ids.flip(-1), ids, **given)
