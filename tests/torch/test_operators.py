"""What is true of every operator as an operator of torch: schemas, fakes, compilation, autograd, modes, vmap."""

import functools
import inspect

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

import pruneopd_kernels
from comparison import differing, same_bits
from implementations import (
    ALONG_RESPONSES,
    DECLARED,
    LOGITS,
    LOSSES,
    OPERATORS,
    REFERENCE,
    each,
    flowing,
    leaf,
    named,
    quick,
    raw,
    temperature,
)
from operators import MODULES, example, of_positions, required
from pruneopd_kernels.ops._operator import IMPLS

every_operator = pytest.mark.parametrize("op", OPERATORS)
every_loss = pytest.mark.parametrize("op", LOSSES)
either_impl = pytest.mark.parametrize("impl", ["auto", "reference"])
# Padded and, of those that have responses, packed.
every_layout = pytest.mark.parametrize(
    ("op", "packed"), [(op, False) for op in OPERATORS] + [(op, True) for op in ALONG_RESPONSES]
)


def function(op):
    return getattr(pruneopd_kernels, op)


def fields(op, outputs):
    """The outputs by name, of a raw operator too."""
    return dict(zip(DECLARED[op].fields, [outputs] if isinstance(outputs, torch.Tensor) else outputs, strict=True))


def computed(op, call, arguments, **options):
    """All that a call gives: outputs and, of a loss, the gradient of the sum of the losses."""
    if op not in LOSSES:
        return fields(op, call(**arguments, **options))
    logits = arguments[leaf(op)].detach().requires_grad_()
    outputs = fields(op, call(**arguments | {leaf(op): logits}, **options))
    (gradient,) = torch.autograd.grad(total(op, outputs), logits)
    return {name: x.detach() for name, x in outputs.items()} | {"gradient": gradient}


def total(op, outputs):
    """The sum of the losses, or of shares of several differentiable outputs."""
    return sum((share * outputs[name]).sum() for name, share in flowing(op, outputs).items())


def described(tensors):
    return [(tuple(x.shape), x.dtype, x.stride()) for x in tensors]


def by_position(op, arguments):
    """Tensors by position, scalars by name: `args, kwargs`."""
    tensors = DECLARED[op].tensors
    scalars = {name: x for name, x in arguments.items() if name not in tensors}
    return tuple(arguments.get(name) for name in tensors), scalars


# --- schemas ---------------------------------------------------------------------------------------------------------

# Written out once more on purpose: what users rely on changes nowhere unseen.
DEFAULTS = {
    "mask": None, "k": 16, "threshold": 0.7, "w_drop": 0.01, "w_base": 0.5, "top_p": 0.95, "eps": 1e-8,
    "metric": "overlap", "reward_weight": "student", "student_temperature": 1.0, "teacher_temperature": 1.0,
    "vocab_size": None, "token_ids": None, "cu_seqlens": None, "drift_count": None, "teacher_topk_logprobs": None,
    "old_logprobs": None, "clip_low": 0.2, "clip_high": 0.2, "clip_dual": 3.0, "weight": None, "logprob_min": None,
    "student_topk_logprobs": None, "loss": "topk_policy", "entropies": False, "tail": "bucket", "temperature": 1.0,
    "impl": "auto",
}  # fmt: skip


