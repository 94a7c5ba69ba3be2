"""How drift judged by the sampled token's log-ratio agrees with drift judged by overlap, on real models.

python -m bench sampled_drift            measures, minutes on two cores; writes the result and the page's table
python -m bench sampled_drift table      writes the saved result into the documentation

Students are SmolLM2-135M-Instruct without the layers that it needs least; they answer the demonstration's questions,
and the whole model scores every token. Both kinds of drift are of the same tokens.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

import pruneopd_kernels as po
from bench.report import rows as results
from bench.report.tables import between_markers, markdown_table
from pruneopd_lab.prompts import PROMPTS
from pruneopd_lab.score import hidden_states
from pruneopd_lab.students import least_needed_layers, load_teacher, remove_layers, smollm2_folder
from pruneopd_trainer.models import encode
from pruneopd_trainer.rollouts import Rollouts, sample, uniforms

FILE = results.FOLDER / "sampled_drift.json"
PAGE = Path(__file__).parents[2] / "docs" / "integrations" / "sampled_token.md"
MARKS = "<!-- sampled_drift:begin -->", "<!-- sampled_drift:end -->"
REMOVED = (1, 4, 10)
CHUNK = 32
"""Positions of each response whose logits exist at a time."""
THRESHOLDS = (0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Nats."""
Row = dict[str, Any]


class Drift(NamedTuple):
    """What both kinds of drift are judged by, of B responses of T tokens."""

    by_overlap: Tensor
    """bool `[B, T]` (eq. 7)."""
    log_ratio: Tensor
    """float64 `[B, T]`: log p - log q of the sampled token, in nats."""
    mask: Tensor
    """bool `[B, T]`."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench sampled_drift", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("command", nargs="?", choices=["measure", "table"], default="measure")
    parser.add_argument("--length", type=int, default=160, help="the most tokens a response may have")
    parser.add_argument("--seeds", type=int, default=2, help="responses to each question")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    if options.command == "measure":
        torch.set_num_threads(options.threads)
        result = measure(options.length, options.seeds)
        options.file.write_text(json.dumps(result, indent=1) + "\n")
    return write(json.loads(options.file.read_text()), options.page)


@torch.no_grad()
def measure(length: int, seeds: int) -> Row:
    """Samples from each student, scores with the teacher, and compares at every threshold."""
    config = po.PruneConfig(w_drop=0.05)  # 20 drifts exhaust a response, so that E falls within it
    teacher, tokenizer = load_teacher(smollm2_folder())
    prompt_ids, prompt_mask = encode(tokenizer, PROMPTS * seeds)
    students = []
    for block in least_needed_layers(teacher, prompt_ids, prompt_mask, REMOVED):
        start = time.perf_counter()
        student = remove_layers(teacher, block)
        rollouts = sample(
            student, prompt_ids, prompt_mask, length=length, end_ids=[tokenizer.eos_token_id],
            uniforms=uniforms([0], range(len(prompt_ids)), length),
        )  # fmt: skip
        drift = score(student, teacher, rollouts, config)
        rows = [agreement(drift, max_log_ratio, config) for max_log_ratio in THRESHOLDS]
        name = f"{len(block)} layer{'s' if len(block) > 1 else ''} removed"
        students.append({"student": name, **ranking(drift), "sweep": rows})
        print(f"{name}: {int(drift.mask.sum())} tokens, {time.perf_counter() - start:.0f} s", flush=True)
    return {
        "prompts": len(PROMPTS), "responses": len(prompt_ids), "length": length, "k": config.k,
        "threshold": config.threshold, "w_drop": config.w_drop, **results.head("sampled drift"), "students": students,
    }  # fmt: skip


def score(student: PreTrainedModel, teacher: PreTrainedModel, rollouts: Rollouts, config: po.PruneConfig) -> Drift:
    """Both kinds of drift of every token, in chunks along the responses."""
    masks, ids = rollouts.mask.split(CHUNK, dim=1), rollouts.response_ids.split(CHUNK, dim=1)
    students, teachers = (
        map(model.get_output_embeddings(), hidden_states(model, rollouts).split(CHUNK, dim=1))
        for model in (student, teacher)
    )
    overlaps, ratios = [], []
    for student_logits, teacher_logits, mask, token_ids in zip(students, teachers, masks, ids, strict=True):
        stats = po.token_stats(student_logits, teacher_logits, mask, token_ids=token_ids, k=config.k)
        trust = po.reliability_from_topk(
            stats.student_topk_ids, stats.teacher_topk_ids, mask, threshold=config.threshold
        )
        overlaps.append(trust.drift)
        ratios.append(stats.student_token_logprob.double() - stats.teacher_token_logprob.double())
    return Drift(torch.cat(overlaps, 1), torch.cat(ratios, 1), rollouts.mask)


def agreement(drift: Drift, max_log_ratio: float, config: po.PruneConfig) -> Row:
    """Drift by overlap is the truth that drift by the sampled token is held to.

    Precision is the share of the sampled token's drifts that are drifts by overlap; recall the share of drifts by
    overlap that the sampled token shows. Both kinds are then followed along the responses with the same w_drop, and
    with one that is scaled by the ratio of how often they occur.
    """
    mask = drift.mask
    sampled = po.sampled_drift(drift.log_ratio, torch.zeros_like(drift.log_ratio), mask, max_log_ratio=max_log_ratio)
    truth, told = drift.by_overlap[mask], sampled[mask]
    both = (truth & told).sum().item()
    scale = truth.sum().item() / max(told.sum().item(), 1)

    def follow(events: Tensor, scale: float = 1.0) -> po.ReliabilityFromDrift:
        return po.reliability_from_drift(
            events, mask, w_drop=config.w_drop * scale, w_base=config.w_base, eps=config.eps
        )

    by_overlap, by_token, scaled = follow(drift.by_overlap), follow(sampled), follow(sampled, scale)
    lengths = by_overlap.effective_length.double()
    return {
        "max_log_ratio": max_log_ratio,
        "rate_by_overlap": _digits(truth.double().mean()),
        "rate_by_token": _digits(told.double().mean()),
        "accuracy": _digits((truth == told).double().mean()),
        "precision": _digits(both / max(told.sum().item(), 1)),
        "recall": _digits(both / max(truth.sum().item(), 1)),
        "count_correlation": _digits(correlation(by_overlap.drift_count[mask], by_token.drift_count[mask])),
        "effective_length_ratio": _digits(by_token.effective_length.double().mean() / lengths.mean()),
        "scaled_effective_length_ratio": _digits(scaled.effective_length.double().mean() / lengths.mean()),
        "scaled_weight_difference": _digits((scaled.weight - by_overlap.weight)[mask].abs().mean()),
        "effective_length_correlation": _digits(correlation(lengths, scaled.effective_length)),
    }


def ranking(drift: Drift) -> Row:
    """What does not depend on a threshold: how well the log-ratio tells drifts by overlap from the rest."""
    truth, ratio = drift.by_overlap[drift.mask], drift.log_ratio[drift.mask]
    order = ratio.argsort()
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(1, len(order) + 1)).double()
    drifts, rest = truth.sum().item(), (~truth).sum().item()
    area = (rank[truth].sum().item() - drifts * (drifts + 1) / 2) / max(drifts * rest, 1)
    quantiles = torch.quantile(ratio, torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64))
    return {
        "tokens": len(truth),
        "area_under_roc": _digits(area),
        "log_ratio_quantiles": {
            name: _digits(value) for name, value in zip(("50", "90", "99"), quantiles, strict=True)
        },
        "matching_threshold": _digits(torch.quantile(ratio, 1 - drifts / len(truth))),
    }


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's; NaN where one of them does not vary."""
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])


