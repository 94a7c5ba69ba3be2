"""How a result is held to the gold of gold.py: what is exact, exactly; every other float within its error budget."""

import numpy as np
import torch

EPS = float(np.finfo(np.float32).eps)

DTYPES = {
    "drift": torch.bool,
    "drift_count": torch.int32,
    "effective_length": torch.int32,
    "topk_ids": torch.int64,
    "student_topk_ids": torch.int64,
    "teacher_topk_ids": torch.int64,
}
EXACT = {*DTYPES, "overlap", "reliability", "weight"}


def check(result, gold, eager, least_size=0.0, sizes=None):
    """Holds every field of `result` to `gold`, all floats with `err <= 2 * err(eager) + 2 * eps * max|gold|`.

    `least_size=1` where anything may come up: eps in a log-probability is a relative eps in the probability, and no
    more is promised of a log-probability near 0, though eager may be lucky there. `sizes`, where the gold gives them,
    stand for `max|gold|`.
    """
    assert list(result._fields) == list(gold)
    for name, expected in gold.items():
        got = getattr(result, name)
        assert got.dtype == DTYPES.get(name, torch.float32), name
        assert tuple(got.shape) == expected.shape, name
        if name in EXACT:
            expected = expected.astype(np.float32) if got.dtype == torch.float32 else expected
            np.testing.assert_array_equal(got.numpy(), expected, err_msg=name, strict=False)
        else:
            of_field = size(name, gold, eager) if sizes is None else sizes[name]
            check_within_budget(name, got.numpy(), expected, eager[name].numpy(), max(least_size, of_field))


def check_loss(result, answer, eager):
    """Holds outputs and gradient of a loss to the answer of gold_losses.py; `result`, `eager`: `(outputs, gradient)`.

    The gradient is float32 or better until it is rounded, once, to the dtype of the logits.
    """
    (outputs, gradient), (eager_outputs, eager_gradient) = result, eager
    check(outputs, answer.outputs, eager_outputs, sizes=answer.sizes)
    assert gradient.shape == answer.gradient.shape
    assert eager_gradient.dtype == torch.float32
    rounding = 0.0
    if gradient.dtype != torch.float32:
        about = torch.finfo(gradient.dtype)
        rounding = np.abs(answer.gradient) * about.eps / 2 + about.smallest_normal * about.eps / 2
    expected = torch.from_numpy(answer.gradient).to(gradient.dtype)
    check_within_budget(
        "gradient", gradient.double().numpy(), answer.gradient, eager_gradient.numpy(), answer.sizes["gradient"],
        rounding, rounded=expected.double().numpy(),
    )  # fmt: skip


def size(name, gold, eager):
    """What stands for `max|gold|`. Of a difference it is the largest of what is subtracted: no float32 is closer."""
    if name in ("reverse_kl", "forward_kl"):  # the cross entropy less the entropy
        return greatest(gold[name] + gold["student_entropy" if name == "reverse_kl" else "teacher_entropy"])
    if name == "rewards":
        return max(greatest(gold[name]), greatest(eager["terms_of_rewards"].numpy()))
    return greatest(gold[name])


def greatest(array):
    return np.abs(array[np.isfinite(array)]).max(initial=0.0)


def check_within_budget(name, got, gold, eager, size, rounding=0.0, rounded=None):
    """`rounding`: what one more rounding may add to each error; `rounded`: the gold after it, else in float32."""
    if rounded is None:
        with np.errstate(over="ignore"):
            rounded = gold.astype(np.float32)
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(np.where(finite, 0, got), np.where(finite, 0, rounded), err_msg=f"{name}: not finite")
    if not finite.any():
        return
    rounding = np.broadcast_to(rounding, gold.shape)[finite]
    got, gold, eager = (x[finite].astype(np.float64) for x in (got, gold, eager))
    with np.errstate(invalid="ignore", over="ignore"):
        eager_error = greatest(eager - gold)
    budget = 2 * eager_error + 2 * EPS * size + EPS**2  # the last: an entropy of 1e-27 has no digits to lose
    errors = np.where(np.isfinite(got), np.abs(got - gold), np.inf)
    worst = (errors - rounding).argmax()
    assert errors[worst] <= budget + rounding[worst], (
        f"{name}: error {errors[worst]:.3g}, budget {budget:.3g} (eager {eager_error:.3g}, size {size:.3g}) and "
        f"{rounding[worst]:.3g} for rounding; got {got[worst]!r} for {gold[worst]!r}"
    )


def same_bits(a, b):
    """Whether two results agree bit for bit, NaN included."""
    return all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True)
    )


def bits(tensor):
    if not tensor.is_floating_point():
        return tensor
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def differing(a, b):
    """The names of the fields in which two results do not agree bit for bit: empty, one hopes."""
    return [name for name in a._fields if not same_bits([getattr(a, name)], [getattr(b, name)])]


# --- what one would write in PyTorch today, in float32 -------------------------------------------------------------


