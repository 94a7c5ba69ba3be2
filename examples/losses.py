"""Write five losses of on-policy distillation, each in a few lines on `selected_logprobs`.

    python examples/losses.py

Every function takes the student's logits `[..., V]` and returns a loss per position, differentiable in them. None
allocates another tensor of that size, except for the gradient.
"""

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from pruneopd_kernels import selected_logprobs, token_stats

ALMOST_ONE = 1 - 2**-24  # the largest float32 below 1


def with_tail(logprobs: Tensor) -> Tensor:
    """Append the log-probability of everything outside the candidates."""
    mass = logprobs.exp().sum(-1, keepdim=True).clamp(max=ALMOST_ONE)
    return torch.cat([logprobs, torch.log1p(-mass)], -1)


def topk_kl_with_tail(student_logits: Tensor, teacher_ids: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """KL(teacher || student) over the teacher's top-k and one bucket for the rest."""
    log_p = with_tail(selected_logprobs(student_logits, teacher_ids).logprobs)
    return kl_div(log_p, with_tail(teacher_logprobs), reduction="none", log_target=True).sum(-1)


def reverse_kl_on_own_candidates(student_logits: Tensor, student_ids: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """KL(student || teacher) over the student's own top-k, where the teacher gives these log-probabilities."""
    log_p = selected_logprobs(student_logits, student_ids).logprobs
    return (log_p.exp() * (log_p - teacher_logprobs)).sum(-1)


def jsd_over_candidates(student_logits: Tensor, ids: Tensor, teacher_logprobs: Tensor, beta: float = 0.5) -> Tensor:
    """Jensen-Shannon divergence of both distributions, renormalised over the candidates."""
    log_p = selected_logprobs(student_logits, ids).logprobs.log_softmax(-1)
    log_q = teacher_logprobs.log_softmax(-1)
    log_m = torch.logaddexp(log_q + torch.tensor(beta).log(), log_p + torch.tensor(1 - beta).log())
    of_teacher = kl_div(log_m, log_q, reduction="none", log_target=True)
    of_student = kl_div(log_m, log_p, reduction="none", log_target=True)
    return (beta * of_teacher + (1 - beta) * of_student).sum(-1)


def clipped_forward_kl(student_logits: Tensor, ids: Tensor, teacher_logprobs: Tensor, most: float = 0.5) -> Tensor:
    """KL(teacher || student) over candidates, where no single entry adds more than `most`."""
    log_p = selected_logprobs(student_logits, ids).logprobs
    return kl_div(log_p, teacher_logprobs, reduction="none", log_target=True).clamp(max=most).sum(-1)


def sampled_policy_gradient(
    student_logits: Tensor, token_ids: Tensor, teacher_logprobs: Tensor, entropy_bonus: float = 0.01
) -> Tensor:
    """Policy gradient of the sampled token with reward log q - log p, and a bonus for the entropy."""
    out = selected_logprobs(student_logits, token_ids[..., None])
    log_p = out.logprobs[..., 0]
    reward = teacher_logprobs - log_p.detach()
    return -reward * log_p - entropy_bonus * out.entropy


def main() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(2, 8, 151936) * 3
    student = (teacher + torch.randn_like(teacher)).requires_grad_()
    tokens = torch.distributions.Categorical(logits=student.detach()).sample()
    stats = token_stats(student.detach(), teacher, token_ids=tokens)
    arguments = {
        topk_kl_with_tail: (stats.teacher_topk_ids, stats.teacher_topk_logprobs),
        reverse_kl_on_own_candidates: (stats.student_topk_ids, stats.teacher_on_student_logprobs),
        jsd_over_candidates: (stats.teacher_topk_ids, stats.teacher_topk_logprobs),
        clipped_forward_kl: (stats.teacher_topk_ids, stats.teacher_topk_logprobs),
        sampled_policy_gradient: (tokens, stats.teacher_token_logprob),
    }
    for loss, given in arguments.items():
        value = loss(student, *given).mean()
        (gradient,) = torch.autograd.grad(value, student)
        print(f"{loss.__name__:30} loss {value.item():8.4f}   gradient norm {gradient.norm().item():.4f}")


if __name__ == "__main__":
    main()
