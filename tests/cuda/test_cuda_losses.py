"""The losses' CUDA kernels, run by the emulator, against the definition; and what must not change a bit of them."""

import itertools

import pytest
import torch

import cases
import comparison
import cuda_emulated
from pruneopd_kernels.reference import _saving

OPS = ["topk_policy_loss", "reverse_kl", "topk_forward_kl"]
DTYPES = [cases.F32, cases.BF16, cases.F16]
NAMES = [
    "random", "ties", "all_equal", "nan_positive", "plus_inf", "minus_inf_some", "minus_inf_only", "one_finite",
    "subnormal", "huge", "largest", "peaked", "both_underflow", "wide_range", "shifted_apart", "temperatures",
    "hot_and_cold", "extreme_temperatures", "wider_teacher", "vocab_size", "k_1", "k_256", "k_is_v_16", "width_1",
    "width_7", "width_17", "width_513",
]  # fmt: skip
every_op = pytest.mark.parametrize("op", OPS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tensors_of(op, student, teacher, m=16, vocab_size=None, seed=0):
    """What a loss takes besides the student's logits, by its names."""
    rng, shape = generator(seed), student.shape[:-1]
    size = vocab_size or student.shape[-1]
    if op == "reverse_kl":
        return {"teacher_logits": teacher, "weight": torch.rand(shape, generator=rng) - 0.2}
    m = min(m, size) if op == "topk_forward_kl" else m
    ids = torch.randint(size, (*shape, m), generator=rng)  # some twice
    best = student[..., :size].float().nan_to_num().topk(min(m - m // 2, size)).indices
    ids[..., : best.shape[-1]] = best
    if m > 2:
        ids[..., 1] = -1
    if op == "topk_forward_kl":
        logprobs = torch.randn((*shape, m), generator=rng).log_softmax(-1)
        return {"teacher_topk_ids": ids, "teacher_topk_logprobs": logprobs}
    old = torch.randn((*shape, m), generator=rng) - 5
    return {"topk_ids": ids, "advantages": torch.randn((*shape, m), generator=rng), "old_logprobs": old}


def defined(op, upstream, **arguments):
    """The same as `cuda_emulated.loss` by the definition, in float64 from the first to the last."""
    arguments = cuda_emulated.ARGUMENTS[op] | arguments
    del arguments["impl"]
    logits = arguments["student_logits"].double()
    outputs = getattr(_saving, op)(**arguments | {"student_logits": logits})
    scale = upstream.double()
    common = {name: arguments[name] for name in ("student_temperature", "vocab_size")}
    if op == "reverse_kl":
        weight = torch.ones_like(scale) if arguments["weight"] is None else arguments["weight"].double()
        valid = torch.ones_like(scale, dtype=torch.bool) if arguments["mask"] is None else arguments["mask"] != 0
        scale = torch.where(valid & (weight != 0), scale * weight, 0.0)
        (gradient,) = _saving.reverse_kl_backward(
            student_logits=logits, teacher_logits=arguments["teacher_logits"], state=outputs[-1], scale=scale,
            teacher_temperature=arguments["teacher_temperature"], **common,
        )  # fmt: skip
        return outputs[:-1], gradient
    (gradient,) = _saving.logprobs_backward(
        student_logits=logits, topk_ids=arguments["topk_ids" if op == "topk_policy_loss" else "teacher_topk_ids"],
        coefficients=outputs[-2], state=outputs[-1], scale=scale, **common,
    )  # fmt: skip
    return outputs[:-2], gradient


def check(op, upstream, **arguments):
    outputs, gradient = cuda_emulated.loss(op, upstream, **arguments)
    expected, expected_gradient = defined(op, upstream, **arguments)
    for got, wanted in zip(outputs, expected, strict=True):
        if wanted.dtype == torch.int64:
            assert torch.equal(got, wanted)
        else:
            torch.testing.assert_close(got, wanted.float(), rtol=2e-5, atol=2e-6, equal_nan=True)
    dtype = arguments["student_logits"].dtype
    assert gradient.dtype == dtype and gradient.is_contiguous()
    finite = expected_gradient[expected_gradient.isfinite()]
    size = finite.abs().max().item() if finite.numel() else 0.0
    # What is left of terms that cancel has their errors. (Budgets are the tests' of every implementation.)
    tolerance = {
        "rtol": torch.finfo(dtype).eps + 2e-5,
        "atol": 2e-6 * (size + 0.1) + torch.finfo(dtype).smallest_normal,
    }
    torch.testing.assert_close(gradient, expected_gradient.to(dtype), **tolerance, equal_nan=True)
    return outputs, gradient


def of_case(op, name, dtypes):
    student, teacher, kwargs = cases.make(name, dtypes)
    kwargs = dict(kwargs)
    vocab_size, k = kwargs.get("vocab_size"), kwargs.pop("k", 16)
    if op != "reverse_kl":
        kwargs.pop("teacher_temperature", None)
    return {"student_logits": student, **tensors_of(op, student, teacher, k, vocab_size), **kwargs}


@every_op
@every_dtype
@pytest.mark.parametrize("name", NAMES)
def test_the_definition(op, name, dtype):
    upstream = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3e-3, 700.0]])
    check(op, upstream, **of_case(op, name, (dtype, dtype)))


