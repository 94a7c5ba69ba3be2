"""What is computed from one chunk's logits: scores, a loss, and its gradient by the logits.

`a` is the record of all arguments. Everything is computed by the operators' own passes.
"""

from typing import Any

import torch
from torch import Tensor

from .. import formulas
from ..dispatch import implementations
from ..ops import OPERATORS, Operator
from ..ops.row_stats import RowStats
from ..rewards import opd_rewards

FIELDS = ("loss", "overlap", "drift", "topk_ids", "rewards")


# Of one chunk: what a position has; C; and what the backward pass of a loss needs of a position, besides logits.
Scored = tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]


class Passes:
    """What reads the logits of a chunk: one implementation's compiled passes."""

    def __init__(self, impl: str) -> None:
        self.impl = impl

    def run(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run a compiled operator or a forward pass by its name."""
        return implementations.run_pass(self.impl, name, *args, **kwargs)

    def logprobs(self, logits: Tensor, ids: Tensor, state: Tensor, temperature: float) -> Tensor:
        """Return the log-probabilities of ids that exist, from the states of their rows."""
        return formulas.logprobs_from_state(logits.gather(-1, ids), state, temperature)

    def gradient(self, op: str, a: Any, *gradients: Tensor | None) -> Tensor:
        """Return the gradient by the first model's logits; `a` also has the logits and what the operator has kept."""
        gradient: Tensor = OPERATORS[op].module.backward(a, *gradients)
        return gradient

    def add_up(self, hidden_gradient: Tensor) -> None:
        """Add to the gradient by hidden states, in place, what comes from ids whose logits are read elsewhere."""


def scalars(op: str, a: Any) -> dict[str, Any]:
    """Return the scalars that an operator takes, from a record of arguments."""
    return {name: getattr(a, name) for name in OPERATORS[op].scalars if hasattr(a, name)}


def score(a: Any, logits: dict[str, Tensor], rows: dict[str, Tensor], **along: Any) -> Scored:
    """Score a chunk; with a loss, if the arguments name one.

    `rows` are the tensors per position that the caller gave, `along` what continues earlier chunks.
    """
    loss = getattr(a, "loss", None)
    if loss is None:
        scored = a.passes.run("reliability", **logits, **rows, **along, **scalars("reliability", a))
        return {name: getattr(scored, name) for name in FIELDS[1:]}, scored.drift_count, {}
    if loss == "topk_forward_kl":
        return _forward_kl(a, logits, rows, along)
    outputs, kept = composed("opd_loss", a, **logits, **rows, **along, entropies=True)
    fields = {name: outputs[name] for name in (*FIELDS, "accepted", "teacher_entropy")}
    fields["entropy"] = outputs["student_entropy"]
    return fields, outputs["drift_count"], kept


def composed(name: str, a: Any, **arguments: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run a composed operator; return its results, and what its backward pass needs besides logits."""
    op: Operator = OPERATORS[name]
    record = op.arguments((), scalars(name, a) | arguments)
    outputs = dict(zip((*op.fields, *op.saved), op.module.compute(record, a.passes.run), strict=True))
    tensors = record._asdict() | outputs
    return outputs, {name: tensors[name] for name in op.module.kept(record) if not name.endswith("logits")}


class Row:
    """One model's rows of a chunk, read once."""

    def __init__(self, a: Any, logits: Tensor, side: str, ids: Tensor, entropy: bool) -> None:
        self.passes, self.logits, self.temperature = a.passes, logits, getattr(a, f"{side}_temperature")
        options = {"k": a.k, "entropy": entropy, "temperature": self.temperature, "vocab_size": a.vocab_size}
        self.stats: RowStats = a.passes.run("row_stats", logits, ids, **options)
        self.broken = self.stats.state[:, :1].isnan()

    def logprobs(self, ids: Tensor) -> Tensor:
        logprobs: Tensor = self.passes.logprobs(self.logits, ids, self.stats.state, self.temperature)
        return logprobs


def _forward_kl(a: Any, logits: dict[str, Tensor], rows: dict[str, Tensor], along: dict[str, Any]) -> Scored:
    """Score from the student's logits and the teacher's candidates: a server's, or those of the teacher's logits."""
    x, teacher = logits["student_logits"], None
    if "teacher_logits" in logits:
        no_ids = torch.full((len(x), 1), -1, device=x.device)
        teacher = Row(a, logits["teacher_logits"], "teacher", no_ids, entropy=False)
        ids = teacher.stats.topk_ids
        rows |= {"teacher_topk_ids": ids, "teacher_topk_logprobs": teacher.logprobs(ids)}
    sent = {name: rows[f"teacher_topk_{name}"] for name in ("ids", "logprobs")}
    student = Row(a, x, "student", sent["ids"], entropy=True)
    own = student.stats.topk_ids, student.logprobs(student.stats.topk_ids)

    # A row without a softmax agrees with nothing and accepts nothing.
    broken = student.broken if teacher is None else student.broken | teacher.broken
    scored = a.passes.run(
        "reliability_from_topk", own[0].masked_fill(broken, -1), sent["ids"].masked_fill(broken, -1),
        student_topk_logprobs=own[1], teacher_topk_logprobs=sent["logprobs"], token_ids=rows.get("token_ids"),
        **along, **scalars("reliability_from_topk", a),
    )  # fmt: skip
    weight = rows.get("weight", scored.weight).to(torch.float64)
    rewards = opd_rewards(
        *own, sent["ids"], sent["logprobs"], None if teacher is None else teacher.logprobs(own[0]),
        strategy="intersection" if teacher is None else "student", reward_weight=a.reward_weight, weight=weight,
    ).rewards  # fmt: skip

    op = OPERATORS["topk_forward_kl"]
    record = op.arguments((x, *sent.values()), scalars(op.name, a))
    (loss, *_), coefficients = formulas.topk_forward_kl(student.stats, record)
    dtype = formulas.float_type(*logits.values())
    loss = formulas.weighted(weight, loss).to(dtype)
    coefficients = formulas.weighted(weight[:, None], coefficients)
    fields = {"loss": loss, "overlap": scored.overlap, "drift": scored.drift, "topk_ids": own[0]}
    fields |= {"rewards": rewards.to(dtype), "entropy": student.stats.entropy.to(dtype)}
    kept = {"teacher_topk_ids": sent["ids"], "state": student.stats.state}
    kept["coefficients"] = formulas.coefficients_of(loss, coefficients, weight != 0)
    return fields, scored.drift_count, kept
