"""Scoring and loss of a training step."""

import math
from types import SimpleNamespace
from typing import Any

import torch

from ..formulas import entropy, float_type, kl_divergence, where_used
from ..ops.opd_loss import OpdLoss, OpdScores
from .reliability import score
from .reverse_kl import reverse_kl, state_of
from .topk_policy_loss import topk_policy_loss


def opd_loss(a: Any) -> OpdLoss:
    scores = _scores(a, a.entropies, a.loss == "reverse_kl")
    if a.loss == "reverse_kl":
        weight = scores.weight if a.weight is None else a.weight
        loss = reverse_kl(SimpleNamespace(**a._asdict() | {"weight": weight}))
    else:
        candidates = {"topk_ids": scores.topk_ids, "advantages": scores.rewards, "old_logprobs": None}
        on_policy = {"clip_low": 0.0, "clip_high": 0.0, "clip_dual": math.inf}  # every ratio is 1
        loss = topk_policy_loss(SimpleNamespace(**a._asdict(), **candidates, **on_policy))
    return OpdLoss._make((loss, *scores[:-2], scores.reverse_kl.to(loss.dtype)))


def opd_scores(a: Any) -> Any:
    return _scores(a, a.entropies, a.divergence)


@torch.no_grad()
def _scores(a: Any, entropies: bool, divergence: bool) -> Any:
    scored, accepted, student, teacher, valid = score(a, a.weight)
    kl = where_used(valid & (entropies or divergence), kl_divergence(student, teacher))
    dtype = float_type(a.student_logits, a.teacher_logits)
    both = [where_used(valid & entropies, entropy(rows)).to(dtype) for rows in (student, teacher)]
    state = state_of(student, teacher, kl, valid)
    if not divergence:
        state[..., 2:] = 0.0
    return OpdScores._make((*scored, accepted, *both, kl, state))
