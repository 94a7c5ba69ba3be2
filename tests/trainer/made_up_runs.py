"""Run folders without training: curves of the shape that runs have, with the noise of their seed."""

import math
import zlib
from dataclasses import replace

import numpy as np

from pruneopd_trainer.config import BANDS, TrainConfig, write_config
from trainer_models import write_lines


def write_run(folder, config, *, until=math.inf, graded=True):
    """Write config.yaml and metrics.jsonl of a run, up to the step `until`."""
    folder.mkdir(parents=True)
    write_config(config, folder / "config.yaml")
    write_lines(folder / "metrics.jsonl", *(step for step in run_metrics(config, graded) if step["step"] <= until))
    return folder


def run_metrics(config, graded=True):
    """The metrics of every step."""
    name = f"{config.method} {config.weights} {config.budget} {config.threshold} {config.match} {config.w_drop}"
    rng = np.random.default_rng([zlib.crc32(name.encode()), config.seed])
    time_s, length = 0.0, config.initial_length
    adaptive = config.method == "prune" and config.budget
    depth = (np.arange(BANDS) + 0.5) / BANDS
    steps = [{"step": 0, "method": config.method, "time_s": 0.0, **evaluation(rng, config, 0.0, graded)}]
    for step in range(1, config.steps + 1):
        progress = step / config.steps * rng.normal(0.9, 0.05)
        length = length + config.length_step if adaptive else config.maximum_length
        tokens = config.batch_size * length // 2
        counts = np.where(depth * config.maximum_length < length, tokens // BANDS, 0)
        overlap = np.clip(0.8 - 0.3 * depth * (1 - progress) + rng.normal(0, 0.02, BANDS), 0, 1)
        weight = config.w_base + np.clip(1 - depth / (0.2 + progress), 0, 1) if adaptive else np.ones(BANDS)
        time_s += 0.6 + tokens * 3.1e-4
        metrics = {
            "step": step, "method": config.method, "time_s": time_s, "tokens_generated": tokens,
            "tokens_kept": tokens // 2, "response_length_mean": length / 2, "budget": length,
            "overlap": float((overlap * counts).sum() / counts.sum()), "peak_memory_mib": 600 + 0.8 * length,
            "effective_length_mean": length / 4, "band_tokens": counts.tolist(),
            "band_overlap": [float(o) if n else None for o, n in zip(overlap, counts, strict=True)],
            "band_weight": [float(w) if n else None for w, n in zip(weight, counts, strict=True)],
        }  # fmt: skip
        if step % config.eval_every == 0 or step == config.steps:
            metrics |= evaluation(rng, config, progress, graded)
        steps.append(metrics)
    return steps


def evaluation(rng, config, progress, graded):
    """What an evaluation finds."""
    responses = config.eval_prompts * config.eval_samples
    accuracy = float(rng.binomial(responses, 0.12 + 0.6 * np.clip(progress, 0, 1)) / responses)
    return {
        "accuracy": accuracy if graded else None,
        "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / responses) if graded else None,
        "eval_overlap": float(0.68 + 0.2 * progress + rng.normal(0, 0.005)),
        "eval_reverse_kl": float(0.9 * math.exp(-1.6 * progress) + rng.normal(0, 0.01)),
    }


def comparison(folder, *, seeds=(0, 1, 2), graded=True, **methods):
    """Write runs of several methods, given by label as changes of the defaults."""
    for label, changes in methods.items():
        for seed in seeds:
            write_run(folder / label / f"seed-{seed}", replace(TrainConfig(), seed=seed, **changes), graded=graded)
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
THRESHOLDS = {f"prune_{threshold}": {"threshold": threshold} for threshold in (0.5, 0.6, 0.8, 0.9)}
