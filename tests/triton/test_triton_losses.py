"""The losses and their backward passes as Triton kernels, in the interpreter, against the definition in float64.

The interpreter takes its time, so the table runs in one dtype after the other, and its many widths for one of the
losses each. With a GPU all of the tests of every implementation run these kernels compiled.
"""

import math

import pytest
import torch

import cases
import comparison
import processes
from interpreted import INTERPRETED
from pruneopd_kernels.formulas import (
    Rows,
    candidate_logprobs,
    forward_terms,
    kl_divergence,
    measures_of,
    policy_positions,
    policy_terms,
    topk_ids,
    valid_positions,
    weighted_positions,
)
from pruneopd_kernels.reference import _saving

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
CARRIED = ["student_logits", "teacher_logits", "student_temperature", "teacher_temperature", "vocab_size"]
UNCHANGED = {"student_temperature": 1.0, "vocab_size": None}
DEFAULTS = {
    "topk_policy_loss": {"mask": None, "old_logprobs": None, "clip_low": 0.2, "clip_high": 0.2, "clip_dual": 3.0},
    "reverse_kl": {"mask": None, "weight": None, "teacher_temperature": 1.0},
    "topk_forward_kl": {"mask": None, "logprob_min": None},
}


# --- the definition in float64, and what one would write in PyTorch in float32 -------------------------------------


def used_by(loss, x):
    if loss == "topk_policy_loss":
        return policy_positions(x["topk_ids"], x["advantages"], x["mask"])
    if loss == "reverse_kl":
        return weighted_positions(x["student_logits"], x["mask"], x["weight"])
    return valid_positions(x["mask"], x["student_logits"], x["student_logits"].shape[:-1])


def eager_rows(logits, used, size, temperature):
    x = torch.where(used[..., None], logits[..., :size].float(), 0.0)
    broken = (x.isnan() | (x == INF)).any(-1) | ~x.isfinite().any(-1)
    return Rows(x, (x / temperature).log_softmax(-1), broken, temperature)


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
        kl = kl_divergence(rows, teacher)
        total = torch.where(used, weight * kl, 0.0)
        outputs["excess"] = rows.logprobs - teacher.logprobs - kl[..., None]
        # No difference is closer than what it is of.
        p = rows.logprobs.exp() / x["student_temperature"]
        sizes["excess"] = rows.logprobs.abs() + teacher.logprobs.abs()
        sizes["gradient"] = torch.where(p == 0, 0.0, p * sizes["excess"]) * (scale * weight)[..., None]
        sizes["loss"] = torch.where(p == 0, 0.0, rows.logprobs.exp() * teacher.logprobs).sum(-1) * weight
    else:
        ids = x["teacher_topk_ids"]
        logprobs = candidate_logprobs(rows.logprobs, ids)
        parts = forward_terms(logprobs, rows.broken, ids, x["teacher_topk_logprobs"], x["logprob_min"])
        outputs.update(measures_of(topk_ids(rows.logits, ids.shape[-1]), rows.broken, parts, ids, used)._asdict())
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
    more |= {name: x[name] for name in CARRIED if name in x}
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
            outputs[-1][spoilt, 3] = NAN
        else:
            outputs[-2][spoilt] = NAN
    return outputs


def said_by_state(state, x, used):
    """What a state says of every id; that is what it is for: log p, and for `reverse_kl` log p - log q - KL."""
    said = {}
    state = torch.where(used[..., None], state.double(), torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])[: state.shape[-1]])
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
        p_is_0 = (distances[0] == -INF) & ~state[..., 3:4].isnan()
        said["excess"] = torch.where(p_is_0, 0.0, distances[0] - distances[1] - state[..., 3:4])
        is_peak = (distances[0] == 0) & (state[..., 1:2] < 1.5) & ~state[..., 3:4].isnan()
        said["excess"] = torch.where(is_peak, state[..., 4:], said["excess"])
    return said


def check(loss, scale=None, **arguments):
    """Both passes of the kernels within the error budget of the definition, and exact where that is."""
    x = {**UNCHANGED, **DEFAULTS[loss], **arguments}
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
        now = candidate_logprobs(student[..., :size].double().log_softmax(-1), best).nan_to_num(neginf=-30.0)
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


