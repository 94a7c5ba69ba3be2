import functools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import cases
import comparison
import gold
from implementations import every_compiled, every_implementation


def reliability_gold(student, teacher, kwargs):
    kwargs = {
        name: cases.as_float64(value) if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()
    }
    return gold.reliability(cases.as_float64(student), cases.as_float64(teacher), **kwargs)


def check(impl, student, teacher, **kwargs):
    expected = reliability_gold(student, teacher, kwargs)
    result = impl.reliability(student, teacher, **kwargs)
    comparison.check(result, expected, comparison.eager_rewards(student, teacher, expected, **kwargs))
    return result


@functools.cache
def answer(name, dtypes, metric, reward_weight):
    student, teacher, kwargs = cases.make(name, dtypes)
    kwargs = kwargs | {"metric": metric, "reward_weight": reward_weight, "w_drop": 0.2, "threshold": 0.5}
    if metric == "top_p":
        vocab_size = kwargs.get("vocab_size", min(student.shape[-1], teacher.shape[-1]))
        kwargs |= {"token_ids": cases.token_ids(teacher, vocab_size), "top_p": 0.83}
    expected = reliability_gold(student, teacher, kwargs)
    return kwargs, expected, comparison.eager_rewards(student, teacher, expected, **kwargs)


# A metric and a reward weight meet each other at least once; the full product would only cost time.
VARIANTS = [("overlap", "student"), ("top_p", "teacher"), ("overlap", "none")]
TABLE = [(*row, *variant) for row in cases.TABLE for variant in VARIANTS if row[1] in cases.SAME_DTYPES]
TABLE = [row for row in TABLE if not row[0].startswith("width_") or row[2] == "top_p"]
TABLE += [(*row, *VARIANTS[0]) for row in cases.TABLE if row[1] not in cases.SAME_DTYPES]


@every_implementation
@pytest.mark.parametrize(("name", "dtypes", "metric", "reward_weight"), TABLE, ids=cases.case_id)
def test_table(impl, name, dtypes, metric, reward_weight):
    student, teacher, _ = cases.make(name, dtypes)
    kwargs, expected, eager = answer(name, dtypes, metric, reward_weight)
    comparison.check(impl.reliability(student, teacher, **kwargs), expected, eager)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("k", [16, 256])
def test_full_width(impl, dtype, k):
    student, teacher = cases.randn(1, 2, 151936, seed=20).to(dtype), cases.randn(1, 2, 152064, seed=21).to(dtype)
    ramp = torch.linspace(-8, 8, 151936).to(dtype).expand(1, 2, -1)
    check(impl, student, teacher, k=k, vocab_size=151936)
    check(impl, ramp, ramp.flip(-1), k=k)


# --- drift -----------------------------------------------------------------------------------------------------------


@every_implementation
def test_drift_by_overlap_is_decided_on_the_exact_count(impl):
    """k=10, count=7, threshold=0.7 is not drift; count=6 is."""
    student, teacher = torch.zeros(1, 11, 30), torch.zeros(1, 11, 30)
    student[..., :10] = 1.0
    for shared in range(11):
        teacher[0, shared, 10 - shared : 20 - shared] = 1.0
    result = check(impl, student, teacher, k=10)
    assert result.drift.tolist() == [[shared < 7 for shared in range(11)]]
    assert check(impl, student, teacher, k=10, threshold=1.0).drift.tolist() == [[True] * 10 + [False]]
    assert check(impl, student, teacher, k=10, threshold=1e-300).drift.tolist() == [[True] + [False] * 10]


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_drift_by_acceptance(impl, dtype):
    """Teacher's probabilities 1/2, 1/4, 1/8, 1/16, 1/16: logits are multiples of ln 2, ids from the top 4, 3, ..."""
    teacher = torch.tensor([-4.0, -4.0, -3.0, -2.0, -1.0]).expand(1, 5, 5).to(dtype)
    kwargs = {
        "metric": "top_p",
        "token_ids": torch.arange(5)[None],
        "k": 4,
        "teacher_temperature": 1 / 0.6931471805599453,
    }
    for top_p, accepted in ((0.4, {4}), (0.6, {4, 3}), (0.9, {4, 3, 2, 0}), (1.0, {4, 3, 2, 0})):
        result = check(impl, teacher, teacher, top_p=top_p, **kwargs)
        assert result.drift.tolist() == [[i not in accepted for i in range(5)]], top_p
    assert check(impl, teacher, teacher, top_p=1.0, **(kwargs | {"k": 5})).drift.sum() == 0


