"""Inputs that users reported: the smallest of each kind, and the right value. What belongs to one operator is there."""

import math

import pytest
import torch

import operators
import tiers
from comparison import differing
from implementations import ALONG_RESPONSES, each, quick
from operators import example

INF = float("inf")


def tensor(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)[None]


@each(["reliability", "opd_loss", "token_stats"])
def test_a_row_with_fewer_than_k_candidates(op, impl):
    """Empty slots match nothing: two rows without a common candidate do not overlap, a row with itself does wholly."""
    student, teacher = torch.full((2, 1, 1, 8), -INF)
    student[..., 6], teacher[..., 7] = 0.0, 0.0
    for second, overlap in ((teacher, 0), (student, 1)):
        result = operators.check(impl, op, student_logits=student, teacher_logits=second, k=4)
        assert result["overlap"] == overlap and result.get("drift", overlap == 0) == (overlap == 0)
        ids = "topk_ids" if "topk_ids" in result else "student_topk_ids"
        assert result[ids].tolist() == [[[6, 0, 1, 2]]]
    for reward_weight in ("student", "teacher", "none") if op != "token_stats" else ():
        teacher[..., 2:7] = 0.0
        given = {"student_logits": student, "teacher_logits": teacher, "reward_weight": reward_weight}
        result = operators.check(impl, op, **given, k=4)  # of one candidate, whose weight is 1
        torch.testing.assert_close(result["rewards"], tensor([-1.49 * math.log(6), 0, 0, 0]))


OF_DRIFT = ["reliability", "opd_loss", "reliability_from_topk"]


def of_nucleus(op, q):
    """A call in which the tokens are the ids in order, and the teacher gives each of them q."""
    ids, logprobs = torch.arange(len(q)), q.log().float().expand(1, len(q), len(q))
    given = {f"{side}_topk_ids": ids.expand(logprobs.shape) for side in ("student", "teacher")}
    given |= {"teacher_topk_logprobs": logprobs, "student_logits": logprobs, "teacher_logits": logprobs, "k": len(q)}
    return operators.of_op(op, given | {"token_ids": ids[None], "metric": "top_p"})


@each(OF_DRIFT)
def test_the_bound_of_the_nucleus_has_room_for_rounding(op, impl):
    """19 of 20 equal tokens hold 0.95 but for rounding. With top_p=1 the room takes no candidate away."""
    result = impl.run(op, **of_nucleus(op, torch.full((20,), 0.05)), top_p=0.95)
    assert result["drift"].tolist() == [[False] * 19 + [True]]
    given = of_nucleus(op, torch.tensor([1 - 5e-7, 4e-7, 1e-7], dtype=torch.float64)) | {"top_p": 1.0}
    assert not operators.check(impl, op, **given)["drift"].any()
    if "k" in given:
        assert operators.check(impl, op, **given | {"k": 2})["drift"].tolist() == [[False, False, True]]


@each(OF_DRIFT)
def test_drift_by_overlap_is_decided_on_the_exact_count(op, impl):
    """With k=10 a count of 7 is no drift at a threshold of 0.7, though 7 / 10 and 0.7 are no exact floats; 6 is."""
    shared, ids = torch.arange(11)[:, None], torch.arange(20)
    student, teacher = (ids < 10).expand(1, 11, 20), ((ids >= 10 - shared) & (ids < 20 - shared))[None]
    given = {"student_logits": student.float(), "teacher_logits": teacher.float(), "k": 10}
    if op == "reliability_from_topk":
        given = {f"{name[:7]}_topk_ids": x.topk(10).indices for name, x in given.items() if name != "k"}
    for threshold, least in ((0.7, 7), (1.0, 10), (1e-300, 1)):
        result = operators.check(impl, op, **given, threshold=threshold)
        assert result["drift"].tolist() == [[count < least for count in range(11)]]