# --- candidates ------------------------------------------------------------------------------------------------------


def candidates(m, width=500, positions=(2, 2), seed=5):
    """Logits, ids with many duplicates and some padding, and a float for each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, min(width, 2 * m), (*positions, m), generator=generator)
    return cases.randn(*positions, width, seed=seed), ids, torch.randn(*ids.shape, generator=generator)


@pytest.mark.parametrize(("m", "on_policy"), [(1, True), (16, False), (100, True), (512, False)], ids=str)
def test_policy_loss_with_duplicates_and_padding(m, on_policy):
    logits, ids, advantages = candidates(m)
    old = None if on_policy else cases.randn(*ids.shape, seed=3, scale=1.5) - 8
    advantages[..., ::7] = 0
    check("topk_policy_loss", student_logits=logits, topk_ids=ids, advantages=advantages, old_logprobs=old)


def test_policy_loss_of_a_single_id_in_every_slot():
    """512 times the same: its derivatives are summed before it is rounded."""
    logits, ids, advantages = candidates(512)
    check("topk_policy_loss", student_logits=logits, topk_ids=ids * 0 + 3, advantages=advantages + 1)


def test_policy_loss_at_its_edges():
    """On each side of a clip and of 20 nats, at ties, at -inf, of an id that does not exist, of nothing to learn."""
    logits = cases.randn(1, 10, 300, seed=6)
    logits[0, 1, 7], logits[0, 8, 7], logits[0, 9] = -INF, -INF, NAN
    ids = torch.arange(7, 15, dtype=torch.int32).repeat(1, 10, 1)
    advantages = cases.randn(1, 10, 8, seed=7, scale=1.0)
    ratios = torch.tensor([0.5, 0.8, 1.0, 1.2, 1.3, 2.9, 3.1, 1e10]).log()
    old = (logits.double().log_softmax(-1)[..., 7:15] - ratios).nan_to_num().float()
    advantages[0, 2], ids[0, 3], ids[0, 4, 2], old[0, 5, 3], advantages[0, 6, 1] = 0, -1, 300, NAN, NAN
    advantages[0, 7, 2], ids[0, 7, 2] = 0, 300  # has no part in the loss, whatever its id
    advantages[0, 8, 1:] = 0  # nothing is left but a log-probability of -inf
    options = {"student_logits": logits, "topk_ids": ids, "advantages": advantages}
    got = check("topk_policy_loss", old_logprobs=old, **options)
    assert got["loss"].isnan().tolist() == [[n in (4, 5, 6, 9) for n in range(10)]]
    assert got["loss"][0, [2, 3, 8]].tolist() == [0.0, 0.0, 0.0]
    check("topk_policy_loss", old_logprobs=old, clip_low=1.0, clip_high=0.0, clip_dual=INF, **options)
    check("topk_policy_loss", **options)


def test_overflowing_losses_spoil_their_gradients():
    logits, ids, advantages = candidates(4, positions=(1, 3))
    advantages[0, 1] = 3e38
    got = check("topk_policy_loss", student_logits=logits, topk_ids=ids.clamp(min=0), advantages=advantages)
    assert got["loss"].isfinite().tolist() == [[True, False, True]]


@pytest.mark.parametrize(("k", "logprob_min"), [(1, None), (16, -9.0), (256, None)], ids=str)
def test_forward_kl_with_duplicates_and_padding(k, logprob_min):
    logits, ids, logprobs = candidates(k)
    logprobs = logprobs.log_softmax(-1)
    logprobs[ids < 0] = NAN
    logprobs[..., 3:4] = -INF
    check("topk_forward_kl", student_logits=logits, teacher_topk_ids=ids, teacher_topk_logprobs=logprobs,
          logprob_min=logprob_min)  # fmt: skip


@pytest.mark.parametrize("logprob_min", [None, -9.0])
def test_forward_kl_at_its_edges(logprob_min):
    """Log-probabilities of NaN and +inf, an id that does not exist, -inf on either side or both, only padding."""
    logits = cases.randn(1, 9, 300, seed=6)
    ids = logits.topk(8).indices.int().flip(-1)
    logits[0, 1, ids[0, 1, 2]], logits[0, 2, ids[0, 2, 2]], logits[0, 8, 50] = -INF, -INF, NAN
    logprobs = cases.randn(1, 9, 8, seed=7, scale=1.0).log_softmax(-1)
    logprobs[0, 2, 2], logprobs[0, 3, 4], logprobs[0, 4, 5], ids[0, 5, 1] = -INF, NAN, INF, 300
    ids[0, 6], ids[0, 8] = -1, -1
    options = {"student_logits": logits, "teacher_topk_ids": ids, "teacher_topk_logprobs": logprobs}
    got = check("topk_forward_kl", logprob_min=logprob_min, **options)
    spoilt = {3, 4, 5, 8} | ({1} if logprob_min is None else set())
    assert got["loss"].isfinite().tolist() == [[n not in spoilt for n in range(9)]]


def test_reverse_kl_with_weights():
    """Of 0, of NaN, that overflow; a mask and a weight together; and a pair that is equal."""
    student, teacher = cases.randn(2, 4, 300, seed=1), cases.randn(2, 4, 300, seed=2)
    student[0, 0], teacher[0, 1, 5], student[1, 3] = NAN, -INF, NAN
    teacher[1, 1] = student[1, 1]
    weight = torch.tensor([[0, 1, 3e38, 0.5], [NAN, -2, 1e-3, 1]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.uint8)
    pair = {"student_logits": student, "teacher_logits": teacher, "mask": mask}
    got = check("reverse_kl", weight=weight, student_temperature=0.7, teacher_temperature=1.5, **pair)
    assert got["loss"].isfinite().tolist() == [[True, False, False, True], [False, True, True, True]]
    check("reverse_kl", **pair)


def arguments_for(loss, student, teacher, mask=None, vocab_size=None):
    *shape, width = student.shape
    ids = torch.arange(2 * math.prod(shape)).view(*shape, 2) % (vocab_size or width)
    floats = cases.randn(*shape, 2, seed=3, scale=1.0)
    x = {
        "topk_policy_loss": {"topk_ids": ids, "advantages": floats},
        "reverse_kl": {"teacher_logits": teacher, "weight": floats[..., 0]},
        "topk_forward_kl": {"teacher_topk_ids": ids, "teacher_topk_logprobs": floats - 3},
    }[loss]
    return {**UNCHANGED, **DEFAULTS[loss], "student_logits": student, "mask": mask, "vocab_size": vocab_size, **x}


@pytest.mark.parametrize("loss", OUTPUTS)
def test_what_does_not_exist_has_no_gradient(loss):
    """Where the loss is NaN, the gradient is, up to vocab_size."""
    student, teacher = cases.randn(1, 2, 300, seed=1), cases.randn(1, 2, 300, seed=2)
    student[0, 1, 5] = NAN
    got = check(loss, **arguments_for(loss, student, teacher, vocab_size=290))
    assert got["gradient"][0, 1].isnan().tolist() == [n < 290 for n in range(300)]


def test_temperatures_out_of_all_proportion_are_computed_in_float64():
    """Beyond what the scale of a float32 can tell."""
    for temperature in (1e-40, 1e39):
        logits = torch.tensor([[0.0, 1e38, -3e38, 3e38, -INF]])
        for loss in OUTPUTS:
            check(loss, **arguments_for(loss, logits, logits * 0.5) | {"student_temperature": temperature})


@pytest.mark.parametrize(("width", "other_peak"), [(1037, None), (40000, 35000)], ids=str)
def test_the_gradient_of_a_peak_is_not_rounded_away(width, other_peak):
    """It is next to nothing, of differences that are in the hundreds; a segment's own peak is a part of the rest."""
    student, teacher = cases.randn(1, 3, width, seed=1, scale=1.0), cases.randn(1, 3, width, seed=2, scale=30.0)
    student[0, 0, 77], student[0, 1, 77], student[0, 2, 77] = 9.5, 14.0, 25.0
    teacher[0, :, 77] = -200.0
    if other_peak is not None:
        student[..., 77] += 4
        student[0, :, other_peak] = 13.0
    got = check("reverse_kl", student_logits=student, teacher_logits=teacher, scale=torch.ones(1, 3))
    x = student.double().requires_grad_()
    log_p, log_q = x.log_softmax(-1), teacher.double().log_softmax(-1)
    (gold,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), x)
    assert (log_p[..., 77].exp() > 2 / 3).tolist() == [[width == 1037, True, True]]
    torch.testing.assert_close(got["gradient"][..., 77].double(), gold[..., 77], rtol=2e-5, atol=0)


