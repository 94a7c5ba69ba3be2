"""How a result is held to a gold: what is exact, exactly; every other float within its error budget."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

EPS = float(np.finfo(np.float32).eps)

DTYPES = {
    "drift": torch.bool,
    "accepted": torch.bool,
    "drift_count": torch.int32,
    "effective_length": torch.int32,
    "topk_ids": torch.int64,
    "student_topk_ids": torch.int64,
    "teacher_topk_ids": torch.int64,
}
EXACT = {*DTYPES, "overlap", "reliability", "weight"}


class Answer(NamedTuple):
    """What a call must give; of a loss also the `gradient`."""

    gold: dict  # float64 arrays by name
    eager: dict  # float32 tensors: what one would write in PyTorch today gives for the same floats
    sizes: dict  # of a difference the largest of what is subtracted, instead of max|gold|: no float32 is closer


def check(result, answer, least_size=0.0):
    """Hold every output to its gold, all floats with `err <= 2 * err(eager) + 2 * eps * max|gold|`.

    `least_size=1` where anything may come up: eps in a log-probability is a relative eps in the probability, and no
    more is promised of a log-probability near 0, though eager may be lucky there. A gradient is float32 or better
    until it is rounded, once, to the dtype of the logits.
    """
    assert list(result) == list(answer.gold)
    for name, expected in answer.gold.items():
        got, rounding = result[name], 0.0
        assert tuple(got.shape) == expected.shape, name
        if name == "gradient":
            about = torch.finfo(got.dtype)
            if got.dtype != torch.float32:
                rounding = np.abs(expected) * about.eps / 2 + about.smallest_normal * about.eps / 2
        else:
            assert got.dtype == DTYPES.get(name, torch.float32), name
        if name in EXACT:
            expected = expected.astype(np.float32) if got.dtype == torch.float32 else expected
            np.testing.assert_array_equal(got.numpy(), expected, err_msg=name, strict=False)
            continue
        assert answer.eager[name].dtype == torch.float32, name
        size = max(least_size, answer.sizes.get(name, greatest(expected)))
        rounded = torch.from_numpy(expected).to(got.dtype).double().numpy()
        check_within_budget(name, got.double().numpy(), expected, answer.eager[name].numpy(), size, rounding, rounded)


def greatest(array):
    return np.abs(array[np.isfinite(array)]).max(initial=0.0)


def check_within_budget(name, got, gold, eager, size, rounding, rounded):
    """`rounding`: what one more rounding may add to each error; `rounded`: the gold after it."""
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
    """The names of the outputs in which two results do not agree bit for bit: empty, one hopes."""
    a, b = (x if isinstance(x, dict) else x._asdict() for x in (a, b))
    assert list(a) == list(b)
    return [name for name in a if not same_bits([a[name]], [b[name]])]


# --- what one would write in PyTorch today, in float32 ---------------------------------------------------------------


def eager_logprobs(logits, temperature, vocab_size):
    """In the dtype of the logits, once they are float32."""
    return (logits[..., :vocab_size] / temperature).log_softmax(-1)


def eager(formula, gold, into, a):
    """What `formula(gold, a)` of float32 tensors gives where the mask is set; of a loss also the gradient.

    `into` is the gradient that comes in by each differentiable output; `a` has the logits first.
    """
    a = SimpleNamespace(**{name: as_float32(value) for name, value in vars(a).items()})
    logits = next(iter(vars(a).values()))
    if into:
        logits = logits.detach().clone().requires_grad_()
        setattr(a, next(iter(vars(a))), logits)
    outputs = formula(gold, a)
    if getattr(a, "mask", None) is not None:
        valid = a.mask != 0
        for name, x in outputs.items():
            outputs[name] = torch.where(valid if x.ndim == valid.ndim else valid[..., None], x, 0.0)
    if into:
        (gradient,) = torch.autograd.grad([outputs[name] for name in into], logits, [*into.values()])
        outputs = {name: x.detach() for name, x in outputs.items()} | {"gradient": gradient}
    return outputs


def as_float32(value):
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
