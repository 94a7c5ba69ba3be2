"""The losses and their backward passes as Triton kernels, in the interpreter, against the definition in float64.

The interpreter takes its time, so the table runs in one dtype after the other, and its many widths for one of the
losses each. With a GPU all of the tests of every implementation run these kernels compiled.
"""

import pytest
import torch

import cases
import comparison
from interpreted import INTERPRETED
from pruneopd_kernels.reference import _saving
from pruneopd_kernels.reference._losses import StudentRows, candidate_logprobs
from pruneopd_kernels.reference._rows import valid_positions
from pruneopd_kernels.reference.reverse_kl import divergence
from pruneopd_kernels.reference.reverse_kl import used_positions as weighted_positions
from pruneopd_kernels.reference.topk_forward_kl import forward_terms, measures_of
from pruneopd_kernels.reference.topk_policy_loss import policy_terms, used_positions

INF, NAN = cases.INF, cases.NAN
BF16, F16, F32 = cases.BF16, cases.F16, cases.F32

OUTPUTS = {
    "topk_policy_loss": ["loss", "coefficients", "state"],
    "reverse_kl": ["loss", "state"],
    "topk_forward_kl": [
        *["loss", "student_mass", "teacher_mass", "overlap", "overlap_token_advantage", "student_topk_ids"],
        *["coefficients", "state"],
    ],
}
DEFAULTS = {
    "topk_policy_loss": {"mask": None, "old_logprobs": None, "clip_low": 0.2, "clip_high": 0.2, "clip_dual": 3.0},
    "reverse_kl": {"mask": None, "weight": None, "teacher_temperature": 1.0},
    "topk_forward_kl": {"mask": None, "logprob_min": None},
}


# --- the definition in float64, and what one would write in PyTorch in float32 -------------------------------------


def used_by(loss, x):
    if loss == "topk_policy_loss":
        return used_positions(x["topk_ids"], x["advantages"], x["mask"])
    if loss == "reverse_kl":
        return weighted_positions(x["student_logits"], x["mask"], x["weight"])
    return valid_positions(x["mask"], x["student_logits"], x["student_logits"].shape[:-1])


def eager_rows(logits, used, size, temperature):
    x = torch.where(used[..., None], logits[..., :size].float(), 0.0)
    broken = (x.isnan() | (x == INF)).any(-1) | ~x.isfinite().any(-1)
    return StudentRows(x, (x / temperature).log_softmax(-1), broken)


def eager(loss, x, scale):
    """Float outputs by name and the gradient of sum(scale * loss), in float32 by autograd; sizes of some (budgets)."""
    used, size = used_by(loss, x), x["vocab_size"] or x["student_logits"].shape[-1]
    logits = x["student_logits"].detach().clone().requires_grad_()
    rows = eager_rows(logits, used, size, x["student_temperature"])
    outputs, sizes = {"logprobs": rows.logprobs}, {}
    if loss == "topk_policy_loss":
        logprobs = candidate_logprobs(rows.logprobs, x["topk_ids"])
        clips = [x[name] for name in ("clip_low", "clip_high", "clip_dual")]
        terms, outputs["coefficients"] = policy_terms(
            logprobs, x["topk_ids"], x["advantages"], x["old_logprobs"], *clips
        )
        total = torch.where(used, terms.sum(-1), 0.0)
    elif loss == "reverse_kl":
        teacher = eager_rows(x["teacher_logits"], used, size, x["teacher_temperature"])
        weight = 1.0 if x["weight"] is None else x["weight"]
        kl = divergence(rows, teacher)
        total = torch.where(used, weight * kl, 0.0)
        outputs["excess"] = rows.logprobs - teacher.logprobs - kl[..., None]
        # No difference is closer than what it is of.
        p = rows.logprobs.exp() / x["student_temperature"]
        sizes["excess"] = rows.logprobs.abs() + teacher.logprobs.abs()
        sizes["gradient"] = torch.where(p == 0, 0.0, p * sizes["excess"]) * (scale * weight)[..., None]
        sizes["loss"] = torch.where(p == 0, 0.0, rows.logprobs.exp() * teacher.logprobs).sum(-1) * weight
    else:
        parts = forward_terms(rows, x["teacher_topk_ids"], x["teacher_topk_logprobs"], x["logprob_min"])
        outputs.update(measures_of(rows, parts, x["teacher_topk_ids"], used)._asdict())
        outputs["coefficients"] = parts.derivatives
        total = torch.where(used, parts.terms.sum(-1), 0.0)
    (total * scale).nan_to_num().sum().backward()
    outputs |= {name: torch.where(used[..., None], x, 0.0) for name, x in outputs.items() if x.dim() > used.dim()}
    outputs |= {"loss": total, "gradient": logits.grad}
    sizes = {name: comparison.greatest(size[used].detach().numpy()) for name, size in sizes.items()}
    return {name: value.detach() for name, value in outputs.items()}, sizes