@each(["token_stats"])
def test_token_ids_that_are_not_tokens(op, impl):
    given = {name: torch.randn(2, 3, 1000) for name in ("student_logits", "teacher_logits")} | {"vocab_size": 900}
    outside = torch.tensor([[-1, -100, 900], [2**31 - 1, 2**31 - 1, 0]])
    beyond = torch.tensor([[-1, -(2**63), 900], [2**40 + 1, 2**32, 899]])  # in range if the upper half were dropped
    for ids in (outside.int(), outside, beyond):
        result = operators.check(impl, op, **given, token_ids=ids)
        assert result["student_token_logprob"].isnan().tolist() == [[True] * 3, [True] * 2 + [False]]


SEEDS = range(600) if tiers.ALL else (553, 10, 0, 11, 24, 28, 41, 48)


@each(["token_stats", "reverse_kl"])
def test_rows_of_which_most_logits_tie(op, impl):
    """A lane that adds the same value again and again rounds each time in the same direction."""
    for seed in SEEDS[:2] if impl.slow else SEEDS:
        torch.manual_seed(seed)
        student = torch.where(torch.rand(1, 513) < 0.1, torch.randn(1, 513), 0)
        given = {"student_logits": student, "teacher_logits": torch.randn(1, 513) * 5, "teacher_temperature": 0.3}
        operators.check(impl, op, **given | ({"k": 1} if op == "token_stats" else {}))
    student, teacher = ((torch.randn(3, 499) * 1000).round() / 1000 + 300 for _ in range(2))
    operators.check(impl, op, student_logits=student.bfloat16(), teacher_logits=teacher, student_temperature=3.0)


@each(["token_stats", "reverse_kl", "opd_loss"])
@pytest.mark.parametrize("swapped", [False, True])
def test_huge_finite_logits(op, impl, swapped):
    """A probability of 1e-38 times a logit of -3e38 is no small term."""
    pair = [tensor([0.0, -3e38]), tensor([0.0, -88.0])]
    student, teacher = pair[::-1] if swapped else pair
    options = {"loss": "reverse_kl"} if op == "opd_loss" else {}
    given = {"student_logits": student, "teacher_logits": teacher, "k": 1} | options
    result = operators.check(impl, op, **operators.of_op(op, given))
    if op == "token_stats" or swapped:
        name = "loss" if op != "token_stats" else "reverse_kl" if swapped else "forward_kl"
        weight = result.get("weight", torch.ones(1))
        torch.testing.assert_close(result[name] / weight, torch.full_like(result[name], 1.816371), rtol=1e-4, atol=0)


@each(["reverse_kl", "opd_loss", "reliability"])
def test_what_a_weight_brings_back_into_float32(op, impl):
    """A divergence and a reward of 6e38 are no float32; a quarter of them is, and so the loss has its gradient."""
    given = {"student_logits": tensor([0.0, -3e38]), "teacher_logits": tensor([-3e38, 3e38]), "weight": tensor(0.25)}
    given |= {"loss": "reverse_kl", "k": 1, "w_drop": 1.0, "w_base": 0.25}
    result = operators.check(impl, op, **operators.of_op(op, given))
    if op != "reverse_kl":
        torch.testing.assert_close(result["rewards"], tensor([-1.5e38]))
    if op != "reliability":
        torch.testing.assert_close(result["loss"], tensor(1.5e38))
        assert result["gradient"].isfinite().all()


@each(implementations=quick)
def test_a_subnormal_mask_is_set_even_if_subnormals_are_flushed(op, impl):
    """-0.0 is not."""
    arguments = example(op, (2, 6))
    for dtype, least in {
        torch.float32: 1e-45,
        torch.float64: 5e-324,
        torch.bfloat16: 1e-40,
        torch.float16: 6e-8,
    }.items():
        mask = torch.where(arguments["mask"], torch.tensor(least, dtype=dtype), torch.tensor(-0.0, dtype=dtype))
        torch.set_flush_denormal(True)
        try:
            result, expected = (impl.run(op, **arguments | {"mask": given}) for given in (mask, arguments["mask"]))
        finally:
            torch.set_flush_denormal(False)
        assert differing(result, expected) == [], dtype


@each(ALONG_RESPONSES)
def test_int64_cu_seqlens(op, impl):
    arguments = example(op, packed=True)
    wide = arguments | {"cu_seqlens": arguments["cu_seqlens"].long()}
    assert differing(impl.run(op, **wide), impl.run(op, **arguments)) == []
