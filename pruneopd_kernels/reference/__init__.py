"""The operators in plain PyTorch: the definition that every implementation is tested against.

The functions have the signatures of their namesakes in `pruneopd_kernels` without `impl`, and run on any device.
Everything computed from logits is computed in float64 and rounded once, to float32. float64 logits are allowed, too;
results then stay float64. Here the losses are differentiated by autograd, any number of times.
"""

from importlib import import_module
from typing import Any

import torch

from .. import formulas
from ..ops import BACKWARD_PASSES, FORWARD_PASSES, OPERATORS, Operator


def _function(op: Operator) -> Any:
    module = import_module(f".{op.stem}", __name__)
    definition = getattr(module, op.name)

    def function(*args: Any, **kwargs: Any) -> Any:
        a = op.arguments(args, kwargs)
        if not torch.compiler.is_compiling():  # a trace has no place for checks
            op.check_kinds(a, torch.Tensor, "a tensor")
            op.check(a, float64=True, values=formulas.has_values(a[0]))
        return definition(a)

    if not op.is_composed:
        COMPUTE[op.name] = getattr(module, "forward_pass", definition)  # of a loss, which saves for the backward pass
    return op.surface(function, f"Compute `pruneopd_kernels.{op.name}` in plain PyTorch.")


# operator or pass: what `impl="reference"` runs, with a record of arguments that have been checked
COMPUTE: dict[str, Any] = {}
globals().update({name: _function(op) for name, op in OPERATORS.items()})
_PASSES = FORWARD_PASSES | BACKWARD_PASSES
COMPUTE.update({name: getattr(import_module(f".{op.stem}", __name__), name) for name, op in _PASSES.items()})

__all__ = list(OPERATORS)