def both_passes(run, loss, x, scale):
    """Outputs by name with the gradient, of `_saving` or of the kernels: run(op, **arguments)."""
    outputs = dict(zip(OUTPUTS[loss], run(loss, **x), strict=True))
    more = {name: outputs[name] for name in ("state", "coefficients") if name in outputs}
    names = ["student_logits", "teacher_logits", "student_temperature", "teacher_temperature", "vocab_size"]
    more |= {name: x[name] for name in names if name in x}
    if loss == "reverse_kl":
        weight = 1.0 if x["weight"] is None else x["weight"].to(scale.dtype)
        scale = torch.where(used_by(loss, x), scale * weight, 0.0)
        (outputs["gradient"],) = run("reverse_kl_backward", scale=scale, **more)
    else:
        ids = x["topk_ids" if loss == "topk_policy_loss" else "teacher_topk_ids"]
        (outputs["gradient"],) = run("logprobs_backward", scale=scale, topk_ids=ids, **more)
    return outputs


def interpreted(op, **arguments):
    return getattr(INTERPRETED, op)(**arguments)


def defined(op, **arguments):
    logits = {name: x.double() for name, x in arguments.items() if name.endswith("_logits")}
    outputs = getattr(_saving, op)(**arguments | logits)
    if op in OUTPUTS:  # a loss beyond float32 is not finite
        spoilt = ~outputs[0].float().isfinite()
        if op == "reverse_kl":
            outputs[-1][spoilt, -1] = NAN
        else:
            outputs[-2][spoilt] = NAN
    return outputs


def said_by_state(state, x, used):
    """What a state says of every id; that is what it is for: log p, and for `reverse_kl` log p - log q - KL."""
    said = {}
    state = torch.where(used[..., None], state.double(), torch.tensor([0.0, 1.0, 0.0, 0.0])[: state.shape[-1]])
    distances = [
        (torch.where(used[..., None], logits[..., : x["vocab_size"]].double(), 0.0) - reference[..., None])
        / temperature
        for logits, temperature, reference in [
            (x["student_logits"], x["student_temperature"], state[..., 0]),
            *([(x["teacher_logits"], x["teacher_temperature"], state[..., 2])] if "teacher_logits" in x else []),
        ]
    ]
    said["logprobs"] = distances[0] - state[..., 1:2].log()
    if len(distances) == 2:
        p_is_0 = (distances[0] == -INF) & ~state[..., 3:].isnan()
        said["excess"] = torch.where(p_is_0, 0.0, distances[0] - distances[1] - state[..., 3:])
    return said


