import functools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import cases
import comparison
import gold
from implementations import every_compiled, every_implementation


def stats_gold(student, teacher, kwargs):
    kwargs = {
        name: cases.as_float64(value) if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()
    }
    return gold.token_stats(cases.as_float64(student), cases.as_float64(teacher), **kwargs)


@functools.cache
def answer(name, dtypes):
    student, teacher, kwargs = cases.make(name, dtypes)
    token_ids = cases.token_ids(teacher, kwargs.get("vocab_size", min(student.shape[-1], teacher.shape[-1])))
    token_ids[0, -1] = -100
    kwargs = kwargs | {"token_ids": token_ids}
    expected = stats_gold(student, teacher, kwargs)
    return kwargs, expected, comparison.eager_token_stats(student, teacher, expected, **kwargs)


@every_implementation
@pytest.mark.parametrize(("name", "dtypes"), cases.TABLE, ids=cases.case_id)
def test_table(impl, name, dtypes):
    student, teacher, _ = cases.make(name, dtypes)
    kwargs, expected, eager = answer(name, dtypes)
    comparison.check(impl.token_stats(student, teacher, **kwargs), expected, eager)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("k", [16, 256])
def test_full_width(impl, dtype, k):
    student, teacher = cases.randn(2, 151936, seed=20).to(dtype), cases.randn(2, 152064, seed=21).to(dtype)
    kwargs = {"k": k, "vocab_size": 151936, "token_ids": torch.tensor([5, 151935])}
    expected = stats_gold(student, teacher, kwargs)
    eager = comparison.eager_token_stats(student, teacher, expected, **kwargs)
    comparison.check(impl.token_stats(student, teacher, **kwargs), expected, eager)


@every_implementation
@pytest.mark.parametrize("offset", [-450.0, 0.0, 30.0])
def test_what_is_left_beside_a_peak_is_not_rounded_away(impl, offset):
    """Beside a mass of 1, each of the others is less than float32 can add; all the entropy is in them."""
    student = torch.full((1, 512), offset)
    teacher = student.clone()
    student[0, 0] += 17.5
    teacher[0, 0] += 18.0
    got, expected = impl.token_stats(student, teacher), stats_gold(student, teacher, {})
    for name in ("student_entropy", "teacher_entropy"):
        np.testing.assert_allclose(getattr(got, name), expected[name], rtol=1e-5)


@every_implementation
@pytest.mark.parametrize("k", [1, 16, 256])
def test_orders_of_a_wide_row(impl, k):
    """What drives a selection to its worst: ramps, plateaus, one value, a comb with a tooth in every tile."""
    width = 60000
    ids = torch.arange(width)
    student = torch.stack([
        ids / 100, -ids / 100, torch.full((width,), 0.5), -(ids // 700).float(), (ids // 700).float(),
        (ids % 512 == 511).float(), (ids % 300 == 0) * 1.0, ids % 1000 / 10,
    ])  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = student.to(dtype)
        expected = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :k]
        result = impl.token_stats(logits, logits.flip(0), k=k)
        assert torch.equal(result.student_topk_ids, expected)
        assert torch.equal(result.teacher_topk_ids, expected.flip(0))


@every_implementation
def test_any_leading_axes(impl):
    student, teacher = cases.randn(2, 3, 4, 40, seed=1), cases.randn(2, 3, 4, 40, seed=2)
    mask = torch.rand(2, 3, 4) < 0.7
    token_ids = torch.randint(40, (2, 3, 4))
    whole = impl.token_stats(student, teacher, mask, token_ids=token_ids)
    flat = impl.token_stats(student.view(24, 40), teacher.view(24, 40), mask.view(24), token_ids=token_ids.view(24))
    one = impl.token_stats(student[1, 2, 3], teacher[1, 2, 3], token_ids=token_ids[1, 2, 3])
    assert whole.overlap.shape == (2, 3, 4) and one.overlap.shape == () and one.student_topk_ids.shape == (16,)
    assert comparison.differing(whole, whole._make(x.view(2, 3, 4, *x.shape[1:]) for x in flat)) == []
    mask[1, 2, 3] = True
    whole = impl.token_stats(student, teacher, mask, token_ids=token_ids)
    assert comparison.differing(one, one._make(x[1, 2, 3] for x in whole)) == []


