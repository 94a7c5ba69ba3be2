"""The operators over a vocabulary that is split over the ranks of a `torch.distributed` group.

The functions take what their namesakes in `pruneopd_kernels` take, each rank its own slice of the logits, and return
the same answer on every rank. Only the passes over logits have a form of their own, in files named like those of their
declarations: the operators compute from them what they compute on one rank. The files with an underscore are what the
passes share: `_agreement` and `_exchange` talk to the other ranks, `_slice` looks at this rank's logits, `_rows` puts
whole rows together, `_autograd` takes a gradient back to the slice.
"""

from functools import partial
from typing import Any

import torch

from ..dispatch.registration import refuse_forward_mode
from ..ops import FORWARD_PASSES, OPERATORS, Operator
from . import opd_loss, row_stats, token_stats
from ._agreement import Slices, agree, logits_of
from ._autograd import with_gradient
from ._exchange import outside_graphs

SUMMARY = """Compute `pruneopd_kernels.{}` over a vocabulary that is split over the ranks of a group.

Every rank calls it with its slice of the logits, of any width, and with all else equal. Slices are contiguous and in
the order of the ranks. Ids, `k` and `vocab_size` are those of the whole vocabulary; None for `vocab_size` means the
widths of all slices together. Every rank gets the whole answer: candidates, overlap, drift and counts are those of one
rank, bit for bit, and floats are as accurate. A loss is differentiable in this rank's slice; nothing is summed over
ranks. If the arguments are wrong on some rank, or differ between ranks, every rank raises.
"""


# What reads logits, over several ranks.
PASSES = {
    "row_stats": row_stats.row_stats,
    "opd_scores": opd_loss.opd_scores,
    "reliability": opd_loss.reliability,
    "reverse_kl": opd_loss.reverse_kl,
    "token_stats": token_stats.token_stats,
}


def _run_pass(slices: Slices, name: str, *args: Any, **kwargs: Any) -> Any:
    return PASSES[name](slices, FORWARD_PASSES[name].arguments(args, kwargs))


def _function(op: Operator) -> Any:
    @outside_graphs
    def function(*args: Any, impl: str = "auto", group: Any = None, **kwargs: Any) -> Any:
        a = op.arguments(args, kwargs)
        refuse_forward_mode(op.name, a)
        slices = agree(op, group, a, impl)
        with torch.no_grad():
            outputs = op.module.compute(a, partial(_run_pass, slices)) if op.is_composed else PASSES[op.name](slices, a)
        outputs = with_gradient(slices, op, a, outputs)
        return op.result(*outputs) if op.result else outputs[0]

    extra = (
        "group",
        "ProcessGroup | None",
        "Group of `torch.distributed` whose ranks hold the slices. None: all ranks.",
    )
    return op.surface(function, SUMMARY.format(op.name), extra, with_impl=True)


__all__ = [name for name, op in OPERATORS.items() if logits_of(op)]
globals().update({name: _function(OPERATORS[name]) for name in __all__})
