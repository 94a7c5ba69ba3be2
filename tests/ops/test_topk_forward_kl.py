import functools

import hypothesis
import hypothesis.strategies as st
import loss_cases
import numpy as np
import pytest
import torch
from loss_cases import generator, sent

import cases
import comparison
from implementations import LOSS_IMPLEMENTATIONS, every_loss_implementation

OP = "topk_forward_kl"


def run(impl, *args, **kwargs):
    return impl.loss(OP, *args, **kwargs)


def check(impl, *args, **kwargs):
    loss_cases.check(impl, OP, *args, **kwargs)


@functools.cache
def calls(name, dtypes):
    """As it is and with a logprob_min: `upstream, student, ids, logprobs`, `kwargs`, and the answers."""
    student, teacher, kwargs = cases.make(name, dtypes)
    kwargs = dict(kwargs)
    ids, log_q = sent(teacher, kwargs.pop("k", 16), kwargs.pop("teacher_temperature", 1.0), kwargs.get("vocab_size"))
    args = cases.randn(*student.shape[:-1], seed=30, scale=1), student, ids, log_q
    return [(args, more, *loss_cases.answers(OP, *args, **more)) for more in (kwargs, kwargs | {"logprob_min": -5.0})]


@every_loss_implementation
@pytest.mark.parametrize(("name", "dtypes"), loss_cases.TABLE, ids=cases.case_id)
def test_table(impl, name, dtypes):
    for args, kwargs, answer, eager in calls(name, dtypes):
        comparison.check_loss(run(impl, *args, **kwargs), answer, eager)


@every_loss_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("k", [16, 256])
def test_full_width(impl, dtype, k):
    student, teacher = cases.randn(2, 152064, seed=20).to(dtype), cases.randn(2, 151936, seed=21)
    ids, log_q = sent(teacher, k, vocab_size=151936)
    check(impl, torch.tensor([0.5, -2.0]), student, ids, log_q, vocab_size=151936)


@every_loss_implementation
@pytest.mark.parametrize("k", [1, 2, 15, 17, 255, 256])
def test_numbers_of_candidates(impl, k):
    """In any order, up to all ids that there are; some given twice."""
    for width in {k, 600}:
        student, teacher = cases.randn(3, width, seed=k), cases.randn(3, width, seed=k + 1)
        ids, log_q = sent(teacher, k)
        order = torch.randperm(k)
        ids, log_q = ids[:, order], log_q[:, order]
        check(impl, torch.ones(3), student, ids, log_q)
        ids[..., 0], log_q[..., 0] = ids[..., -1], log_q[..., -1]
        check(impl, torch.ones(3), student, ids.int(), log_q, logprob_min=-3.0)


@every_loss_implementation
@pytest.mark.parametrize(
    "name", ["random", "temperatures", "strongly_negative", "peaked", "both_underflow", "wide_range"]
)
def test_small_probabilities_have_their_digits(impl, name):
    """Not only what is large in a gradient: each element of it, down to where float32 ends."""
    (args, kwargs, answer, _), _ = calls(name, (cases.F32, cases.F32))
    _, gradient = run(impl, *args, **kwargs)
    others = torch.ones_like(args[1], dtype=torch.bool).scatter(-1, args[2].clamp(min=0), False)
    np.testing.assert_allclose(gradient[others], answer.gradient[others], rtol=2e-5, atol=1e-36)


# --- rules -----------------------------------------------------------------------------------------------------------


