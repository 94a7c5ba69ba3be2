"""How an operator becomes `torch.ops.pruneopd.<op>`, and how its Python function calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..schemas import public_schema
from . import _implementations as implementations

_LIBRARY = torch.library.Library("pruneopd", "DEF")

Outputs = tuple[Tensor, ...]


def register(op: str, fake: Callable[..., Outputs]) -> None:
    """Register the operator: kernel for every device, fake, autograd and vmap.

    `fake(**arguments)` makes empty outputs; both it and the kernel see checked arguments, all of them, by name.
    """
    _LIBRARY.define(public_schema(op), tags=(torch.Tag.pt2_compliant_tag,))
    name = f"pruneopd::{op}"
    parameters = getattr(torch.ops.pruneopd, op).default._schema.arguments
    defaults = {parameter.name: parameter.default_value for parameter in parameters}
    check = getattr(checks, op)
    takes_logits = "student_logits" in defaults  # which may be float64 in the reference

    def prepare(args: tuple[Any, ...], kwargs: dict[str, Any], real: bool) -> tuple[str, dict[str, Any]]:
        # The dispatcher leaves out arguments that equal their default.
        arguments = {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}
        impl = implementations.choose(op, arguments.pop("impl"), args[0].device, real)
        options = {"float64": impl == "reference"} if takes_logits else {}
        check(**arguments, **options, values=real and args[0].device.type == "cpu")
        return impl, arguments

    def kernel(*args: Any, **kwargs: Any) -> Outputs:
        impl, arguments = prepare(args, kwargs, real=True)
        implementations.require_usable(op, impl, args[0].device)
        return implementations.run(op, impl, arguments)

    def fake_kernel(*args: Any, **kwargs: Any) -> Outputs:
        _, arguments = prepare(args, kwargs, real=False)
        return fake(**arguments)

    def mark_non_differentiable(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Outputs) -> None:
        ctx.mark_non_differentiable(*output)

    def backward(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(f"{op}: no output is differentiable")

    def vmap(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"{op}: torch.func.vmap is not supported, the operator takes its leading axes as they are")

    _LIBRARY.impl(op, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake_kernel, lib=_LIBRARY)
    torch.library.register_autograd(name, backward, setup_context=mark_non_differentiable, lib=_LIBRARY)
    torch.library.register_vmap(name, vmap, lib=_LIBRARY)


def call(op: str, **arguments: Any) -> Any:
    """Call `torch.ops.pruneopd.<op>`, where a wrong Python type gets our words instead of the dispatcher's."""
    if not torch.compiler.is_compiling():
        checks.kinds(op, arguments, Tensor, "a tensor")
    return getattr(torch.ops.pruneopd, op)(**arguments)
