from types import SimpleNamespace

import numpy as np
import torch

import bad_input
import reliability
import reverse_kl
import token_stats
from comparison import eager_logprobs
from gold import Sizes, by_logits_of, is_broken, logprobs, nucleus, put_gradient, validity

COMMON = {"w_drop": 0.2, "threshold": 0.5, "top_p": 0.83}
VARIANTS = [
    COMMON | {"loss": "topk_policy", "entropies": True, "reward_weight": "student", "weight": None},
    COMMON | {"loss": "reverse_kl", "metric": "top_p", "reward_weight": "teacher"},
    COMMON | {"loss": "topk_policy", "reward_weight": "none"},
    COMMON | {"loss": "reverse_kl", "entropies": True, "w_base": 0.0, "weight": None},
]
EXAMPLE = {"entropies": True, "w_drop": 0.1}
RANDOM = reliability.RANDOM | {"loss": ["topk_policy", "reverse_kl"], "entropies": [False, True]}
FINITE_DIFFERENCES = {"loss": "reverse_kl"}  # they would also see how rewards depend on the logits
tensors = reverse_kl.tensors


def gold(into, a):
    shape = a.student_logits.shape[:-1]
    valid = validity(a.mask, shape)
    scores, sizes_of_scores = reliability.gold(a)
    stats, sizes = token_stats.gold(a)
    accepted = np.zeros(shape, bool)
    for n in np.ndindex(shape if a.token_ids is not None else 0):
        broken = any(is_broken(x[n][: a.vocab_size]) for x in (a.student_logits, a.teacher_logits))
        if valid[n] and not broken:
            ids = nucleus(stats["teacher_topk_ids"][n], stats["teacher_topk_logprobs"][n], a.top_p)
            accepted[n] = a.token_ids[n] in ids
    if a.loss == "reverse_kl":
        weighted = SimpleNamespace(**vars(a) | {"weight": reliability.weight_of(scores, a)})
        of_loss, sizes_of_loss = reverse_kl.gold(into, weighted)
    else:
        of_loss, sizes_of_loss = policy(into, a, scores, sizes_of_scores["magnitudes"])
    floats = {name: np.where(on, stats[name], 0.0) for name, on in computed(a).items()}
    values = {"loss": of_loss["loss"], **scores, "accepted": accepted, **floats, "gradient": of_loss["gradient"]}
    return values, sizes_of_scores | {"reverse_kl": sizes["reverse_kl"]} | sizes_of_loss


def computed(a):
    """Which of the sums over all ids are asked for."""
    asked = torch.tensor([a.entropies, a.entropies, a.entropies or a.loss == "reverse_kl"])
    return dict(zip(("student_entropy", "teacher_entropy", "reverse_kl"), asked, strict=True))


def policy(into, a, scores, magnitudes):
    """The rewards are the advantages, after they have been rounded; every ratio is 1."""
    with np.errstate(over="ignore", invalid="ignore"):
        advantages = scores["rewards"].astype(np.float32).astype(np.float64)
        loss, gradient, sizes = -advantages.sum(-1), np.zeros(a.student_logits.shape), Sizes("loss", "gradient")
    for n in np.ndindex(loss.shape):
        if (advantages[n] != 0).any() or magnitudes[n].any():
            log_p = logprobs(a.student_logits[n][: a.vocab_size].astype(np.float64), a.student_temperature)
            sizes.put("loss", magnitudes[n].sum())
            by_logits = by_logits_of(log_p, scores["topk_ids"][n], -advantages[n], magnitudes[n])
            put_gradient(gradient[n], sizes, loss[n], *by_logits, into["loss"][n] / a.student_temperature)
    return {"loss": loss, "gradient": gradient}, sizes.of


def eager(gold, a):
    stats = token_stats.eager_sums(a)
    rewards = reliability.eager(gold, a)["rewards"]
    if a.loss == "reverse_kl":
        weight = torch.as_tensor(reliability.weight_of(gold, a)).float()
        loss = reverse_kl.eager(gold, SimpleNamespace(**vars(a) | {"weight": weight}))["loss"]
    else:
        log_p = eager_logprobs(a.student_logits, a.student_temperature, a.vocab_size)
        log_p = log_p.gather(-1, torch.from_numpy(gold["topk_ids"]))
        loss = -torch.where(rewards == 0, 0.0, rewards * (log_p - log_p.detach()).exp()).sum(-1)
    stats = {name: torch.where(on, stats[name], 0.0) for name, on in computed(a).items()}
    return {"loss": loss, "rewards": rewards} | stats


READ_BACKWARDS = ["student_logits"]  # by the backward pass
FLOAT32 = reliability.FLOAT32
BASE = reliability.BASE


def bad():
    yield from reliability.bad()
    yield from bad_input.floats("weight", (2, 8), (2, 7), (2, 8, 1), dtype=torch.bool)
    yield {"loss": "topk_forward_kl"}, "loss must be one of 'topk_policy', 'reverse_kl', got 'topk_forward_kl'"
