"""The matrix products, which are torch's: logits of a chunk, and the gradients by hidden states, weight and bias.

Operands have one dtype, under autocast its dtype. Logits and sums are float32 regardless, or float64 for float64
operands. CUDA multiplies half-precision operands into a float32 matrix. On a CPU they are made float32 before, a few
ids at a time, so that no float32 copy of a head exists.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._positions import put

TILE_BYTES = 2**22
HALF = (torch.bfloat16, torch.float16)
Optional = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Head:
    """An output layer: logits = hidden @ weight.T + bias, and then cap * tanh(logits / cap) if there is a cap."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    cap: float | None
    operands: torch.dtype  # what both sides of a product are rounded to

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of logits, of their gradient and of sums."""
        return sum_dtype(self.operands)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Write and return the logits `[c, V]` of hidden states `[c, H]`."""
        if not self._is_tiled(out):
            torch.mm(hidden, self.weight.t(), out=out, **self._into_float32())
        else:
            hidden = hidden.to(self.dtype)
            for rows, weight in self._tiles(len(hidden)):
                torch.mm(hidden, weight.t(), out=out[:, rows])
        if self.bias is not None:
            out.add_(self.bias.to(self.operands))
        return out if self.cap is None else out.div_(self.cap).tanh_().mul_(self.cap)

    def through_cap(self, gradient: Tensor, logits: Tensor) -> None:
        """Turn the gradient by logits into the one before the cap, in place. The logits are overwritten."""
        if self.cap is not None:
            torch.ops.aten.tanh_backward.grad_input(gradient, logits.div_(self.cap), grad_input=gradient)

    def operand(self, gradient: Tensor, spare: Tensor) -> Tensor:
        """Return the gradient of a chunk's logits as a product takes it, rounded into `spare`, memory of that shape."""
        if self.operands not in HALF or self._is_tiled(gradient):
            return gradient
        return spare.view(-1).view(self.operands)[: gradient.numel()].view_as(gradient).copy_(gradient)

    def hidden_gradient(self, gradient: Tensor) -> Tensor:
        """Return `[c, H]`, from an `operand`."""
        if not self._is_tiled(gradient):
            return torch.mm(gradient, self.weight, **self._into_float32())
        total = gradient.new_zeros(len(gradient), self.weight.shape[1])
        for rows, weight in self._tiles(len(gradient)):
            total.addmm_(gradient[:, rows], weight)
        return total

    def add_weight_gradient(self, total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
        """Add `gradient.T @ hidden` to `[V, H]`, from an `operand`."""
        if self._is_tiled(gradient):
            hidden = hidden.to(self.dtype)
            total.addmm_(gradient.t(), hidden)
        else:
            torch.addmm(total, gradient.t(), hidden, out=total, **self._into_float32())

    def _is_tiled(self, like: Tensor) -> bool:
        return self.operands in HALF and not like.is_cuda

    def _into_float32(self) -> dict[str, Any]:
        return {"out_dtype": torch.float32} if self.operands in HALF else {}

    def _tiles(self, positions: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield some rows of the weight at a time in float32, so few that neither they nor their logits are large."""
        step = max(1, TILE_BYTES // (4 * max(1, self.weight.shape[1], positions)))
        memory = self.weight.new_empty(min(step, len(self.weight)), self.weight.shape[1], dtype=self.dtype)
        for start in range(0, len(self.weight), step):
            rows = slice(start, start + step)
            weight = self.weight[rows].to(self.operands)
            yield rows, memory[: len(weight)].copy_(weight)


class Gradients:
    """By hidden states, weight and bias, where wanted; formed chunk by chunk, in float32 or float64.

    The gradients of a chunk's logits come divided by the number `unit`, which the last product gives back.
    """

    def __init__(self, inputs: Sequence[Tensor | None], wanted: Sequence[bool], unit: Tensor) -> None:
        self.dtypes = [None if x is None else x.dtype for x in inputs]
        self.unit = unit
        self.sums: list[Tensor | None] | None = [
            x.new_zeros(x.shape, dtype=sum_dtype(x.dtype)) if x is not None and want else None
            for x, want in zip(inputs, wanted, strict=True)
        ]

    def add(self, head: Head, places: Tensor, hidden: Tensor, gradient: Tensor, logits: Tensor) -> None:
        """Add a chunk's, from the gradient by its logits. The memory of both is used again."""
        assert self.sums is not None
        of_hidden, of_weight, of_bias = self.sums
        head.through_cap(gradient, logits)
        if of_bias is not None:
            of_bias += gradient.sum(0)
        gradient = head.operand(gradient, logits)
        if of_hidden is not None:
            put(of_hidden, places, head.hidden_gradient(gradient))
        if of_weight is not None:
            head.add_weight_gradient(of_weight, gradient, hidden)

    def give_up(self, passes: Any, factor: Tensor | float = 1.0) -> Optional:
        """Return the gradients times a factor, in place, in the dtypes of the inputs; keep none."""
        assert self.sums is not None
        factor = self.unit * factor
        gradients = [None if x is None else x.mul_(factor) for x in self.sums]
        self.sums = None
        if gradients[0] is not None:
            passes.add_up(gradients[0])
        for place, gradient in enumerate(gradients):  # so that one float32 sum at a time has a rounded copy beside it
            gradients[place] = None if gradient is None else gradient.to(self.dtypes[place])
        return tuple(gradients)


def unit_of(*scales: Tensor | None) -> Tensor:
    """Return the power of two next to the largest of these numbers, 1 if there is no finite one above 0.

    Divided by it, a gradient of any scale does not vanish when a product rounds it to half precision.
    """
    finite = [x.abs().nan_to_num(0.0, 0.0, 0.0).amax() for x in scales if x is not None and x.numel()]
    if not finite:
        return torch.ones((), dtype=torch.float64)
    _, exponent = torch.frexp(torch.stack(finite).amax())
    unit = torch.ldexp(torch.ones_like(finite[0], dtype=torch.float64), exponent)
    return torch.where((unit > 0) & unit.isfinite(), unit, 1.0)


def head_of(weight: Tensor, bias: Tensor | None, cap: float | None, autocast: torch.dtype | None) -> Head:
    operands = weight.dtype
    if autocast is not None and operands != torch.float64:  # which autocast leaves alone, too
        operands = autocast
        if weight.is_cuda:
            weight = weight.to(autocast)  # one rounded copy for all chunks, as autocast itself would keep
    return Head(weight, bias, cap, operands)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums of such numbers."""
    return torch.float32 if dtype in HALF else dtype
