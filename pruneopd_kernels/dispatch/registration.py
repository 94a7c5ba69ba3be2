"""Make `torch.ops.pruneopd.<op>` of each declaration, and the Python function that calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import checks, formulas
from ..ops._operator import BACKWARD_PASSES, NAMESPACE, OPERATORS, Operator
from . import implementations

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

OPS: Any = getattr(torch.ops, NAMESPACE)

Outputs = tuple[Tensor, ...]
_PLAIN = (Tensor, torch.nn.Parameter, type(None))


class Empty:
    """Makes the empty outputs of a call: `empty(dtype, *more)` is `[..., *more]`, where `...` are the positions.

    The dtype "logits" stands for `formulas.float_type` of the logits.
    """

    def __init__(self, a: Any) -> None:
        self.like = a[0]
        self.positions = self.like.shape[: self.like.ndim - (self.like.dtype != torch.bool)]
        self.of_logits = formulas.float_type(*(x for name, x in a._asdict().items() if name.endswith("logits")))

    def __call__(self, dtype: str, *more: int | torch.SymInt) -> Tensor:
        torch_dtype = self.of_logits if dtype == "logits" else getattr(torch, dtype)
        return self.like.new_empty((*self.positions, *more), dtype=torch_dtype)  # type: ignore[no-any-return]

    def scan(self, cu_seqlens: Tensor | None) -> Outputs:
        """Return empty C, R, L and E."""
        responses = self.positions[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return self("int32"), self("float32"), self("float32"), self.like.new_empty(responses, dtype=torch.int32)


def register(op: Operator) -> None:
    """Register an operator whose outputs are constants."""
    compute = _define(op, op.name, op.fields)
    overload = getattr(OPS, op.name).default

    def below_autograd(*args: Any, **kwargs: Any) -> Any:
        is_direct = _is_direct(args)
        if not is_direct:
            _refuse_special(op, args, kwargs)
        # No output is differentiable: autograd has nothing to record.
        with torch._C._AutoDispatchBelowAutograd():
            if is_direct:
                return compute(kwargs.pop("impl", "auto"), op.raw_arguments(args, kwargs))
            return overload(*args, **kwargs)

    _LIBRARY.impl(op.name, below_autograd, "Autograd")
    op.call = _function(op, compute)  # type: ignore[method-assign]


def register_differentiable(op: Operator) -> None:
    """Register an operator some of whose outputs are differentiable in its first argument, and in nothing else.

    `torch.ops.pruneopd._<op>` does the work. It returns the public outputs and what its backward pass needs, which the
    public operator drops.
    """
    inner, visible = f"_{op.name}", len(op.fields)
    outputs = (*op.fields, *op.saved)
    compute = _define(op, inner, outputs)
    differentiable = [op.fields.index(name) for name in op.differentiable]
    constant = [index for index in range(len(outputs)) if index not in differentiable]

    def setup_context(ctx: Any, inputs: Any, keyword_only_inputs: dict[str, Any], output: Any) -> None:
        is_differentiable = ctx.needs_input_grad[0]
        ctx.mark_non_differentiable(*(output[i] for i in constant) if is_differentiable else output)
        ctx.set_materialize_grads(False)
        if not is_differentiable:
            return
        ctx.scalars = keyword_only_inputs
        given = dict(zip(op.tensors, inputs, strict=True)) | dict(zip(outputs, output, strict=True))
        save_tensors(ctx, {name: given[name] for name in op.module.kept(SimpleNamespace(**keyword_only_inputs))})

    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        none: tuple[Tensor | None, ...] = (None,) * len(op.tensors)
        wanted = [gradients[i] for i in differentiable]
        if all(gradient is None for gradient in wanted) or not ctx.needs_input_grad[0]:
            return none
        return op.module.backward(SimpleNamespace(**saved_tensors(ctx), **ctx.scalars), *wanted), *none[1:]

    torch.library.register_autograd(f"{NAMESPACE}::{inner}", backward, setup_context=setup_context, lib=_LIBRARY)
    saving = getattr(OPS, inner).default

    def public(*args: Any, **kwargs: Any) -> Any:
        _refuse_special(op, args, kwargs)
        outputs = saving(*args, **kwargs)
        return outputs[0] if visible == 1 else outputs[:visible]

    _LIBRARY.define(op.schema(op.name, op.fields), tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(op.name, public, "CompositeImplicitAutograd")
    _refuse_vmap(op.name, op.name)
    op.call = _function(op, compute)  # type: ignore[method-assign]


def save_tensors(ctx: Any, tensors: dict[str, Tensor | None]) -> None:
    """Save tensors by name for a backward pass."""
    # Inference tensors cannot be saved for backward; they are immutable, so a plain reference is enough.
    ctx.unsaved = {name: x for name, x in tensors.items() if x is None or x.is_inference()}
    ctx.names = [name for name in tensors if name not in ctx.unsaved]
    ctx.save_for_backward(*(tensors[name] for name in ctx.names))


def saved_tensors(ctx: Any) -> dict[str, Any]:
    """Return what `save_tensors` saved."""
    return ctx.unsaved | dict(zip(ctx.names, ctx.saved_tensors, strict=True))  # type: ignore[no-any-return]


def register_backward(op: Operator) -> None:
    """Register the backward pass `torch.ops.pruneopd._<op>`: a gradient like its first argument."""

    def save_nothing(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Outputs) -> None:
        pass

    def backward(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(f"{op.name}: the gradient of a loss cannot be differentiated a second time")

    _define(op, f"_{op.name}", op.fields)
    torch.library.register_autograd(f"{NAMESPACE}::_{op.name}", backward, setup_context=save_nothing, lib=_LIBRARY)


def _define(op: Operator, name: str, outputs: tuple[str, ...]) -> Callable[[str, Any], Any]:
    """Define an operator with its kernel for every device, its fake and its refusal of vmap; return the kernel.

    The kernel that is returned takes `impl` and a record of arguments. It checks them, except in a backward pass.
    """
    _LIBRARY.define(op.schema(name, outputs), tags=(torch.Tag.pt2_compliant_tag,))
    is_backward, single = op.name in BACKWARD_PASSES, len(outputs) == 1
    check_results = None if is_backward else getattr(op.module, "check_results", None)

    def prepare(impl: str, a: Any, real: bool) -> str:
        device = a[0].device
        impl = implementations.choose(op.name, impl, device, real)
        if not is_backward:
            op.check(a, float64=impl == "reference", values=real and device.type == "cpu")
        return impl

    def compute(impl: str, a: Any) -> Any:
        computed = implementations.run(op, prepare(impl, a, real=True), a)
        if check_results and a[0].device.type == "cpu":
            check_results(op.name, a, computed[0])
        return computed[0] if single else computed

    def kernel(*args: Any, **kwargs: Any) -> Any:
        # The dispatcher leaves out arguments that equal their default.
        return compute(kwargs.pop("impl", "auto"), op.raw_arguments(args, kwargs))

    def fake(*args: Any, **kwargs: Any) -> Any:
        impl, a = kwargs.pop("impl", "auto"), op.raw_arguments(args, kwargs)
        prepare(impl, a, real=False)
        made = (a[0].new_empty(a[0].shape),) if is_backward else op.module.fake(a, Empty(a))
        return made[0] if single else made

    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    _refuse_vmap(name, op.name)
    return compute


def _refuse_vmap(name: str, op: str) -> None:
    def vmap(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"{op}: torch.func.vmap is not supported, the operator takes its leading axes as they are")

    torch.library.register_vmap(f"{NAMESPACE}::{name}", vmap, lib=_LIBRARY)


def refuse_forward_mode(op: str, tensors: Iterable[Any]) -> None:
    """Raise if a tensor has a tangent: torch would drop it, and a tangent of 0 is no answer."""
    if forward_ad._current_level >= 0:
        for x in tensors:
            if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
                raise RuntimeError(
                    f"{op}: forward-mode AD is not supported; use reverse mode, or the functions of "
                    "pruneopd_kernels.reference"
                )


def _refuse_special(op: Operator, args: Any, kwargs: Any) -> None:
    """Look at what does not go the direct way, before torch does."""
    tensors = op.raw_arguments(args, {name: x for name, x in kwargs.items() if name != "impl"})[: len(op.tensors)]
    op.check_plain(tensors)
    refuse_forward_mode(op.name, tensors)


# The dispatcher costs more than a small kernel. The Python functions do without it if it has nothing to do.


def _is_direct(tensors: Any) -> bool:
    """Return whether the tensors are plain and hold data, and no mode, transform or trace listens to the dispatcher."""
    return (
        not tensors[0].is_meta
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and all(type(x) in _PLAIN for x in tensors)
    )


def _function(op: Operator, compute: Callable[[str, Any], Any]) -> Callable[..., Any]:
    """Return what the Python function of an operator does."""
    overload = getattr(OPS, op.name).default
    result, tensors, visible = op.result, len(op.tensors), len(op.fields)
    is_loss = bool(op.saved)

    def call(*args: Any, impl: str = "auto", **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            a = op.arguments(args, kwargs)
            op.check_kinds(a, Tensor, "a tensor")
            checks.kind(op.name, "impl", impl, "str")
            if _is_direct(a[:tensors]) and not (is_loss and torch.is_grad_enabled() and a[0].requires_grad):
                with torch._C._AutoDispatchBelowAutograd():
                    outputs = compute(impl, a)
                return result(*outputs[:visible]) if result else outputs[0] if is_loss else outputs
            _refuse_special(op, a, {})
        outputs = overload(*args, **kwargs, impl=impl)
        return result(*outputs) if result else outputs

    return call


for _op in OPERATORS.values():
    (register_differentiable if _op.saved else register)(_op)
for _op in BACKWARD_PASSES.values():
    register_backward(_op)
