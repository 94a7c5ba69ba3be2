"""Every implementation that this machine can run, called in one way: arguments by name in, outputs by name out.

What the tests know of the package's insides stands here.
"""

from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import cuda_emulated
import interpreted
import parallel_rank
import pruneopd_kernels
import ranks
from arrays import as_array, as_tensor
from comparison import differing
from pruneopd_kernels.dispatch import cpp
from pruneopd_kernels.dispatch.registration import Empty
from pruneopd_kernels.ops import BACKWARD_PASSES, FORWARD_PASSES
from pruneopd_kernels.ops import OPERATORS as DECLARED
from pruneopd_kernels.ops._operator import compiled

OPERATORS = [*DECLARED]
COMPILED_PASSES = {op.name: op for op in compiled()}
LOSSES = [op for op, declared in DECLARED.items() if declared.saved]  # what has a gradient
LOGITS = [op for op, declared in DECLARED.items() if declared.tensors[0].endswith("logits")]
ALONG_RESPONSES = [op for op, declared in DECLARED.items() if "drift_count" in declared.tensors]


def leaf(op):
    """The name of the logits that have a gradient."""
    return DECLARED[op].tensors[0]


def temperature(op):
    """The name of what they are divided by."""
    return leaf(op).replace("logits", "temperature")


def raw(op):
    """The operator of torch; `_<loss>` also returns what the backward pass needs."""
    return getattr(torch.ops.pruneopd, op)


def compiled_alone(op, library="cpp", **arguments):
    """What a compiled operator or pass returns without the checks of Python."""
    return getattr(getattr(torch.ops, f"pruneopd_{library}"), op)(*COMPILED_PASSES[op].arguments((), arguments))


def named(outputs):
    """Outputs by name; a tensor alone is a loss."""
    return {"loss": outputs} if isinstance(outputs, torch.Tensor) else outputs._asdict()


def flowing(op, outputs, upstream=None):
    """The gradient that comes in by each differentiable output, if `upstream` comes in at each position; None: 1.

    Where there are several outputs, or slots, each gets a share of its own.
    """
    first, *others = (outputs[name] for name in DECLARED[op].differentiable)
    if not others:
        return {DECLARED[op].differentiable[0]: torch.ones_like(first) if upstream is None else upstream}
    upstream = torch.ones_like(others[0]) if upstream is None else upstream
    slots = torch.linspace(1.0, -0.5, first.shape[-1], dtype=upstream.dtype, device=upstream.device)
    return dict(zip(DECLARED[op].differentiable, (upstream[..., None] * slots, upstream * -0.75), strict=True))


class Implementation:
    """`Implementation("cpp", "avx2").run("token_stats", student_logits=..., teacher_logits=..., k=4)`."""

    marks = ()
    slow = False

    def __init__(self, name, instruction_set=None):
        self.name, self.instruction_set = name, instruction_set

    def __repr__(self):
        return self.name if self.instruction_set is None else f"{self.name}-{self.instruction_set}"

    def call(self, op, **arguments):
        """What the public function returns."""
        if self.name == "reference":
            return getattr(pruneopd_kernels.reference, op)(**arguments)
        if self.name == "host":
            arrays = {name: as_array(value) for name, value in arguments.items()}
            result = getattr(pruneopd_kernels.host, op)(**arrays)
            return result._make(torch.from_numpy(array) for array in result)
        with self.chosen():
            return getattr(pruneopd_kernels, op)(**arguments, impl=self.name.removesuffix("-operator"))

    def run(self, op, upstream=None, **arguments):
        """The outputs, and of a loss the `gradient` of sum(upstream * loss) by its logits; None: of ones.

        An operator with several differentiable outputs counts as a loss: see `flowing`.
        """
        if op not in LOSSES:
            return named(self.call(op, **arguments))
        logits = arguments[leaf(op)].detach().requires_grad_()
        outputs = named(self.call(op, **arguments | {leaf(op): logits}))
        into = flowing(op, outputs, upstream)
        with self.chosen():
            (gradient,) = torch.autograd.grad([outputs[name] for name in into], logits, [*into.values()])
        return {name: x.detach() for name, x in outputs.items()} | {"gradient": gradient}

    @contextmanager
    def chosen(self):
        """Compute with its instruction set, in the backward pass too."""
        with cpp.use_instruction_set(self.instruction_set) if self.instruction_set else nullcontext():
            yield