@every_implementation
def test_acceptance_of_equal_tokens_has_room_for_rounding(impl):
    """19 of 20 equal tokens hold 0.95 but for rounding: the bound lies 1e-6 lower, so that all agree."""
    logits = torch.full((1, 20, 20), -7.7)
    result = impl.reliability(logits, logits, metric="top_p", token_ids=torch.arange(20)[None], k=20, top_p=0.95)
    assert result.drift.tolist() == [[False] * 19 + [True]]


@every_implementation
def test_token_ids_are_read_where_valid_only(impl):
    student, teacher, _ = cases.make("random", (cases.F32, cases.F32))
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
    token_ids = torch.tensor([[0, -100, 1036], [10**9, -1, 5]])
    for ids in (token_ids, token_ids.int()):
        check(impl, student, teacher, mask=mask, token_ids=ids, metric="top_p")


@every_implementation
def test_rewards_where_the_weight_is_zero(impl):
    """L = 0: no NaN and no infinity passes; L > 0: both do."""
    student, teacher, _ = cases.make("nan_positive", (cases.F32, cases.F32))
    zero = check(impl, student, teacher, w_drop=1.0, w_base=0.0, threshold=1.0)
    assert (zero.rewards == 0).all()
    assert check(impl, student, teacher, w_drop=1.0, w_base=0.1, threshold=1.0).rewards.isnan().any()
    student, teacher, _ = cases.make("minus_inf_disjoint", (cases.F32, cases.F32))
    assert (check(impl, student, teacher, w_drop=1.0, w_base=0.0, threshold=1.0).rewards == 0).all()
    assert (check(impl, student, teacher).rewards == -torch.inf).any()


@every_implementation
def test_no_mass_to_renormalise(impl):
    """The teacher excludes every candidate of the student: no weight, so no reward."""
    student, teacher = torch.zeros(1, 1, 40), torch.zeros(1, 1, 40)
    student[..., 8:], teacher[..., :8] = -torch.inf, -torch.inf
    assert (check(impl, student, teacher, k=8, reward_weight="teacher").rewards == 0).all()
    assert (check(impl, student, teacher, k=8, reward_weight="student").rewards == -torch.inf).all()
    assert (check(impl, student, teacher, k=8, reward_weight="none").rewards == -torch.inf).all()


@every_implementation
def test_mass_that_underflows_is_renormalised(impl):
    """The teacher gives the candidates some e**-200 of its mass: weights are relative to it."""
    student, teacher = cases.randn(1, 2, 50, seed=1), cases.randn(1, 2, 50, seed=2)
    student[..., :16] += 20
    teacher[..., 30] += 200
    result = check(impl, student, teacher, reward_weight="teacher")
    assert (result.rewards.sum(-1) < -150).all()


# --- along the response ----------------------------------------------------------------------------------------------


def batch(seed=5, width=90, shape=(3, 14)):
    """Logits that drift at about every second position, a mask with holes, token ids."""
    student = cases.randn(*shape, width, seed=seed, scale=2)
    teacher = student + cases.randn(*shape, width, seed=seed + 1, scale=1.5)
    rng = torch.Generator().manual_seed(seed)
    return student, teacher, torch.rand(shape, generator=rng) < 0.75, cases.token_ids(teacher, width, seed)


METRICS = pytest.mark.parametrize("metric", ["overlap", "top_p"])


@every_implementation
@METRICS
def test_with_everything(impl, metric):
    student, teacher, mask, token_ids = batch()
    carried = torch.tensor([0, 3, 1000], dtype=torch.int32)
    result = check(
        impl,
        student,
        teacher,
        mask=mask,
        token_ids=token_ids,
        drift_count=carried,
        metric=metric,
        k=10,
        w_drop=0.07,
        w_base=0.25,
        eps=0.3,
        top_p=0.7,
        student_temperature=0.9,
        teacher_temperature=1.1,
    )
    assert result.drift.any() and not result.drift[mask].all()


@every_implementation
@METRICS
def test_packed_equals_padded(impl, metric):
    student, teacher, mask, token_ids = batch()
    padded = impl.reliability(student, teacher, mask, token_ids=token_ids, metric=metric, w_drop=0.1)
    flat = [x.reshape(-1, *x.shape[2:]) for x in (student, teacher, mask, token_ids)]
    packed = impl.reliability(
        *flat[:3],
        token_ids=flat[3],
        metric=metric,
        w_drop=0.1,
        cu_seqlens=torch.tensor([0, 14, 28, 42], dtype=torch.int32),
    )
    expected = padded._make(x.reshape(-1, *x.shape[2:]) if x.dim() > 1 else x for x in padded)
    assert comparison.differing(packed, expected) == []


