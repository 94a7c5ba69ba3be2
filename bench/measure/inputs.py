"""The tensors that everything is timed on: logits, candidates, drift, advantages; the same in every run."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

VOCABULARY = 151936
LONG = (64, 12288, 16)  # a training batch's top-k ids
DTYPES = ("float32", "bfloat16", "float16")
ROWS_AT_ONCE = 256  # made in float32, regardless of the dtype
PER_POSITION = ("token_ids", "weight")  # of what an operator is given; all else has k values a position

Shape = tuple[int, ...]


@functools.cache
def logits(dtype: str, rows: str, shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """Return student and teacher. Random rows overlap by about .65 at k=16; half precision has many equal logits."""
    generator = torch.Generator(device).manual_seed(0)
    pair = [torch.empty((*shape, VOCABULARY), dtype=getattr(torch, dtype), device=device) for _ in range(2)]
    for student_rows, teacher_rows in zip(*(whole.flatten(0, -2).split(ROWS_AT_ONCE) for whole in pair), strict=True):
        student = torch.randn(student_rows.shape, generator=generator, device=device).mul_(2.5)
        teacher = torch.randn(student_rows.shape, generator=generator, device=device).mul_(0.4).add_(student)
        student_rows.copy_(student if rows == "random" else student.sort(-1).values)
        teacher_rows.copy_(teacher if rows == "random" else teacher.sort(-1).values)
    return pair[0], pair[1]


@functools.cache
def like_logits(dtype: str, shape: Shape, device: str) -> Tensor:
    """Return a place to copy the student's logits to."""
    return torch.empty((*shape, VOCABULARY), dtype=getattr(torch, dtype), device=device)


@functools.cache
def topk_ids(sets: int, device: str) -> tuple[Tensor, Tensor]:
    """Return different ids in a row; about a third of the teacher's are not among the student's."""
    generator = torch.Generator().manual_seed(2)
    shape = (sets, *LONG)
    start = torch.randint(VOCABULARY, (*shape[:-1], 1), generator=generator)
    step = torch.randint(8, VOCABULARY // LONG[2], (*shape[:-1], 1), generator=generator)
    student = (start + step * torch.arange(LONG[2])) % VOCABULARY
    other = (torch.rand(shape, generator=generator) < 0.3) * 7  # less than any step: all stay different
    return student.to(device), ((student.roll(3, -1) + other) % VOCABULARY).to(device)


@functools.cache
def drift(sets: int, device: str) -> Tensor:
    return (torch.rand((sets, *LONG[:2]), generator=torch.Generator().manual_seed(3)) < 0.02).to(device)


@functools.cache
def candidates(side: str, dtype: str, k: int, shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """Return the k best ids of one side's random logits, and their log-probabilities in float32."""
    pair = logits(dtype, "random", shape, device)
    found = []
    for rows in pair[side == "teacher"].flatten(0, -2).split(ROWS_AT_ONCE):
        top, ids = rows.topk(k)
        found.append((ids, top.float() - rows.float().logsumexp(-1, keepdim=True)))
    ids, logprobs = (torch.cat(parts).view(*shape, k) for parts in zip(*found, strict=True))
    return ids, logprobs


@functools.cache
def given(name: str, dtype: str, k: int, shape: Shape, device: str) -> Tensor:
    """Return what an operator is given besides its large inputs, by the name of the parameter."""
    if name == "token_ids":
        return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(1)).to(device)
    if name == "weight":  # from w_base to w_base + 1, as L
        return (torch.rand(shape, generator=torch.Generator().manual_seed(5)) + 0.5).to(device)
    if name == "advantages":
        return torch.randn((*shape, k), generator=torch.Generator().manual_seed(4)).to(device)
    ids, logprobs = candidates("teacher" if name.startswith("teacher") else "student", dtype, k, shape, device)
    return ids if name.endswith("ids") else logprobs


def given_like(name: str, k: int, shape: Shape, device: str = "meta") -> Tensor:
    """Return the same in shape and dtype: different ids, and zeros."""
    shape = shape if name in PER_POSITION else (*shape, k)
    if name.endswith("ids"):
        return torch.arange(shape[-1], device=device).expand(shape)
    return torch.zeros(shape, device=device)


CACHED = (logits, like_logits, topk_ids, drift, candidates, given)


def forget() -> None:
    """Give the memory back: a run's logits are gigabytes."""
    for function in CACHED:
        function.cache_clear()
