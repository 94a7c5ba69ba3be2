"""Arguments of another kind, on every surface: tensors that are not plain, numbers that are none, forward-mode AD."""

import inspect

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

import bad_input
import pruneopd_kernels
from arrays import as_array
from comparison import differing
from implementations import DECLARED, LOSSES, OPERATORS, named
from operators import MODULES, example, required
from pruneopd_kernels import checks, linear, parallel

# torch's own, when it first makes a dual tensor
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

# --- what there is: a name, a function and the arguments of a good call ----------------------------------------------

TOPK = {"ids": bad_input.ids(2, 8, 1), "logprobs": bad_input.zeros(2, 8, 1)}
REWARDS = {f"{side}_topk_{name}": x for side in ("student", "teacher") for name, x in TOPK.items()}
OTHERS = {
    "opd_rewards": REWARDS | {"strategy": "intersection"},
    "sampled_drift": {f"{side}_logprobs": bad_input.zeros(2, 8) for side in ("student", "teacher")}
    | {"max_log_ratio": 1.0},
    "next_drift_count": {"drift_count": bad_input.i32(1, 2).expand(2, 2)},
}
HIDDEN = {f"{side}_{name}": bad_input.zeros(*shape) for side in ("student", "teacher")
          for name, shape in (("hidden", (2, 8, 4)), ("weight", (64, 4)))}  # fmt: skip


def linear_call(name):
    """The arguments of a good call: heads and hidden states of zeros."""
    given = HIDDEN | {"hidden": HIDDEN["student_hidden"], "weight": HIDDEN["student_weight"], "token_ids": TOPK["ids"]}
    parameters = inspect.signature(getattr(linear, name)).parameters
    needed = ["teacher_hidden", "teacher_weight"]  # which may be left out of a loss, for a server's candidates
    return {n: given[n] for n, p in parameters.items() if p.default is p.empty or n in needed}


SURFACES = {
    "function": (pruneopd_kernels, {op: MODULES[op].BASE for op in OPERATORS}),
    "raw": (torch.ops.pruneopd, {op: MODULES[op].BASE for op in OPERATORS}),
    "reference": (pruneopd_kernels.reference, {op: MODULES[op].BASE for op in OPERATORS}),
    "parallel": (parallel, {op: MODULES[op].BASE for op in parallel.__all__ if op in OPERATORS}),
    "linear": (linear, {name: linear_call(name) for name in linear.__all__ if name.startswith("linear_")}),
    "others": (pruneopd_kernels, OTHERS),
    "host": (pruneopd_kernels.host, {op: MODULES[op].BASE for op in pruneopd_kernels.host.__all__}),
}


def calls(*surfaces):
    for surface in surfaces:
        module, names = SURFACES[surface]
        for name, arguments in names.items():
            if surface == "host":
                arguments = {n: as_array(x) for n, x in arguments.items()}
            yield surface, name, getattr(module, name), arguments


@pytest.fixture(scope="module", autouse=True)
def _one_rank():
    """A group of this process alone, for `parallel` and for DTensor."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


# --- tensors that are not plain ones ---------------------------------------------------------------------------------

NESTED = "a nested tensor: in layout torch.jagged, pass .values(), with cu_seqlens=.offsets() along responses"
SPARSE = "one of layout torch.{}: pass .to_dense()"
SPECIAL = {
    "a DTensor: pass .to_local(), and use pruneopd_kernels.parallel where the vocabulary is split":
        lambda x: distribute_tensor(x, init_device_mesh("cpu", (1,)), [Replicate()]),
    NESTED: lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    f"{NESTED}, and strided": lambda x: torch.nested.nested_tensor(list(x)),
    SPARSE.format("sparse_coo"): torch.Tensor.to_sparse,
    SPARSE.format("sparse_csr"): torch.Tensor.to_sparse_csr,
    SPARSE.format("_mkldnn"): torch.Tensor.to_mkldnn,
    "a quantized tensor: pass .dequantize()": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
    "a masked one: pass its data, and where it is valid as mask":
        lambda x: torch.masked.masked_tensor(x, torch.ones_like(x, dtype=torch.bool)),
}  # fmt: skip
OF_FLOATS = {SPARSE.format("_mkldnn"), "a quantized tensor: pass .dequantize()"}


@pytest.mark.filterwarnings("ignore:.*(prototype|beta|quantize)")
@pytest.mark.parametrize("words", SPECIAL)
def test_tensors_that_are_not_plain(words):
    """Each tensor of each call; also where a gradient is wanted, and of what may be left out, the mask."""
    for surface, name, function, arguments in calls("function", "raw", "reference", "parallel", "linear", "others"):
        signature = inspect.signature(getattr(pruneopd_kernels, name, None) or getattr(linear, name))
        given = arguments | ({"mask": bad_input.zeros(2, 8)} if "mask" in signature.parameters else {})
        first, *_ = arguments
        for argument, x in given.items():
            if not isinstance(x, torch.Tensor) or (words in OF_FLOATS and not x.is_floating_point()):
                continue
            change = given | {argument: SPECIAL[words](x)}
            check(name, function, change, argument, words)
            if surface in ("function", "raw") and name in LOSSES and argument != first:
                change[first] = torch.zeros(given[first].shape, requires_grad=True)
                check(name, function, change, argument, words)


def check(name, function, arguments, argument, words):
    with pytest.raises((TypeError, RuntimeError)) as raised:
        function(**arguments)
    assert str(raised.value) == f"{name}: {argument} must be a plain tensor, got {words.split(', and s')[0]}"
    assert isinstance(raised.value, pruneopd_kernels.InvalidType)


def test_the_way_out_of_a_nested_tensor():
    student, teacher = (torch.randn(10, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    nested = torch.nested.nested_tensor([student[:4], student[4:]], layout=torch.jagged)
    found = pruneopd_kernels.reliability(nested.values(), teacher, cu_seqlens=nested.offsets())
    expected = pruneopd_kernels.reliability(student, teacher, cu_seqlens=bad_input.i32(0, 4, 10))
    assert nested.offsets().dtype == torch.int64 and differing(found, expected) == []


def test_masked_arrays_and_memory_maps(tmp_path):
    masked = np.ma.zeros((2, 8), np.float32)
    for _, op, function, arguments in calls("host"):
        with pytest.raises(TypeError) as raised:
            function(**arguments | {"mask": masked})
        words = "mask must be a plain array, got a masked one: pass its data, and where it is valid as mask"
        assert str(raised.value) == f"{op}: {words}"
    logits = np.memmap(tmp_path / "logits", np.float32, "w+", shape=(2, 8, 64))
    assert pruneopd_kernels.host.token_stats(logits, logits).overlap.all()


# --- numbers that are none -------------------------------------------------------------------------------------------

NO_NUMBERS = [True, np.array([4, 5]), np.array(4), torch.tensor(4), "4", 1j]
BAD = {
    "int": [*NO_NUMBERS, 4.0, None, 2**63, -(2**63) - 1, 10**5000],
    "float": [*NO_NUMBERS, None, 10**400, -(10**400)],
    "str": [3, None, np.array(["overlap"])],
    "bool": ["false", 0, None, np.array([True])],
}
KINDS = checks.KINDS | dict.fromkeys(("Loss", "Reduction", "Impl", "Strategy"), "str")


def bad_scalars(function):
    for name, parameter in inspect.signature(function).parameters.items():
        kind = KINDS.get(str(parameter.annotation), "Tensor")
        for value in BAD.get(kind.replace("SymInt", "int").rstrip("?"), []):
            if value is not None or not kind.endswith("?"):
                yield name, value


@pytest.mark.parametrize("surface", [name for name in SURFACES if name != "raw"])
def test_numbers_that_are_none(surface):
    """Each scalar of each call gives one sentence; also on the way through torch's dispatcher."""
    for _, name, function, arguments in calls(surface):
        given = dict(arguments)
        if surface == "function" and name in LOSSES:
            first = next(iter(arguments))
            given[first] = arguments[first].clone().requires_grad_()
        for scalar, value in bad_scalars(function):
            refuses(lambda given: function(**given), given | {scalar: value}, name, scalar)  # noqa: B023


