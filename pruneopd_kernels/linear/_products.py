"""The matrix products, which are torch's: logits of a chunk, and the gradients by hidden states, weight and bias.

Without autocast all operands have one dtype, and so have the logits. Under autocast operands are rounded to its dtype
and logits are float32. Half-precision operands of the head's gradient make a float32 sum. CUDA multiplies such
operands into a float32 matrix; on a CPU they are made float32 before, a few ids at a time, so that no second head
exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_BYTES = 2**22
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Head:
    """An output layer: logits = hidden @ weight.T + bias."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    operands: torch.dtype  # what both sides of a product are rounded to
    dtype: torch.dtype  # of the logits and their gradient

    @property
    def width(self) -> int:
        return self.weight.shape[0]

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """Write the logits `[c, V]` of hidden states `[c, H]`."""
        hidden = hidden.to(self.operands)
        if self.operands == self.dtype:
            if self.bias is None:
                torch.mm(hidden, self.weight.t(), out=out)
            else:
                torch.addmm(self.bias, hidden, self.weight.t(), out=out)
            return
        if _multiplies_into_float32(out):
            torch.mm(hidden, self.weight.t(), out_dtype=self.dtype, out=out)
        else:
            hidden = hidden.to(self.dtype)
            for rows, weight in self._float32_blocks(len(hidden)):
                torch.mm(hidden, weight.t(), out=out[:, rows])
        if self.bias is not None:
            out.add_(self.bias.to(self.operands))

    def operand(self, gradient: Tensor, spare: Tensor) -> Tensor:
        """The gradient of a chunk's logits as a product takes it; `spare` is memory of that shape to round it into."""
        if self.operands == self.dtype or not _multiplies_into_float32(gradient):
            return gradient
        rounded = spare.view(-1).view(self.operands)[: gradient.numel()].view_as(gradient)
        return rounded.copy_(gradient)

    def hidden_gradient(self, gradient: Tensor) -> Tensor:
        """`[c, H]`, from an `operand`."""
        if self.operands in HALF and not _multiplies_into_float32(gradient):
            # Also without autocast: some processors take 30 times as long for this product in half precision.
            total = gradient.new_zeros(gradient.shape[0], self.weight.shape[1], dtype=torch.float32)
            for rows, weight in self._float32_blocks(len(gradient)):
                total.addmm_(gradient[:, rows].to(torch.float32), weight)
            return total
        if self.operands == self.dtype:
            return torch.mm(gradient, self.weight)
        return torch.mm(gradient, self.weight, out_dtype=self.dtype)

    def _float32_blocks(self, positions: int) -> Iterator[tuple[slice, Tensor]]:
        for rows in blocks(self.weight.shape[0], max(self.weight.shape[1], positions)):
            yield rows, self.weight[rows].to(self.operands).to(torch.float32)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What operands are to be rounded to here and now, if anything."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def without_autocast(like: Tensor) -> AbstractContextManager[None]:
    """Nothing rounds but what is written here."""
    return torch.autocast(like.device.type, enabled=False)


def head_of(weight: Tensor, bias: Tensor | None, autocast: torch.dtype | None) -> Head:
    if autocast is None or weight.dtype == torch.float64:  # which autocast leaves alone, too
        return Head(weight, bias, weight.dtype, weight.dtype)
    if _multiplies_into_float32(weight):
        weight = weight.to(autocast)  # one rounded copy for all chunks, as autocast itself would keep
    return Head(weight, bias, autocast, torch.float32)


def add_weight_gradient(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """Add `gradient.T @ hidden` to `[V, H]`, in the dtype of the total: float32 for half-precision operands."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.t(), hidden.to(total.dtype))
    elif _multiplies_into_float32(gradient):
        torch.addmm(total, gradient.t(), hidden, out_dtype=total.dtype, out=total)
    else:
        hidden = hidden.to(total.dtype)
        for rows in blocks(gradient.shape[1], gradient.shape[0]):
            total[rows].addmm_(gradient[:, rows].to(total.dtype).t(), hidden)


def add_bias_gradient(total: Tensor, gradient: Tensor) -> None:
    """Add the sum over the chunk to `[V]`, in the dtype of the total."""
    if gradient.dtype == total.dtype or gradient.is_cuda:
        total += gradient.sum(0, dtype=total.dtype)
        return
    for rows in blocks(gradient.shape[1], gradient.shape[0]):  # a CPU makes a copy in that dtype before it sums
        total[rows] += gradient[:, rows].sum(0, dtype=total.dtype)


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of so many rows that a block in float32 stays small."""
    step = max(1, BLOCK_BYTES // (4 * max(1, columns)))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over chunks are kept in."""
    return torch.float32 if dtype in HALF else dtype


def _multiplies_into_float32(tensor: Tensor) -> bool:
    return tensor.is_cuda
