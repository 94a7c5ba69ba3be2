"""Responses sampled from a model: one random stream a response, a KV cache, and no work on rows that have ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

WORTH_DROPPING = 0.8  # rows that have ended leave the KV cache, which copies it, when only this share goes on


class Rollouts(NamedTuple):
    """B responses of up to T tokens, each behind its prompt, which is padded on the left to P tokens."""

    token_ids: Tensor  # [B, P + T] int64
    attention_mask: Tensor  # [B, P + T] int64: 0 at padding and after a response's end
    prompt_length: int  # P

    @property
    def response_ids(self) -> Tensor:
        """Return `[B, T]`."""
        return self.token_ids[:, self.prompt_length :]

    @property
    def mask(self) -> Tensor:
        """Return `[B, T]` bool: True at a response's tokens, the one that ends it included."""
        return self.attention_mask[:, self.prompt_length :].bool()

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Return what models take: the positions of tokens do not count padding."""
        position_ids = positions(self.attention_mask)
        return {"input_ids": self.token_ids, "attention_mask": self.attention_mask, "position_ids": position_ids}

    def to(self, device: torch.device) -> Rollouts:
        """Return the same on a device."""
        return self._replace(token_ids=self.token_ids.to(device), attention_mask=self.attention_mask.to(device))

    def take(self, rows: Tensor) -> Rollouts:
        """Return some of the responses, without the columns that are padding in all of them."""
        ids, mask, start = self.token_ids[rows], self.attention_mask[rows], self.prompt_length
        used = mask.any(0).nonzero()
        first, last = int(used[0]), max(int(used[-1]), start)
        return Rollouts(ids[:, first : last + 1], mask[:, first : last + 1], start - first)


def positions(attention_mask: Tensor) -> Tensor:
    """Return the position of each token in its own sequence, padding not counted."""
    return (attention_mask.cumsum(1) - 1).clamp_min(0)


def uniforms(key: Sequence[int], rows: Sequence[int], length: int) -> Tensor:
    """Return random numbers in [0, 1), float64 `[B, length]`; each row under a key, such as the step, has its stream.

    A response thus does not depend on which others are sampled with it, on how many processes share them, or on what
    was sampled before: nothing has to be saved to continue a run.
    """
    return torch.from_numpy(np.stack([np.random.default_rng([*key, row]).random(length) for row in rows]))


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompt_ids: Tensor,  # [B, P] int64, padded on the left
    prompt_mask: Tensor,  # [B, P], 0 at padding
    *,
    length: int,  # the most tokens of a response; T is less if every response ends before
    end_ids: Sequence[int],  # the tokens that end a response; the first of them also fills what follows
    uniforms: Tensor,  # [B, at least length] in [0, 1): what decides about each token
    temperature: float = 1.0,  # 1 samples the model itself, as on-policy distillation does
    vocab_size: int | None = None,  # ids from here on are never sampled: they pad the head
    on_token: Callable[[], None] = lambda: None,  # called after every token
) -> Rollouts:
    """Sample one response to each prompt, all in step."""
    (count, prompt_length), device = prompt_ids.shape, prompt_ids.device
    token_ids = torch.cat([prompt_ids, prompt_ids.new_full((count, length), end_ids[0])], 1)
    attention_mask = torch.cat([prompt_mask, prompt_mask.new_zeros(count, length)], 1)
    ends, uniforms = torch.tensor(end_ids, device=device), uniforms.to(device)
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(x) is DynamicLayer else x for x in cache.layers]  # type: ignore[no-untyped-call]
    rows = torch.arange(count, device=device)  # those that are still computed, and which of them go on
    going = torch.ones(count, dtype=torch.bool, device=device)
    first_unread = 0
    for end in range(prompt_length, prompt_length + length):
        mask = attention_mask[rows, :end]
        logits = model(
            input_ids=token_ids[rows, first_unread:end],
            attention_mask=mask,
            position_ids=positions(mask)[:, first_unread:],
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1, :vocab_size]
        drawn = draw(logits, uniforms[rows, end - prompt_length], temperature)
        token_ids[rows[going], end] = drawn[going]
        attention_mask[rows[going], end] = 1
        going &= ~torch.isin(drawn, ends)
        first_unread = end
        on_token()
        alive = int(going.sum())
        if alive == 0:
            break
        if alive <= WORTH_DROPPING * len(rows):
            cache.batch_select_indices(going.nonzero()[:, 0])
            rows, going = rows[going], going[going]
    return Rollouts(token_ids[:, : end + 1], attention_mask[:, : end + 1], prompt_length)


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Return the token at which the cumulative probability passes `uniform`: `[B]` int64 of logits `[B, V]`."""
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    place = (uniform * cumulative[:, -1])[:, None]
    return torch.searchsorted(cumulative, place, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)


class GrowingLayer(DynamicLayer):
    """Keys and values `[B, heads, length, head width]` as views of buffers, which are not copied at every token."""

    ROOM = 64  # for tokens to come
    buffers: Sequence[Tensor] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the states of new tokens and return those of all tokens."""
        if not self.buffers:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.buffers = [key_states[..., :0, :], value_states[..., :0, :]]
            self.show(0)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self.buffers[0].shape[-2]:
            room = (0, 0, 0, end + self.ROOM - start)
            self.buffers = [torch.nn.functional.pad(buffer[..., :start, :], room) for buffer in self.buffers]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = states
        return self.show(end)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self.show(self.get_seq_length())

    def show(self, length: int) -> tuple[Tensor, Tensor]:
        """Make the first `length` tokens of the buffers the keys and values."""
        keys, values = (buffer[..., :length, :] for buffer in self.buffers)
        self.keys, self.values = keys, values
        return keys, values