def _digits(value: float | Tensor) -> float | None:
    """Four of them; None for NaN, which JSON does not have."""
    return None if math.isnan(float(value)) else float(f"{float(value):.4g}")


def write(result: Row, page: Path) -> int:
    """Put the tables of a result between the page's markers."""
    return between_markers(page, tables(result), *MARKS)


COLUMNS = {
    "max_log_ratio": "threshold",
    "rate_by_token": "drifts",
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "count_correlation": "r of C",
    "effective_length_ratio": "E / E by overlap",
    "scaled_effective_length_ratio": "the same, scaled",
    "effective_length_correlation": "r of E, scaled",
    "scaled_weight_difference": "difference of L, scaled",
}


def tables(result: Row) -> str:
    """A table for each student, with a line of what does not depend on the threshold."""
    columns = {head: functools.partial(_cell, name) for name, head in COLUMNS.items()}
    parts = []
    for student in result["students"]:
        rate, quantiles = student["sweep"][0]["rate_by_overlap"], student["log_ratio_quantiles"]
        facts = [
            f"**{student['student']}**: {student['tokens']} tokens, {rate:.0%} of them drift by overlap",
            f"the log-ratio is {quantiles['50']:.2f} in the median, above {quantiles['90']:.2f} at one token in ten, "
            f"above {quantiles['99']:.2f} at one in a hundred",
            f"area under the ROC curve {student['area_under_roc']:.2f}",
            f"as many tokens drift as by overlap at a threshold of {student['matching_threshold']:.3f}",
        ]
        parts += [markdown_table("; ".join(facts) + ".", columns, student["sweep"]), ""]
    parts.append(
        f"{result['responses']} responses of up to {result['length']} tokens to {result['prompts']} questions; "
        f"k={result['k']}, an overlap below {result['threshold']:g} is drift, w_drop={result['w_drop']:g}; "
        f"torch {result['torch']}, {result['date'][:10]}."
    )
    return "\n".join(parts)


def _cell(name: str, row: Row) -> str:
    return "" if row[name] is None else f"{row[name]:.2f}"