class Unregistered(Implementation):
    """Kernels that torch does not know: `kernel(op, arguments)` runs one; what is PyTorch is the package's own."""

    marks = (pytest.mark.thorough,)
    slow = True

    def __init__(self, name, kernel):
        super().__init__(name)
        self.kernel = kernel

    def call(self, op, **arguments):
        outputs = tuple(self.run(op, **arguments)[name] for name in DECLARED[op].fields)
        return DECLARED[op].result(*outputs) if DECLARED[op].result else outputs[0]

    def run(self, op, upstream=None, **arguments):
        declared = DECLARED[op]
        a = declared.arguments((), arguments)
        composed = declared.is_composed
        outputs = declared.module.compute(a, self._forward_pass) if composed else self.kernel(op, a._asdict())
        result = dict(zip(declared.fields, outputs, strict=False))
        if op not in LOSSES:
            return result
        given = a._asdict() | dict(zip((*declared.fields, *declared.saved), outputs, strict=True))
        kept = {name: given[name] for name in declared.module.kept(a)}
        kept |= {name: getattr(a, name) for name in declared.scalars}  # one may have an output's name
        into = flowing(op, result, upstream).values()
        with ExitStack() as patches:
            for name in BACKWARD_PASSES:
                patches.enter_context(mock.patch.object(torch.ops.pruneopd, f"_{name}", self._backward_pass(name)))
            return result | {"gradient": declared.module.backward(SimpleNamespace(**kept, impl=None), *into)}

    def _forward_pass(self, name, *args, **kwargs):
        declared = FORWARD_PASSES[name]
        return declared.result(*self.kernel(name, declared.arguments(args, kwargs)._asdict()))

    def _backward_pass(self, name):
        def call(*tensors, impl, **scalars):
            return self.kernel(name, BACKWARD_PASSES[name].arguments(tensors, scalars)._asdict())[0]

        return call


class OnGpu(Implementation):
    """The same on a GPU: tensors go there with the strides and the memory around them that they have here."""

    marks = (pytest.mark.gpu,)

    def __repr__(self):
        return f"{self.name}-on-gpu"

    def run(self, op, upstream=None, **arguments):
        result = Implementation(self.name).run(op, to_gpu(upstream), **on_gpu(arguments))
        assert all(tensor.is_cuda for tensor in result.values())
        return {name: tensor.cpu() for name, tensor in result.items()}


def on_gpu(arguments, device="cuda"):
    return {name: to_gpu(value, device) for name, value in arguments.items()}


def to_gpu(value, device="cuda"):
    """A copy of a tensor's whole storage, and the view of it that the tensor is: expanded, shifted or overlapping."""
    if not isinstance(value, torch.Tensor):
        return value
    memory = torch.empty(0, dtype=torch.uint8).set_(value.detach().untyped_storage()).to(device, copy=True)
    copy = torch.empty(0, dtype=value.dtype, device=device)
    return copy.set_(memory.untyped_storage(), value.storage_offset(), value.shape, value.stride())


def run_emulated(op, arguments, module=cuda_emulated.SOURCE):
    """The CUDA kernels on the CPU; the module takes and returns NumPy arrays."""
    arrays = {name: as_array(value) for name, value in arguments.items()}
    outputs = getattr(cuda_emulated.module(module), op)(**arrays, num_threads=0)
    return [as_tensor(array) for array in (outputs if isinstance(outputs, tuple) else (outputs,))]