# --- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", OUTPUTS)
def test_strides_and_leading_axes(loss):
    """Three axes that no two can stand for, rows that begin anywhere, other tensors with any strides and dtypes."""
    student, teacher = (cases.randn(3, 2, 2, 77, seed=seed).half()[..., 3:-4] for seed in (1, 2))
    student = student.transpose(0, 1).contiguous().transpose(0, 1)
    ids = torch.randint(70, (5, 2, 3, 2), generator=torch.Generator().manual_seed(0)).permute(2, 1, 3, 0).int()
    floats = cases.randn(5, 2, 3, 2, seed=3, scale=1.0).permute(2, 1, 3, 0)
    x = {
        "topk_policy_loss": {"topk_ids": ids, "advantages": floats.bfloat16(), "old_logprobs": floats.double() - 5},
        "reverse_kl": {"teacher_logits": teacher, "weight": floats[..., 0].half()},
        "topk_forward_kl": {"teacher_topk_ids": ids, "teacher_topk_logprobs": floats.bfloat16() - 3},
    }[loss]
    mask = (cases.randn(2, 2, 3, seed=5) < 2).permute(2, 0, 1)
    got = check(loss, student_logits=student, mask=mask, vocab_size=69, scale=floats[..., 1], **x)
    assert got["gradient"].is_contiguous()
    check(loss, student_logits=student[:, :, ::2], mask=mask[:, :, ::2], scale=floats[:, :, ::2, 1],
          **{name: value[:, :, ::2] for name, value in x.items()})  # fmt: skip


