"""How good the student is on held-out prompts: accuracy if there are answers, and its distance to the teacher."""

from __future__ import annotations

import math
from typing import Any

import torch

from .loop import Trainer
from .rollouts import uniforms
from .scoring import response_logits

STREAM = 2**31 - 1  # the key of evaluations' random numbers: the same in every evaluation of every run


@torch.no_grad()
def evaluate(trainer: Trainer) -> dict[str, Any]:
    """Sample `eval_samples` responses to each held-out prompt, at full length, and grade and score them.

    Accuracy is Avg@n, the mean over prompts of the mean grade of a prompt's n responses; its standard error is that of
    the spread between prompts. Both are None without grades. Overlap and KL (in nats) are means over tokens.
    """
    config, accelerator, task = trainer.config, trainer.accelerator, trainer.task
    prompts = config.eval_prompts if task.held_out_count is None else min(config.eval_prompts, task.held_out_count)
    grades = torch.zeros(prompts, dtype=torch.float64, device=trainer.device)
    sums = torch.zeros(4, dtype=torch.float64, device=trainer.device)  # overlap, KL, tokens, finished
    rows = list(range(prompts * config.eval_samples))[accelerator.process_index :: accelerator.num_processes]
    for start in range(0, len(rows), config.eval_batch_size):
        some = rows[start : start + config.eval_batch_size]
        examples = [task.held_out(row // config.eval_samples) for row in some]
        rollouts = trainer.respond(examples, uniforms([STREAM], some, config.maximum_length))
        with trainer.autocast():
            for part in rollouts.mask.sum(1).argsort(descending=True).split(config.micro_batch_size):
                taken = rollouts.take(part)
                scores = trainer.score(response_logits(trainer.student, taken), taken)
                found = scores.overlap.sum(), scores.reverse_kl.sum(), taken.mask.sum(), trainer.finished(taken).sum()
                sums += torch.stack([value.double() for value in found])
        if task.graded:
            for row, grade in zip(some, trainer.grade(examples, rollouts), strict=True):
                grades[row // config.eval_samples] += grade / config.eval_samples
    overlap, divergence, tokens, finished = trainer.total(sums).tolist()
    grades = trainer.total(grades)
    return {
        "accuracy": float(grades.mean()) if task.graded else None,
        "accuracy_se": float(grades.std()) / math.sqrt(prompts) if task.graded and prompts > 1 else None,
        "eval_overlap": overlap / tokens,
        "eval_reverse_kl": divergence / tokens,
        "eval_length_mean": tokens / (prompts * config.eval_samples),
        "eval_finished": finished / (prompts * config.eval_samples),
    }
