"""Every schema, defined once: what `torch.ops.pruneopd.*` take and return.

The public operators have one argument more, `impl`. An implementation that is compiled registers the same signatures
without it in a namespace of its own (`pruneopd_cpp`). Tensors stand before the `*`, because autograd registration
refuses them after it; scalars stand after it.
"""

from __future__ import annotations

import re

# What `torch.ops` calls them. A copy of the package under another name, as the kernel hub's, gets a namespace of its
# own: both may live in one process.
NAMESPACE = __name__.partition(".")[0].removesuffix("_kernels")

# operator: (what it takes, what it returns)
SIGNATURES = {
    "reliability": (
        """Tensor student_logits, Tensor teacher_logits, Tensor? mask=None, Tensor? token_ids=None,
        Tensor? cu_seqlens=None, Tensor? drift_count=None, *, int k=16, float threshold=0.7, float w_drop=0.01,
        float w_base=0.5, float eps=1e-8, str metric="overlap", float top_p=0.95, str reward_weight="student",
        float student_temperature=1.0, float teacher_temperature=1.0, SymInt? vocab_size=None""",
        """Tensor overlap, Tensor drift, Tensor drift_count, Tensor reliability, Tensor weight,
        Tensor effective_length, Tensor topk_ids, Tensor rewards""",
    ),
    "reliability_from_topk": (
        """Tensor student_topk_ids, Tensor teacher_topk_ids, Tensor? mask=None, Tensor? teacher_topk_logprobs=None,
        Tensor? token_ids=None, Tensor? cu_seqlens=None, Tensor? drift_count=None, *, float threshold=0.7,
        float w_drop=0.01, float w_base=0.5, float eps=1e-8, str metric="overlap", float top_p=0.95""",
        """Tensor overlap, Tensor drift, Tensor drift_count, Tensor reliability, Tensor weight,
        Tensor effective_length""",
    ),
    "reliability_from_drift": (
        """Tensor drift, Tensor? mask=None, Tensor? cu_seqlens=None, Tensor? drift_count=None, *,
        float w_drop=0.01, float w_base=0.5, float eps=1e-8""",
        """Tensor drift_count, Tensor reliability, Tensor weight, Tensor effective_length""",
    ),
    "token_stats": (
        """Tensor student_logits, Tensor teacher_logits, Tensor? mask=None, Tensor? token_ids=None, *, int k=16,
        float student_temperature=1.0, float teacher_temperature=1.0, SymInt? vocab_size=None""",
        """Tensor student_topk_ids, Tensor student_topk_logprobs, Tensor teacher_topk_ids,
        Tensor teacher_topk_logprobs, Tensor teacher_on_student_logprobs, Tensor student_on_teacher_logprobs,
        Tensor overlap, Tensor student_lse, Tensor teacher_lse, Tensor student_entropy, Tensor teacher_entropy,
        Tensor reverse_kl, Tensor forward_kl, Tensor student_token_logprob, Tensor teacher_token_logprob""",
    ),
    "topk_policy_loss": (
        """Tensor student_logits, Tensor topk_ids, Tensor advantages, Tensor? mask=None, Tensor? old_logprobs=None, *,
        float clip_low=0.2, float clip_high=0.2, float clip_dual=3.0, float student_temperature=1.0,
        SymInt? vocab_size=None""",
        """Tensor loss""",
    ),
    "reverse_kl": (
        """Tensor student_logits, Tensor teacher_logits, Tensor? mask=None, Tensor? weight=None, *,
        float student_temperature=1.0, float teacher_temperature=1.0, SymInt? vocab_size=None""",
        """Tensor loss""",
    ),
    "topk_forward_kl": (
        """Tensor student_logits, Tensor teacher_topk_ids, Tensor teacher_topk_logprobs, Tensor? mask=None, *,
        float? logprob_min=None, float student_temperature=1.0, SymInt? vocab_size=None""",
        """Tensor loss, Tensor student_mass, Tensor teacher_mass, Tensor overlap, Tensor overlap_token_advantage,
        Tensor student_topk_ids""",
    ),
}

# loss: what its forward pass hands to its backward pass, besides the inputs
SAVED = {
    "topk_policy_loss": "Tensor coefficients, Tensor state",
    "reverse_kl": "Tensor state",
    "topk_forward_kl": "Tensor coefficients, Tensor state",
}

# backward pass: (what it takes, what it returns)
BACKWARD_SIGNATURES = {
    "logprobs_backward": (
        """Tensor student_logits, Tensor topk_ids, Tensor coefficients, Tensor state, Tensor scale, *,
        float student_temperature=1.0, SymInt? vocab_size=None""",
        """Tensor student_logits_gradient""",
    ),
    "reverse_kl_backward": (
        """Tensor student_logits, Tensor teacher_logits, Tensor state, Tensor scale, *,
        float student_temperature=1.0, float teacher_temperature=1.0, SymInt? vocab_size=None""",
        """Tensor student_logits_gradient""",
    ),
}

# What no public operator shows: the plain reading speed of a compiled implementation, for the benchmarks.
ROW_MAX = "row_max(Tensor student_logits, Tensor teacher_logits) -> (Tensor student_max, Tensor teacher_max)"


def public_schema(op: str) -> str:
    """The schema of `torch.ops.pruneopd.<op>`."""
    takes, returns = SIGNATURES[op]
    return f'{op}({takes}, str impl="auto") -> ({returns})'


def saving_schema(loss: str) -> str:
    """The schema of `torch.ops.pruneopd._<loss>`, which also returns what the backward pass needs."""
    takes, returns = SIGNATURES[loss]
    return f'_{loss}({takes}, str impl="auto") -> ({returns}, {SAVED[loss]})'


def backward_schema(op: str) -> str:
    """The schema of `torch.ops.pruneopd._<op>`, a backward pass."""
    takes, returns = BACKWARD_SIGNATURES[op]
    return f'_{op}({takes}, str impl="auto") -> ({returns})'


def private_schemas() -> list[str]:
    """The schemas of a compiled implementation: the operators, losses with what they save, and backward passes."""
    schemas = []
    for op, (takes, returns) in {**SIGNATURES, **BACKWARD_SIGNATURES}.items():
        returns = ", ".join(filter(None, [returns, SAVED.get(op)]))
        schemas.append(f"{op}({takes}) -> ({returns})")
    return schemas


# operator: {argument: its type in the schema}
ARGUMENTS = {
    op: {name: kind for kind, name in re.findall(r"(\w+\??) (\w+)", takes)} | {"impl": "str"}
    for op, (takes, _) in {**SIGNATURES, **BACKWARD_SIGNATURES}.items()
}
