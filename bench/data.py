"""The tensors that everything is timed on: logits, candidates, drift, advantages; the same in every run."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

VOCABULARY = 151936
LONG = (64, 12288, 16)  # a training batch's top-k ids
DTYPES = ("float32", "bfloat16", "float16")
ROWS_AT_ONCE = 256  # made in float32, whatever the dtype


@functools.cache
def logits(dtype: str, rows: str, shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor]:
    """Student and teacher. Random rows overlap by about .65 at k=16; in half precision equal logits are common."""
    generator = torch.Generator(device).manual_seed(0)
    pair = [torch.empty((*shape, VOCABULARY), dtype=getattr(torch, dtype), device=device) for _ in range(2)]
    for student_rows, teacher_rows in zip(*(whole.flatten(0, -2).split(ROWS_AT_ONCE) for whole in pair), strict=True):
        student = torch.randn(student_rows.shape, generator=generator, device=device).mul_(2.5)
        teacher = torch.randn(student_rows.shape, generator=generator, device=device).mul_(0.4).add_(student)
        student_rows.copy_(student if rows == "random" else student.sort(-1).values)
        teacher_rows.copy_(teacher if rows == "random" else teacher.sort(-1).values)
    return pair[0], pair[1]


@functools.cache
def like_logits(dtype: str, shape: tuple[int, ...], device: str) -> Tensor:
    """Where the student's logits are copied to."""
    return torch.empty((*shape, VOCABULARY), dtype=getattr(torch, dtype), device=device)


@functools.cache
def token_ids(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(1)).to(device)


@functools.cache
def topk_ids(sets: int, device: str) -> tuple[Tensor, Tensor]:
    """Different ids in a row; about a third of the teacher's are not among the student's."""
    generator = torch.Generator().manual_seed(2)
    shape = (sets, *LONG)
    start = torch.randint(VOCABULARY, (*shape[:-1], 1), generator=generator)
    step = torch.randint(1, VOCABULARY // LONG[2], (*shape[:-1], 1), generator=generator)
    student = (start + step * torch.arange(LONG[2])) % VOCABULARY
    other = (torch.rand(shape, generator=generator) < 0.3) * 7
    return student.to(device), ((student.roll(3, -1) + other) % VOCABULARY).to(device)


@functools.cache
def drift(sets: int, device: str) -> Tensor:
    return (torch.rand((sets, *LONG[:2]), generator=torch.Generator().manual_seed(3)) < 0.02).to(device)


@functools.cache
def candidates(side: str, dtype: str, k: int, shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor]:
    """The k best ids of the student's or the teacher's random logits, and their log-probabilities in float32."""
    pair = logits(dtype, "random", shape, device)
    found = []
    for rows in pair[side == "teacher"].flatten(0, -2).split(ROWS_AT_ONCE):
        top, ids = rows.topk(k)
        found.append((ids, top.float() - rows.float().logsumexp(-1, keepdim=True)))
    ids, logprobs = (torch.cat(parts).view(*shape, k) for parts in zip(*found, strict=True))
    return ids, logprobs


@functools.cache
def advantages(k: int, shape: tuple[int, ...], device: str) -> Tensor:
    return torch.randn((*shape, k), generator=torch.Generator().manual_seed(4)).to(device)


@functools.cache
def weights(shape: tuple[int, ...], device: str) -> Tensor:
    """Of positions, from w_base to w_base + 1 as L is."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(5)) + 0.5).to(device)


def forget() -> None:
    """Give the memory back: a run's logits are gigabytes."""
    for function in (logits, like_logits, token_ids, topk_ids, drift, candidates, advantages, weights):
        function.cache_clear()
