"""Responses sampled by a model: a batch of chat prompts in, token ids and masks out."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


class Rollouts(NamedTuple):
    """B responses of up to T tokens, each behind its prompt, which is padded on the left to P tokens."""

    token_ids: Tensor
    """`[B, P + T]` int64."""
    attention_mask: Tensor
    """`[B, P + T]` int64: 0 at padding and after a response's end."""
    prompt_length: int
    """P."""

    @property
    def response_ids(self) -> Tensor:
        """`[B, T]`."""
        return self.token_ids[:, self.prompt_length :]

    @property
    def mask(self) -> Tensor:
        """`[B, T]` bool: True at a response's tokens, the one that ends it included."""
        return self.attention_mask[:, self.prompt_length :].bool()


def position_ids(attention_mask: Tensor) -> Tensor:
    """The position of each token in its own sequence, padding not counted."""
    return (attention_mask.cumsum(1) - 1).clamp_min(0)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    length: int,
    end_id: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    on_step: Callable[[], None] = lambda: None,
) -> Rollouts:
    """Samples one response for each prompt, all in step, with a KV cache.

    Args:
        model: The model that answers.
        prompt_ids: `[B, P]`, padded on the left.
        prompt_mask: `[B, P]`, 0 at padding.
        length: The most tokens a response may have.
        end_id: The token that ends a response; it also fills what follows.
        generator: The source of randomness: the same state gives the same responses.
        temperature: The logits are divided by it; 1 samples the model itself, as on-policy distillation does.
        on_step: Called after every token.

    Returns:
        The rollouts; T is `length`, or less where every response ended before.
    """
    cache = DynamicCache(config=model.config)
    token_ids, mask, unread = prompt_ids, prompt_mask, prompt_ids.shape[1]
    alive = torch.ones(len(prompt_ids), dtype=torch.bool)
    for _ in range(length):
        logits = model(
            input_ids=token_ids[:, -unread:],
            attention_mask=mask,
            position_ids=position_ids(mask)[:, -unread:],
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
        drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        drawn = drawn.where(alive[:, None], end_id)
        token_ids = torch.cat([token_ids, drawn], dim=1)
        mask = torch.cat([mask, alive[:, None].to(mask.dtype)], dim=1)
        alive &= drawn[:, 0] != end_id
        unread = 1
        on_step()
        if not alive.any():
            break
    return Rollouts(token_ids, mask, prompt_ids.shape[1])
