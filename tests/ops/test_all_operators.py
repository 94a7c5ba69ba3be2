"""What is true of every operator as an operator of torch: schemas, fakes, compilation, autograd, vmap, offsets."""

import inspect
import itertools

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cases
import comparison
import loss_cases
import pruneopd_kernels
from implementations import COMPILED, HOST, IMPLEMENTATIONS, LOSSES, OPERATORS, REFERENCE

LOGITS_OPERATORS = ["reliability", "token_stats"]
every_operator = pytest.mark.parametrize("op", OPERATORS)
every_operator_and_loss = pytest.mark.parametrize("op", [*OPERATORS, *LOSSES])  # more of the latter: test_all_losses.py


def raw(op):
    return getattr(torch.ops.pruneopd, op)


def example(op, layout="padded", dtype=torch.float32, seed=0, batch=2, length=6, width=70, k=4):
    """`args, kwargs` of an ordinary call, with every optional tensor given."""
    rng = torch.Generator().manual_seed(seed)
    shape = (batch, length) if layout == "padded" else (batch * length,)
    student, teacher = (torch.randn(*shape, width, generator=rng) for _ in range(2))
    teacher = student + 0.5 * teacher
    mask = torch.rand(shape, generator=rng) < 0.8
    along = {"drift_count": torch.arange(batch, dtype=torch.int32)}
    if layout == "packed":
        along["cu_seqlens"] = (torch.arange(batch + 1) * length).int()
    token_ids = torch.randint(width, shape, generator=rng)
    s, t = student.topk(k).indices, teacher.topk(k)
    if op == "reliability":
        return (student.to(dtype), teacher.to(dtype), mask), {
            **along,
            "k": k,
            "token_ids": token_ids,
            "metric": "top_p",
        }
    if op == "token_stats":
        return (student.to(dtype), teacher.to(dtype), mask), {"k": k, "token_ids": token_ids}
    if op == "reliability_from_topk":
        logprobs = teacher.log_softmax(-1).gather(-1, t.indices)
        return (s, t.indices, mask), {
            **along,
            "teacher_topk_logprobs": logprobs,
            "token_ids": token_ids,
            "metric": "top_p",
        }
    return (torch.rand(shape, generator=rng) < 0.5, mask), along


def plain_example(op, layout="padded", **kwargs):
    """The same with the required tensors only."""
    args, more = example(op, layout, **kwargs)
    return args[:-1], {name: more[name] for name in ("cu_seqlens", "k") if name in more}


# --- the functions and their schemas ---------------------------------------------------------------------------------


@every_operator_and_loss
def test_signatures_agree(op):
    """Function, reference and NumPy twin take the same arguments in the same order, with the same defaults."""
    of_function = inspect.signature(getattr(pruneopd_kernels, op)).parameters
    of_reference = inspect.signature(getattr(pruneopd_kernels.reference, op)).parameters

    def described(parameters, but=()):
        return [(p.name, p.kind, p.default) for p in parameters.values() if p.name not in but]

    assert described(of_function, but=["impl"]) == described(of_reference)
    assert "impl" in of_function
    if op in OPERATORS:
        of_host = inspect.signature(getattr(pruneopd_kernels.host, op)).parameters
        assert described(of_host, but=["num_threads"]) == described(of_reference) and "num_threads" in of_host
    after_mask = list(of_function.values())[list(of_function).index("mask") + 1 :]
    assert all(p.kind is p.KEYWORD_ONLY for p in after_mask)


@every_operator_and_loss
def test_schema_has_the_arguments_of_the_function(op):
    schema = raw(op).default._schema
    parameters = inspect.signature(getattr(pruneopd_kernels, op)).parameters
    assert {a.name for a in schema.arguments} == set(parameters)
    assert all("Tensor" not in str(a.type) for a in schema.arguments if a.kwarg_only)
    assert [a.kwarg_only for a in schema.arguments] == sorted(a.kwarg_only for a in schema.arguments)
    for a in schema.arguments:
        if a.has_default_value():
            assert a.default_value == parameters[a.name].default, a.name
    assert not schema.is_mutable and all(r.alias_info is None for r in schema.returns)


