"""What the losses take beside logits: candidates, advantages, log-probabilities of earlier, what a teacher sends."""

import numpy as np
import torch

import cases
import comparison
import gold
import gold_losses

TABLE = [(name, dtypes) for name, dtypes in cases.TABLE if dtypes in cases.SAME_DTYPES]  # where only the student counts

# How far log p has moved since the tokens were sampled: within the clips, beyond each of them, beyond the clamp.
MOVES = torch.tensor([0.02, 0.05, -0.1, 0.5, -0.5, 1.0, 2.0, -2.0, 25.0, -25.0])


def generator(seed):
    return torch.Generator().manual_seed(seed)


def logprobs(logits, temperature=1.0, vocab_size=None):
    """In float64."""
    rows = cases.as_float64(logits)[..., :vocab_size]
    return torch.from_numpy(np.apply_along_axis(gold.logprobs, -1, rows, temperature))


def candidates(student, m, vocab_size=None, seed=0):
    """Ids `[..., m]`: half of them the most probable, the others anywhere, some twice, some padding; and advantages."""
    rng = generator(seed)
    row = student[..., :vocab_size].float().nan_to_num()
    ids = torch.randint(row.shape[-1], (*row.shape[:-1], m), generator=rng)
    best = row.topk(min(-(-m // 2), row.shape[-1])).indices
    ids[..., : best.shape[-1]] = best
    advantages = torch.randn(ids.shape, generator=rng)
    if m > 4:
        ids[..., 1], ids[..., -1], ids[..., -2] = -1, ids[..., 0], -100
        advantages[..., 2], advantages[..., -2] = 0.0, torch.nan  # of padding: ignored
    return ids, advantages


def moved(student, ids, temperature=1.0, vocab_size=None, seed=0):
    """Log-probabilities of the candidates under a policy that sampled earlier."""
    old = logprobs(student, temperature, vocab_size).gather(-1, ids.clamp(min=0)).nan_to_num(0.0, 0.0, -50.0)
    return (old - MOVES[torch.randint(len(MOVES), ids.shape, generator=generator(seed))]).float()


def sent(teacher, k, temperature=1.0, vocab_size=None, with_padding=True):
    """What a teacher's server sends: its candidates and their log-probabilities, some of them padding."""
    order = np.apply_along_axis(gold.top, -1, cases.as_float64(teacher)[..., :vocab_size], k)
    ids = torch.from_numpy(order)
    log_q = logprobs(teacher, temperature, vocab_size).gather(-1, ids).float()
    if with_padding and k > 4:
        ids[..., -2], log_q[..., -2] = -1, torch.nan  # of padding: ignored
    return ids, log_q


def example(op, shape=(2, 6), width=70, m=8, seed=0, dtype=torch.float32):
    """The arguments of an ordinary call by their names, with every tensor that may be given."""
    rng = generator(seed)
    student = (torch.randn(*shape, width, generator=rng) * 2).to(dtype)
    teacher = (student + torch.randn(student.shape, generator=rng)).to(dtype)
    mask = torch.rand(shape, generator=rng) < 0.8
    if op == "reverse_kl":
        weight = torch.rand(shape, generator=rng) + 0.5
        return {"student_logits": student, "teacher_logits": teacher, "mask": mask, "weight": weight}
    if op == "topk_forward_kl":
        ids, log_q = sent(teacher, m) if student.numel() else (torch.zeros(*shape, m).long(), torch.zeros(*shape, m))
        return {"student_logits": student, "teacher_topk_ids": ids, "teacher_topk_logprobs": log_q, "mask": mask}
    ids = torch.randint(width, (*shape, m), generator=rng)
    advantages = torch.randn(*shape, m, generator=rng)
    old = torch.randn(*shape, m, generator=rng) - 4
    return {"student_logits": student, "topk_ids": ids, "advantages": advantages, "mask": mask, "old_logprobs": old}


EAGER = {
    "topk_policy_loss": comparison.eager_topk_policy_loss,
    "reverse_kl": comparison.eager_reverse_kl,
    "topk_forward_kl": comparison.eager_topk_forward_kl,
}


def answers(op, upstream, *args, **kwargs):
    """The gold's answer to a call, and eager's; the mask is given by its name."""
    arrays = [cases.as_float64(x) for x in (upstream, *args)]
    named = {name: cases.as_float64(x) if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
    return getattr(gold_losses, op)(*arrays, **named), comparison.eager_loss(EAGER[op], upstream, *args, **kwargs)


def check(impl, op, upstream, *args, **kwargs):
    comparison.check_loss(impl.loss(op, upstream, *args, **kwargs), *answers(op, upstream, *args, **kwargs))
