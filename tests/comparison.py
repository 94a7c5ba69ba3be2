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


def check(result, gold, eager, least_size=0.0):
    """Holds every field of `result` to `gold`, all floats with `err <= 2 * err(eager) + 2 * eps * max|gold|`.

    `least_size=1` where anything may come up: eps in a log-probability is a relative eps in the probability, and no
    more is promised of a log-probability near 0, though eager may be lucky there.
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
            check_within_budget(
                name, got.numpy(), expected, eager[name].numpy(), max(least_size, size(name, gold, eager))
            )


def size(name, gold, eager):
    """What stands for `max|gold|`. Of a difference it is the largest of what is subtracted: no float32 is closer."""
    if name in ("reverse_kl", "forward_kl"):  # the cross entropy less the entropy
        return greatest(gold[name] + gold["student_entropy" if name == "reverse_kl" else "teacher_entropy"])
    if name == "rewards":
        return max(greatest(gold[name]), greatest(eager["terms_of_rewards"].numpy()))
    return greatest(gold[name])


def greatest(array):
    return np.abs(array[np.isfinite(array)]).max(initial=0.0)


def check_within_budget(name, got, gold, eager, size):
    with np.errstate(over="ignore"):
        gold32 = gold.astype(np.float32)
    finite = np.isfinite(gold32)
    np.testing.assert_array_equal(np.where(finite, 0, got), np.where(finite, 0, gold32), err_msg=f"{name}: not finite")
    if not finite.any():
        return
    got, gold, eager = (x[finite].astype(np.float64) for x in (got, gold, eager))
    with np.errstate(invalid="ignore", over="ignore"):
        eager_error = greatest(eager - gold)
    budget = 2 * eager_error + 2 * EPS * size + EPS**2  # the last: an entropy of 1e-27 has no digits to lose
    errors = np.where(np.isfinite(got), np.abs(got - gold), np.inf)
    worst = errors.argmax()
    assert errors[worst] <= budget, (
        f"{name}: error {errors[worst]:.3g}, budget {budget:.3g} (eager {eager_error:.3g}, size {size:.3g}); "
        f"got {got[worst]!r} for {gold[worst]!r}"
    )


def same_bits(a, b):
    """Whether two results agree bit for bit, NaN included."""
    return all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True)
    )


def bits(tensor):
    return tensor.contiguous().view(torch.int32) if tensor.dtype == torch.float32 else tensor


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