@every_implementation
def test_masked_positions(impl):
    student, teacher, _ = cases.make("random", (cases.F32, cases.F32))
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
    with_nan = student.clone()
    with_nan[mask == 0] = torch.nan
    result = impl.token_stats(with_nan, teacher, mask, k=4)
    whole = impl.token_stats(student, teacher, k=4)
    for name, value in zip(result._fields, result, strict=True):
        of_masked = torch.arange(4).expand(3, 4) if name.endswith("topk_ids") else torch.zeros_like(value[mask == 0])
        assert torch.equal(value[mask == 0], of_masked), name
        assert comparison.same_bits([value[mask == 1]], [getattr(whole, name)[mask == 1]]), name


@every_implementation
def test_token_ids_that_are_not_tokens(impl):
    student, teacher, _ = cases.make("random", (cases.F32, cases.F32))
    token_ids = torch.tensor([[0, -1, -100], [900, 899, 2**31 - 1]], dtype=torch.int32)
    for ids in (token_ids, token_ids.long()):
        result = impl.token_stats(student, teacher, token_ids=ids, vocab_size=900)
        for of_token in (result.student_token_logprob, result.teacher_token_logprob):
            assert of_token.isnan().tolist() == [[False, True, True], [True, False, True]]
    far = torch.full((2, 3), 2**40 + 1)  # in range if the upper half were dropped
    assert impl.token_stats(student, teacher, token_ids=far).student_token_logprob.isnan().all()
    assert impl.token_stats(student, teacher).student_token_logprob.isnan().all()


# --- invariants ------------------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**31)


@every_implementation
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=100)
def test_random_against_gold(impl, data):
    """Any width, k, dtypes, mask and temperatures; quantised logits, so that much ties; some special values."""
    width = data.draw(st.integers(1, 1600), "width")
    k = data.draw(st.integers(1, min(width, 256)), "k")
    rng = torch.Generator().manual_seed(data.draw(seeds, "seed"))
    draw = functools.partial(torch.randn, generator=rng)
    step = data.draw(st.sampled_from([1e-3, 0.25, 1.0, 8.0]), "step")
    scale = data.draw(st.sampled_from([0.1, 1.0, 10.0]), "scale")
    offset = data.draw(st.sampled_from([0.0, -450.0, 300.0]), "offset")
    pair = [(draw(3, width) * scale / step).round() * step + offset for _ in range(2)]
    for special in data.draw(
        st.lists(st.sampled_from([-torch.inf, -torch.inf, 0.0, torch.inf, torch.nan]), max_size=2)
    ):
        pair[data.draw(st.integers(0, 1))][torch.rand(3, width, generator=rng) < 1.0 / width] = special
    dtype = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    student, teacher = (x.to(data.draw(dtype)) for x in pair)
    kwargs = {
        "k": k,
        "mask": torch.rand(3, generator=rng) < 0.8,
        "token_ids": torch.randint(-1, width, (3,), generator=rng),
        "student_temperature": data.draw(st.sampled_from([1.0, 0.5, 3.0])),
        "teacher_temperature": data.draw(st.sampled_from([1.0, 0.8])),
    }
    expected = stats_gold(student, teacher, kwargs)
    eager = comparison.eager_token_stats(student, teacher, expected, **kwargs)
    comparison.check(impl.token_stats(student, teacher, **kwargs), expected, eager, least_size=1)


@every_implementation
@hypothesis.given(seed=seeds, width=st.integers(20, 1500))
def test_permuting_the_vocabulary(impl, seed, width):
    rng = torch.Generator().manual_seed(seed)
    student, teacher = (torch.stack([torch.randperm(width, generator=rng) for _ in range(2)]) * 0.02 for _ in range(2))
    permutation = torch.randperm(width, generator=rng)
    before = impl.token_stats(student, teacher)
    after = impl.token_stats(student[:, permutation], teacher[:, permutation])
    assert torch.equal(permutation[after.student_topk_ids], before.student_topk_ids)
    assert torch.equal(permutation[after.teacher_topk_ids], before.teacher_topk_ids)
    for name in set(before._fields) - {"student_topk_ids", "teacher_topk_ids"}:
        torch.testing.assert_close(getattr(after, name), getattr(before, name), rtol=2e-6, atol=2e-6, equal_nan=True)