@every_operator
def test_signatures_and_schemas(op):
    """Tensors up to the mask by position; everything else by name, with a default."""
    parameters, schema = inspect.signature(function(op)).parameters, raw(op).default._schema
    names = list(parameters)
    by_name = [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert names[: names.index("mask") + 1] + by_name == names
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    assert defaults == {name: DEFAULTS[name] for name in ["mask", *by_name]}
    assert {a.name: a.default_value for a in schema.arguments if a.has_default_value()} == defaults
    assert {a.name for a in schema.arguments} == set(names)
    assert not schema.is_mutable and all(one.alias_info is None for one in schema.returns)
    outputs = list(named(function(op)(**example(op))))
    assert outputs == [one.name for one in schema.returns] == list(DECLARED[op].fields)


@every_layout
def test_raw_operator_equals_function(op, packed):
    """With its tensors by position."""
    arguments = example(op, packed=packed)
    args, scalars = by_position(op, arguments)
    expected = named(function(op)(**arguments))
    assert differing(fields(op, raw(op)(*args, **scalars)), expected) == []


# --- torch.library ---------------------------------------------------------------------------------------------------


@every_layout
@either_impl
def test_opcheck(op, packed, impl):
    for arguments in (example(op, packed=packed), required(op, example(op, packed=packed))):
        if op == "token_stats":  # without tokens the answer is NaN, unequal to itself
            arguments["token_ids"] = example(op)["token_ids"]
        args, kwargs = by_position(op, arguments)
        for requires_grad in {False, op in LOGITS}:
            leading = args[0].detach().requires_grad_(requires_grad)
            for overload in (raw(op), raw(f"_{op}")) if op in LOSSES else (raw(op),):
                torch.library.opcheck(overload.default, (leading, *args[1:]), kwargs | {"impl": impl})


@every_loss
@either_impl
def test_opcheck_of_the_backward_pass(op, impl):
    """The operator that autograd calls is one like the others."""
    calls = []

    class Listen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.name().endswith("_backward"):
                calls.append((function, [x if x is None else x.detach() for x in args], kwargs))
            return function(*args, **kwargs or {})

    with Listen():
        computed(op, function(op), example(op), impl=impl)
    ((overload, args, kwargs),) = calls
    torch.library.opcheck(overload, args, kwargs)


@every_layout
@either_impl
def test_fake_and_meta_equal_real(op, packed, impl):
    """The outputs, what is saved, and the gradient."""
    shapes = [(2, 6), (0, 6), (2, 0), (1, 1), *([] if op in ALONG_RESPONSES else [()])]
    calls = [functools.partial(computed, op, functools.partial(raw(op), impl=impl))]
    if op in LOSSES:
        calls.append(lambda arguments: dict(enumerate(raw(f"_{op}")(**arguments, impl=impl))))
    for call in calls:
        for shape in shapes:
            whole = example(op, shape, packed=packed)
            for arguments in (whole, required(op, whole)):
                real = described(call(arguments).values())
                with FakeTensorMode() as mode:
                    fakes = {n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
                    assert described(call(fakes).values()) == real
                if call is calls[0]:  # what a saving operator saves depends on the implementation
                    meta = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
                    result = call(meta).values()
                    assert described(result) == real and all(x.is_meta for x in result)


@every_operator
@pytest.mark.parametrize("impl", IMPLS)
def test_meta_tensors_ask_no_implementation(op, impl):
    arguments = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in example(op).items()}
    for surface in (function(op), raw(op)):
        outputs = surface(**arguments, impl=impl)
        assert all(x.is_meta for x in ([outputs] if isinstance(outputs, torch.Tensor) else outputs))


# --- torch.compile ---------------------------------------------------------------------------------------------------


def counting_backend():
    """A backend that runs the traced forward and backward graphs as they are, and how often it has been given each."""
    torch._dynamo.reset()
    counts = {"forward": 0, "backward": 0}

    def compiler(name):
        def run(module, inputs):
            counts[name] += 1
            return make_boxed_func(module.forward)

        return run

    return aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward")), counts


@every_layout
def test_compiles_to_one_graph_for_all_shapes(op, packed):
    """A vocab_size that depends on a width included."""
    backend, counts = counting_backend()

    def step(**arguments):
        wider = {n: torch.nn.functional.pad(x, (0, 2)) for n, x in arguments.items() if n.endswith("logits")}
        options = {"vocab_size": arguments[leaf(op)].shape[-1]} if op in LOGITS else {}
        return function(op)(**arguments | wider | options)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for batch, length, width in ((2, 6, 70), (3, 5, 71), (4, 9, 100)):
        arguments = example(op, (batch, length), width, packed=packed)
        assert differing(computed(op, compiled, arguments), computed(op, step, arguments)) == []
    assert counts == {"forward": 1, "backward": int(op in LOSSES)}


def test_compiles_beside_something_that_is_differentiable():
    arguments = example("reliability")
    student = arguments.pop("student_logits").requires_grad_()

    def step(student):
        return (function("reliability")(student * 1.0, **arguments).overlap[..., None] * student).sum()

    compiled = torch.compile(step, fullgraph=True, backend=counting_backend()[0])
    gradient, expected = (torch.autograd.grad(call(student), student)[0] for call in (compiled, step))
    assert torch.equal(gradient, expected) and expected.any()


@pytest.mark.thorough
@every_operator
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, while inductor is imported
def test_compiles_with_the_default_backend_between_other_operations(op):
    torch._dynamo.reset()

    def step(**arguments):
        outputs = fields(op, raw(op)(**arguments))
        return list(outputs.values()), next(x for x in outputs.values() if x.is_floating_point()) * 2

    arguments = example(op)
    if op in LOSSES:
        arguments[leaf(op)].requires_grad_()
    (outputs, doubled), (expected, twice) = torch.compile(step, fullgraph=True)(**arguments), step(**arguments)
    assert same_bits([x.detach() for x in outputs], [x.detach() for x in expected])
    if op in LOSSES:
        gradient, wanted = (torch.autograd.grad(x.sum(), arguments[leaf(op)])[0] for x in (doubled, twice))
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-7)


