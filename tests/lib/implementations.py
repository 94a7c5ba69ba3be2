"""Every implementation that this machine can run, called in one way: torch tensors in, a NamedTuple of tensors out."""

import functools
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import pytest
import torch
from pruneopd_kernels.results import TopkForwardKl

import cuda_emulated
import pruneopd_kernels
from arrays import as_array
from pruneopd_kernels.dispatch import cpp

OPERATORS = ["reliability", "reliability_from_topk", "reliability_from_drift", "token_stats"]
LOSSES = ["topk_policy_loss", "reverse_kl", "topk_forward_kl"]


class Loss(NamedTuple):
    """What a loss with one output returns here, so that every result has fields."""

    loss: torch.Tensor


class Implementation:
    """`Implementation("cpp", "avx2").token_stats(student_logits, teacher_logits, k=4)`."""

    def __init__(self, name, instruction_set=None):
        self.name, self.instruction_set = name, instruction_set

    def __repr__(self):
        return self.name if self.instruction_set is None else f"{self.name}-{self.instruction_set}"

    def __getattr__(self, op):
        if op not in OPERATORS:
            raise AttributeError(op)
        return functools.partial(self.call, op)

    def loss(self, op, upstream, student_logits, *args, **kwargs):
        """The outputs of a loss, and the gradient of sum(upstream * loss) by the student's logits; upstream None: 1."""
        student_logits = student_logits.detach().requires_grad_()
        outputs = self.call(op, student_logits, *args, **kwargs)
        outputs = Loss(outputs) if isinstance(outputs, torch.Tensor) else outputs
        upstream = torch.ones_like(outputs.loss) if upstream is None else upstream
        with self.chosen():
            (gradient,) = torch.autograd.grad(outputs.loss, student_logits, upstream)
        return outputs._make(x.detach() for x in outputs), gradient

    def chosen(self):
        """While the backward pass runs, too."""
        return cpp.use_instruction_set(self.instruction_set) if self.instruction_set else nullcontext()

    def call(self, op, *args, **kwargs):
        if self.name == "reference":
            return getattr(pruneopd_kernels.reference, op)(*args, **kwargs)
        if self.name == "host":
            with use_instruction_set_of_host(self.instruction_set):
                return on_arrays(getattr(pruneopd_kernels.host, op), *args, **kwargs)
        with self.chosen():
            return getattr(pruneopd_kernels, op)(*args, impl=self.name.removesuffix("-operator"), **kwargs)


class Emulated(Implementation):
    """CUDA on a CPU. Nothing of it is registered with torch."""

    def call(self, op, *args, **kwargs):
        return on_arrays(functools.partial(cuda_emulated.call, op), *args, **kwargs)

    def loss(self, op, upstream, *args, **kwargs):
        outputs, gradient = cuda_emulated.loss(op, upstream, *args, **kwargs)
        return (Loss if len(outputs) == 1 else TopkForwardKl)(*outputs), gradient


class OnGpu(Implementation):
    """The same on a GPU: tensors go there with the strides and the memory around them that they have here."""

    def __repr__(self):
        return f"{self.name}-on-gpu"

    def call(self, op, *args, **kwargs):
        args, kwargs = on_gpu(args), dict(zip(kwargs, on_gpu(kwargs.values()), strict=True))
        result = getattr(pruneopd_kernels, op)(*args, impl=self.name, **kwargs)
        assert all(tensor.is_cuda for tensor in result)
        return result._make(tensor.cpu() for tensor in result)

    def loss(self, op, upstream, *args, **kwargs):
        upstream, *args = on_gpu([upstream, *args])
        kwargs = dict(zip(kwargs, on_gpu(kwargs.values()), strict=True))
        outputs, gradient = Implementation(self.name).loss(op, upstream, *args, **kwargs)
        assert all(tensor.is_cuda for tensor in (*outputs, gradient))
        return outputs._make(tensor.cpu() for tensor in outputs), gradient.cpu()


def on_gpu(values, device="cuda"):
    return [to_device(value, device) if isinstance(value, torch.Tensor) else value for value in values]


def to_device(tensor, device):
    """A copy of the tensor's whole storage, and the view of it that the tensor is: expanded, shifted or overlapping."""
    memory = torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage()).to(device, copy=True)
    copy = torch.empty(0, dtype=tensor.dtype, device=device)
    return copy.set_(memory.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


@contextmanager
def use_instruction_set_of_host(name):
    from pruneopd_kernels import _host

    before = _host.instruction_set()
    assert _host.set_instruction_set(name)
    try:
        yield
    finally:
        _host.set_instruction_set(before)


def on_arrays(function, *args, **kwargs):
    result = function(*map(as_array, args), **{name: as_array(value) for name, value in kwargs.items()})
    assert all(isinstance(array, np.ndarray) for array in result)
    return result._make(torch.from_numpy(array) for array in result)


# Without the library every test of it fails, with the reason; it is never left out in silence.
INSTRUCTION_SETS = cpp.instruction_sets() if cpp.WHY_NOT is None else ["missing"]
REFERENCE = Implementation("reference")
COMPILED = [Implementation("cpp", name) for name in INSTRUCTION_SETS]
HOST = [Implementation("host", INSTRUCTION_SETS[0])]  # the same core again: once is enough
CUDA_EMULATED = Emulated("cuda-emulated")
IMPLEMENTATIONS = [REFERENCE, *COMPILED, *HOST, CUDA_EMULATED]  # those that any machine runs
# A loss is defined by the reference through autograd, and again as two passes, which the operator runs.
REFERENCE_OPERATOR = Implementation("reference-operator")
LOSS_IMPLEMENTATIONS = [REFERENCE, REFERENCE_OPERATOR, *COMPILED]
# The package for AMD's GPUs is called cuda too, and has no CUDA.
ON_GPU = [OnGpu(name) for name in ("cuda", "triton") if name != "cuda" or torch.version.hip is None]


def each_of(implementations):
    return pytest.mark.parametrize(
        "impl", [*implementations, *(pytest.param(impl, marks=pytest.mark.gpu) for impl in ON_GPU)], ids=repr
    )


every_implementation = each_of(IMPLEMENTATIONS)
every_loss_implementation = each_of([*LOSS_IMPLEMENTATIONS, CUDA_EMULATED])
every_compiled = pytest.mark.parametrize("impl", COMPILED, ids=repr)
