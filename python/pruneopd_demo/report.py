"""What a run found: as numbers in summary.json, and as a table on the terminal."""

import itertools
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pruneopd_kernels import PruneConfig
from pruneopd_trainer.rollouts import Rollouts

from .budget import replay
from .scoring import Scores, implementation

BANDS = 4


class Result(NamedTuple):
    """One student's responses and their scores."""

    name: str
    change: str
    rollouts: Rollouts
    scores: Scores


def depth_bands(length: int) -> list[tuple[int, int]]:
    """Quarters of the response, as (first position, one past the last), from 0."""
    edges = [round(length * band / BANDS) for band in range(BANDS + 1)]
    return list(itertools.pairwise(edges))


def mean(values: Tensor, mask: Tensor) -> float | None:
    """The mean where `mask`, None where nothing is."""
    return values[mask].double().mean().item() if mask.any() else None


def summarise_student(result: Result, length: int) -> dict[str, Any]:
    """The numbers of one student, means taken over tokens."""
    scores = result.scores
    mask, lengths = scores.mask, scores.mask.sum(1)
    budget = replay(scores.effective_length, lengths, length)
    return {
        "name": result.name,
        "change": result.change,
        "tokens": int(lengths.sum()),
        "mean_length": lengths.double().mean().item(),
        "mean_overlap": mean(scores.overlap, mask),
        "drift_rate": mean(scores.drift, mask),
        "mean_effective_length": scores.effective_length.double().mean().item(),
        "mean_weight_by_band": [mean(scores.weight[:, a:b], mask[:, a:b]) for a, b in depth_bands(length)],
        "budget_length": budget.length,
        "tokens_saved": budget.saved,
        "operator_s": scores.operator_s,
        "eager_s": scores.eager_s,
        "positions_compared": scores.positions_compared,
        "largest_reward_difference": scores.reward_difference,
    }


def summarise(
    results: Sequence[Result], config: PruneConfig, length: int, seed: int, model: str, seconds: float
) -> dict[str, Any]:
    """Everything a run found, ready for JSON."""
    students = [summarise_student(result, length) for result in results]
    operator_s = sum(student["operator_s"] for student in students)
    eager_s = sum(student["eager_s"] for student in students)
    return {
        "model": model,
        "responses": len(results[0].scores.mask),
        "length": length,
        "seed": seed,
        "config": asdict(config),
        "bands": [[a + 1, b] for a, b in depth_bands(length)],
        "students": students,
        "scoring": {
            "implementation": implementation(),
            "operator_s": operator_s,
            "eager_s": eager_s,
            "speedup": eager_s / operator_s,
            "positions": sum(student["tokens"] for student in students),
            "positions_compared": sum(student["positions_compared"] for student in students),
            "largest_reward_difference": max(student["largest_reward_difference"] for student in students),
        },
        "seconds": seconds,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def write(summary: dict[str, Any], out: Path) -> Path:
    """Writes summary.json and returns its path."""
    path = out / "summary.json"
    path.write_text(json.dumps(summary, indent=2) + "\n")
    return path


def show(summary: dict[str, Any], written: Sequence[Path]) -> None:
    """Prints the table, the speed of scoring, and where the files are."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    config, scoring = summary["config"], summary["scoring"]
    table = Table(
        title=f"{summary['responses']} responses of at most {summary['length']} tokens from each student, "
        f"scored against {summary['model']}",
        caption=settings(config),
    )
    table.add_column("student")
    bands = [f"weight\n{first}-{last}" for first, last in summary["bands"]]
    for heading in ["overlap", "drift\nrate", "length", "effective\nlength", *bands, "budget\nM", "tokens\nsaved"]:
        table.add_column(heading, justify="right")
    for student in summary["students"]:
        table.add_row(
            f"{student['name']}\n[dim]{student['change']}[/dim]",
            number(student["mean_overlap"]),
            number(student["drift_rate"]),
            f"{student['mean_length']:.0f}",
            f"{student['mean_effective_length']:.0f}",
            *map(number, student["mean_weight_by_band"]),
            f"{student['budget_length']:.0f}",
            f"{student['tokens_saved']:.0%}",
        )
    console.print(table)
    rest = scoring["positions"] - scoring["positions_compared"]
    ties = f" ({rest} more lie behind a tie at the k-th place)" if rest else ""
    console.print(
        "Means are over tokens, lengths over responses. Budget M: where ResponseBudget settles with these responses\n"
        "as every batch. Tokens saved: the share of all tokens beyond M, which it would not have sampled.\n\n"
        f"Scoring {scoring['positions']} tokens took the operators {scoring['operator_s']:.2f} s with "
        f"{scoring['implementation']} and eager PyTorch {scoring['eager_s']:.2f} s: "
        f"[bold]{scoring['speedup']:.1f} times faster[/bold].\n"
        f"They agree at all {scoring['positions_compared']} positions compared{ties}: overlap exactly, "
        f"rewards within {scoring['largest_reward_difference']:.1g}.\n"
        f"The run took {summary['seconds']:.0f} s and wrote\n  " + "\n  ".join(map(str, written))
    )


def settings(config: dict[str, Any]) -> str:
    """The hyperparameters in one line, and which of them are not the paper's."""
    paper = asdict(PruneConfig())
    names = ("k", "threshold", "w_drop", "w_base")
    changed = [f"{name} is {paper[name]} in the paper" for name in names if config[name] != paper[name]]
    values = ", ".join(f"{name} = {config[name]:g}" for name in names)
    return f"{values} ({', '.join(changed) or 'as in the paper'})"


def number(value: float | None) -> str:
    """Two decimals, or a dash where there is nothing to average."""
    return "-" if value is None else f"{value:.2f}"