@pytest.mark.parametrize("dtypes", cases.MIXED_DTYPES, ids=cases.case_id)
@pytest.mark.parametrize("name", cases.MIXED)
def test_two_dtypes(name, dtypes):
    check("reverse_kl", torch.ones(2, 3), **of_case("reverse_kl", name, dtypes))


@pytest.mark.parametrize("op", ["topk_policy_loss", "topk_forward_kl"])
@every_dtype
@pytest.mark.parametrize("m", [1, 2, 16, 255, 256, 512])
def test_numbers_of_candidates(op, dtype, m):
    if op == "topk_forward_kl" and m > 256:
        return
    student = cases.randn(3, 9000, seed=m).to(dtype)
    check(op, torch.tensor([1.0, 2.0, -1.0]), student_logits=student, **tensors_of(op, student, None, m))


def test_candidates_that_do_not_exist():
    """They spoil a loss; in the backward pass, where another rank may have them, they count in the sum."""
    student, ids = cases.randn(2, 300), torch.tensor([[5, 400, 2**40, 5], [299, 298, 7, 7]])
    (loss, *_), gradient = cuda_emulated.loss("topk_policy_loss", None, student, ids, torch.ones(2, 4), vocab_size=299)
    assert loss.isnan().tolist() == [True, True]
    assert gradient[:, :299].isnan().all() and (gradient[:, 299] == 0).all()
    coefficients = torch.tensor([[1.0, 2.0, -0.5, 0.25], [-1.0, 1.0, 3.0, 0.5]])
    state = torch.stack([student.amax(-1), (student - student.amax(-1, True)).exp().sum(-1)], -1)
    arguments = {
        "student_logits": student, "topk_ids": ids, "coefficients": coefficients, "state": state,
        "scale": torch.tensor([1.0, -2.0]), "student_temperature": 1.0, "vocab_size": None,
    }  # fmt: skip
    got = cuda_emulated.call_private("logprobs_backward", **arguments)
    torch.testing.assert_close(got, _saving.logprobs_backward(**arguments)[0], rtol=1e-5, atol=1e-6)


