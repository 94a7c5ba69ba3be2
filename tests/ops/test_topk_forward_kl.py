import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import cases
from cases import sent
from implementations import each_of
from operators import by_position, examples
from topk_forward_kl import TAILS

OP = "topk_forward_kl"
run, check = by_position(OP)


@each_of(OP)
@pytest.mark.parametrize("k", [1, 2, 17, 256])
def test_numbers_of_candidates(impl, k):
    """In any order, up to all ids that there are; one of them impossible."""
    for width in {k, 600}:
        student, teacher = cases.randn(3, width, seed=k), cases.randn(3, width, seed=k + 1)
        ids, log_q = sent(teacher, k)
        order = torch.randperm(k)
        ids, log_q = ids[:, order], log_q[:, order]
        check(impl, torch.ones(3), student, ids, log_q)
        log_q[..., 0] = -torch.inf
        check(impl, torch.ones(3), student, ids.int(), log_q, logprob_min=-3.0)


@each_of(OP)
@pytest.mark.parametrize("tail", ["bucket", "generalised"])
def test_with_a_tail_it_is_a_divergence(impl, tail):
    """At p = q the loss and its gradient are 0, so that a perfect student stays as it is; it is never negative."""
    student, ids, log_q = (torch.tensor(x) for x in ([[0.4, 0.3, 0.2, 0.1]], [[0, 1]], [[0.4, 0.3]]))
    outputs, gradient = run(impl, None, student.log(), ids, log_q.log(), tail=tail)
    np.testing.assert_allclose(outputs.loss, [0], atol=1e-7)
    np.testing.assert_allclose(gradient, np.zeros((1, 4)), atol=1e-7)

    @examples(impl, seed=st.integers(0, 2**31), k=st.sampled_from([1, 5, 30]), noise=st.sampled_from([0.0, 1e-3, 1.0]))
    def holds(seed, k, noise):
        student = cases.randn(4, 30, seed=seed)
        ids, log_q = sent(student + noise * cases.randn(4, 30, seed=seed + 1), k)
        outputs, gradient = run(impl, None, student, ids, log_q, tail=tail)
        assert (outputs.loss >= 0).all()
        assert noise or ((outputs.loss < 2e-7).all() and gradient.abs().max() < 1e-6)


@each_of(OP)
def test_raised_to_logprob_min(impl):
    """A log p below it is raised and has no gradient. The masses are as they were."""
    student = torch.tensor([[0.0, 0.0, -torch.inf, 0.0, 0.0]])  # log p is exactly -ln 4 or -inf
    at = student.double().log_softmax(-1)[0, 0].item()
    ids, log_q = torch.tensor([[0, 2, 1, -1]]), torch.tensor([[-1.0, -2.0, -40.0, -1.0]])

    def loss_at(minimum):
        outputs, gradient = run(impl, None, student, ids, log_q, logprob_min=minimum, tail="none")
        np.testing.assert_allclose(outputs.student_mass, [0.5], rtol=1e-6)
        np.testing.assert_allclose(outputs.teacher_mass, [np.exp(-1) + np.exp(-2)], rtol=1e-6)
        b = np.maximum([-1.0, -2.0, -40.0], minimum)
        a = np.maximum([at, -np.inf, at], minimum)
        np.testing.assert_allclose(outputs.loss, [(np.exp(b) * (b - a)).sum()], rtol=1e-6)
        return gradient, np.exp(b)

    gradient, q = loss_at(-3.0)  # below log p: the first and the third learn
    np.testing.assert_allclose(gradient[0, 3], 0.25 * (q[0] + q[2]), rtol=1e-6)
    np.testing.assert_allclose(gradient[0, 0], 0.25 * (q[0] + q[2]) - q[0], rtol=1e-6)
    assert gradient[0, 2] == 0
    gradient, _ = loss_at(-0.5)  # above all of them
    assert not gradient.any()


@each_of(OP)
def test_padding(impl):
    """An id below 0, or one with a log-probability of -inf. Whatever is sent with the first is ignored."""
    student = cases.randn(2, 40, seed=3)
    ids, log_q = sent(student + cases.randn(2, 40, seed=4), 6, with_padding=False)
    first_ids, first_log_q = ids[:, :4].clone(), log_q[:, :4].clone()
    padding = [((-1, -100), value) for value in (torch.nan, 0.0, torch.inf, -torch.inf)]
    padding += [((0, 0), -torch.inf), ((int(first_ids[0, 0]), -1), -torch.inf)]
    for (slots, value), logprob_min, tail in itertools.product(padding, (None, -8.0), TAILS):
        ids[:, 4:], log_q[:, 4:] = torch.tensor(slots), value
        options = {"logprob_min": logprob_min, "tail": tail}
        fewer, of_fewer = run(impl, None, student, first_ids, first_log_q, **options)
        padded, gradient = run(impl, None, student, ids, log_q, **options)
        torch.testing.assert_close(padded.loss, fewer.loss)
        torch.testing.assert_close(padded.student_mass, fewer.student_mass)
        torch.testing.assert_close(padded.teacher_mass, fewer.teacher_mass)
        torch.testing.assert_close(gradient, of_fewer)
    ids[:] = -1
    for logprob_min in (None, -8.0):
        outputs, gradient = run(impl, None, student, ids, log_q, logprob_min=logprob_min)
        measures = (outputs.loss, outputs.student_mass, outputs.teacher_mass, outputs.overlap)
        assert not any(x.any() for x in (*measures, outputs.overlap_token_advantage, gradient))
        expected = student.sort(dim=-1, descending=True, stable=True).indices[:, :6]
        assert torch.equal(outputs.student_topk_ids, expected)


@each_of(OP)
def test_what_is_not_finite(impl):
    """NaN in every id that exists, 0 beyond them; and 0 everywhere where nobody asks for the gradient."""
    student = cases.randn(9, 50, seed=6)
    student[:, 20] = -torch.inf
    ids, log_q = torch.rand(9, 20).argsort(-1)[:, :4], torch.randn(9, 4) - 2
    student[0, 3], student[1, 42], student[2] = torch.nan, torch.inf, -torch.inf
    ids[2] = -1  # a row that is broken has no loss even where nothing is asked of it
    log_q[3, 1], log_q[4, 2] = torch.nan, torch.inf
    ids[5, 0] = 20  # the student gives it nothing, the teacher does
    ids[6, 0], log_q[6, 0] = 20, torch.nan
    ids[7, 0], log_q[7, 0] = 20, -torch.inf  # nor does the teacher: an empty slot
    for upstream, tail in itertools.product((1.0, 0.0, -0.0), TAILS):
        upstream = torch.full((9,), upstream)
        result = check(impl, upstream, student, ids, log_q, vocab_size=43, tail=tail)
        assert result.loss.isfinite().tolist() == [False] * 7 + [True] * 2 and result.loss[5] == torch.inf
        assert result.gradient[:7, :43].isnan().all() == upstream.any()
