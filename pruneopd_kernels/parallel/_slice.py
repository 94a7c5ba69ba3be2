"""What one rank computes from its slice, with the passes over whole rows."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..dispatch import implementations
from ..formulas import float_type, kl_divergence, read_rows
from ..ops import token_stats
from ._agreement import Slices
from ._exchange import Side
from ._rows import local_ids

ROWS_AT_ONCE = 16


def own(slices: Slices, logits: Tensor) -> Tensor:
    """Return this rank's logits of ids that exist; of none, one of -inf, which is no candidate and has no mass."""
    logits = logits.detach()[..., : slices.width]
    return logits if slices.width else logits.new_full((*logits.shape[:-1], 1), -torch.inf)


def side_of(slices: Slices, x: Tensor, used: Tensor, k: int, temperature: float, entropy: bool) -> Side:
    """Return one model's side, from one read."""
    no_ids, width = torch.full((*used.shape, 1), -1, device=used.device), x.shape[-1]
    options = {"k": min(k, width), "entropy": entropy, "temperature": temperature, "vocab_size": width}
    row = implementations.run_pass(slices.impl, "row_stats", x, no_ids, used, **options)
    reference, mass, mean = row.state.unbind(-1)
    greatest = logits_at(x, row.topk_ids[..., :1], used)[..., 0].to(torch.float64)
    log_mass = mass.log() + (reference - greatest) / temperature
    return _side(slices, x, used, k, row.topk_ids, log_mass, mass.log() - mean if entropy else None)


def pair_of(
    slices: Slices, x: Tensor, y: Tensor, used: Tensor, k: int, temperatures: tuple[float, float], divergences: bool
) -> tuple[Side, Side]:
    """Return the student's side and the teacher's, from one read; on request with entropies and divergences."""
    if divergences:
        both: dict[str, Any] = dict(zip(("student_temperature", "teacher_temperature"), temperatures, strict=True))
        stats = token_stats(x, y, used, k=min(k, x.shape[-1]), impl=slices.impl, **both)
        # The log-probability of the greatest tells the mass without a log-sum-exp, which is as large as the logits.
        of_student, of_teacher = -stats.student_topk_logprobs[..., 0], -stats.teacher_topk_logprobs[..., 0]
        student = _side(slices, x, used, k, stats.student_topk_ids, of_student, stats.student_entropy)
        teacher = _side(slices, y, used, k, stats.teacher_topk_ids, of_teacher, stats.teacher_entropy)
        student = student._replace(divergence=_exact(stats.reverse_kl, x, y, *temperatures))
        teacher = teacher._replace(divergence=_exact(stats.forward_kl, y, x, *reversed(temperatures)))
    else:
        student = side_of(slices, x, used, k, temperatures[0], entropy=False)
        teacher = side_of(slices, y, used, k, temperatures[1], entropy=False)
    return student._replace(others=logits_of_ids(slices, y, student.topk_ids, used)), teacher


def _exact(kl: Tensor, x: Tensor, y: Tensor, of_x: float, of_y: float) -> Tensor:
    """Return KL(p || q) of this slice in float64: +inf if an id has log q = -inf < log p, and only then.

    `token_stats` also returns +inf for a finite KL beyond float32, so rows that are +inf are read again. That takes
    logits near the ends of float32, or a temperature near 0. A GPU is asked whether there are such rows.
    """
    kl = kl.to(torch.float64)
    for rows in (kl == torch.inf).nonzero().split(ROWS_AT_ONCE):
        index = tuple(rows.unbind(-1)) if kl.ndim else ()
        used = torch.ones_like(kl[index], dtype=torch.bool)
        kl[index] = kl_divergence(read_rows(x[index], used, None, of_x), read_rows(y[index], used, None, of_y))
    return kl


def logits_of_ids(slices: Slices, x: Tensor, ids: Tensor, used: Tensor) -> Tensor:
    """Return the logits of those ids `[..., c]` of the vocabulary that this slice holds; of others, something."""
    return logits_at(x, local_ids(slices, ids), used)


def logits_at(x: Tensor, ids: Tensor, used: Tensor) -> Tensor:
    """Return the logits of ids `[..., c]` of this slice; where a position is not used or no id, something.

    A position that is not used gives its place to the first that is, so that its own logits are not read.
    """
    if ids.numel() == 0:
        return torch.zeros(ids.shape, dtype=float_type(x), device=ids.device)
    used = used.reshape(-1)
    position = torch.arange(used.numel(), device=used.device)
    position = torch.where(used, position, used.to(torch.uint8).argmax())
    # One index an axis: not all strides allow a view of [positions, V].
    axes = torch.unravel_index(position, x.shape[:-1]) if x.ndim > 1 else ()
    index = (*(axis[:, None] for axis in axes), ids.clamp(0, x.shape[-1] - 1).reshape(used.numel(), -1))
    return x[index].view(ids.shape).to(float_type(x))


def _side(
    slices: Slices, x: Tensor, used: Tensor, k: int, topk_ids: Tensor, log_mass: Tensor, entropy: Tensor | None
) -> Side:
    missing = max(slices.counts(k)) - topk_ids.shape[-1]
    topk_logits = logits_at(x, topk_ids, used)
    return Side(
        pad(topk_ids + slices.offset, (0, missing)), pad(topk_logits, (0, missing), value=-torch.inf), log_mass, entropy
    )
