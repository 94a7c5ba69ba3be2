"""What is true of every loss as an operator of torch: schemas, fakes, compilation, autograd, checkpoints, offsets."""

import functools

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import comparison
import pruneopd_kernels
from implementations import COMPILED, LOSS_IMPLEMENTATIONS, LOSSES, REFERENCE, Loss
from loss_cases import example
from test_all_operators import FAR, raw, untouched

every_loss = pytest.mark.parametrize("op", LOSSES)
either_impl = pytest.mark.parametrize("impl", ["auto", "reference"])


def function(op):
    return getattr(pruneopd_kernels, op)


def fields(outputs):
    """The outputs as a NamedTuple, of a raw operator too."""
    if isinstance(outputs, torch.Tensor):
        return Loss(outputs)
    return pruneopd_kernels.TopkForwardKl(*outputs)


def floats_but_the_student(arguments):
    return [x for name, x in arguments.items() if name != "student_logits" and x.is_floating_point()]


def with_gradient(call, arguments, **kwargs):
    """All that a call gives: outputs and the gradient of the sum of the losses."""
    student = arguments["student_logits"].detach().requires_grad_()
    outputs = fields(call(**(arguments | {"student_logits": student}), **kwargs))
    (gradient,) = torch.autograd.grad(outputs.loss.sum(), student)
    return (*(x.detach() for x in outputs), gradient)


# --- the functions and their operators -------------------------------------------------------------------------------


@every_loss
def test_raw_operator_equals_function(op):
    arguments = example(op)
    expected = with_gradient(function(op), arguments)
    assert comparison.same_bits(with_gradient(raw(op), arguments), expected)
    names = [argument.name for argument in raw(op).default._schema.arguments]
    by_position = [arguments.get(name) for name in names[: 1 + max(map(names.index, arguments))]]
    assert comparison.same_bits(fields(raw(op)(*by_position)), expected[:-1])


@every_loss
def test_outputs_are_new_and_contiguous(op):
    for impl in LOSS_IMPLEMENTATIONS:
        arguments = example(op)
        outputs, gradient = impl.loss(op, None, **arguments)
        given = {x.data_ptr() for x in arguments.values()}
        for x in (*outputs, gradient):
            assert x.is_contiguous() and x.data_ptr() not in given, impl


@every_loss
def test_inputs_are_left_as_they_are(op):
    arguments, upstream = example(op), torch.randn(2, 6)
    tensors = [*arguments.values(), upstream]
    copies = [x.clone() for x in tensors]
    for impl in LOSS_IMPLEMENTATIONS:
        impl.loss(op, upstream, **arguments)
        assert comparison.same_bits(tensors, copies), impl


@every_loss
@pytest.mark.parametrize("shape", [(0, 6), (2, 0), (0,), (1, 1), (), (2, 0, 3)], ids=str)
def test_every_implementation_gives_the_same_shapes_on_small_batches(op, shape):
    for m in (1, 8):
        results = []
        for impl in LOSS_IMPLEMENTATIONS:
            outputs, gradient = impl.loss(op, None, **example(op, shape, m=m))
            results.append([(x.shape, x.dtype) for x in (*outputs, gradient)])
        assert results == [results[0]] * len(results)


@every_loss
def test_a_vocabulary_of_one(op):
    """Its only token is certain: nothing diverges and nothing is to be learnt."""
    for impl in LOSS_IMPLEMENTATIONS:
        outputs, gradient = impl.loss(op, None, **example(op, width=1, m=1))
        assert outputs.loss.isfinite().all() and not gradient.any(), impl


# --- torch.library ---------------------------------------------------------------------------------------------------