class OnRanks(Implementation):
    """`pruneopd_kernels.parallel` in a group of processes; `cut(width)` are the widths of their slices."""

    slow = True

    def __init__(self, name, cut, marks=()):
        super().__init__(name)
        self.cut, self.marks = cut, marks

    def run(self, op, upstream=None, **arguments):
        return on_ranks(ranks.of_session(), op, self.cut(arguments[leaf(op)].shape[-1]), upstream, **arguments)


def on_ranks(ranks, op, widths, upstream=None, device=None, **arguments):
    """The outputs by name, which are the same on every rank, bit for bit; of a loss the whole rows' gradient."""
    into, declared = None, DECLARED[op]
    if op in LOSSES:
        a = declared.arguments((), {name: x for name, x in arguments.items() if name != "impl"})
        into = flowing(op, dict(zip(declared.fields, declared.module.fake(a, Empty(a)), strict=False)), upstream)
    answers = ranks.run(parallel_rank.call, op, widths, arguments, into, device, size=len(widths))
    gradients = [answer.pop("gradient") for answer in answers if "gradient" in answer]
    for other in answers[1:]:
        assert differing(answers[0], other) == []
    return answers[0] | ({"gradient": torch.cat(gradients, -1)} if gradients else {})


# Without the library every test of it fails, with the reason; it is never left out in silence.
INSTRUCTION_SETS = cpp.instruction_sets() if cpp.WHY_NOT is None else ["missing"]
REFERENCE = Implementation("reference")
# A loss is defined by the reference through autograd, and again as two passes, which the operator runs.
REFERENCE_OPERATOR = Implementation("reference-operator")
COMPILED = [Implementation("cpp", name) for name in INSTRUCTION_SETS]
HOST = Implementation("host")
CUDA_EMULATED = Unregistered("cuda-emulated", run_emulated)
CUDA_PTX = Unregistered("cuda-ptx", partial(run_emulated, module=cuda_emulated.PTX))
EMULATED = [CUDA_EMULATED, *([CUDA_PTX] if cuda_emulated.has_ptx() else [])]
TRITON_INTERPRETED = Unregistered("triton-interpreted", interpreted.run)
# One slice has half as much as the other; or the first one id, and another none.
PARALLEL = [
    OnRanks("parallel", lambda width: [-(-width // 3), width * 2 // 3]),
    OnRanks("parallel-3", lambda width: [min(width, 1), 0, width - min(width, 1)], (pytest.mark.thorough,)),
]
# The package for AMD's GPUs is called cuda too, and has no CUDA.
ON_GPU = [OnGpu(name) for name in ("cuda", "triton") if name == "triton" or torch.version.hip is None]
ON_GPU = ON_GPU if torch.cuda.is_available() else []


# What takes the values inside tensors as they are.
UNCHECKED = [pytest.param(impl, marks=impl.marks, id=repr(impl)) for impl in (*EMULATED, TRITON_INTERPRETED, *ON_GPU)]


def quick(op):
    """Those that need neither an emulator nor an interpreter."""
    return [REFERENCE, *([REFERENCE_OPERATOR] if op in LOSSES else []), *COMPILED, *([] if op in LOSSES else [HOST])]


def every(op):
    return [*quick(op), *EMULATED, TRITON_INTERPRETED, *ON_GPU, *(PARALLEL if op in LOGITS else [])]


def of_one_process(op):
    """Those whose bits depend on a position alone; several ranks agree with one to rounding."""
    return [impl for impl in every(op) if impl not in PARALLEL]


def each(ops=None, implementations=every):
    """Parametrize a test by `op` and `impl`: each operator with each implementation of it."""
    ops = OPERATORS if ops is None else ops
    rows = [pytest.param(op, impl, marks=impl.marks) for op in ops for impl in implementations(op)]
    return pytest.mark.parametrize(("op", "impl"), rows, ids=lambda value: str(value))


def each_of(op, implementations=every):
    """The same for the tests of one operator, by `impl` alone."""
    rows = [pytest.param(impl, marks=impl.marks, id=repr(impl)) for impl in implementations(op)]
    return pytest.mark.parametrize("impl", rows)


def references(op):
    return [REFERENCE, REFERENCE_OPERATOR]
