"""How good the student is on held-out prompts: accuracy where there are answers, and its distance to the teacher."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .loop import Trainer
from .rollouts import uniforms
from .scoring import response_logits

STREAM = 2**31 - 1
"""The key of the random numbers of evaluations: each evaluation of each run has the same, so differences are seen."""


@torch.no_grad()
def evaluate(trainer: Trainer) -> dict[str, Any]:
    """Samples `eval_samples` responses to each held-out prompt, at full length, and grades and scores them.

    Returns:
        accuracy: Avg@n, the mean over prompts of the mean grade of a prompt's n responses; None without answers.
        accuracy_se: its standard error, from the spread between prompts.
        eval_overlap, eval_reverse_kl: means over tokens; KL(student || teacher) in nats.
        eval_length_mean: tokens a response.
        eval_finished: the share of responses that end by themselves.
    """
    config, accelerator = trainer.config, trainer.accelerator
    prompts = config.eval_prompts
    if trainer.task.held_out_count is not None:
        prompts = min(prompts, trainer.task.held_out_count)
    grades = torch.zeros(prompts, dtype=torch.float64, device=trainer.device)
    sums = torch.zeros(4, dtype=torch.float64, device=trainer.device)  # overlap, KL, tokens, finished
    rows = list(range(prompts * config.eval_samples))[accelerator.process_index :: accelerator.num_processes]
    for some in chunks(rows, config.eval_batch_size):
        examples = [trainer.task.held_out(row // config.eval_samples) for row in some]
        rollouts = trainer.respond(examples, uniforms([STREAM], some, config.maximum_length))
        with trainer.autocast():
            for part in rollouts.mask.sum(1).argsort(descending=True).split(config.micro_batch_size):
                taken = rollouts.take(part)
                scores = trainer.score(response_logits(trainer.student, taken), taken)
                found = scores.overlap.sum(), scores.reverse_kl.sum(), taken.mask.sum(), trainer.finished(taken).sum()
                sums += torch.stack([value.double() for value in found])
        if trainer.task.graded:
            for row, grade in zip(some, trainer.grade(examples, rollouts), strict=True):
                grades[row // config.eval_samples] += grade / config.eval_samples
    overlap, divergence, tokens, finished = trainer.total(sums).tolist()
    accuracy, error = mean_and_error(trainer.total(grades)) if trainer.task.graded else (None, None)
    return {
        "accuracy": accuracy,
        "accuracy_se": error,
        "eval_overlap": overlap / tokens,
        "eval_reverse_kl": divergence / tokens,
        "eval_length_mean": tokens / (prompts * config.eval_samples),
        "eval_finished": finished / (prompts * config.eval_samples),
    }


def mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """The mean of `[n]` and its standard error, which one value alone does not have."""
    if len(values) == 1:
        return float(values[0]), None
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def chunks(rows: list[int], size: int) -> Iterator[list[int]]:
    """Consecutive parts of at most `size`."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