@every_loss
@either_impl
def test_opcheck(op, impl):
    arguments = example(op)
    names = [argument.name for argument in raw(op).default._schema.arguments if not argument.kwarg_only]
    required = {name: x for name, x in arguments.items() if name not in ("mask", "weight", "old_logprobs")}
    for given in (arguments, required):
        args = tuple(given.get(name) for name in names)
        for requires_grad in (False, True):
            student = given["student_logits"].detach().requires_grad_(requires_grad)
            for overload in (raw(op).default, getattr(torch.ops.pruneopd, f"_{op}").default):
                torch.library.opcheck(overload, (student, *args[1:]), {"impl": impl})


@every_loss
@either_impl
def test_opcheck_of_the_backward_pass(op, impl):
    """The operator that autograd calls is one like the others."""
    arguments = example(op)
    names = [argument.name for argument in raw(op).default._schema.arguments if not argument.kwarg_only]
    outputs = getattr(torch.ops.pruneopd, f"_{op}")(*(arguments.get(name) for name in names), impl=impl)
    scale = torch.rand(2, 6) * arguments["mask"]  # as autograd gives it
    student = arguments["student_logits"]
    if op == "reverse_kl":
        args, backward = (student, arguments["teacher_logits"], outputs[-1], scale), "_reverse_kl_backward"
    else:
        ids = arguments["topk_ids" if op == "topk_policy_loss" else "teacher_topk_ids"]
        args, backward = (student, ids, *outputs[-2:], scale), "_logprobs_backward"
    torch.library.opcheck(getattr(torch.ops.pruneopd, backward).default, args, {"impl": impl})


@every_loss
@either_impl
@pytest.mark.parametrize("shape", [(2, 6), (0, 6), (), (1, 1)], ids=str)
def test_fake_and_meta_equal_real(op, impl, shape):
    """The outputs, what is saved, and the gradient."""

    def described(tensors):
        return [(tuple(x.shape), x.dtype, x.stride()) for x in tensors]

    inner = functools.partial(getattr(torch.ops.pruneopd, f"_{op}"), impl=impl)
    arguments = example(op, shape)
    saved, real = described(inner(**arguments)), described(with_gradient(raw(op), arguments, impl=impl))
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(x) for name, x in arguments.items()}
        assert described(inner(**fakes)) == saved
        assert described(with_gradient(raw(op), fakes, impl=impl)) == real
    on_meta = {name: x.to("meta") for name, x in arguments.items()}
    results = with_gradient(raw(op), on_meta, impl=impl)
    assert described(results) == real and all(x.is_meta for x in results)


# --- torch.compile ---------------------------------------------------------------------------------------------------


def counting_backend():
    """A backend that runs the traced forward and backward graphs as they are, and how often it has been given each."""
    counts = {"forward": 0, "backward": 0}

    def compiler(name):
        def run(module, inputs):
            counts[name] += 1
            return make_boxed_func(module.forward)

        return run

    return aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward")), counts


@every_loss
@pytest.mark.parametrize("call", ["function", "raw"])
def test_compiles_to_one_graph_for_all_shapes_forwards_and_backwards(op, call):
    torch._dynamo.reset()
    plain = function(op) if call == "function" else raw(op)
    backend, counts = counting_backend()
    compiled = torch.compile(lambda **kwargs: plain(**kwargs), fullgraph=True, dynamic=True, backend=backend)
    for batch, length, width, m in ((2, 6, 70, 8), (3, 5, 71, 9), (4, 9, 100, 12)):
        arguments = example(op, (batch, length), width, m)
        assert comparison.same_bits(with_gradient(compiled, arguments), with_gradient(plain, arguments))
    assert counts == {"forward": 1, "backward": 1}


@every_loss
def test_compiles_with_a_vocab_size_that_is_dynamic(op):
    torch._dynamo.reset()
    backend, counts = counting_backend()

    def step(student_logits, **arguments):
        return function(op)(student_logits, **arguments, vocab_size=student_logits.shape[-1] - 2)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for width in (70, 71, 90):
        arguments = example(op, width=width)
        for name, ids in arguments.items():
            if name.endswith("ids"):
                ids.clamp_(max=width - 3)
        assert comparison.same_bits(with_gradient(compiled, arguments), with_gradient(step, arguments))
    assert counts == {"forward": 1, "backward": 1}