@every_implementation
@hypothesis.given(
    seed=seeds, student_shift=st.sampled_from([-1024, -3, 0.5, 700]), teacher_shift=st.sampled_from([64, -512])
)
def test_shifting_a_row_by_a_constant(impl, seed, student_shift, teacher_shift):
    rng = torch.Generator().manual_seed(seed)
    student, teacher = ((torch.randn(2, 600, generator=rng) * 256).round() / 64 for _ in range(2))
    before = impl.token_stats(student, teacher)
    after = impl.token_stats(student + student_shift, teacher + teacher_shift)  # exact: a multiple of 1/64 below 2**17
    torch.testing.assert_close(after.student_lse, before.student_lse + student_shift, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(after.teacher_lse, before.teacher_lse + teacher_shift, rtol=1e-6, atol=1e-6)
    for name in set(before._fields) - {"student_lse", "teacher_lse"}:
        rtol = 2e-6 if getattr(before, name).dtype == torch.float32 else 0
        torch.testing.assert_close(getattr(after, name), getattr(before, name), rtol=rtol, atol=rtol, equal_nan=True)


@every_implementation
@hypothesis.given(seed=seeds, factor=st.sampled_from([0.25, 2.0, 3.0, 1024.0]))
def test_scaling_logits_and_temperature_together(impl, seed, factor):
    rng = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(2, 600, generator=rng) * 4 for _ in range(2))
    before = impl.token_stats(student, teacher, student_temperature=0.75, teacher_temperature=1.5)
    scaled = impl.token_stats(
        student * factor, teacher * factor, student_temperature=0.75 * factor, teacher_temperature=1.5 * factor
    )
    for name in before._fields:
        rtol = 2e-6 if getattr(before, name).dtype == torch.float32 else 0
        torch.testing.assert_close(getattr(scaled, name), getattr(before, name), rtol=rtol, atol=rtol, equal_nan=True)


@every_implementation
@hypothesis.given(seed=seeds)
def test_exchanging_student_and_teacher(impl, seed):
    rng = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(2, 600, generator=rng) * 4 for _ in range(2))
    one, other = impl.token_stats(student, teacher), impl.token_stats(teacher, student)
    assert torch.equal(one.student_topk_ids, other.teacher_topk_ids)
    assert torch.equal(one.overlap, other.overlap)
    torch.testing.assert_close(one.reverse_kl, other.forward_kl, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one.student_on_teacher_logprobs, other.teacher_on_student_logprobs, rtol=1e-6, atol=1e-6)


@every_implementation
@hypothesis.given(seed=seeds, noise=st.sampled_from([0.0, 1e-6, 1e-3]), shift=st.sampled_from([0.0, -450.0]))
def test_kl_is_never_negative(impl, seed, noise, shift):
    rng = torch.Generator().manual_seed(seed)
    student = torch.randn(4, 500, generator=rng)
    result = impl.token_stats(student, student + noise * torch.randn(4, 500, generator=rng) + shift)
    assert (result.reverse_kl >= 0).all() and (result.forward_kl >= 0).all()
    assert result.reverse_kl.max() < 1e-5  # relative entropies this small are lost in rounding, and only in rounding


# --- determinism -----------------------------------------------------------------------------------------------------


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_same_bits_from_run_to_run_and_in_any_batch(impl, dtype):
    student, teacher = cases.randn(64, 1033, seed=3).to(dtype), cases.randn(64, 1033, seed=4).to(dtype)
    token_ids = torch.arange(64)
    whole = impl.token_stats(student, teacher, token_ids=token_ids)
    assert comparison.differing(whole, impl.token_stats(student, teacher, token_ids=token_ids)) == []
    for n in (0, 1, 37, 63):
        alone = impl.token_stats(student[n], teacher[n], token_ids=token_ids[n])
        assert comparison.differing(alone, alone._make(x[n] for x in whole)) == []


@every_compiled
def test_same_bits_from_any_number_of_threads(impl, two_threads):
    student, teacher = cases.randn(37, 2000, seed=3), cases.randn(37, 2000, seed=4)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(impl.token_stats(student, teacher))
    assert [comparison.differing(results[0], result) for result in results[1:]] == [[], [], []]


def test_order_is_that_of_torch_sort():
    """The gold's order is the one that the definition names."""
    for name in ("ties", "nan_negative", "nan_many", "signed_zeros", "subnormal", "minus_inf_some", "plus_inf"):
        student, teacher, _ = cases.make(name, (cases.F32, cases.F32))
        for logits in (student, teacher):
            expected = torch.sort(logits, dim=-1, descending=True, stable=True).indices
            for n in np.ndindex(logits.shape[:-1]):
                np.testing.assert_array_equal(gold.top(cases.as_float64(logits[n]), cases.V), expected[n], err_msg=name)