def check(loss, scale=None, **arguments):
    """Both passes of the kernels within the error budget of the definition, and exact where that is."""
    x = {"student_temperature": 1.0, "vocab_size": None, **DEFAULTS[loss], **arguments}
    logits, used = x["student_logits"], used_by(loss, x)
    if scale is None:
        scale = cases.randn(*used.shape, seed=11, scale=1.0)
    gold, got = both_passes(defined, loss, x, scale.double()), both_passes(interpreted, loss, x, scale)
    usual, sizes = eager(loss, x, scale)
    assert all(got[name].shape == gold[name].shape for name in gold)
    assert got["gradient"].dtype == logits.dtype
    for name in set(gold) & {"student_topk_ids", "overlap"}:
        assert got[name].dtype == gold[name].dtype and torch.equal(got[name], gold[name]), name
        del gold[name]
    state = got["state"]
    assert state.dtype == F32 and (state[~used] == 0).all()
    gold |= said_by_state(gold.pop("state"), x, used)
    got |= {name: values.float() for name, values in said_by_state(state, x, used).items()}
    for name, expected in gold.items():
        assert got[name].dtype == F32 or name == "gradient", name
        size = comparison.greatest(expected.numpy())
        numbers = [values.double().numpy() for values in (got[name], expected, usual[name])]
        comparison.check_within_budget(name, *numbers, max(size, sizes.get(name, 0.0)))
    check_what_is_zero(got["gradient"], logits[..., : x["vocab_size"]], used, got["loss"].isfinite(), scale)
    return got


def check_what_is_zero(gradient, logits, used, finite, scale):
    """And what is NaN."""
    inside, beyond = gradient[..., : logits.shape[-1]], gradient[..., logits.shape[-1] :]
    assert (beyond == 0).all() and (gradient[~used] == 0).all()
    assert (inside[(logits == -INF) & (used & finite)[..., None]] == 0).all()
    assert inside[used & ~finite & (scale != 0)].isnan().all()


# --- the table -------------------------------------------------------------------------------------------------------


def arguments_of(loss, name, dtypes):
    """A case with one position masked, and what is in its rows NaN."""
    student, teacher, options = cases.make(name, dtypes)
    student, teacher = student.clone(), teacher.clone()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    student[1, 2], teacher[1, 2] = NAN, NAN
    x = {"student_logits": student, "mask": mask}
    x |= {name: options[name] for name in ("student_temperature", "vocab_size") if name in options}
    size = options.get("vocab_size", student.shape[-1])
    best = teacher[..., :size].float().nan_to_num().topk(options.get("k", min(16, size))).indices
    generator = torch.Generator().manual_seed(13)
    if loss == "topk_policy_loss":
        x["topk_ids"] = best
        x["advantages"] = torch.randn(best.shape, generator=generator)
        # Near what they are now, and far from it.
        now = _saving.candidate_logprobs(student[..., :size].double().log_softmax(-1), best).nan_to_num(neginf=-30.0)
        x["old_logprobs"] = (now + torch.randn(best.shape, generator=generator)).float()
    elif loss == "reverse_kl":
        x |= {"teacher_logits": teacher, "weight": 1 - 0.4 * torch.rand(2, 3, generator=generator)}
        x["teacher_temperature"] = options.get("teacher_temperature", 1.0)
    else:
        logprobs = (teacher[..., :size].float() / options.get("teacher_temperature", 1.0)).log_softmax(-1)
        x |= {"teacher_topk_ids": best, "teacher_topk_logprobs": logprobs.gather(-1, best)}
    return x


WIDE = [name for name in cases.CASES if not name.startswith("width_")]
NARROW = [name for name in cases.CASES if name.startswith("width_")]
TABLE = [(loss, name, cases.SAME_DTYPES[(i + j) % 3]) for j, loss in enumerate(OUTPUTS) for i, name in enumerate(WIDE)]
TABLE += [(list(OUTPUTS)[i % 3], name, cases.SAME_DTYPES[i // 3 % 3]) for i, name in enumerate(NARROW)]
TABLE += [("reverse_kl", name, dtypes) for name, dtypes in [("random", (F32, BF16)), ("wider_teacher", (BF16, F16))]]


@pytest.mark.parametrize(("loss", "name", "dtypes"), TABLE, ids=cases.case_id)
def test_table(loss, name, dtypes):
    check(loss, **arguments_of(loss, name, dtypes))
