"""A vocabulary that is split over ranks: what reads it, and what takes gradients back to this rank's slice."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..formulas import logprobs_from_state
from ..linear._gradients import attach
from ..linear._scoring import Passes
from ..ops import FORWARD_PASSES, OPERATORS, Operator
from ._agreement import Slices
from ._exchange import Side, gather
from ._rows import from_owners, local_ids
from ._slice import logits_of_ids, own
from .opd_loss import opd_scores, reliability, reverse_kl
from .row_stats import row_stats
from .token_stats import token_stats

PASSES = {f.__name__: f for f in (opd_scores, reliability, reverse_kl, row_stats, token_stats)}


class Split(Passes):
    """What reads slices of the logits. All ranks make the same calls."""

    def __init__(self, slices: Slices) -> None:
        super().__init__(slices.impl)
        self.slices = slices

    def run(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run what reads logits over all ranks, and all else on this one."""
        if name not in PASSES:
            return super().run(name, *args, **kwargs)
        return PASSES[name](self.slices, (FORWARD_PASSES | OPERATORS)[name].arguments(args, kwargs))

    def logprobs(self, logits: Tensor, ids: Tensor, state: Tensor, temperature: float) -> Tensor:
        """Return the log-probabilities of ids that exist; the ranks that hold them send their logits."""
        used = torch.ones(ids.shape[:-1], dtype=torch.bool, device=ids.device)
        mine = logits_of_ids(self.slices, own(self.slices, logits), ids, used)
        (everyone,) = gather(self.slices, used.shape, Side(of_ids=mine))
        return logprobs_from_state(from_owners(self.slices, ids, everyone.of_ids), state, temperature)

    def gradient(self, op: str, a: Any, *gradients: Tensor | None) -> Tensor:
        """Return the gradient by this rank's slice. Every rank has kept the same of whole rows, so nothing is sent."""
        slices, given = self.slices, vars(a)
        logits = given[OPERATORS[op].tensors[0]]
        if slices.width == 0:
            return torch.zeros_like(logits)
        # Candidates of other ranks count in the sum of the coefficients, and have no logit here.
        ids = {name: local_ids(slices, x) for name, x in given.items() if name.endswith("_ids") and x is not None}
        here = {"impl": slices.impl, "vocab_size": slices.width}
        return super().gradient(op, SimpleNamespace(**given | ids | here), *gradients)

    def add_up(self, hidden_gradient: Tensor) -> None:
        """Sum the gradient by hidden states over the ranks, in place."""
        dist.all_reduce(hidden_gradient, group=self.slices.group)


def with_gradient(passes: Split, op: Operator, a: Any, outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the operator's outputs, the differentiable ones with their gradient by this rank's logits."""
    fields, scalars = list(outputs[: len(op.fields)]), {name: getattr(a, name) for name in op.scalars}
    if not op.saved:
        return fields
    given = a._asdict() | dict(zip((*op.fields, *op.saved), outputs, strict=True))

    def backward(inputs: Any, kept: dict[str, Any], wanted: Any, *gradients: Tensor | None) -> tuple[Tensor]:
        return (passes.gradient(op.name, SimpleNamespace(**scalars, **kept), *gradients),)

    at = [op.fields.index(name) for name in op.differentiable]
    kept = {name: given[name] for name in op.module.kept(a)}
    linked = attach(op.name, a[:1], backward, kept, *(fields[i].clone() for i in at))
    for i, output in zip(at, linked, strict=True):
        fields[i] = output
    return fields
