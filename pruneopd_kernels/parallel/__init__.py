"""The operators over a vocabulary that is split over the ranks of a `torch.distributed` group.

The functions take what their namesakes in `pruneopd_kernels` take, each rank its own slice of the logits, and return
the same answer on every rank. One file per operator computes it. The files with an underscore are what they share:
`_agreement` and `_exchange` talk to the other ranks, `_slice` looks at this rank's logits, `_rows` and `_loss` put
whole rows together.
"""

from importlib import import_module
from typing import Any

from ..dispatch.registration import refuse_forward_mode
from ..ops import OPERATORS, Operator
from ._agreement import agree
from ._exchange import outside_graphs

SUMMARY = """Compute `pruneopd_kernels.{}` over a vocabulary that is split over the ranks of a group.

Every rank calls it with its slice of the logits, of any width, and with all else equal. Slices are contiguous and in
the order of the ranks. Ids, `k` and `vocab_size` are those of the whole vocabulary; None for `vocab_size` means the
widths of all slices together. Every rank gets the whole answer: candidates, overlap, drift and counts are those of one
rank, bit for bit, and floats are as accurate. A loss is differentiable in this rank's slice; nothing is summed over
ranks. If the arguments are wrong on some rank, or differ between ranks, every rank raises.
"""


def _function(op: Operator) -> Any:
    compute = getattr(import_module(f".{op.name}", __name__), op.name)

    @outside_graphs
    def function(*args: Any, impl: str = "auto", group: Any = None, **kwargs: Any) -> Any:
        a = op.arguments(args, kwargs)
        refuse_forward_mode(op.name, a)
        return compute(agree(op, group, a, impl), a)

    extra = (
        "group",
        "ProcessGroup | None",
        "Group of `torch.distributed` whose ranks hold the slices. None: all ranks.",
    )
    return op.surface(function, SUMMARY.format(op.name), extra, with_impl=True)


globals().update({op.name: _function(op) for op in OPERATORS.values() if "student_logits" in op.tensors})

__all__ = [name for name, op in OPERATORS.items() if "student_logits" in op.tensors]