def refuses(function, given, name, argument):
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: {argument} must .*, got ") as raised:
        function(given)
    assert isinstance(raised.value, (pruneopd_kernels.InvalidType, pruneopd_kernels.InvalidValue))
    assert len(str(raised.value)) < 200


def test_settings_that_are_no_numbers():
    for kind in (pruneopd_kernels.PruneConfig, pruneopd_kernels.ResponseBudget):
        for name, value in bad_scalars(kind):
            refuses(lambda given: kind(**given), {name: value}, kind.__name__, name)  # noqa: B023


SCALARS = {"k": 4, "vocab_size": 60, "w_drop": 0.25, "student_temperature": 0.5, "temperature": 0.5, "entropies": True}


def test_numbers_of_numpy():
    for _, name, function, arguments in calls("function", "parallel", "linear", "host"):
        parameters = inspect.signature(function).parameters
        given = {n: x for n, x in SCALARS.items() if n in parameters}
        scalars = {n: np.array(x)[()] for n, x in given.items()}
        assert all(isinstance(x, np.generic) for x in scalars.values())
        expected, found = (function(**arguments | some) for some in (given, scalars))
        for x, y in zip(expected, found, strict=True):
            assert np.array_equal(x, y, equal_nan=True), name
    assert type(pruneopd_kernels.ResponseBudget(np.int64(4096), step=np.int32(5)).update([0])) is int


# --- forward-mode AD -------------------------------------------------------------------------------------------------


def dual(call, x):
    with forward_ad.dual_level():
        return call(forward_ad.make_dual(x, torch.ones_like(x)))


TRANSFORMS = {
    "jvp": lambda call, x: torch.func.jvp(call, (x,), (torch.ones_like(x),)),
    "jacobian": lambda call, x: torch.func.jacfwd(call)(x),
    "dual": dual,
    "dual with gradient": lambda call, x: dual(call, x.clone().requires_grad_()),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_forward_mode_raises(transform):
    """Each operator, also where a tensor other than the first has a tangent."""
    for _, name, function, arguments in calls("function", "raw", "parallel", "linear"):
        for argument, x in arguments.items():
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                words = f"^{name}: (forward-mode AD|torch.func.vmap) is not supported"
                with pytest.raises(RuntimeError, match=words):
                    TRANSFORMS[transform](lambda x: function(**arguments | {argument: x}), x)  # noqa: B023


def test_no_tangent_no_error():
    with forward_ad.dual_level():
        for _, _, function, arguments in calls("function", "raw"):
            function(**arguments)


@pytest.mark.parametrize("op", LOSSES)
def test_the_reference_has_a_forward_mode(op):
    """The tangent is that of the gradient."""
    arguments = required(op, example(op))
    leaf, *_ = arguments
    x, direction = arguments[leaf].double(), torch.linspace(-1, 1, arguments[leaf].numel()).view(arguments[leaf].shape)

    def total(x):
        outputs = named(getattr(pruneopd_kernels.reference, op)(**arguments | {leaf: x}))
        return sum(outputs[name].sum() for name in DECLARED[op].differentiable)

    _, tangent = torch.func.jvp(total, (x,), (direction.double(),))
    torch.testing.assert_close(tangent, (torch.func.grad(total)(x) * direction).sum())
    assert tangent != 0