@every_loss_implementation
def test_by_hand(impl):
    student = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    ids, q = torch.tensor([[3, 0]]), torch.tensor([[0.5, 0.25]])
    outputs, gradient = run(impl, torch.tensor([2.0]), student, ids, q.log())
    # 0.5 (ln 0.5 - ln 0.125) + 0.25 (ln 0.25 - ln 0.5)
    np.testing.assert_allclose(outputs.loss, [0.5 * np.log(4) - 0.25 * np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(outputs.student_mass, [0.625], rtol=1e-6)
    np.testing.assert_allclose(outputs.teacher_mass, [0.75], rtol=1e-6)
    np.testing.assert_allclose(outputs.overlap_token_advantage, [0.25 * np.log(2)], rtol=1e-6)  # of id 0 alone
    assert outputs.overlap.tolist() == [0.5] and outputs.student_topk_ids.tolist() == [[0, 1]]
    p, mass = np.array([0.5, 0.25, 0.125, 0.125]), 0.75
    np.testing.assert_allclose(gradient, [2 * (mass * p - np.array([0.25, 0, 0, 0.5]))], rtol=1e-6)


@every_loss_implementation
def test_the_same_distribution(impl):
    """All of it: the loss is 0, and nothing is to be gained."""
    student = cases.randn(3, 40, seed=1)
    log_q, ids = student.double().log_softmax(-1).sort(descending=True)
    outputs, gradient = run(impl, None, student, ids, log_q)
    assert outputs.loss.abs().max() < 1e-6 and gradient.abs().max() < 1e-6
    assert outputs.overlap.tolist() == [1.0] * 3
    np.testing.assert_allclose(outputs.student_mass, 1.0, rtol=1e-6)


@every_loss_implementation
def test_raised_to_logprob_min(impl):
    """A log p below it is raised and has no gradient. The masses are as they were."""
    student = torch.tensor([[0.0, 0.0, -torch.inf, 0.0, 0.0]])  # log p is exactly -ln 4 or -inf
    at = student.double().log_softmax(-1)[0, 0].item()
    ids, log_q = torch.tensor([[0, 2, 1, -1]]), torch.tensor([[-1.0, -2.0, -torch.inf, -1.0]])

    def loss_at(minimum):
        outputs, gradient = run(impl, None, student, ids, log_q, logprob_min=minimum)
        np.testing.assert_allclose(outputs.student_mass, [0.5], rtol=1e-6)
        np.testing.assert_allclose(outputs.teacher_mass, [np.exp(-1) + np.exp(-2)], rtol=1e-6)
        b = np.maximum([-1.0, -2.0, -np.inf], minimum)
        a = np.maximum([at, -np.inf, at], minimum)
        np.testing.assert_allclose(outputs.loss, [(np.exp(b) * (b - a)).sum()], rtol=1e-6)
        return gradient, np.exp(b)

    gradient, q = loss_at(-3.0)  # below log p: the first and the third learn
    np.testing.assert_allclose(gradient[0, 3], 0.25 * (q[0] + q[2]), rtol=1e-6)
    np.testing.assert_allclose(gradient[0, 0], 0.25 * (q[0] + q[2]) - q[0], rtol=1e-6)
    assert gradient[0, 2] == 0
    gradient, _ = loss_at(-0.5)  # above all of them
    assert not gradient.any()


@every_loss_implementation
def test_padding(impl):
    """It matches nothing, counts in k, and whatever is sent with it is ignored; nothing but padding leaves no loss."""
    student = cases.randn(2, 40, seed=3)
    ids, log_q = sent(student + cases.randn(2, 40, seed=4), 6, with_padding=False)
    first_ids, first_log_q = ids[:, :4].clone(), log_q[:, :4].clone()
    for value, logprob_min in ((torch.nan, None), (0.0, None), (torch.inf, None), (torch.nan, -8.0), (0.0, -8.0)):
        ids[:, 4:], log_q[:, 4:] = torch.tensor([-1, -100]), value
        fewer, of_fewer = run(impl, None, student, first_ids, first_log_q, logprob_min=logprob_min)
        padded, gradient = run(impl, None, student, ids, log_q, logprob_min=logprob_min)
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


@every_loss_implementation
def test_overlap_and_advantage(impl):
    """Overlap is the share of the student's slots; the advantage is a mean over the teacher's."""
    student = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    log_p = student.double().log_softmax(-1)[0]
    for ids, overlap, shared in (
        ([0, 1, 2], 1.0, [0, 1, 2]),
        ([2, 5, 4], 1 / 3, [0]),
        ([1, 1, 1], 1 / 3, [0, 1, 2]),  # one slot of the student's, three of the teacher's
        ([-1, 2, 0], 2 / 3, [1, 2]),
        ([5, 4, 3], 0.0, []),
    ):
        log_q = torch.tensor([[-0.5, -1.5, -2.5]])
        outputs, _ = run(impl, None, student, torch.tensor([ids]), log_q)
        assert outputs.overlap == torch.tensor(overlap, dtype=torch.float64).float(), ids
        b = log_q[0].double()
        terms = -b.exp() * (b - log_p[ids])
        expected = terms[shared].mean() if shared else 0.0
        np.testing.assert_allclose(outputs.overlap_token_advantage, [expected], rtol=1e-5, err_msg=str(ids))


@every_loss_implementation
def test_what_is_not_finite(impl):
    """NaN in every id that exists, 0 beyond them; and 0 everywhere where nobody asks for the gradient."""
    student = cases.randn(9, 50, seed=6)
    student[:, 20] = -torch.inf
    ids, log_q = torch.randint(20, (9, 4)), torch.randn(9, 4) - 2
    student[0, 3], student[1, 42], student[2] = torch.nan, torch.inf, -torch.inf
    ids[2] = -1  # a row that is broken has no loss even where nothing is asked of it
    log_q[3, 1], log_q[4, 2] = torch.nan, torch.inf
    ids[5, 0] = 20  # the student gives it nothing, the teacher does
    ids[6, 0], log_q[6, 0] = 20, torch.nan
    ids[7, 0], log_q[7, 0] = 20, -torch.inf  # nor does the teacher
    outputs, gradient = run(impl, torch.ones(9), student, ids, log_q, vocab_size=43)
    assert outputs.loss.isnan().tolist() == [True] * 4 + [False, False, True, False, False]
    assert outputs.loss[4] == torch.inf and outputs.loss[5] == torch.inf and outputs.loss[7:].isfinite().all()
    assert outputs.student_mass.isnan().tolist() == [True] * 3 + [False] * 6
    assert outputs.teacher_mass.isnan().tolist() == [False] * 3 + [True, False, False, True, False, False]
    assert outputs.teacher_mass[4] == torch.inf and outputs.teacher_mass[2] == 0
    assert outputs.overlap_token_advantage[:3].isnan().all() and not outputs.overlap[:3].any()
    assert outputs.student_topk_ids[0, 0] == 3 and outputs.student_topk_ids[1, 0] == 42
    assert outputs.student_topk_ids[2].tolist() == [0, 1, 2, 3]
    assert gradient[:7, :43].isnan().all() and not gradient[:, 43:].any() and gradient[7:].isfinite().all()
    for zero in (0.0, -0.0):
        _, gradient = run(impl, torch.full((9,), zero), student, ids, log_q, vocab_size=43)
        assert not gradient.any()  # no NaN either


@every_loss_implementation
def test_masked_positions(impl):
    student, teacher, _ = cases.make("random", (cases.F32, cases.F32))
    ids, log_q = sent(teacher, 6)
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
    with_nan = student.clone()
    with_nan[mask == 0] = torch.nan
    result, gradient = run(impl, None, with_nan, ids, log_q, mask)
    whole, whole_gradient = run(impl, None, student, ids, log_q)
    for name, value in zip(result._fields, result, strict=True):
        of_masked = torch.arange(6).expand(3, 6) if name.endswith("topk_ids") else torch.zeros(3)
        assert torch.equal(value[mask == 0], of_masked), name
        assert comparison.same_bits([value[mask == 1]], [getattr(whole, name)[mask == 1]]), name
    assert not gradient[mask == 0].any() and torch.equal(gradient[mask == 1], whole_gradient[mask == 1])


@every_loss_implementation
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_of_the_teacher_s_logprobs(impl, dtype):
    student = cases.randn(3, 80, seed=1)
    ids, log_q = sent(cases.randn(3, 80, seed=2), 8)
    check(impl, torch.ones(3), student, ids, log_q.to(dtype))


# --- invariants ------------------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**31)


@every_loss_implementation
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60)
def test_random_against_gold(impl, data):
    """Any width, k, dtype, mask and temperature; quantised logits, so that much ties; some special values."""
    width = data.draw(st.integers(1, 1600), "width")
    k = data.draw(st.integers(1, min(width, 256)), "k")
    rng = generator(data.draw(seeds, "seed"))
    step = data.draw(st.sampled_from([1e-3, 0.25, 1.0, 8.0]), "step")
    scale = data.draw(st.sampled_from([0.1, 1.0, 10.0]), "scale")
    offset = data.draw(st.sampled_from([0.0, -450.0, 300.0]), "offset")
    student, teacher = ((torch.randn(3, width, generator=rng) * scale / step).round() * step + offset for _ in range(2))
    for special in data.draw(st.lists(st.sampled_from([-torch.inf, -torch.inf, torch.inf, torch.nan]), max_size=2)):
        student[torch.rand(3, width, generator=rng) < 1.0 / width] = special
    student = student.to(data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    ids, log_q = sent(teacher, k)
    log_q[torch.rand(3, k, generator=rng) < 0.02] = data.draw(st.sampled_from([-torch.inf, -20.0]))
    kwargs = {
        "mask": torch.rand(3, generator=rng) < 0.8,
        "student_temperature": data.draw(st.sampled_from([1.0, 0.5, 3.0])),
        "logprob_min": data.draw(st.sampled_from([None, -12.345, -3.21])),
    }
    check(impl, torch.randn(3, generator=rng), student, ids, log_q, **kwargs)


@every_loss_implementation
@hypothesis.given(seed=seeds, width=st.integers(20, 1500))
def test_permuting_the_vocabulary_and_the_candidates(impl, seed, width):
    rng = generator(seed)
    student = torch.randperm(width, generator=rng)[None] * 0.02
    ids, log_q = sent(torch.randn(1, width, generator=rng) * 3, 12, with_padding=False)
    permutation, order = torch.randperm(width, generator=rng), torch.randperm(12, generator=rng)
    before, gradient = run(impl, None, student, ids, log_q)
    renamed = permutation.argsort()[ids]
    after, permuted = run(impl, None, student[:, permutation], renamed[:, order], log_q[:, order])
    assert torch.equal(permutation[after.student_topk_ids], before.student_topk_ids)
    for name in set(before._fields) - {"student_topk_ids"}:
        torch.testing.assert_close(getattr(after, name), getattr(before, name), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(permuted, gradient[:, permutation], rtol=2e-6, atol=2e-6)


@every_loss_implementation
@hypothesis.given(seed=seeds, shift=st.sampled_from([-1024, -3, 0.5, 700]))
def test_shifting_a_row_by_a_constant(impl, seed, shift):
    rng = generator(seed)
    student = (torch.randn(2, 600, generator=rng) * 256).round() / 64
    ids, log_q = sent(student + torch.randn(2, 600, generator=rng), 12)
    before, gradient = run(impl, None, student, ids, log_q)
    after, shifted = run(impl, None, student + shift, ids, log_q)  # exactly shifted
    for name in before._fields:
        torch.testing.assert_close(getattr(after, name), getattr(before, name), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(shifted, gradient, rtol=2e-6, atol=2e-6)


@every_loss_implementation
@hypothesis.given(seed=seeds)
def test_what_token_stats_says(impl, seed):
    """Over the whole vocabulary it is the forward KL; candidates and overlap are those of the other operators."""
    rng = generator(seed)
    student, teacher = torch.randn(3, 30, generator=rng) * 2, torch.randn(3, 30, generator=rng) * 2
    stats = impl.call("token_stats", student, teacher, k=30)
    outputs, _ = run(impl, None, student, stats.teacher_topk_ids, stats.teacher_topk_logprobs)
    torch.testing.assert_close(outputs.loss, stats.forward_kl, rtol=1e-5, atol=1e-5)
    stats = impl.call("token_stats", student, teacher, k=7)
    outputs, _ = run(impl, None, student, stats.teacher_topk_ids, stats.teacher_topk_logprobs)
    assert torch.equal(outputs.student_topk_ids, stats.student_topk_ids)
    assert torch.equal(outputs.overlap, stats.overlap)


# --- finite differences ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", LOSS_IMPLEMENTATIONS[:2], ids=repr)
@pytest.mark.parametrize("logprob_min", [None, -3.21])
def test_gradcheck(impl, logprob_min):
    student = cases.randn(3, 12, seed=1).double()
    student[1, 4] = -torch.inf
    ids, log_q = sent(cases.randn(3, 12, seed=2), 6, vocab_size=11)
    log_q[ids == 4] = -torch.inf
    if logprob_min is None:
        ids[ids == 4] = 3
    mask = torch.tensor([True, True, False])
    kwargs = {"logprob_min": logprob_min, "student_temperature": 0.6, "vocab_size": 11}
    finite = student.isfinite()

    def loss(free):
        return impl.call(OP, student.masked_scatter(finite, free), ids, log_q, mask, **kwargs).loss

    assert torch.autograd.gradcheck(loss, student[finite].requires_grad_())
