"""What one rank computes from its slice, with the operators for whole rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..dispatch.registration import OPS
from ..formulas import kl_divergence as whole_kl_divergence
from ..formulas import read_rows
from ..ops import token_stats
from ._agreement import Slices
from ._rows import local_ids


class Side(NamedTuple):
    """One side's slice, per position. A slice narrower than k' fills its candidates up with logits of -inf."""

    topk_ids: Tensor  # [..., k'], of the whole vocabulary
    topk_logits: Tensor  # [..., k'], exact; the first is the slice's greatest logit
    log_mass: Tensor  # log(sum(exp((logit - greatest) / temperature))), of use where the greatest is finite


# A divergence travels over this: one that float32 does not hold may count for little in the whole row.
KL_UNIT = 2.0**20
ROWS_AT_ONCE = 16


class Pair(NamedTuple):
    """Both sides' slices, and what `token_stats` says of them."""

    student: Side
    teacher: Side
    student_entropy: Tensor
    teacher_entropy: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor


def pair_of(slices: Slices, a: Any, used: Tensor, k: int) -> Pair:
    """Return both sides of this rank's slice, from one read."""
    if slices.width == 0:
        nothing = torch.zeros(used.shape, device=used.device)
        student, teacher = (_empty_side(slices, logits, used, k) for logits in (a.student_logits, a.teacher_logits))
        return Pair(student, teacher, nothing, nothing, nothing, nothing)
    options = slices.options("student_temperature", "teacher_temperature")
    stats = token_stats(a.student_logits, a.teacher_logits, used, k=min(k, slices.width), **options)
    # The log-probability of the greatest tells the mass without a log-sum-exp, which is as large as the logits.
    return Pair(
        _side(slices, a.student_logits, used, k, stats.student_topk_ids, -stats.student_topk_logprobs[..., 0]),
        _side(slices, a.teacher_logits, used, k, stats.teacher_topk_ids, -stats.teacher_topk_logprobs[..., 0]),
        stats.student_entropy,
        stats.teacher_entropy,
        stats.reverse_kl,
        stats.forward_kl,
    )


def sent_divergence(slices: Slices, kl: Tensor, p: tuple[Tensor, float], q: tuple[Tensor, float]) -> Tensor:
    """Return KL(p || q) of this slice over KL_UNIT: +inf where an id has log q = -inf < log p, and only there.

    `token_stats` also returns +inf where KL is finite and no float32. That takes logits near the ends of float32, or a
    temperature near 0. Only rows that are +inf are read again; a GPU is asked whether there are any. p and q are the
    logits and the temperature of each side.
    """
    kl = kl.to(torch.float64)
    for rows in (kl == torch.inf).nonzero().split(ROWS_AT_ONCE):
        index = tuple(rows.unbind(-1)) if kl.ndim else ()
        x, y = (logits[index][..., : slices.width] for logits, _ in (p, q))
        finite = ~((x > -torch.inf) & (y == -torch.inf)).any(-1)
        if finite.any():
            p_rows, q_rows = read_rows(x, finite, None, p[1]), read_rows(y, finite, None, q[1])
            kl[index] = torch.where(finite, whole_kl_divergence(p_rows, q_rows), torch.inf)
    return torch.where(kl == torch.inf, kl, (kl / KL_UNIT).clamp(max=torch.finfo(torch.float32).max))


def student_of(slices: Slices, a: Any, used: Tensor, k: int) -> Side:
    """Return the student's side of this rank's slice."""
    if slices.width == 0:
        return _empty_side(slices, a.student_logits, used, k)
    shape = (*used.shape, min(k, slices.width))
    padding, nothing = (torch.full((), value, device=used.device).expand(shape) for value in (-1, 0.0))
    options = slices.options("student_temperature")
    *_, topk_ids, _, state = OPS._topk_forward_kl(a.student_logits, padding, nothing, used, **options)
    reference, mass = state.to(torch.float64).unbind(-1)
    greatest = logits_at(a.student_logits, topk_ids[..., :1], used)[..., 0].to(torch.float64)
    log_mass = mass.log() + (reference - greatest) / a.student_temperature
    return _side(slices, a.student_logits, used, k, topk_ids, log_mass)


def logits_of_ids(slices: Slices, logits: Tensor, ids: Tensor, used: Tensor) -> Tensor:
    """The logits of those ids `[..., c]` of the vocabulary that this slice holds; of others, something."""
    return logits_at(logits, local_ids(slices, ids), used)


def logits_at(logits: Tensor, ids: Tensor, used: Tensor) -> Tensor:
    """The logits of ids `[..., c]` of this slice; where a position is not used or an id below 0, something.

    A position that is not used gives its place to the first that is, so that its own logits are not read.
    """
    if logits.shape[-1] == 0 or ids.numel() == 0:
        return torch.zeros(ids.shape, device=ids.device)
    used = used.reshape(-1)
    position = torch.arange(used.numel(), device=used.device)
    position = torch.where(used, position, used.to(torch.uint8).argmax())
    # One index an axis: not all strides allow a view of [positions, V].
    axes = torch.unravel_index(position, logits.shape[:-1]) if logits.ndim > 1 else ()
    index = (*(axis[:, None] for axis in axes), ids.clamp(min=0).reshape(used.numel(), -1))
    return logits[index].view(ids.shape)


def _side(slices: Slices, logits: Tensor, used: Tensor, k: int, topk_ids: Tensor, log_mass: Tensor) -> Side:
    missing = max(slices.counts(k)) - topk_ids.shape[-1]
    topk_logits = logits_at(logits, topk_ids, used).to(log_mass.dtype)
    return Side(
        pad(topk_ids + slices.offset, (0, missing)),
        pad(topk_logits, (0, missing), value=-torch.inf),
        log_mass,
    )


def _empty_side(slices: Slices, logits: Tensor, used: Tensor, k: int) -> Side:
    no_ids = torch.zeros((*used.shape, 0), dtype=torch.int64, device=used.device)
    return _side(slices, logits, used, k, no_ids, torch.zeros(used.shape, device=used.device))