@pytest.mark.parametrize("loss", OUTPUTS)
@pytest.mark.parametrize("shape", [(0, 40), (3, 0, 40)], ids=str)
def test_empty(loss, shape):
    logits = torch.zeros(shape)
    outputs = both_passes(interpreted, loss, arguments_for(loss, logits, logits), torch.zeros(shape[:-1]))
    assert outputs["gradient"].shape == shape and outputs["loss"].shape == shape[:-1]


# --- one position a program, or one segment of it --------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "dtype"), list(zip(OUTPUTS, [BF16, F32, F16], strict=True)), ids=str)
def test_same_bits_whether_rows_are_split_or_not(loss, dtype):
    """Three segments, the last one partial; of many positions each has a program, a single one is split."""
    width, positions = 70003, 5
    student, teacher = (cases.randn(positions, width, seed=seed).to(dtype) for seed in (3, 4))
    student[1, 40000], teacher[1, 3] = 60.0, 50.0  # peaks that are summed apart
    ids = torch.randint(width, (positions, 16), generator=torch.Generator().manual_seed(2))
    ids[:, 0], ids[:, 1], ids[:, 2:4] = 40000, 32768, 70002
    floats = cases.randn(positions, 16, seed=3, scale=1.0)
    x = {
        "topk_policy_loss": {"topk_ids": ids, "advantages": floats, "old_logprobs": floats - 12},
        "reverse_kl": {"teacher_logits": teacher},
        "topk_forward_kl": {"teacher_topk_ids": ids, "teacher_topk_logprobs": floats - 4},
    }[loss]
    x = {**UNCHANGED, **DEFAULTS[loss], "student_logits": student, **x}
    whole = check(loss, scale=floats[:, 5], **x)
    for part in (slice(1, 2), slice(3, 4)):
        few = {name: value[part] if isinstance(value, torch.Tensor) else value for name, value in x.items()}
        alone = both_passes(interpreted, loss, few, floats[part, 5])
        assert [name for name in alone if not comparison.same_bits([alone[name]], [whole[name][part]])] == []


# --- memory ----------------------------------------------------------------------------------------------------------


def in_a_process(function, *arguments):
    """Runs a function of this file with interpreted kernels that are not checked from another process."""
    return processes.run(
        code=f"""
        import interpreted
        kernels = interpreted.InThisProcess()
        import faulthandler; faulthandler.enable()
        import test_triton_losses
        print(test_triton_losses.{function.__name__}(kernels, *{arguments!r}))
    """
    )


