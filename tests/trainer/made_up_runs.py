"""Run folders without training: curves of the shape that runs have, with the noise of their seed."""

import json
import math
import zlib
from dataclasses import replace

import numpy as np

from pruneopd_trainer.config import TrainConfig, write_config

BANDS = 16
SPEED = {"opd": 0.75, "truncate": 0.8, "random": 0.7, "prune": 1.0, "prefix": 0.85, "prune+grpo": 1.05}
"""How fast a student of the method learns from a step."""


def write_run(folder, config, *, until=None, graded=True):
    """Writes config.yaml and metrics.jsonl of a run, up to the step `until`."""
    folder.mkdir(parents=True)
    write_config(config, folder / "config.yaml")
    lines = [json.dumps(metrics) for metrics in run_metrics(config, graded) if metrics["step"] <= (until or math.inf)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def run_metrics(config, graded=True):
    """The metrics of every step."""
    name = f"{config.method} {config.weights} {config.budget} {config.threshold} {config.match} {config.w_drop}"
    rng = np.random.default_rng([zlib.crc32(name.encode()), config.seed])
    full = config.maximum_length
    adaptive = config.method in ("prune", "prune+grpo") and config.budget
    length = config.initial_length if adaptive else full
    learned, time_s = 0.0, 0.0
    speed = SPEED[config.method] * (1 if config.weights else 0.85) * (0.02 / config.w_drop) ** 0.1
    speed *= math.exp(-20 * (config.threshold - 0.7) ** 2)
    steps = [{"step": 0, "method": config.method, "time_s": 0.0, **evaluation(rng, config, 0.0, graded)}]
    for step in range(1, config.steps + 1):
        if config.method == "truncate":
            length = config.truncate_length
        if config.method == "prefix":
            share = (step - 1) / max(config.steps - 1, 1)
            length = round(config.initial_length + (config.final_length - config.initial_length) * share)
        learned += speed * (0.6 + 0.4 * length / full) / config.steps * rng.normal(1, 0.1)
        progress = 1 - math.exp(-2.5 * learned)
        lengths = np.minimum(rng.lognormal(5.7 - 0.7 * progress, 0.5, config.batch_size).astype(int) + 1, length)
        effective = np.minimum(lengths, rng.lognormal(4.3 + 1.3 * progress - 4 * (config.threshold - 0.7), 0.5,
                                                      config.batch_size).astype(int) + 1)  # fmt: skip
        tokens = int(lengths.sum())
        time_s += 0.6 + tokens * 3.1e-4 * rng.normal(1, 0.03)
        hit_ratio = float((effective >= length - config.margin).mean())
        if adaptive:
            grown = hit_ratio >= config.hit_ratio
            length = min(length + config.length_step, full) if grown else max(length - 3, config.minimum_length)
        counts, overlap, weight = bands(rng, config, lengths, effective, progress)
        total = counts.sum()
        metrics = {
            "step": step,
            "method": config.method,
            "time_s": time_s,
            "tokens_generated": tokens,
            "tokens_kept": int(tokens * (0.45 if config.method == "random" else 1)),
            "response_length_mean": float(lengths.mean()),
            "budget": length,
            "hit_ratio": hit_ratio,
            "overlap": float((overlap * counts).sum() / total),
            "drift_rate": 0.2,
            "first_drift_mean": 20.0,
            "effective_length_mean": float(effective.mean()),
            "weight_mean": float((weight * counts).sum() / total),
            "acceptance": 0.8,
            "entropy_gap": 0.1,
            "loss": -0.1,
            "grad_norm": 1.0,
            "learning_rate": config.learning_rate,
            "peak_memory_mib": 600 + 0.8 * length,
            "band_tokens": counts.tolist(),
            "band_overlap": [float(o) if n else None for o, n in zip(overlap, counts, strict=True)],
            "band_weight": [float(w) if n else None for w, n in zip(weight, counts, strict=True)],
        }
        if step % config.eval_every == 0 or step == config.steps:
            metrics |= evaluation(rng, config, progress, graded)
        steps.append(metrics)
    return steps


def bands(rng, config, lengths, effective, progress):
    """Tokens, overlap and weight by band of position."""
    width = config.maximum_length / BANDS
    starts = np.arange(BANDS) * width
    counts = np.clip(lengths[:, None] - starts, 0, width).sum(0).round()
    depth = (starts + width / 2) / config.maximum_length
    noise = rng.normal(0, 1, BANDS) / np.sqrt(np.maximum(counts, 1))
    overlap = np.clip(0.9 - 0.35 * depth * (1 - progress) - 0.12 * (1 - progress) + 0.3 * noise, 0, 1)
    weight = np.ones(BANDS)
    if config.method in ("prune", "prune+grpo") and config.weights:
        reach = effective.mean() / config.maximum_length
        weight = np.clip(config.w_base + np.clip(1 - depth / (2 * reach), 0, 1) + 0.2 * noise, config.w_base, 1.5)
    return counts, overlap, weight


def evaluation(rng, config, progress, graded):
    """What an evaluation finds."""
    responses = config.eval_prompts * config.eval_samples
    accuracy = float(rng.binomial(responses, 0.12 + 0.6 * progress) / responses)
    return {
        "accuracy": accuracy if graded else None,
        "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / responses) if graded else None,
        "eval_overlap": float(0.68 + 0.2 * progress + rng.normal(0, 0.005)),
        "eval_reverse_kl": float(0.9 * math.exp(-1.6 * progress) + rng.normal(0, 0.01)),
        "eval_length_mean": float(260 - 120 * progress),
        "eval_finished": float(0.4 + 0.5 * progress),
    }


def comparison(folder, *, seeds=(0, 1, 2), base=None, graded=True, **methods):
    """Writes runs of several methods, given by label as changes of `base`."""
    base = base or TrainConfig()
    for label, changes in methods.items():
        for seed in seeds:
            write_run(folder / label / f"seed-{seed}", replace(base, seed=seed, **changes), graded=graded)
    return folder


METHODS = {
    "opd": {"method": "opd"},
    "prune": {},
    "prune_no_weights": {"weights": False},
    "prune_slow": {"w_drop": 0.05},
    "random_mass": {"method": "random", "match": "mass"},
    "truncate": {"method": "truncate"},
    "prefix": {"method": "prefix"},
}
THRESHOLDS = {f"prune_{threshold}": {"threshold": threshold} for threshold in (0.5, 0.6, 0.7, 0.8, 0.9)}
