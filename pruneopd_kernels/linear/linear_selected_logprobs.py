"""`linear_selected_logprobs`: what `selected_logprobs` returns, from hidden states and a head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import SelectedLogprobs
from ._chunks import Fields, Sides
from ._declaration import from_hidden_states
from ._gradients import inputs_of, wanted_of, with_recomputed
from ._positions import take, valid_places
from ._scoring import composed


@from_hidden_states("selected_logprobs")
def linear_selected_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk_size: int | None = None,
    **arguments: Any,
) -> SelectedLogprobs:
    """Compute `selected_logprobs` of `logits = hidden @ weight.T + bias`, with at most `chunk_size` positions alive.

    The backward pass computes each chunk's logits again and forms the gradients by hidden states, weight and bias. They
    are summed in float32 and rounded to their tensors' dtypes at the end. Products, autocast and masks are as in
    `linear_reliability`.

    Returns:
        The fields of `SelectedLogprobs`. Log-probabilities and entropy are differentiable in `hidden`, `weight` and
        `bias`, once; `lse` is a constant.

    Examples:
        >>> import torch
        >>> from pruneopd_kernels import linear_selected_logprobs
        >>> hidden, head = torch.randn(2, 5, 8, requires_grad=True), torch.randn(100, 8, requires_grad=True)
        >>> tokens = torch.randint(100, (2, 5))
        >>> out = linear_selected_logprobs(hidden, head, tokens[..., None])
        >>> (-out.logprobs.mean() - 0.01 * out.entropy.mean()).backward()  # cross-entropy with an entropy bonus
        >>> hidden.grad.shape, head.grad.shape
        (torch.Size([2, 5, 8]), torch.Size([100, 8]))
    """
    ...


def compute(a: Any) -> SelectedLogprobs:
    wanted, kept = any(wanted_of(inputs_of(a, ""))), []
    with torch.no_grad():
        sides, fields = Sides(a), Fields(a.hidden.shape[:-1])
        for places in valid_places(fields.shape, a.mask, a.hidden.device).split(a.chunk_size):
            _, logits = sides.logits(places)
            outputs, rows = composed("selected_logprobs", a, **logits, token_ids=take(a.token_ids, places))
            fields.put(places, {name: outputs[name] for name in SelectedLogprobs._fields})
            if wanted:
                kept.append((places, rows))
    logprobs, entropy, lse = fields.values()
    if wanted:
        logprobs, entropy = with_recomputed("selected_logprobs", a, "", kept, logprobs, entropy)
    return SelectedLogprobs(logprobs, entropy, lse)