def touch_nothing_else(kernels):
    from guarded_reads import PAGE, between_guards, protect

    def run(op, **arguments):
        return getattr(kernels, op)(**arguments)

    new_empty = torch.Tensor.new_empty

    def guarded(like, shape, dtype=None, **of_interpreter):
        if of_interpreter:
            return new_empty(like, shape, **of_interpreter)
        return between_guards(torch.zeros(shape, dtype=dtype or like.dtype), True)

    torch.Tensor.new_empty = guarded  # as all outputs are made
    for loss in OUTPUTS:
        for width, dtype, at_end in [(7, F32, True), (513, BF16, False), (4096, F16, True), (4100, BF16, True)]:
            student, teacher = (between_guards(torch.randn(1, 2, width).to(dtype), at_end) for _ in range(2))
            both_passes(run, loss, arguments_for(loss, student, teacher), torch.ones(1, 2))
        student, teacher = (between_guards(torch.randn(1, 1, PAGE // 2), True) for _ in range(2))
        for x in (student, teacher):
            protect(x.data_ptr() + PAGE, PAGE)  # beyond vocab_size
        for vocab_size in (PAGE // 4, PAGE // 4 - 3):
            x = arguments_for(loss, student, teacher, vocab_size=vocab_size)
            both_passes(run, loss, x, torch.ones(1, 1))
        student, teacher = (between_guards(torch.randn(1, 6, PAGE // 4), True) for _ in range(2))
        x = arguments_for(loss, student, teacher, mask=torch.tensor([[1, 1, 1, 0, 1, 0]]))
        if loss == "topk_policy_loss":
            x["advantages"][0, 0], x["topk_ids"][0, 2] = 0, -1
        elif loss == "reverse_kl":
            x["weight"][0, [0, 2]] = 0
        else:
            x["mask"][0, [0, 2]] = 0
        for logits in (student, teacher):
            for n in (0, 2, 3, 5):
                protect(logits.data_ptr() + n * PAGE, PAGE)
        outputs = both_passes(run, loss, x, torch.ones(1, 6))
        assert [n for n in range(6) if outputs["gradient"][0, n].any()] == [1, 4]
        for logits in (student, teacher):
            protect(logits.data_ptr() + 4 * PAGE, PAGE)
        backward = "reverse_kl_backward" if loss == "reverse_kl" else "logprobs_backward"
        more = {name: outputs[name] for name in ("state", "coefficients") if name in outputs}
        more |= {name: value for name, value in x.items() if name in CARRIED}
        if loss != "reverse_kl":
            more["topk_ids"] = x["topk_ids" if loss == "topk_policy_loss" else "teacher_topk_ids"]
        (gradient,) = run(backward, scale=torch.tensor([[0.0, 1, 0, 0, 0, 0]]), **more)
        assert [n for n in range(6) if gradient[0, n].any()] == [1]
    return "nothing"


def test_nothing_else_is_touched():
    """Beside rows and outputs, beyond vocab_size and where nothing counts lie pages that must not be touched."""
    assert in_a_process(touch_nothing_else) == "nothing\n"


def far_apart(kernels, folder):
    def run(op, **arguments):
        return getattr(kernels, op)(**arguments)

    def moved(x, name):
        far = 2**31 + 4096
        memory = torch.from_file(f"{folder}/{name}", shared=True, size=far + 2 * x[0].numel(), dtype=x.dtype)
        return memory.as_strided(x.shape, (far, *x.stride()[1:])).copy_(x)

    student, teacher, scale = torch.randn(2, 2, 600).half(), torch.randn(2, 2, 600).half(), torch.randn(2, 2)
    same = []
    for loss in OUTPUTS:
        plain = both_passes(run, loss, arguments_for(loss, student, teacher), scale)
        x = arguments_for(loss, moved(student, "s"), moved(teacher, "t"))
        far = both_passes(run, loss, x, scale)
        same += [comparison.same_bits([plain[name]], [far[name]]) for name in plain]
    return same


def test_strides_beyond_32_bits(tmp_path):
    assert eval(in_a_process(far_apart, str(tmp_path))) == [True] * 16