def eager_token_stats(
    student_logits,
    teacher_logits,
    gold,
    token_ids=None,
    student_temperature=1.0,
    teacher_temperature=1.0,
    vocab_size=None,
    **_,
):
    """The float fields of token_stats, at the candidates that `gold` names. Masked positions are computed too."""
    vocab_size = vocab_size or student_logits.shape[-1]
    student = student_logits[..., :vocab_size].float() / student_temperature
    teacher = teacher_logits[..., :vocab_size].float() / teacher_temperature
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    s, t = torch.from_numpy(gold["student_topk_ids"]), torch.from_numpy(gold["teacher_topk_ids"])
    out = {
        "student_topk_logprobs": log_p.gather(-1, s),
        "teacher_topk_logprobs": log_q.gather(-1, t),
        "teacher_on_student_logprobs": log_q.gather(-1, s),
        "student_on_teacher_logprobs": log_p.gather(-1, t),
        "student_lse": student.logsumexp(-1),
        "teacher_lse": teacher.logsumexp(-1),
        "student_entropy": eager_sum(log_p, -log_p),
        "teacher_entropy": eager_sum(log_q, -log_q),
        "reverse_kl": eager_sum(log_p, log_p - log_q),
        "forward_kl": eager_sum(log_q, log_q - log_p),
    }
    token = torch.zeros(s.shape[:-1], dtype=torch.int64) if token_ids is None else token_ids.long()
    token = token.clamp(0, vocab_size - 1)[..., None]
    out["student_token_logprob"] = log_p.gather(-1, token)[..., 0]
    out["teacher_token_logprob"] = log_q.gather(-1, token)[..., 0]
    return out


def eager_sum(logprob, of):
    p = logprob.exp()
    return torch.where(p > 0, p * of, 0.0).sum(-1)


def eager_rewards(
    student_logits,
    teacher_logits,
    gold,
    reward_weight="student",
    student_temperature=1.0,
    teacher_temperature=1.0,
    vocab_size=None,
    **_,
):
    vocab_size = vocab_size or student_logits.shape[-1]
    log_p = (student_logits[..., :vocab_size].float() / student_temperature).log_softmax(-1)
    log_q = (teacher_logits[..., :vocab_size].float() / teacher_temperature).log_softmax(-1)
    ids = torch.from_numpy(gold["topk_ids"])
    log_p, log_q = log_p.gather(-1, ids), log_q.gather(-1, ids)
    w = {"student": log_p.softmax(-1), "teacher": log_q.softmax(-1), "none": torch.tensor(1 / ids.shape[-1])}
    weight = torch.from_numpy(gold["weight"]).float()[..., None]
    weight = weight * w[reward_weight]
    return {"rewards": weight * (log_q - log_p), "terms_of_rewards": weight * torch.stack([log_p, log_q])}


def eager_loss(formula, upstream, student_logits, *args, mask=None, vocab_size=None, **kwargs):
    """`(outputs, gradient)` of a formula below in float32, where the mask is set."""
    logits = student_logits.detach().float().requires_grad_()
    args, kwargs = map(as_float32, args), {name: as_float32(value) for name, value in kwargs.items()}
    outputs = formula(logits[..., :vocab_size], *args, **kwargs)
    if mask is not None:
        outputs = {name: torch.where(mask != 0, x, 0.0) for name, x in outputs.items()}
    (gradient,) = torch.autograd.grad(outputs["loss"], logits, upstream)
    return {name: x.detach() for name, x in outputs.items()}, gradient


def as_float32(value):
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def candidate_logprobs(logits, ids, temperature):
    return (logits / temperature).log_softmax(-1).gather(-1, ids.clamp(min=0).long())


def eager_topk_policy_loss(
    logits, topk_ids, advantages, old_logprobs=None, clip_low=0.2, clip_high=0.2, clip_dual=3.0, student_temperature=1.0
):
    """As in PPO."""
    logprobs = candidate_logprobs(logits, topk_ids, student_temperature)
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    ratio = (logprobs - old).clamp(-20, 20).exp()
    terms = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    terms = torch.where(advantages < 0, torch.minimum(terms, -advantages * clip_dual), terms)
    counts = (topk_ids >= 0) & (advantages != 0) & (logprobs != -torch.inf)
    return {"loss": torch.where(counts, terms, 0.0).sum(-1)}


def eager_reverse_kl(logits, teacher_logits, weight=None, student_temperature=1.0, teacher_temperature=1.0):
    log_p = (logits / student_temperature).log_softmax(-1)
    log_q = (teacher_logits[..., : logits.shape[-1]] / teacher_temperature).log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return {"loss": kl if weight is None else weight * kl}


def eager_topk_forward_kl(logits, teacher_topk_ids, teacher_topk_logprobs, logprob_min=None, student_temperature=1.0):
    given = teacher_topk_ids >= 0
    log_p = candidate_logprobs(logits, teacher_topk_ids, student_temperature)
    log_q = torch.where(given, teacher_topk_logprobs, -torch.inf)
    student_mass, teacher_mass = (torch.where(given, x.exp(), 0.0).sum(-1) for x in (log_p, log_q))
    if logprob_min is not None:
        log_p, log_q = log_p.clamp(min=logprob_min), log_q.clamp(min=logprob_min)
    terms = torch.where(given & (log_q > -torch.inf), log_q.exp() * (log_q - log_p), 0.0)
    top = logits.sort(dim=-1, descending=True, stable=True).indices[..., : teacher_topk_ids.shape[-1]]
    shared = (teacher_topk_ids[..., :, None] == top[..., None, :]).any(-1)
    advantage = torch.where(shared, -terms, 0.0).sum(-1) / shared.sum(-1).clamp(min=1)
    return {
        "loss": terms.sum(-1),
        "student_mass": student_mass,
        "teacher_mass": teacher_mass,
        "overlap_token_advantage": advantage,
    }
