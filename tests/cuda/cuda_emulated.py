"""The CUDA operators, their own source run on the CPU by the emulator: called as those of `pruneopd_kernels.host`."""

import sys
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from unittest import mock

import torch

from arrays import as_array, as_tensor
from pruneopd_kernels import host, schemas
from pruneopd_kernels.ops import _losses

BUILT = Path(__file__).parents[2] / "build" / "tests-cuda"


def _load():
    """The compiled module, or why there is none."""
    sys.path.insert(0, str(BUILT))
    try:
        return import_module("_cuda_emulated"), None
    except ImportError as error:
        return None, f"{error}; make test-cuda builds it in {BUILT}"
    finally:
        sys.path.remove(str(BUILT))


MODULE, WHY_NOT = _load()

# operator: {argument: its default, None where it has none}, of the losses and their backward passes
ARGUMENTS = {
    op: {one.name: one.default_value for one in getattr(torch.ops.pruneopd, f"_{op}").default._schema.arguments}
    for op in (*schemas.SAVED, *schemas.BACKWARD_SIGNATURES)
}


def call(op, *args, **kwargs):
    """`call("token_stats", student_logits, teacher_logits, k=4)` with NumPy arrays."""
    with mock.patch.multiple(host, _HOST=MODULE, WHY_NOT=WHY_NOT):
        return getattr(host, op)(*args, **kwargs)


def call_private(op, *args, **kwargs):
    """A loss with what it saves, or a backward pass, as in `schemas.private_schemas`: tensors in, tensors out."""
    assert MODULE is not None, WHY_NOT
    arguments = {**ARGUMENTS[op], **dict(zip(ARGUMENTS[op], args, strict=False)), **kwargs}
    arguments.pop("impl", None)
    result = getattr(MODULE, op)(**{name: as_array(value) for name, value in arguments.items()}, num_threads=0)
    return [as_tensor(array) for array in result] if isinstance(result, tuple) else as_tensor(result)


def loss(op, upstream, *args, **kwargs):
    """The public outputs of a loss, and the gradient of sum(upstream * loss) by the student's logits; None: of ones.

    The backward pass is the package's own but for the kernel that it calls.
    """
    public = len(getattr(torch.ops.pruneopd, op).default._schema.returns)
    arguments = {**ARGUMENTS[op], **dict(zip(ARGUMENTS[op], args, strict=False)), **kwargs}
    outputs = call_private(op, **arguments)
    upstream = torch.ones_like(outputs[0]) if upstream is None else upstream
    kernel = "reverse_kl_backward" if op == "reverse_kl" else "logprobs_backward"
    module = import_module(f"pruneopd_kernels.ops.{op}")
    backward = getattr(module, "_backward", _losses.through_logprobs)
    with mock.patch.object(torch.ops.pruneopd, f"_{kernel}", partial(call_private, kernel)):
        return outputs[:public], backward(upstream, outputs[public:], **arguments)


@contextmanager
def device(multiprocessors=132, seed=1):
    """How many it has, which is what splits few rows over several blocks; the order of threads and blocks."""
    MODULE.set_emulator(multiprocessors, seed)
    try:
        yield
    finally:
        MODULE.set_emulator(132, 1)