@every_implementation
def test_packed_with_empty_responses(impl):
    student, teacher, mask, _ = (x.reshape(-1, *x.shape[2:]) for x in batch())
    for cu_seqlens in ([0, 0, 5, 5, 5, 42, 42], [0, 42], [0, 1, 2, 42]):
        carried = torch.arange(len(cu_seqlens) - 1, dtype=torch.int32)
        check(
            impl,
            student,
            teacher,
            mask=mask,
            cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
            drift_count=carried,
            w_drop=0.1,
        )


@every_implementation
@METRICS
@hypothesis.given(seed=st.integers(0, 1000), cut=st.integers(1, 13))
@hypothesis.settings(max_examples=15)
def test_chunks_with_the_carry_equal_the_whole(impl, metric, seed, cut):
    tensors = batch(seed)

    def run(part, **more):
        student, teacher, mask, token_ids = (x[:, part] for x in tensors)
        return impl.reliability(
            student, teacher, mask, token_ids=token_ids, metric=metric, w_drop=0.1, w_base=0, **more
        )

    whole, first = run(slice(None)), run(slice(0, cut))
    second = run(slice(cut, None), drift_count=first.drift_count[:, -1])
    for name in set(whole._fields) - {"effective_length"}:
        joined = torch.cat([getattr(first, name), getattr(second, name)], 1)
        assert comparison.same_bits([joined], [getattr(whole, name)]), name
    assert torch.equal(first.effective_length + second.effective_length, whole.effective_length)


@every_implementation
@hypothesis.given(seed=st.integers(0, 1000), junk=st.sampled_from([float("nan"), float("inf"), 1e30, -float("inf")]))
@hypothesis.settings(max_examples=15)
def test_masked_logits_have_no_influence(impl, seed, junk):
    student, teacher, mask, _ = batch(seed)
    before = impl.reliability(student, teacher, mask, k=7)
    student[~mask], teacher[~mask] = junk, junk
    assert comparison.differing(impl.reliability(student, teacher, mask, k=7), before) == []
    assert torch.equal(before.topk_ids[~mask], torch.arange(7).expand(int((~mask).sum()), 7))
    for name in ("overlap", "drift", "reliability", "weight", "rewards"):
        assert not getattr(before, name)[~mask].any(), name


@every_implementation
@hypothesis.given(seed=st.integers(0, 1000), width=st.integers(20, 1200))
@hypothesis.settings(max_examples=15)
def test_permuting_the_vocabulary(impl, seed, width):
    rng = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.stack([torch.randperm(width, generator=rng) for _ in range(4)])[None] * 0.02 for _ in range(2)
    )
    permutation = torch.randperm(width, generator=rng)
    before = impl.reliability(student, teacher, k=20)
    after = impl.reliability(student[..., permutation], teacher[..., permutation], k=20)
    assert torch.equal(permutation[after.topk_ids], before.topk_ids)
    torch.testing.assert_close(after.rewards, before.rewards, rtol=2e-6, atol=2e-6)
    for name in set(before._fields) - {"topk_ids", "rewards"}:
        assert torch.equal(getattr(after, name), getattr(before, name)), name


@every_implementation
def test_agrees_with_its_parts(impl):
    """token_stats, then reliability_from_topk, then reliability_from_drift."""
    student, teacher, mask, token_ids = batch(width=300)
    stats = impl.token_stats(student, teacher, mask)
    for metric in ("overlap", "top_p"):
        whole = impl.reliability(student, teacher, mask, token_ids=token_ids, metric=metric)
        parts = impl.reliability_from_topk(
            stats.student_topk_ids,
            stats.teacher_topk_ids,
            mask,
            token_ids=token_ids,
            metric=metric,
            teacher_topk_logprobs=stats.teacher_topk_logprobs,
        )
        assert comparison.differing(parts, parts._make(getattr(whole, name) for name in parts._fields)) == []
        parts = impl.reliability_from_drift(whole.drift, mask)
        assert comparison.differing(parts, parts._make(getattr(whole, name) for name in parts._fields)) == []
        assert torch.equal(whole.topk_ids, stats.student_topk_ids)


# --- edges -----------------------------------------------------------------------------------------------------------


