"""The operators over a vocabulary that is split over the ranks of a `torch.distributed` group.

The functions take what their namesakes in `pruneopd_kernels` take, each rank its own slice of the logits or of the
heads, and return the same answer on every rank. Only the passes over logits have a form of their own, in files named
like their declarations. The files with an underscore are what they share: `_agreement` and `_exchange` talk to other
ranks, `_slice` reads this rank's logits, `_rows` puts whole rows together, `_passes` runs passes forward and backward.
"""

from typing import Any

import torch

from ..dispatch.registration import refuse_forward_mode
from ..linear import linear_opd_loss as on_one_rank
from ..linear._chunks import chunk_size_of
from ..linear._declaration import outside_graphs
from ..ops import OPERATORS, Operator
from ._agreement import agree, axes_of
from ._passes import Split, with_gradient

SUMMARY = """Compute `pruneopd_kernels.{}` over a vocabulary that is split over the ranks of a group.

Every rank calls it with its slice of the logits, of any width, and with all else equal. Slices are contiguous and in
the order of the ranks. Ids, `k` and `vocab_size` are those of the whole vocabulary; None for `vocab_size` means the
widths of all slices together. Every rank gets the whole answer: candidates, overlap, drift and counts are those of one
rank, bit for bit, and floats are as accurate. A loss is differentiable in this rank's slice; nothing is summed over
ranks. If the arguments are wrong on some rank, or differ between ranks, every rank raises.
"""
LINEAR_SUMMARY = """Compute `pruneopd_kernels.{}` with heads whose rows are split over the ranks of a group.

Every rank calls it with whole hidden states, its rows of both heads and biases, any number of them, and with all else
equal. Rows are contiguous and in the order of the ranks. Ids, `k` and `vocab_size` are those of the whole vocabulary.
Every rank gets the whole answer. The gradient by the hidden states is summed over the ranks, so that every rank gets
the whole of it; those by head and bias are of this rank's rows. If the arguments are wrong on some rank, or differ
between ranks, every rank raises.
"""
GROUP = "group", "ProcessGroup | None", "Group of `torch.distributed` whose ranks hold the slices. None: all ranks."


def _function(op: Operator) -> Any:
    def compute(*args: Any, impl: str = "auto", group: Any = None, **kwargs: Any) -> Any:
        a = op.arguments(args, kwargs)
        refuse_forward_mode(op.name, a)
        passes = Split(agree(op, group, a, impl))
        with torch.no_grad():
            outputs = op.module.compute(a, passes.run) if op.is_composed else passes.run(op.name, **a._asdict())
        outputs = with_gradient(passes, op, a, outputs)
        return op.result(*outputs) if op.result else outputs[0]

    return op.surface(outside_graphs(compute), SUMMARY.format(op.name), GROUP, with_impl=True)


def _linear(declared: Any) -> Any:
    def compute(*args: Any, group: Any = None, **kwargs: Any) -> Any:
        a = declared.arguments(args, kwargs)
        refuse_forward_mode(declared.name, a)
        slices = agree(declared, group, a, a.impl)
        chunk_size = chunk_size_of(a, slices.widest)
        return declared.compute(a._replace(impl=slices.impl, chunk_size=chunk_size, passes=Split(slices)))

    return declared.surface(outside_graphs(compute), LINEAR_SUMMARY.format(declared.name), GROUP, with_impl=True)


linear_opd_loss = _linear(on_one_rank.declared)
__all__ = [*(name for name, op in OPERATORS.items() if axes_of(op)), "linear_opd_loss"]
globals().update({name: _function(OPERATORS[name]) for name in __all__ if name in OPERATORS})