@every_loss
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, while inductor is imported
def test_compiles_with_the_default_backend_between_other_operations(op):
    torch._dynamo.reset()

    def step(student_logits, **arguments):
        loss = fields(raw(op)(student_logits * 2.0, **arguments)).loss
        return (loss * torch.arange(6)).sum()

    arguments = example(op)
    student = arguments.pop("student_logits").requires_grad_()
    (expected,) = torch.autograd.grad(step(student, **arguments), student)
    loss = torch.compile(step, fullgraph=True)(student, **arguments)
    torch.testing.assert_close(loss, step(student, **arguments))
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)
    assert expected.any()


@every_loss
def test_bad_input_raises_under_compile(op):
    torch._dynamo.reset()
    compiled = torch.compile(function(op), fullgraph=True, backend=counting_backend()[0])
    with pytest.raises(Exception, match="must be"):
        compiled(**example(op), student_temperature=-1.0)


# --- autograd --------------------------------------------------------------------------------------------------------


@every_loss
@either_impl
def test_only_the_loss_is_differentiable_and_only_in_the_student(op, impl):
    arguments = example(op)
    others = floats_but_the_student(arguments)
    for x in others:
        x.requires_grad_()
    outputs = fields(function(op)(**arguments, impl=impl))
    assert not any(x.requires_grad for x in outputs)
    arguments["student_logits"].requires_grad_()
    outputs = fields(function(op)(**arguments, impl=impl))
    assert [name for name, x in outputs._asdict().items() if x.requires_grad] == ["loss"]
    outputs.loss.sum().backward()
    assert arguments["student_logits"].grad.any() and all(x.grad is None for x in others)


@every_loss
@pytest.mark.parametrize("impl", LOSS_IMPLEMENTATIONS, ids=repr)
def test_no_implementation_differentiates_anything_else(op, impl):
    """The plain reference neither, whose formulas autograd could go on through."""
    arguments = example(op)
    for x in arguments.values():
        x.requires_grad_(x.is_floating_point())
    outputs = impl.call(op, **arguments)
    (outputs if isinstance(outputs, torch.Tensor) else outputs.loss).sum().backward()
    assert arguments["student_logits"].grad.any()
    assert all(x.grad is None for x in floats_but_the_student(arguments))


@every_loss
@either_impl
def test_second_derivatives_raise(op, impl):
    arguments = example(op)
    student = arguments.pop("student_logits").requires_grad_()
    loss = fields(function(op)(student, **arguments, impl=impl)).loss
    (gradient,) = torch.autograd.grad(loss.sum(), student, create_graph=True)
    with pytest.raises(RuntimeError, match="the gradient of a loss cannot be differentiated a second time"):
        gradient.square().sum().backward()


@every_loss
def test_the_reference_has_second_derivatives(op):
    arguments = {name: x.double() if x.is_floating_point() else x for name, x in example(op, (2,), 9, 6).items()}
    student = arguments.pop("student_logits").requires_grad_()

    def loss(student):
        return fields(getattr(pruneopd_kernels.reference, op)(student, **arguments)).loss

    assert torch.autograd.gradgradcheck(loss, student)


@every_loss
def test_gradients_asked_for_change_no_number(op):
    arguments = example(op)
    plain = fields(function(op)(**arguments))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert comparison.differing(fields(function(op)(**arguments)), plain) == []
    assert comparison.same_bits(with_gradient(function(op), arguments)[:-1], plain)


