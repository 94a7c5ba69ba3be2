"""The second exchange: what each rank tells of its slice, as the bits of one tensor."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from ._agreement import Slices


class Side(NamedTuple):
    """One model's slice at each position, or all slices stacked on a first axis. None: not asked for.

    A slice narrower than the widest list of candidates fills its own up with logits of -inf.
    """

    topk_ids: Any = None  # [..., k'], of the whole vocabulary
    topk_logits: Any = None  # [..., k'], exact; the first is the slice's greatest logit
    log_mass: Any = None  # log(sum(exp((logit - greatest) / temperature))), of use where the greatest is finite
    entropy: Any = None
    divergence: Any = None  # KL(this model || the other)
    others: Any = None  # [..., k']: the other model's logits of these candidates
    of_ids: Any = None  # [..., m]: the logits of given ids, of use where this slice holds them


def gather(slices: Slices, shape: torch.Size, *mine: Side) -> list[Side]:
    """Return what every rank sends of the positions `[*shape]`. Floats come back in float64, ids in int64."""
    sent = [x for side in mine for x in side if x is not None]
    words = [_words(x, shape) for x in sent]
    packed = torch.cat(words, -1)
    everyone = packed.new_empty((dist.get_world_size(slices.group), *packed.shape))
    dist.all_gather(list(everyone.unbind()), packed, group=slices.group)
    parts = everyone.split([x.shape[-1] for x in words], -1)
    received = (_values(part, x) for part, x in zip(parts, sent, strict=True))
    return [Side._make(None if x is None else next(received) for x in side) for side in mine]


def _words(x: Tensor, shape: torch.Size) -> Tensor:
    """Return `[positions, words]` of 32 bits. An id takes one."""
    x = x.reshape(shape.numel(), x.shape[len(shape) :].numel())
    return x.contiguous().view(torch.int32) if x.is_floating_point() else x.to(torch.int32)


def _values(words: Tensor, like: Tensor) -> Tensor:
    if like.is_floating_point():
        words = words.clone(memory_format=torch.contiguous_format)  # aligned for a float64
        values = words.view(like.dtype).to(torch.float64)
    else:
        values = words.to(torch.int64)
    return values.reshape(len(words), *like.shape)