DEFAULTS = {
    "k": 16,
    "threshold": 0.7,
    "w_drop": 0.01,
    "w_base": 0.5,
    "top_p": 0.95,
    "eps": 1e-8,
    "metric": "overlap",
    "reward_weight": "student",
    "student_temperature": 1.0,
    "teacher_temperature": 1.0,
    "vocab_size": None,
    "token_ids": None,
    "cu_seqlens": None,
    "drift_count": None,
    "teacher_topk_logprobs": None,
    "old_logprobs": None,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "clip_dual": 3.0,
    "weight": None,
    "logprob_min": None,
    "impl": "auto",
}
KEYWORDS = {
    "reliability": "token_ids cu_seqlens drift_count k threshold w_drop w_base eps metric top_p reward_weight "
    "student_temperature teacher_temperature vocab_size impl",
    "reliability_from_topk": "teacher_topk_logprobs token_ids cu_seqlens drift_count threshold w_drop w_base eps "
    "metric top_p impl",
    "reliability_from_drift": "cu_seqlens drift_count w_drop w_base eps impl",
    "token_stats": "token_ids k student_temperature teacher_temperature vocab_size impl",
    "topk_policy_loss": "old_logprobs clip_low clip_high clip_dual student_temperature vocab_size impl",
    "reverse_kl": "weight student_temperature teacher_temperature vocab_size impl",
    "topk_forward_kl": "logprob_min student_temperature vocab_size impl",
}
POSITIONAL = {
    "reliability": "student_logits teacher_logits mask",
    "reliability_from_topk": "student_topk_ids teacher_topk_ids mask",
    "reliability_from_drift": "drift mask",
    "token_stats": "student_logits teacher_logits mask",
    "topk_policy_loss": "student_logits topk_ids advantages mask",
    "reverse_kl": "student_logits teacher_logits mask",
    "topk_forward_kl": "student_logits teacher_topk_ids teacher_topk_logprobs mask",
}
FIELDS = {
    "reliability": "overlap drift drift_count reliability weight effective_length topk_ids rewards",
    "reliability_from_topk": "overlap drift drift_count reliability weight effective_length",
    "reliability_from_drift": "drift_count reliability weight effective_length",
    "token_stats": "student_topk_ids student_topk_logprobs teacher_topk_ids teacher_topk_logprobs "
    "teacher_on_student_logprobs student_on_teacher_logprobs overlap student_lse teacher_lse student_entropy "
    "teacher_entropy reverse_kl forward_kl student_token_logprob teacher_token_logprob",
    "topk_policy_loss": "loss",
    "reverse_kl": "loss",
    "topk_forward_kl": "loss student_mass teacher_mass overlap overlap_token_advantage student_topk_ids",
}


@every_operator_and_loss
def test_names_and_defaults(op):
    parameters = inspect.signature(getattr(pruneopd_kernels, op)).parameters
    keywords = [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert keywords == KEYWORDS[op].split()
    assert [name for name in parameters if name not in keywords] == POSITIONAL[op].split()
    assert {name: parameters[name].default for name in keywords} == {name: DEFAULTS[name] for name in keywords}
    names = FIELDS[op].split()
    assert [result.name for result in raw(op).default._schema.returns] == names
    args, kwargs = example(op) if op in OPERATORS else ((), loss_cases.example(op))
    result = getattr(pruneopd_kernels, op)(*args, **kwargs)
    assert list(result._fields) == names if len(names) > 1 else isinstance(result, torch.Tensor)


@every_operator
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_raw_operator_equals_function(op, layout):
    args, kwargs = example(op, layout)
    result = getattr(pruneopd_kernels, op)(*args, **kwargs)
    assert comparison.same_bits(raw(op)(*args, **kwargs), result)
    by_name = {a.name: value for a, value in zip(raw(op).default._schema.arguments, args, strict=False)}
    assert comparison.same_bits(raw(op)(**by_name, **kwargs), result)


@every_operator
def test_outputs_are_new_and_contiguous(op):
    args, kwargs = example(op)
    for impl in IMPLEMENTATIONS:
        result = getattr(impl, op)(*args, **kwargs)
        assert all(x.is_contiguous() for x in result), impl
        given = {x.data_ptr() for x in [*args, *kwargs.values()] if isinstance(x, torch.Tensor)}
        assert not given & {x.data_ptr() for x in result}, impl


@every_operator
def test_inputs_are_left_as_they_are(op):
    args, kwargs = example(op)
    tensors = [x for x in [*args, *kwargs.values()] if isinstance(x, torch.Tensor)]
    copies = [x.clone() for x in tensors]
    for impl in IMPLEMENTATIONS:
        getattr(impl, op)(*args, **kwargs)
        assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True)), impl


