"""The operators over NumPy arrays, computed by the compiled core of the torch operators; torch is not needed.

The functions take and return what their namesakes in `pruneopd_kernels` do, with NumPy arrays for tensors: bfloat16
logits are arrays of `ml_dtypes.bfloat16`. Results are equal bit for bit, and do not depend on `num_threads`.
"""

import os
from importlib import import_module
from typing import Any

import numpy as np

from . import checks
from .ops import OPERATORS, Operator

_HOST: Any = None
WHY_NOT: str | None = None  # why this module is not usable, and what would help
try:
    _HOST = import_module("._host", __package__)
except ImportError as error:
    WHY_NOT = f"{error}; installing the package where a C++20 compiler is found builds it"


def _function(op: Operator) -> Any:
    def function(*args: Any, num_threads: int | None = None, **kwargs: Any) -> Any:
        a = op.arguments(args, kwargs)
        op.check_kinds(a, np.ndarray, "an array")
        checks.kind(op.name, "num_threads", num_threads, "int?")
        for name, value in zip(op.tensors, a, strict=False):
            if value is not None and not value.flags.aligned:
                checks.bad_value(op.name, name, "be aligned to its elements in memory", "an unaligned array")
        op.check(a, values=True)
        if num_threads is None:
            # Those of this process, if the system tells them apart.
            num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        checks.at_least(op.name, "num_threads", num_threads, 1)
        if WHY_NOT is not None:
            raise RuntimeError(f"{op.name}: pruneopd_kernels.host is not usable here: {WHY_NOT}")
        if "vocab_size" in op.scalars and a.vocab_size is None:
            a = a._replace(vocab_size=a.student_logits.shape[-1])
        computed = getattr(_HOST, op.name)(*a, num_threads=num_threads)
        if hasattr(op.module, "check_results"):
            op.module.check_results(op.name, a, computed[0])
        return op.result(*computed)

    return op.surface(
        function,
        f"Compute `pruneopd_kernels.{op.name}` over NumPy arrays, which take the place of tensors.",
        ("num_threads", "int | None", "Threads to compute with, >= 1. None: one for each processor of this process."),
    )


# The operators without a gradient.
__all__ = [name for name, op in OPERATORS.items() if not op.saved]
globals().update({name: _function(OPERATORS[name]) for name in __all__})