@every_operator
def test_bad_input_raises_under_compile(op):
    compiled = torch.compile(function(op), fullgraph=True, backend=counting_backend()[0])
    name = temperature(op) if op in LOGITS else "w_drop"
    with pytest.raises(Exception, match="must be"):
        compiled(**example(op) | {name: -1.0})


# --- autograd --------------------------------------------------------------------------------------------------------


@each(LOGITS, lambda op: [impl for impl in quick(op) if impl.name != "host"])
def test_only_a_loss_is_differentiable_and_only_in_the_student(op, impl):
    arguments = example(op)
    floats = [name for name in of_positions(arguments) if arguments[name].is_floating_point()]
    for name in floats:
        arguments[name].requires_grad_()
    outputs = named(impl.call(op, **arguments))
    differentiable = DECLARED[op].differentiable if op in LOSSES else ()
    assert tuple(name for name, x in outputs.items() if x.requires_grad) == differentiable
    if op in LOSSES:
        with impl.chosen():
            total(op, outputs).backward()
        assert [name for name in floats if arguments[name].grad is not None] == [leaf(op)]
        assert arguments[leaf(op)].grad.any()
        arguments[leaf(op)] = arguments[leaf(op)].detach()
        assert not any(x.requires_grad for x in named(impl.call(op, **arguments)).values())


@every_loss
@either_impl
def test_backwards_twice_but_no_second_derivative(op, impl):
    """The graph is kept, and so is what it saved."""
    arguments = example(op)
    logits = arguments[leaf(op)].requires_grad_()
    loss = total(op, named(function(op)(**arguments, impl=impl)))
    first, second = (torch.autograd.grad(loss, logits, create_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.any()
    with pytest.raises(RuntimeError, match="the gradient of a loss cannot be differentiated a second time"):
        first.square().sum().backward()


@every_operator
def test_no_mode_changes_a_number(op):
    """no_grad, inference mode, autocast; gradients; tensors of inference mode beside a student that trains."""
    arguments = example(op)
    expected = computed(op, function(op), arguments)
    outputs = {name: expected[name] for name in DECLARED[op].fields}
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert differing(fields(op, raw(op)(**arguments)), outputs) == []
            assert differing(named(function(op)(**arguments)), outputs) == []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert differing(computed(op, function(op), arguments), expected) == []
    with torch.inference_mode():
        inferred = {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
    if op in LOGITS:
        inferred[leaf(op)] = arguments[leaf(op)].clone().requires_grad_()
    assert differing(computed(op, function(op), inferred), expected) == []


@every_loss
def test_what_the_backward_pass_reads_must_be_as_it_was(op):
    """A change in between is an error and no wrong number; of what it does not read, none."""
    for name in (name for name in example(op) if name in DECLARED[op].tensors):
        arguments = example(op)
        logits = arguments[leaf(op)].requires_grad_()
        arguments[leaf(op)] = logits * 1.0
        loss = total(op, named(function(op)(**arguments)))
        with torch.no_grad():
            arguments[name].copy_(arguments[name].clone())
        if name in MODULES[op].READ_BACKWARDS:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        else:
            loss.backward()
            assert logits.grad.any()


@every_operator
@pytest.mark.parametrize("call", [function, raw])
def test_vmap_raises(op, call):
    arguments = example(op)
    tensors = {name: torch.stack([x, x]) for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda given: call(op)(**arguments | given))(tensors)


# --- choice of implementation ----------------------------------------------------------------------------------------


@every_operator
def test_auto_takes_cpp(op):
    """Of logits the bits of the sums differ from the reference's, so this compares what it says."""
    arguments = example(op, (2, 6), 3000)
    auto, cpp, reference = (computed(op, function(op), arguments, impl=x) for x in ("auto", "cpp", "reference"))
    assert differing(auto, cpp) == [] and bool(differing(cpp, reference)) == (op in LOGITS)
    if op not in LOSSES:
        assert differing(reference, REFERENCE.run(op, **arguments)) == []