@every_operator
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("sizes", [(0, 6), (2, 0), (0, 0), (1, 1)], ids=str)
def test_every_implementation_gives_the_same_shapes_on_small_batches(op, layout, sizes):
    args, kwargs = example(op, layout, batch=sizes[0], length=sizes[1])
    expected = [(x.shape, x.dtype) for x in getattr(REFERENCE, op)(*args, **kwargs)]
    for impl in (*COMPILED, *HOST):
        assert [(x.shape, x.dtype) for x in getattr(impl, op)(*args, **kwargs)] == expected, impl


# --- torch.library ---------------------------------------------------------------------------------------------------


@every_operator
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_opcheck(op, layout, impl):
    for args, kwargs in (example(op, layout), plain_example(op, layout)):
        if op == "token_stats":
            kwargs["token_ids"] = example(op, layout)[1][
                "token_ids"
            ]  # without them the answer is NaN, unequal to itself
        torch.library.opcheck(raw(op).default, args, {**kwargs, "impl": impl})


@pytest.mark.parametrize("op", LOGITS_OPERATORS)
def test_opcheck_with_a_gradient_asked_for(op):
    (student, teacher, mask), kwargs = example(op)
    torch.library.opcheck(raw(op).default, (student.requires_grad_(), teacher.requires_grad_(), mask), kwargs)


@every_operator
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("sizes", [(2, 6), (0, 6), (2, 0), (1, 1)], ids=str)
def test_fake_and_meta_equal_real(op, layout, sizes):
    def described(tensors):
        return [(tuple(x.shape), x.dtype, x.stride()) for x in tensors]

    for make in (example, plain_example):  # the latter gives token_stats that are NaN
        args, kwargs = make(op, layout, batch=sizes[0], length=sizes[1])
        real = described(raw(op)(*args, **kwargs))
        with FakeTensorMode() as mode:
            fake_args = [mode.from_tensor(x) for x in args]
            fake_kwargs = {n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for n, x in kwargs.items()}
            assert described(raw(op)(*fake_args, **fake_kwargs)) == real
        on_meta = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in kwargs.items()}
        result = raw(op)(*(x.to("meta") for x in args), **on_meta)
        assert described(result) == real and all(x.is_meta for x in result)


# --- torch.compile ---------------------------------------------------------------------------------------------------


