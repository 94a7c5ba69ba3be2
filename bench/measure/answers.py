"""A benchmark first checks the answer: what is wrong has no speed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# The widest error a float output may have, in units of the largest value of that output (or of 1, if that is larger).
KERNEL_TOLERANCE = 1e-5
PEER_TOLERANCE = {"float32": 1e-4, "native": 1e-1}


def fields(outputs: object) -> dict[str, Tensor]:
    """Name -> tensor, for a NamedTuple or a mapping; a tensor alone is a loss."""
    if isinstance(outputs, Tensor):
        return {"loss": outputs}
    return dict(outputs) if isinstance(outputs, Mapping) else outputs._asdict()  # type: ignore[attr-defined]


def complaints(got: Mapping[str, Tensor], gold: Mapping[str, Tensor], tolerance: float = KERNEL_TOLERANCE) -> list[str]:
    """What differs from the reference, one sentence a field; ids, drift and counts must be equal."""
    found = [f"{name} is missing" for name in gold if name not in got]
    for name in gold:
        if name in got:
            found += _differs(name, got[name], gold[name], tolerance)
    return found


def peer_complaints(
    got: Mapping[str, Tensor], gold: Mapping[str, Tensor], logits: Mapping[str, Tensor], tolerance: float
) -> list[str]:
    """The same for a peer whose top-k breaks ties as it likes.

    Its candidates need only have the right logits, and what depends on which of two equal candidates was taken is not
    compared. `logits`: field of ids -> the logits that it picks from.
    """
    found = []
    ties = False
    for name, source in logits.items():
        same = torch.equal(source.gather(-1, got[name]), source.gather(-1, gold[name]))
        found += [] if same else [f"{name} does not hold the largest logits"]
        ties |= not torch.equal(got[name], gold[name])
    untied = ("student_topk_logprobs", "teacher_topk_logprobs", "lse", "entropy", "kl", "token_logprob",
              "loss", "mass", "gradient")  # fmt: skip
    for name in got:
        if name not in logits and (not ties or name.endswith(untied)):
            found += _differs(name, got[name], gold[name], tolerance)
    return found


def _differs(name: str, got: Tensor, gold: Tensor, tolerance: float) -> list[str]:
    if got.shape != gold.shape:
        return [f"{name} has shape {list(got.shape)}, not {list(gold.shape)}"]
    if name == "gradient":
        return _gradient_differs(got, gold, tolerance)
    if not gold.is_floating_point():
        different = int((got.to(gold.dtype) != gold).sum())
        return [f"{name} differs at {different} of {gold.numel()} places"] if different else []
    error = (got.double() - gold.double()).abs()
    allowed = tolerance * max(1.0, float(gold.abs().nan_to_num(posinf=0).max()))
    wrong = ~((error <= allowed) | (got.double() == gold.double()) | (got.isnan() & gold.isnan()))
    return [f"{name} is off by {float(error.max()):.2g}, allowed is {allowed:.2g}"] if bool(wrong.any()) else []


def _gradient_differs(got: Tensor, gold: Tensor, tolerance: float) -> list[str]:
    """All errors of a row together, in units of all its values: most are so small that beside the largest any would do.

    Half of what is allowed is for those that round to the other side in half precision.
    """
    if got.dtype != gold.dtype:
        return [f"gradient has dtype {got.dtype}, not {gold.dtype}"]
    worst = 0.0
    for one, expected in zip(got.flatten(0, -2), gold.flatten(0, -2), strict=True):
        size = max(float(expected.double().abs().sum()), torch.finfo(torch.float32).tiny)
        error = float((one.double() - expected.double()).abs().sum()) / size
        worst = max(worst, error) if error == error else torch.inf
    return (
        [f"gradient is off by {worst:.2g} of itself, allowed is {2 * tolerance:.2g}"] if worst > 2 * tolerance else []
    )