@every_loss
def test_backwards_twice(op):
    """The graph is kept, and so is what it saved."""
    arguments = example(op)
    student = arguments.pop("student_logits").requires_grad_()
    loss = fields(function(op)(student, **arguments)).loss
    first, second = (torch.autograd.grad(loss.sum(), student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.any()


@every_loss
def test_gradients_add_up_in_a_parameter(op):
    """Through a head, in two chunks of positions, as a trainer does."""
    arguments = example(op, (4, 5), 70)
    hidden, head = torch.randn(4, 5, 8), torch.randn(8, 70, requires_grad=True)

    def loss(part):
        given = {name: x[part] for name, x in arguments.items() if name != "student_logits"}
        return fields(function(op)(hidden[part] @ head, **given)).loss.sum()

    loss(slice(None)).backward()
    whole, head.grad = head.grad, None
    for part in (slice(0, 1), slice(1, 4)):
        loss(part).backward()
    torch.testing.assert_close(head.grad, whole, rtol=1e-5, atol=1e-5)
    assert whole.any()


@every_loss
def test_tensors_of_inference_mode(op):
    """All but the student's may come from there."""
    arguments = example(op)
    expected = with_gradient(function(op), arguments)
    with torch.inference_mode():
        arguments = {name: x if name == "student_logits" else x.clone() for name, x in arguments.items()}
    assert comparison.same_bits(with_gradient(function(op), arguments), expected)


READ_BACKWARDS = {
    "topk_policy_loss": ["student_logits", "topk_ids"],
    "reverse_kl": ["student_logits", "teacher_logits", "mask", "weight"],
    "topk_forward_kl": ["student_logits", "teacher_topk_ids"],
}


@every_loss
def test_what_the_backward_pass_reads_must_be_as_it_was(op):
    """A change in between is an error and no wrong number; of what it does not read, none."""
    for name in example(op):
        arguments = example(op)
        leaf = arguments["student_logits"].requires_grad_()
        arguments["student_logits"] = leaf * 1.0
        loss = fields(function(op)(**arguments)).loss
        with torch.no_grad():
            arguments[name].copy_(arguments[name].clone())
        if name in READ_BACKWARDS[op]:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.sum().backward()
        else:
            loss.sum().backward()
            assert leaf.grad.any()


@every_loss
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(op, use_reentrant):
    arguments = example(op)
    expected = with_gradient(function(op), arguments)
    names = list(arguments)

    def step(*tensors):
        return fields(function(op)(**dict(zip(names, tensors, strict=True)))).loss

    student = arguments["student_logits"].requires_grad_()
    loss = checkpoint(step, *arguments.values(), use_reentrant=use_reentrant)
    (gradient,) = (torch.autograd.grad(loss.sum(), student)) if not use_reentrant else (backwards(loss, student),)
    assert comparison.same_bits([loss.detach(), gradient], [expected[0], expected[-1]])


def backwards(loss, leaf):
    """Reentrant checkpoints take part in .backward() only."""
    loss.sum().backward()
    return leaf.grad


@every_loss
def test_autocast_changes_nothing(op):
    arguments = example(op)
    expected = with_gradient(function(op), arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert comparison.same_bits(with_gradient(function(op), arguments), expected)


@every_loss
@pytest.mark.parametrize("call", ["function", "raw"])
def test_vmap_raises(op, call):
    arguments = example(op)
    called = function(op) if call == "function" else raw(op)
    stacked = [torch.stack([x, x]) for x in arguments.values()]
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda *tensors: called(**dict(zip(arguments, tensors, strict=True))))(*stacked)


# --- choice of implementation ----------------------------------------------------------------------------------------


@every_loss
def test_auto_takes_cpp(op):
    """Forwards and backwards; the bits of the sums differ from the reference's, so this compares what it says."""
    arguments = example(op, width=3000, m=16)
    auto, cpp, reference = (with_gradient(function(op), arguments, impl=impl) for impl in ("auto", "cpp", "reference"))
    assert comparison.same_bits(auto, cpp)
    assert not torch.equal(cpp[-1], reference[-1])


@every_loss
def test_float64_in_the_reference(op):
    arguments = {name: x.double() if x.is_floating_point() else x for name, x in example(op).items()}
    results = [with_gradient(getattr(pruneopd_kernels.reference, op), arguments)]
    results += [with_gradient(call, arguments, impl="reference") for call in (function(op), raw(op))]
    of_float32, of_gradient32 = REFERENCE.loss(op, None, **example(op))
    for *outputs, gradient in results:
        for x, wanted in zip([*outputs, gradient], [*of_float32, of_gradient32], strict=True):
            torch.testing.assert_close(x.to(wanted.dtype), wanted, rtol=1e-5, atol=1e-6)
        assert outputs[0].dtype == gradient.dtype == torch.float64
        assert [x.dtype for x in outputs] == [x.dtype for x in results[0][:-1]]


@every_loss
def test_whole_numbers_are_floats_too(op):
    whole = {"student_temperature": 2}
    if op == "topk_policy_loss":
        whole |= {"clip_low": 1, "clip_high": 0, "clip_dual": 2}
    if op == "topk_forward_kl":
        whole |= {"logprob_min": -3}
    floats = {name: float(value) for name, value in whole.items()}
    for impl in LOSS_IMPLEMENTATIONS:
        results = [impl.loss(op, None, **example(op), **options) for options in (whole, floats)]
        assert comparison.same_bits(*[(*outputs, gradient) for outputs, gradient in results]), impl


# --- offsets beyond 32 bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", LOSS_IMPLEMENTATIONS, ids=repr)
@every_loss
def test_stride_beyond_32_bits(impl, op, tmp_path):
    """Two responses lie 2**31 elements apart, in every tensor, and so do the gradients that come back."""
    arguments, upstream = example(op, (2, 3), 600, dtype=torch.float16), torch.randn(2, 3)

    def far_apart(name, x):
        storage = untouched(tmp_path / name, FAR + 2 * x[0].numel(), x.dtype)
        view = storage.as_strided(x.shape, (FAR, *x.stride()[1:]))
        return view.copy_(x)

    outputs, gradient = impl.loss(op, upstream, **arguments)
    far = {name: far_apart(name, x) for name, x in arguments.items()}
    result, of_far = impl.loss(op, far_apart("upstream", upstream), **far)
    assert comparison.same_bits([*result, of_far], [*outputs, gradient])


@pytest.mark.parametrize("impl", COMPILED, ids=repr)
@every_loss
def test_contiguous_logits_of_more_than_2_to_the_31_elements(impl, op, tmp_path):
    """Only the valid positions are read, so only they take memory; a gradient would take all of it."""
    width, length = 151936, 14200
    assert width * length > 2**31
    logits = untouched(tmp_path / "logits", width * length, torch.float16).view(1, length, width)
    positions = [0, 7100, length - 1]
    mask = torch.zeros(1, length, dtype=torch.bool)
    for t in positions:
        logits[0, t, t % 1000] = 1 + t % 7
        mask[0, t] = True
    rows = logits[:, positions].clone()
    tensors = example(op, (1, len(positions)), width, 4, dtype=torch.float16) | {"student_logits": rows}
    if op == "reverse_kl":
        tensors["teacher_logits"] = -rows

    def at_length(name, x):
        if "logits" in name:
            return logits
        return x.new_zeros((1, length, *x.shape[2:])).index_copy(1, torch.tensor(positions), x)

    spread = {name: at_length(name, x) for name, x in tensors.items() if name != "mask"} | {"mask": mask}
    if op == "reverse_kl":
        tensors["teacher_logits"] = rows  # the same memory: a divergence of 0 at each position
    with torch.no_grad():
        result = fields(impl.call(op, **spread))
        expected = fields(impl.call(op, **(tensors | {"mask": None})))
    for x, wanted in zip(result, expected, strict=True):
        assert torch.equal(x[mask].squeeze(), wanted[0].squeeze())