@every_op
@every_dtype
def test_logits_that_are_not_read(op, dtype):
    student, teacher = (cases.randn(6, 3000, seed=seed).to(dtype) for seed in (1, 2))
    arguments = {"student_logits": student, **tensors_of(op, student, teacher)}
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    upstream = torch.tensor([1.0, 1.0, 0.0, -2.0, 0.0, 1.0])
    whole = cuda_emulated.loss(op, upstream, **arguments, mask=mask)
    spoilt = {name: x.clone() for name, x in arguments.items()}
    for name in ("student_logits", "teacher_logits"):
        if name in spoilt:
            spoilt[name][mask == 0] = torch.nan
    again = cuda_emulated.loss(op, upstream, **spoilt, mask=mask)
    assert comparison.same_bits([*whole[0], whole[1]], [*again[0], again[1]])
    assert not whole[1][(mask == 0) | (upstream == 0)].any() and whole[1][[0, 3, 5]].any(-1).all()
    for x in whole[0]:
        masked = torch.arange(16).expand(2, 16) if x.dtype == torch.int64 else torch.zeros_like(x[mask == 0])
        assert torch.equal(x[mask == 0], masked)


@every_op
@pytest.mark.parametrize("dtype", [*DTYPES, "mixed"], ids=["f32", "bf16", "f16", "mixed"])
def test_neither_the_split_nor_the_order_changes_a_bit(op, dtype):
    """One block a row, or up to as many as it has units; a row alone or in a batch."""
    student, teacher = cases.randn(3, 33001, seed=1), cases.randn(3, 33001, seed=2)
    student[1, 17000] = 60.0  # a peak
    if dtype == "mixed":
        if op != "reverse_kl":
            return
        teacher = teacher.bfloat16()
    else:
        student, teacher = student.to(dtype), teacher.to(dtype)
    arguments = {"student_logits": student, **tensors_of(op, student, teacher, vocab_size=32999), "vocab_size": 32999}
    upstream = torch.tensor([1.0, -0.3, 2.0])
    results = []
    for multiprocessors, seed in ((1, 1), (4, 2), (132, 3), (132, 4)):
        with cuda_emulated.device(multiprocessors, seed):
            outputs, gradient = cuda_emulated.loss(op, upstream, **arguments)
            results.append([*outputs, gradient])
    one = {name: x[1:2] if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    alone, gradient = cuda_emulated.loss(op, upstream[1:2], **one)
    for result in results[1:]:
        assert comparison.same_bits(result, results[0])
    assert comparison.same_bits([*alone, gradient], [x[1:2].contiguous() for x in results[0]])
    assert results[0][-1].any()


@every_op
@every_dtype
def test_neither_strides_nor_alignment_change_a_bit(op, dtype):
    """Rows that begin anywhere, in memory and in the gradient."""
    for width, offset, gap in itertools.product([1, 5, 16, 17, 2100], [0, 1, 3, 6], [0, 3]):
        memory = cases.randn(2, 3, width + gap + offset, seed=width).to(dtype)
        student, teacher = memory[0][:, offset : offset + width], memory[1][:, gap : gap + width]
        arguments = tensors_of(op, student, teacher, m=4, seed=width)
        outputs, gradient = cuda_emulated.loss(op, torch.ones(3), student, **arguments)
        for n in range(3):
            one = {name: x[n : n + 1].clone() for name, x in arguments.items()}
            alone, of_one = cuda_emulated.loss(op, torch.ones(1), student[n : n + 1].clone(), **one)
            got, wanted = [*(x[n : n + 1] for x in outputs), gradient[n : n + 1]], [*alone, of_one]
            assert comparison.same_bits([x.contiguous() for x in got], wanted), (width, offset, gap, n)


@every_op
@pytest.mark.parametrize(("width", "vocab_size"), [(9000, 3), (9000, 4097), (4100, 4099)])
def test_ids_beyond_the_vocabulary(op, width, vocab_size):
    for dtype in DTYPES:
        student, teacher = (cases.randn(2, width, seed=seed).to(dtype) for seed in (1, 2))
        student[:, vocab_size:] = torch.nan
        arguments = tensors_of(op, student, teacher, m=3, vocab_size=vocab_size)
        _, gradient = check(op, torch.ones(2), student_logits=student, vocab_size=vocab_size, **arguments)
        assert not gradient[:, vocab_size:].any()