class OneGraph:
    """A backend that runs the graph as it is and counts the compilations."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return module.forward


@every_operator
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("call", ["function", "raw"])
def test_compiles_to_one_graph_for_all_shapes(op, layout, call):
    torch._dynamo.reset()
    function = getattr(pruneopd_kernels, op) if call == "function" else raw(op)
    backend = OneGraph()
    compiled = torch.compile(
        lambda *args, **kwargs: function(*args, **kwargs), fullgraph=True, dynamic=True, backend=backend
    )
    for batch, length, width in ((2, 6, 70), (3, 5, 71), (4, 9, 100)):
        args, kwargs = example(op, layout, batch=batch, length=length, width=width)
        assert comparison.same_bits(compiled(*args, **kwargs), function(*args, **kwargs))
    assert backend.graphs == 1


@pytest.mark.parametrize("op", LOGITS_OPERATORS)
def test_compiles_with_a_vocab_size_that_is_dynamic(op):
    torch._dynamo.reset()
    backend = OneGraph()

    def step(student, teacher):
        return getattr(pruneopd_kernels, op)(student, teacher, vocab_size=student.shape[-1] - 2, k=5)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for width in (70, 71, 90):
        (student, teacher, _), _ = example(op, width=width)
        assert comparison.same_bits(compiled(student, teacher), step(student, teacher))
    assert backend.graphs == 1


@pytest.mark.parametrize("op", LOGITS_OPERATORS)
def test_compiles_beside_something_that_is_differentiable(op):
    torch._dynamo.reset()
    (student, teacher, mask), kwargs = example(op)

    def step(student):
        result = getattr(pruneopd_kernels, op)(student * 1.0, teacher, mask, **kwargs)
        return ((result.overlap if op == "token_stats" else result.weight)[..., None] * student).sum()

    student.requires_grad_()
    (expected,) = torch.autograd.grad(step(student), student)
    (gradient,) = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(student), student)
    assert torch.equal(gradient, expected) and expected.any()


@every_operator
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, while inductor is imported
def test_compiles_with_the_default_backend_between_other_operations(op):
    torch._dynamo.reset()

    def step(*args, **kwargs):
        result = getattr(pruneopd_kernels, op)(*args, **kwargs)
        return result, (result.overlap if op == "token_stats" else result.weight) * 2

    args, kwargs = example(op)
    result, doubled = torch.compile(step, fullgraph=True)(*args, **kwargs)
    expected, expected_doubled = step(*args, **kwargs)
    assert comparison.differing(result, expected) == [] and torch.equal(doubled, expected_doubled)


@every_operator
def test_bad_input_raises_under_compile(op):
    torch._dynamo.reset()
    args, kwargs = example(op)
    bad = {"k": 0} if op in LOGITS_OPERATORS else {"w_drop": -1.0}
    with pytest.raises(Exception, match="must be"):
        torch.compile(getattr(pruneopd_kernels, op), fullgraph=True, backend=OneGraph())(*args, **(kwargs | bad))


# --- autograd, modes, vmap -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", LOGITS_OPERATORS)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_no_output_is_differentiable(op, impl):
    (student, teacher, mask), kwargs = example(op)
    student.requires_grad_(), teacher.requires_grad_()
    result = getattr(pruneopd_kernels, op)(student, teacher, mask, **kwargs, impl=impl)
    assert [name for name, x in zip(result._fields, result, strict=True) if x.requires_grad] == []
    floats = [x for x in result if x.is_floating_point()]
    with pytest.raises(RuntimeError, match="does not require grad"):
        sum(x.sum() for x in floats).backward()
    (student.sum() + sum(x.sum() for x in floats)).backward()  # as a constant beside something that is
    assert torch.equal(student.grad, torch.ones_like(student)) and teacher.grad is None


@pytest.mark.parametrize("op", LOGITS_OPERATORS)
def test_no_derivative_of_any_order(op):
    (student, teacher, mask), kwargs = example(op)
    student.requires_grad_()
    result = getattr(pruneopd_kernels, op)(student * 1.0, teacher, mask, **kwargs)
    for x in result:
        if x.is_floating_point():
            with pytest.raises(RuntimeError, match="does not require grad"):
                torch.autograd.grad(x.sum(), student, create_graph=True)


@pytest.mark.parametrize("op", LOGITS_OPERATORS)
def test_gradients_asked_for_change_no_number(op):
    (student, teacher, mask), kwargs = example(op)
    plain = getattr(pruneopd_kernels, op)(student, teacher, mask, **kwargs)
    with_grad = getattr(pruneopd_kernels, op)(student.clone().requires_grad_(), teacher, mask, **kwargs)
    assert comparison.differing(plain, with_grad) == []


@every_operator
def test_under_no_grad_and_inference_mode(op):
    args, kwargs = example(op)
    plain = getattr(pruneopd_kernels, op)(*args, **kwargs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert comparison.differing(getattr(pruneopd_kernels, op)(*args, **kwargs), plain) == []


@pytest.mark.parametrize("op", LOGITS_OPERATORS)
def test_inference_mode_teacher_with_a_student_that_trains(op):
    (student, teacher, mask), kwargs = example(op)
    plain = getattr(pruneopd_kernels, op)(student, teacher, mask, **kwargs)
    with torch.inference_mode():
        teacher = teacher.clone()
    result = getattr(pruneopd_kernels, op)(student.requires_grad_(), teacher, mask, **kwargs)
    assert comparison.differing(result, plain) == []


@every_operator
@pytest.mark.parametrize("call", ["function", "raw"])
def test_vmap_raises(op, call):
    args, kwargs = example(op)
    function = getattr(pruneopd_kernels, op) if call == "function" else raw(op)
    stacked = [torch.stack([x, x]) for x in args]
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda *args: function(*args, **kwargs))(*stacked)


@every_operator
def test_autocast_changes_nothing(op):
    args, kwargs = example(op)
    plain = getattr(pruneopd_kernels, op)(*args, **kwargs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert comparison.differing(getattr(pruneopd_kernels, op)(*args, **kwargs), plain) == []


# --- choice of implementation ----------------------------------------------------------------------------------------


@every_operator
def test_auto_takes_cpp(op):
    args, kwargs = example(op)
    function = getattr(pruneopd_kernels, op)
    auto = function(*args, **kwargs)
    assert comparison.differing(auto, function(*args, **kwargs, impl="cpp")) == []
    by_reference = function(*args, **kwargs, impl="reference")
    assert comparison.differing(by_reference, getattr(REFERENCE, op)(*args, **kwargs)) == []


@pytest.mark.parametrize("op", LOGITS_OPERATORS)
def test_implementations_are_told_apart(op):
    """The bits of the sums differ, so the tests above compare what they say they compare."""
    (student, teacher, _), _ = example(op, width=3000)
    field = {"reliability": "rewards", "token_stats": "reverse_kl"}[op]
    function = getattr(pruneopd_kernels, op)
    cpp, reference = (getattr(function(student, teacher, impl=impl), field) for impl in ("cpp", "reference"))
    assert not torch.equal(cpp, reference)


@pytest.mark.parametrize("op", LOGITS_OPERATORS)
def test_reference_takes_float64(op):
    (student, teacher, mask), kwargs = example(op)
    result = getattr(REFERENCE, op)(student.double(), teacher.double(), mask, **kwargs)
    of_float32 = getattr(REFERENCE, op)(student, teacher, mask, **kwargs)
    in_float64 = {name for name, x in zip(result._fields, result, strict=True) if x.dtype == torch.float64}
    floats = {name for name, x in zip(of_float32._fields, of_float32, strict=True) if x.dtype == torch.float32}
    assert in_float64 == {"reliability": {"rewards"}, "token_stats": floats}[op]
    for name in result._fields:
        torch.testing.assert_close(getattr(result, name).to(getattr(of_float32, name).dtype), getattr(of_float32, name))


@pytest.mark.parametrize("op", LOGITS_OPERATORS)
def test_impl_reference_takes_float64(op):
    (student, teacher, mask), kwargs = example(op)
    expected = getattr(REFERENCE, op)(student.double(), teacher.double(), mask, **kwargs)
    for function in (getattr(pruneopd_kernels, op), raw(op)):
        result = function(student.double(), teacher.double(), mask, **kwargs, impl="reference")
        assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))


def test_whole_numbers_are_floats_too():
    """`threshold=1, w_drop=0` as anyone writes it."""
    (student, teacher, _), _ = example("reliability")
    whole = {"threshold": 1, "w_drop": 1, "w_base": 0, "eps": 0, "top_p": 1, "student_temperature": 2}
    floats = {name: float(value) for name, value in whole.items()}
    expected = REFERENCE.reliability(student, teacher, **floats)
    for impl in IMPLEMENTATIONS:
        result = impl.reliability(student, teacher, **whole)
        assert comparison.differing(result, impl.reliability(student, teacher, **floats)) == [], impl
        assert torch.equal(result.weight, expected.weight), impl
    assert torch.equal(raw("reliability")(student, teacher, **whole)[4], expected.weight)


def test_the_mode_of_floating_point_is_left_as_it_is(two_threads):
    """Flushing of subnormals, as fast kernels like it, ends with the call, in every thread."""
    student, teacher = cases.randn(64, 4000, seed=1), cases.randn(64, 4000, seed=2)
    small = torch.full((1 << 20,), 1e-40)
    for impl in (*COMPILED, *HOST):
        impl.token_stats(student, teacher)
        assert torch.equal(small * 1.0, small) and (small * 0.5 > 0).all(), impl
        assert np.float32(1e-40) * np.float32(0.5) > 0


def test_flushing_subnormals_changes_no_order():
    """Whoever has asked torch to flush them still gets the order by value."""
    student, teacher, _ = cases.make("subnormal", (cases.F32, cases.F32))
    expected = REFERENCE.token_stats(student, teacher)
    torch.set_flush_denormal(True)
    try:
        results = [(impl, impl.token_stats(student, teacher)) for impl in (*COMPILED, *HOST)]
    finally:
        torch.set_flush_denormal(False)
    for impl, result in results:
        assert torch.equal(result.student_topk_ids, expected.student_topk_ids), impl
        assert torch.equal(result.teacher_topk_ids, expected.teacher_topk_ids), impl


# --- offsets beyond 32 bits ------------------------------------------------------------------------------------------


FAR = 2**31 + 4096


def untouched(path, elements, dtype):
    """A tensor on a sparse file: room for `elements` that costs what is written."""
    return torch.from_file(str(path), shared=True, size=elements, dtype=dtype)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS, ids=repr)
@pytest.mark.parametrize("op", LOGITS_OPERATORS)
def test_stride_beyond_32_bits(impl, op, tmp_path):
    """Two responses lie 2**31 elements apart, and so do their masks and token ids."""
    student, teacher = cases.randn(2, 3, 600, seed=1).half(), cases.randn(2, 3, 600, seed=2).half()
    mask, token_ids = torch.tensor([[1, 0, 1], [1, 1, 0]], dtype=torch.int8), torch.randint(600, (2, 3))

    def far_apart(x, name):
        storage = untouched(tmp_path / name, FAR + 2 * x[0].numel(), x.dtype)
        view = storage.as_strided(x.shape, (FAR, *x.stride()[1:]))
        view.copy_(x)
        return view

    function = getattr(impl, op)
    plain = function(student, teacher, mask, token_ids=token_ids)
    far = [far_apart(x, name) for name, x in zip("stm", (student, teacher, mask), strict=True)]
    result = function(*far, token_ids=far_apart(token_ids.int(), "ids"))
    assert comparison.differing(result, plain) == []


@pytest.mark.parametrize("impl", [*COMPILED, *HOST], ids=repr)
@pytest.mark.parametrize("op", LOGITS_OPERATORS)
def test_contiguous_logits_of_more_than_2_to_the_31_elements(impl, op, tmp_path):
    """Only the valid positions are read, so only they take memory."""
    width, length = 151936, 14200
    assert width * length > 2**31
    logits = untouched(tmp_path / "logits", width * length, torch.float16).view(1, length, width)
    mask = torch.zeros(1, length, dtype=torch.bool)
    for t in (0, 7100, length - 1):
        logits[0, t, t % 1000] = 1 + t
        mask[0, t] = True
    kwargs = {"w_drop": 0.1} if op == "reliability" else {}
    result = getattr(impl, op)(logits, logits, mask, k=2, **kwargs)
    ids = result.topk_ids if op == "reliability" else result.student_topk_ids
    assert ids[mask].tolist() == [[0, 1], [100, 0], [199, 0]]
    assert result.overlap[mask].tolist() == [1, 1, 1] and result.overlap.sum() == 3


@pytest.mark.parametrize("impl", COMPILED, ids=repr)
def test_ids_beyond_32_bits(impl, tmp_path):
    """Candidates and their log-probabilities, read with far strides."""
    (student, teacher, mask), kwargs = example("reliability_from_topk")
    plain = impl.reliability_from_topk(student, teacher, mask, **kwargs)

    def far_apart(x, name):
        storage = untouched(tmp_path / name, FAR + 2 * x[0].numel(), x.dtype)
        view = storage.as_strided(x.shape, (FAR, *x.stride()[1:]))
        view.copy_(x)
        return view

    logprobs = far_apart(kwargs.pop("teacher_topk_logprobs"), "q")
    result = impl.reliability_from_topk(
        far_apart(student.int(), "s"),
        far_apart(teacher.int(), "t"),
        far_apart(mask, "m"),
        teacher_topk_logprobs=logprobs,
        **kwargs,
    )
    assert comparison.differing(result, plain) == []


@pytest.mark.parametrize("impl", [*COMPILED, *HOST], ids=repr)
def test_the_size_of_a_real_step(impl):
    """64 x 12288 positions of 151936 logits, all of them one row in memory, nearly all of them masked."""
    row = cases.randn(151936, seed=1).bfloat16()
    logits = row.expand(64, 12288, 151936)
    mask = torch.zeros(64, 12288, dtype=torch.bool)
    mask[63, 12287], mask[40, 3] = True, True
    result = impl.reliability(logits, logits, mask, k=1)
    assert result.topk_ids[63, 12287] == row.float().argmax() and result.overlap.sum() == 2
    assert result.effective_length.sum() == 2 and result.weight[63, 12287] == 1.5


def test_examples_cover_every_optional_tensor():
    """`example` gives them all, so the tests above see them all."""
    for op, layout in itertools.product(OPERATORS, ["padded", "packed"]):
        args, kwargs = example(op, layout)
        names = {a.name for a in raw(op).default._schema.arguments if "Tensor" in str(a.type)}
        given = {n for n, x in kwargs.items() if isinstance(x, torch.Tensor)}
        assert len(args) + len(given) == len(names) - (layout == "padded" and "cu_seqlens" in names), (op, layout)
    assert np.iinfo(np.int32).max < FAR
