"""How an operator becomes `torch.ops.pruneopd.<op>`, and how its Python function calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..schemas import NAMESPACE, SIGNATURES, backward_schema, public_schema, saving_schema
from . import _implementations as implementations

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

OPS: Any = getattr(torch.ops, NAMESPACE)

Outputs = tuple[Tensor, ...]
Gradients = tuple[Tensor | None, ...]


def register(op: str, fake: Callable[..., Outputs]) -> None:
    """Register an operator whose outputs are constants: kernel for every device, fake, autograd and vmap.

    `fake(**arguments, impl=impl)` makes empty outputs; both it and the kernel see checked arguments, all by name.
    """

    def mark_non_differentiable(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Outputs) -> None:
        ctx.mark_non_differentiable(*output)

    def backward(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(f"{op}: no output is differentiable")

    _define(op, public_schema(op), op, fake)
    torch.library.register_autograd(f"{NAMESPACE}::{op}", backward, setup_context=mark_non_differentiable, lib=_LIBRARY)


def register_loss(
    op: str,
    fake: Callable[..., Outputs],
    saved_inputs: Sequence[str],
    backward: Callable[..., Tensor],
) -> None:
    """Register an operator whose first output is differentiable in its first argument, and nothing else.

    `torch.ops.pruneopd._<op>` does the work: it returns the public outputs and then what its backward pass needs
    (`schemas.SAVED`). The public operator drops the latter. `fake` makes empty outputs of the former.
    `backward(gradient, saved, **arguments)` gets the gradient of the loss, what the forward pass saved, the tensors
    named in `saved_inputs` and all scalars.
    """
    inner = f"_{op}"
    visible = len(SIGNATURES[op][1].split(","))
    _define(inner, saving_schema(op), op, fake)
    arguments = getattr(OPS, inner).default._schema.arguments
    positional = [argument.name for argument in arguments if not argument.kwarg_only]

    def setup_context(ctx: Any, inputs: Any, keyword_only_inputs: dict[str, Any], output: Outputs) -> None:
        is_differentiable = ctx.needs_input_grad[0]
        ctx.mark_non_differentiable(*(output[1:] if is_differentiable else output))
        ctx.set_materialize_grads(False)
        if not is_differentiable:
            return
        given = dict(zip(positional, inputs, strict=True))
        # What comes from inference mode cannot be saved, and needs not be watched for changes: nobody may make any.
        tensors = {name: given[name] for name in saved_inputs}
        ctx.unsaved = {name: x for name, x in tensors.items() if x is None or x.is_inference()}
        ctx.names = [name for name in tensors if name not in ctx.unsaved]
        ctx.scalars = keyword_only_inputs
        ctx.save_for_backward(*(tensors[name] for name in ctx.names), *output[visible:])

    def run_backward(ctx: Any, *gradients: Any) -> Gradients:
        none: Gradients = (None,) * len(positional)
        if gradients[0] is None or not ctx.needs_input_grad[0]:
            return none
        kept = ctx.saved_tensors  # asked for once: checkpointing computes them again
        tensors = dict(zip(ctx.names, kept, strict=False))
        return backward(gradients[0], kept[len(ctx.names) :], **tensors, **ctx.unsaved, **ctx.scalars), *none[1:]

    torch.library.register_autograd(f"{NAMESPACE}::{inner}", run_backward, setup_context=setup_context, lib=_LIBRARY)

    def public(*args: Any, **kwargs: Any) -> Any:
        outputs = getattr(OPS, inner)(*args, **kwargs)
        return outputs[0] if visible == 1 else outputs[:visible]

    _LIBRARY.define(public_schema(op), tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(op, public, "CompositeImplicitAutograd")
    _refuse_vmap(op, op)


def register_backward(op: str) -> None:
    """Register the backward pass `torch.ops.pruneopd._<op>`: a gradient like its first argument."""

    def fake(*, student_logits: Tensor, **_: Any) -> Outputs:
        return (student_logits.new_empty(student_logits.shape),)

    def save_nothing(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Outputs) -> None:
        pass

    def backward(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(f"{op}: the gradient of a loss cannot be differentiated a second time")

    _define(f"_{op}", backward_schema(op), op, fake)
    torch.library.register_autograd(f"{NAMESPACE}::_{op}", backward, setup_context=save_nothing, lib=_LIBRARY)


def _define(name: str, schema: str, op: str, fake: Callable[..., Outputs]) -> None:
    """Define an operator with its kernel for every device, its fake and its refusal of vmap."""
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    parameters = getattr(OPS, name).default._schema.arguments
    defaults = {parameter.name: parameter.default_value for parameter in parameters}
    check = getattr(checks, op, None)  # a backward pass gets what a forward pass has checked
    takes_logits = "student_logits" in defaults  # which may be float64 in the reference
    single = len(getattr(OPS, name).default._schema.returns) == 1

    def prepare(args: tuple[Any, ...], kwargs: dict[str, Any], real: bool) -> tuple[str, dict[str, Any]]:
        # The dispatcher leaves out arguments that equal their default.
        arguments = {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}
        impl = implementations.choose(op, arguments.pop("impl"), args[0].device, real)
        options = {"float64": impl == "reference"} if takes_logits else {}
        if check is not None:
            check(**arguments, **options, values=real and args[0].device.type == "cpu")
        return impl, arguments

    def kernel(*args: Any, **kwargs: Any) -> Any:
        impl, arguments = prepare(args, kwargs, real=True)
        implementations.require_usable(op, impl, args[0].device)
        outputs = implementations.run(op, impl, arguments)
        return outputs[0] if single else outputs

    def fake_kernel(*args: Any, **kwargs: Any) -> Any:
        impl, arguments = prepare(args, kwargs, real=False)
        outputs = fake(**arguments, impl=impl)
        return outputs[0] if single else outputs

    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake_kernel, lib=_LIBRARY)
    _refuse_vmap(name, op)


def _refuse_vmap(name: str, op: str) -> None:
    def vmap(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"{op}: torch.func.vmap is not supported, the operator takes its leading axes as they are")

    torch.library.register_vmap(f"{NAMESPACE}::{name}", vmap, lib=_LIBRARY)


def call(op: str, **arguments: Any) -> Any:
    """Call `torch.ops.pruneopd.<op>`, where a wrong Python type gets our words instead of the dispatcher's."""
    if not torch.compiler.is_compiling():
        checks.kinds(op, arguments, Tensor, "a tensor")
    return getattr(OPS, op)(**arguments)
