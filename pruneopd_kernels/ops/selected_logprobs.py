"""`selected_logprobs`: differentiable log-probabilities of given ids, and the entropy, without a log-softmax."""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import checks
from ._operator import Impl, Tensor, operator, run_backward


@operator
def selected_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    impl: Impl = "auto",
) -> SelectedLogprobs:
    """Compute log-probabilities of given ids, the entropy and the log-sum-exp of each position.

        logprobs[j] = log_softmax(logits / temperature)[token_ids[j]]
        entropy = -sum(p * log p)
        lse = log(sum(exp(logits / temperature)))

    This is the primitive under every loss over given ids: a policy gradient of the sampled token, a divergence over
    candidates, an entropy bonus. The forward pass reads each logit once and saves three floats per position. The
    backward pass reads each logit once and writes its gradient once. No `[..., V]` log-softmax is allocated.

    An id below 0 is padding: its log-probability is 0 and has no gradient, so that a sum over slots ignores it. A logit
    of -inf gives -inf and has no gradient. A row with a NaN, a +inf or no finite logit gives NaN, and its gradient is
    NaN for every id. At a masked position the logits are not read: all results and the gradient are 0. If nothing flows
    back into a position, its logits are not read again and its gradient is exactly 0.

    Args:
        logits: float32, bfloat16 or float16 `[..., V]`; stride 1 on the last axis, any other strides:
            `logits[:, :-1]` is taken without a copy.
        token_ids: int32 or int64 `[..., m]`, m from 1 to 512, in `[0, vocab_size)` or below 0; duplicates are allowed.
            For one token per position, pass `token_ids[..., None]`.
        mask: bool, integer or float `[...]`; non-zero where a position is valid. None: all positions are valid.
        temperature: What the logits are divided by, > 0.
        vocab_size: Only ids below it exist, for the softmax; ids from it on get a gradient of 0. None: V.

    Returns:
        The fields of `SelectedLogprobs`. Log-probabilities and entropy are differentiable in `logits`, once; `lse` is a
        constant. The gradient has the logits' dtype.

    Examples:
        >>> import torch
        >>> from pruneopd_kernels import selected_logprobs
        >>> logits = torch.tensor([[0.0, 2.0, 1.0]], requires_grad=True)
        >>> out = selected_logprobs(logits, torch.tensor([[1, -100]]))
        >>> out.logprobs.detach(), out.entropy.detach()
        (tensor([[-0.4076,  0.0000]]), tensor([0.8324]))
        >>> (-out.logprobs.sum() - 0.1 * out.entropy.sum()).backward()  # cross-entropy with an entropy bonus
        >>> logits.grad
        tensor([[ 0.0758, -0.3065,  0.2307]])
    """
    ...


class SelectedLogprobs(NamedTuple):
    """Of `selected_logprobs`. Per position means the leading axes of the logits."""

    logprobs: Tensor
    """float32 `[..., m]`: log-probabilities of the ids; 0 for an id below 0. Differentiable."""
    entropy: Tensor
    """float32 per position: entropy of the distribution. Differentiable."""
    lse: Tensor
    """float32 per position: log-sum-exp of the logits over their temperature."""


def check(op: str, a: Any, *, float64: bool, values: bool) -> None:
    checks.logits(op, "logits", a.logits, float64)
    checks.candidates(op, "token_ids", a.token_ids, a.logits, checks.MAX_POLICY_CANDIDATES, "m")
    checks.mask_of_positions(op, a.mask, a.logits, a.logits.shape[:-1])
    vocab_size = checks.vocab_size(op, a)
    checks.scalars(op, a)
    if values:
        checks.candidate_values(op, "token_ids", a.token_ids, a.mask, vocab_size)


DIFFERENTIABLE = ("logprobs", "entropy")
SAVED = ("state",)


def kept(a: Any) -> tuple[str, ...]:
    return "logits", "token_ids", "logprobs", "state"


def fake(a: Any, empty: Any) -> Any:
    return empty("logits", a.token_ids.shape[-1]), empty("logits"), empty("logits"), empty("float64", 3)


def compute(a: Any, run: Any) -> tuple[Tensor, ...]:
    row = run("row_stats", a.logits, a.token_ids, a.mask, temperature=a.temperature, vocab_size=a.vocab_size)
    return row.logprobs.to(row.lse.dtype), row.entropy, row.lse, row.state


def backward(a: Any, of_logprobs: Tensor | None, of_entropy: Tensor | None) -> Tensor:
    import torch

    masked = a.state[..., 1] == 0  # the mass of any other row is at least 1, or NaN
    constant = (a.token_ids < 0) | (a.logprobs == -torch.inf) | masked[..., None]
    flowing = torch.zeros_like(a.logprobs) if of_logprobs is None else of_logprobs.masked_fill(constant, 0.0)
    # An id that does not exist, which only a GPU lets in, spoils its row.
    coefficients = flowing.masked_fill(a.logprobs.isnan() & (flowing != 0), torch.nan)
    of_entropy = None if of_entropy is None else of_entropy.masked_fill(masked, 0.0)
    tensors = a.logits, a.token_ids, coefficients, a.state, of_entropy
    return run_backward("logprobs_backward", a.impl, *tensors, temperature=a.temperature, vocab_size=a.vocab_size)
