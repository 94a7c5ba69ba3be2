"""The checks of the operators, on torch tensors and with all that the reference allows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..formulas import has_values


def check(op: str, **arguments: Any) -> None:
    if torch.compiler.is_compiling():
        return  # a trace has no place for them
    checks.kinds(op, arguments, Tensor, "a tensor")
    first = next(iter(arguments.values()))
    options = {"float64": True} if "student_logits" in arguments else {}
    getattr(checks, op)(**arguments, **options, values=has_values(first))
