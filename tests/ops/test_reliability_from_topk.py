import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import comparison
import gold
from implementations import REFERENCE, every_compiled, every_implementation

INF, NAN = float("inf"), float("nan")


def arrays(kwargs):
    return {
        name: (x.double() if x.is_floating_point() else x).numpy() if isinstance(x, torch.Tensor) else x
        for name, x in kwargs.items()
    }


def check(result, student, teacher, **kwargs):
    comparison.check(result, gold.reliability_from_topk(student.numpy(), teacher.numpy(), **arrays(kwargs)), {})


def random_ids(rng, positions, k, below, padding):
    """[positions, k] distinct ids; a share of them replaced by padding."""
    ids = (
        torch.stack([torch.randperm(below, generator=rng)[:k] for _ in range(positions)])
        if positions
        else torch.zeros(0, k)
    )
    is_padding = torch.rand(positions, k, generator=rng) < padding
    return torch.where(is_padding, torch.randint(-9, 0, (positions, k), generator=rng), ids.long())


@st.composite
def problems(draw):
    """Ids as they come from outside: any order, duplicates when few ids exist, padding; NaN at the padding."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    k = draw(st.sampled_from([1, 2, 5, 8, 16, 17, 64, 200, 256]))
    shape = draw(st.sampled_from([(2, 5), (1, 1), (3, 4)]))
    positions = shape[0] * shape[1]
    padding = draw(st.sampled_from([0.0, 0.3, 1.0]))
    far = draw(st.sampled_from([0, 2**31, 2**40]))  # ids that differ above their lower 32 bits only
    if draw(st.booleans()):
        student, teacher = (random_ids(rng, positions, k, 2 * k, padding) for _ in range(2))
    else:
        student, teacher = (torch.randint(-1, k, (positions, k), generator=rng) for _ in range(2))
    student, teacher = (
        torch.where(student % 3 == 0, student + far, student),
        torch.where(teacher % 2 == 0, teacher + far, teacher),
    )
    logprobs = (torch.randn(positions, k, generator=rng) * 2).log_softmax(-1) - 0.02
    logprobs[torch.rand(positions, k, generator=rng) < 0.1] = -INF
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    logprobs = torch.where(teacher < 0, NAN, logprobs).to(dtype)
    logprobs[torch.rand(positions, k, generator=rng) < draw(st.sampled_from([0.0, 0.02]))] = NAN
    tokens = teacher.gather(1, torch.randint(k, (positions, 1), generator=rng)).squeeze(1)
    kwargs = {
        "mask": (torch.rand(shape, generator=rng) < 0.8) if draw(st.booleans()) else None,
        "metric": draw(st.sampled_from(["overlap", "top_p"])),
        "threshold": draw(st.sampled_from([0.7, 0.5, 1.0, 1e-9, 1 / 3])),
        "top_p": draw(st.sampled_from([0.95, 0.8, 0.3, 1.0])),
        "w_drop": draw(st.sampled_from([0.01, 0.4])),
        "teacher_topk_logprobs": logprobs.view(*shape, k),
        "token_ids": tokens.view(shape),
    }
    return student.view(*shape, k), teacher.view(*shape, k), kwargs


@every_implementation
@hypothesis.given(problem=problems())
@hypothesis.settings(max_examples=100)
def test_against_gold(impl, problem):
    student, teacher, kwargs = problem
    try:
        expected = gold.reliability_from_topk(student.numpy(), teacher.numpy(), **arrays(kwargs))
    except AssertionError:  # a mass on the bound of the nucleus: no one answer
        hypothesis.reject()
    comparison.check(impl.reliability_from_topk(student, teacher, **kwargs), expected, {})


@every_implementation
def test_int32_and_int64_ids_mix(impl):
    rng = torch.Generator().manual_seed(0)
    student, teacher = (
        random_ids(rng, 20, 16, 40, 0.1).view(2, 10, 16),
        random_ids(rng, 20, 16, 40, 0.1).view(2, 10, 16),
    )
    token_ids = teacher[..., 2]
    kwargs = {"metric": "top_p", "teacher_topk_logprobs": torch.full((2, 10, 16), 0.06).log()}
    whole = impl.reliability_from_topk(student, teacher, token_ids=token_ids, **kwargs)
    check(whole, student, teacher, token_ids=token_ids, **kwargs)
    for s, t, token in ((student.int(), teacher, token_ids), (student, teacher.int(), token_ids.int())):
        assert comparison.differing(impl.reliability_from_topk(s, t, token_ids=token, **kwargs), whole) == []


@every_implementation
def test_drift_is_decided_on_the_exact_count(impl):
    """k=10, count=7, threshold=0.7 is not drift, though 7/10 and 0.7 are no exact floats; one less is."""
    student = torch.arange(10).expand(1, 11, 10)
    counts = torch.arange(11)
    teacher = torch.where(torch.arange(10) < counts[:, None], torch.arange(10), 100)[None]
    result = impl.reliability_from_topk(student, teacher)
    assert result.drift.tolist() == [[count < 7 for count in range(11)]]
    for k in (3, 7, 10, 100, 256):  # at every k the threshold count / k itself is reached
        ids = torch.arange(k).expand(1, k, k)
        teacher = torch.where(torch.arange(k) <= torch.arange(k)[:, None], torch.arange(k), 1000)[None]
        for count in (1, k // 2, k - 1, k):
            result = impl.reliability_from_topk(ids, teacher, threshold=max(count, 1) / k)
            assert result.drift.tolist() == [[c < max(count, 1) for c in range(1, k + 1)]], (k, count)


@every_implementation
def test_overlap_counts_student_slots(impl):
    student = torch.tensor([[[5, 5, 5, 7], [1, 2, 3, 4], [-1, -1, -1, -1], [-1, 3, -2, 9]]])
    teacher = torch.tensor([[[5, 8, 8, 8], [4, 4, 4, 4], [-1, -1, -1, -1], [-2, 9, -1, -7]]])
    result = impl.reliability_from_topk(student, teacher)
    assert result.overlap.tolist() == [[0.75, 0.25, 0.0, 0.25]]


@every_implementation
def test_nucleus(impl):
    teacher = torch.tensor([7, 5, 3, -1]).expand(1, 9, 4)
    logprobs = torch.tensor([0.5, 0.25, 0.125, 1.0]).log().expand(1, 9, 4).clone()
    tokens = torch.tensor([[7, 5, 3, 8, -1, 7, 7, 7, 3]])
    logprobs[0, 5, 2] = NAN  # not accepted, although 7 leads
    logprobs[0, 6, 3] = NAN  # padding
    logprobs[0, 7, 0] = -INF  # no mass, but the shortest prefix holds it
    logprobs[0, 8] = torch.tensor([0.0, 0.0, 0.75, 0.0]).log()
    student = torch.zeros(1, 9, 4, dtype=torch.int64)
    kwargs = {"metric": "top_p", "teacher_topk_logprobs": logprobs, "token_ids": tokens}
    for top_p in (0.75, 0.3, 0.9, 0.6):
        check(
            impl.reliability_from_topk(student, teacher, top_p=top_p, **kwargs), student, teacher, top_p=top_p, **kwargs
        )
    accepted = ~impl.reliability_from_topk(student, teacher, top_p=0.75, **kwargs).drift
    assert accepted.tolist() == [[True, True, False, False, False, False, True, True, True]]


@every_implementation
def test_nucleus_reaches_its_bound_with_room_for_rounding(impl):
    """19 of 20 equal tokens hold 0.95 but for rounding: the bound lies 1e-6 lower, so that all agree."""
    teacher = torch.arange(20).expand(1, 20, 20)
    kwargs = {"metric": "top_p", "top_p": 0.95, "token_ids": torch.arange(20)[None]}
    for dtype in (torch.float32, torch.float64):
        logprobs = torch.full((1, 20, 20), 0.05, dtype=torch.float64).log().to(dtype)
        result = impl.reliability_from_topk(teacher, teacher, teacher_topk_logprobs=logprobs, **kwargs)
        assert result.drift.tolist() == [[False] * 19 + [True]]


@every_implementation
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
    check(impl.reliability_from_topk(teacher, teacher, **kwargs), teacher, teacher, **kwargs)


@every_implementation
def test_masked_positions(impl):
    rng = torch.Generator().manual_seed(1)
    student, teacher = random_ids(rng, 12, 8, 20, 0.0).view(2, 6, 8), random_ids(rng, 12, 8, 20, 0.0).view(2, 6, 8)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]])
    kwargs = {
        "metric": "top_p",
        "teacher_topk_logprobs": torch.full((2, 6, 8), 0.1).log(),
        "token_ids": teacher[..., 0].clone(),
    }
    kwargs["teacher_topk_logprobs"][mask == 0] = NAN
    kwargs["token_ids"][mask == 0] = -100
    result = impl.reliability_from_topk(student, teacher, mask, **kwargs)
    check(result, student, teacher, mask=mask, **kwargs)
    assert not result.drift[mask == 0].any() and not result.overlap[mask == 0].any()
    assert result.effective_length[1] == 0


@every_implementation
@hypothesis.given(problem=problems(), cut=st.integers(1, 3))
def test_chunks_with_the_carry_equal_the_whole_and_packed_equals_padded(impl, problem, cut):
    student, teacher, kwargs = problem
    batch, length, _ = student.shape
    per_position = {name: kwargs.pop(name) for name in ("mask", "teacher_topk_logprobs", "token_ids")}
    per_position = {name: x for name, x in per_position.items() if x is not None}

    def run(part, **more):
        return impl.reliability_from_topk(
            part(student), part(teacher), **{n: part(x) for n, x in per_position.items()}, **kwargs, **more
        )

    whole = run(lambda x: x)
    if cut < length:
        first = run(lambda x: x[:, :cut])
        second = run(lambda x: x[:, cut:], drift_count=first.drift_count[:, -1])
        for name in whole._fields[:-1]:
            assert torch.equal(torch.cat([getattr(first, name), getattr(second, name)], 1), getattr(whole, name)), name
        assert torch.equal(first.effective_length + second.effective_length, whole.effective_length)
    packed = run(lambda x: x.reshape(-1, *x.shape[2:]), cu_seqlens=(torch.arange(batch + 1) * length).int())
    flat = whole._make([*(x.reshape(-1) for x in whole[:-1]), whole.effective_length])
    assert comparison.differing(packed, flat) == []


@every_implementation
def test_packed_with_empty_responses(impl):
    rng = torch.Generator().manual_seed(2)
    student, teacher = random_ids(rng, 11, 4, 8, 0.1), random_ids(rng, 11, 4, 8, 0.1)
    for cu_seqlens in ([0, 0, 3, 3, 11, 11], [0, 11], [0, 0, 11, 11]):
        kwargs = {
            "cu_seqlens": torch.tensor(cu_seqlens, dtype=torch.int32),
            "w_drop": 0.3,
            "drift_count": torch.arange(len(cu_seqlens) - 1, dtype=torch.int32),
        }
        check(impl.reliability_from_topk(student, teacher, **kwargs), student, teacher, **kwargs)


@every_implementation
@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (0, 4)], ids=str)
def test_empty(impl, shape):
    ids = torch.zeros(shape, dtype=torch.int64)
    kwargs = {"cu_seqlens": torch.zeros(3, dtype=torch.int32)} if len(shape) == 2 else {}
    check(impl.reliability_from_topk(ids, ids, **kwargs), ids, ids, **kwargs)


@every_implementation
def test_strides(impl):
    rng = torch.Generator().manual_seed(3)
    student, teacher = random_ids(rng, 30, 16, 30, 0.1).view(5, 6, 16), random_ids(rng, 30, 16, 30, 0.1).view(5, 6, 16)
    logprobs = torch.rand(5, 6, 16, generator=rng).log_softmax(-1) - 0.02
    tokens, mask = teacher[..., 3].contiguous(), torch.rand(5, 6, generator=rng) < 0.8
    kwargs = {"metric": "top_p"}
    plain = impl.reliability_from_topk(
        student, teacher, mask, teacher_topk_logprobs=logprobs, token_ids=tokens, **kwargs
    )

    def transposed(x):
        return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))

    def spaced(x):
        wide = torch.full([2 * n for n in x.shape], 1, dtype=x.dtype)
        view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
        view.copy_(x)
        return view

    for change in (transposed, spaced):
        result = impl.reliability_from_topk(
            change(student),
            change(teacher),
            change(mask),
            token_ids=change(tokens),
            teacher_topk_logprobs=change(logprobs),
            **kwargs,
        )
        assert comparison.differing(result, plain) == []
    one = (student[:1, :1], teacher[:1, :1], mask[:1, :1], logprobs[:1, :1], tokens[:1, :1])
    shapes = [(5, 6, *x.shape[2:]) for x in one]
    s, t, m, q, token = (x.expand(shape) for x, shape in zip(one, shapes, strict=True))
    expanded = impl.reliability_from_topk(s, t, m, teacher_topk_logprobs=q, token_ids=token, **kwargs)
    s, t, m, q, token = (x.contiguous() for x in (s, t, m, q, token))
    assert (
        comparison.differing(
            expanded, impl.reliability_from_topk(s, t, m, teacher_topk_logprobs=q, token_ids=token, **kwargs)
        )
        == []
    )


@every_compiled
def test_same_bits_from_any_number_of_threads_and_in_any_batch(impl, two_threads):
    rng = torch.Generator().manual_seed(4)
    student, teacher = (
        random_ids(rng, 300, 16, 24, 0.1).view(3, 100, 16),
        random_ids(rng, 300, 16, 24, 0.1).view(3, 100, 16),
    )
    reference = REFERENCE.reliability_from_topk(student, teacher)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert comparison.differing(impl.reliability_from_topk(student, teacher), reference) == []
    alone = impl.reliability_from_topk(student[1:2], teacher[1:2])
    assert comparison.differing(alone, alone._make(x[1:2] for x in reference)) == []