@every_implementation
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 40)], ids=str)
def test_short_and_single_responses(impl, shape):
    student, teacher, mask, _ = batch(shape=shape)
    check(impl, student, teacher, w_drop=0.1)
    check(impl, student, teacher, mask=mask, w_drop=0.1)


@every_implementation
@pytest.mark.parametrize("shape", [(0, 5, 40), (3, 0, 40), (0, 0, 40), (0, 40)], ids=str)
def test_empty(impl, shape):
    logits = torch.zeros(shape)
    kwargs = {"cu_seqlens": torch.zeros(4, dtype=torch.int32)} if len(shape) == 2 else {}
    result = impl.reliability(logits, logits, token_ids=torch.zeros(shape[:-1]).long(), metric="top_p", **kwargs)
    assert result.rewards.shape == result.topk_ids.shape == (*shape[:-1], 16)
    assert result.overlap.shape == result.drift.shape == result.weight.shape == shape[:-1]
    assert result.effective_length.tolist() == [0] * (3 if len(shape) == 2 else shape[0])
    stats = impl.token_stats(logits, logits)
    assert stats.student_topk_ids.shape == (*shape[:-1], 16) and stats.reverse_kl.shape == shape[:-1]


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_strides(impl, dtype):
    student, teacher, mask, token_ids = batch(width=515)
    student, teacher = student.to(dtype), teacher.to(dtype)
    kwargs = {"metric": "top_p", "w_drop": 0.1}
    shifted = student[:, 1:], teacher[:, 1:], mask[:, 1:], token_ids[:, 1:]
    plain = impl.reliability(*(x.contiguous() for x in shifted[:3]), token_ids=shifted[3].contiguous(), **kwargs)
    assert comparison.differing(impl.reliability(*shifted[:3], token_ids=shifted[3], **kwargs), plain) == []

    def transposed(x):  # the leading axes only: the last keeps its stride 1
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    def in_wider_rows(x):
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 7), 99.0, dtype=x.dtype)
        wide[..., 3:-4] = x
        return wide[..., 3:-4]

    s, t, m, token = shifted
    for args in (
        (transposed(s), t, transposed(m), transposed(token)),
        (s, transposed(t), m, token),
        (in_wider_rows(s), in_wider_rows(t), m, token),
        (transposed(in_wider_rows(s)), in_wider_rows(t.contiguous()), transposed(m.int()), token.int()),
    ):
        assert comparison.differing(impl.reliability(*args[:3], token_ids=args[3], **kwargs), plain) == []
    same = impl.reliability(s[:1, :1].expand(3, 13, 515), t[:1, :1].expand(3, 13, 515), m, token_ids=token, **kwargs)
    copies = (x[:1, :1].expand(3, 13, 515).contiguous() for x in (s, t))
    assert comparison.differing(same, impl.reliability(*copies, m, token_ids=token, **kwargs)) == []


@every_implementation
def test_a_column_of_logits_needs_no_stride(impl):
    """V = 1: the stride of an axis of size 1 means nothing."""
    wide = torch.randn(2, 3, 8)
    result = impl.reliability(wide[..., :1], wide[..., ::8], k=1)
    assert result.overlap.tolist() == [[1.0] * 3] * 2 and (result.rewards == 0).all()


# --- determinism -----------------------------------------------------------------------------------------------------


@every_implementation
@METRICS
def test_same_bits_from_run_to_run_and_in_any_batch(impl, metric):
    student, teacher, mask, token_ids = batch(width=1033, shape=(5, 9))
    whole = impl.reliability(student, teacher, mask, token_ids=token_ids, metric=metric)
    again = impl.reliability(student, teacher, mask, token_ids=token_ids, metric=metric)
    assert comparison.differing(whole, again) == []
    for b in (slice(0, 1), slice(3, 4), slice(2, 5)):
        part = impl.reliability(student[b], teacher[b], mask[b], token_ids=token_ids[b], metric=metric)
        assert comparison.differing(part, part._make(x[b] for x in whole)) == []


@every_compiled
def test_same_bits_from_any_number_of_threads(impl, two_threads):
    student, teacher, mask, _ = batch(width=2000, shape=(7, 11))
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(impl.reliability(student, teacher, mask, w_drop=0.1))
    assert [comparison.differing(results[0], result) for result in results[1:]] == [[], [], []]


@every_compiled
def test_few_rows_that_are_wide(impl, two_threads):
    """Fewer positions than threads, as when decoding."""
    student, teacher = cases.randn(1, 1, 40000, seed=1), cases.randn(1, 1, 40000, seed=2)
    check(impl, student, teacher)
