"""Every hyperparameter of a run, and where their values come from: preset, YAML file, command line."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from pruneopd_kernels import PruneConfig
from pruneopd_kernels.checks import Metric, RewardWeight
from pruneopd_kernels.rewards import Strategy

from .errors import TrainerError, reason, shown

Method = Literal["opd", "truncate", "random", "prune", "prefix", "prune+grpo"]
Match = Literal["tokens", "mass"]
Precision = Literal["auto", "float32", "bfloat16"]

BANDS = 16  # equal bands of position, from 0 to the maximum length, for which overlap and weight are logged


@dataclass(frozen=True)
class TrainConfig:
    """Every hyperparameter of a run; lengths are in tokens. The defaults are those of the preset `tiny`."""

    # --- what is trained on what
    preset: Literal["tiny", "smollm2"] = "tiny"  # The source of values that neither the command line nor a file gives.
    pair: str = "low"  # Which student of the preset: low, high or bilingual (tiny); drop1, drop4 or drop10 (smollm2).
    student: Path | None = None  # A model folder in place of the preset's student.
    teacher: Path | None = None  # A model folder in place of the preset's teacher.
    data: Path | None = None  # JSONL of {"prompt", "answer"}, not the preset's task; without answers nothing is graded.
    seed: int = 0  # Of the prompts and the sampling; the same seed gives every method the same prompts.

    # --- the method
    method: Method = "prune"
    """opd: full length; truncate: a fixed length; random: as much as prune would keep, anywhere; prune; prefix: a
    length that grows linearly; prune+grpo: prune, and the group advantage where reliability has run out."""
    match: Match = "tokens"  # `random` keeps as much as prune would of the same responses: tokens, or reward mass.
    weights: bool = True  # Whether prune scales rewards by their weight L (eq. 11).
    budget: bool = True  # Whether prune adapts the length M (Algorithm 1, lines 12-19).

    # --- drift, reliability, rewards: `pruneopd_kernels.PruneConfig`
    k: int = 16  # Candidates per position.
    threshold: float = 0.7  # A position drifts where its overlap is below this (eq. 7).
    w_drop: float = 0.01  # Reliability lost with each drift (eq. 9): E is about 1 / (w_drop x drift rate).
    w_base: float = 0.5  # Added to the reliability to give the weight L (eq. 10).
    top_p: float = 0.95  # Mass of the teacher's nucleus (eq. 14).
    eps: float = 1e-8  # A position counts towards the effective length where its reliability exceeds this (eq. 12).
    metric: Metric = "overlap"  # What decides about drift.
    strategy: Strategy = "student"  # Whose candidates are rewarded.
    reward_weight: RewardWeight = "student"  # By whose probabilities rewards are weighted.

    # --- lengths: `pruneopd_kernels.ResponseBudget`
    initial_length: int = 85  # M at the first step; also where `prefix` begins.
    minimum_length: int = 40  # M never falls below this.
    maximum_length: int = 512  # The most tokens that a response has, in every method and in evaluations.
    length_step: int = 8  # By how much M changes.
    margin: int = 10  # How far short of M a response may stay reliable and still count as having used it.
    hit_ratio: float = 0.1  # The share of such responses from which M grows.
    patience: int = 3  # After how many steps without growth M shrinks.
    truncate_length: int = 128  # The length of `truncate`.
    final_length: int = 256  # The length of `prefix` at the last step.

    # --- the optimiser
    steps: int = 30  # Updates of the student.
    batch_size: int = 32  # Responses in a step, over all processes.
    micro_batch_size: int = 16  # Responses in one forward and backward pass of a process.
    group_size: int = 1  # Responses to the same prompt; `prune+grpo` needs at least 2.
    learning_rate: float = 1.5e-4  # AdamW's, after the warm-up.
    warmup_steps: int = 5  # Steps over which the learning rate grows linearly.
    weight_decay: float = 0.0  # AdamW's.
    max_grad_norm: float = 1.0  # Gradients are clipped to this norm.
    temperature: float = 1.0  # Of sampling, and of both models' distributions.
    group_advantage: float = 0.1  # Factor of `prune+grpo`'s group advantage, to match the size of the rewards.
    precision: Precision = "auto"  # Of the student's passes; auto: bfloat16 if the processor computes in it.
    teacher_precision: Precision = "auto"  # Of the teacher; auto: as its folder has it.
    teacher_device: str | None = None  # Where the teacher lives, such as cuda:1; None: beside the student.

    # --- evaluation, checkpoints, logs
    eval_every: int = 10  # Steps between evaluations; there is also one before the first step and after the last.
    eval_prompts: int = 128  # Held-out prompts, the same in every evaluation.
    eval_samples: int = 1  # Responses to each held-out prompt: accuracy is Avg@n.
    eval_batch_size: int = 64  # Responses that are sampled at a time in evaluations.
    save_every: int = 10  # Steps between checkpoints; there is one after the last step as well.
    keep_checkpoints: int = 2  # The newest so many are kept.
    tracker: Literal["none", "trackio", "wandb"] = "none"  # Beside metrics.jsonl and TensorBoard; must be installed.

    def __post_init__(self) -> None:
        """Raise TrainerError for a value that is out of its range."""

        def need(name: str, allowed: bool, rule: str) -> None:
            if not allowed:
                raise TrainerError(f"TrainConfig: {name} must {rule}, got {shown(getattr(self, name))}")

        for name, least in _AT_LEAST.items():
            need(name, getattr(self, name) >= least, f"be at least {least}")
        need("seed", self.seed <= MAX_SEED, f"be at most {MAX_SEED}")
        for name in ("learning_rate", "max_grad_norm", "temperature"):
            need(name, 0 < getattr(self, name) < math.inf, "be finite and > 0")
        for name in ("weight_decay", "group_advantage"):
            need(name, 0 <= getattr(self, name) < math.inf, "be finite and >= 0")
        for name in ("learning_rate", "max_grad_norm", "temperature", "weight_decay", "group_advantage"):
            need(name, getattr(self, name) <= LARGEST, f"be at most {LARGEST:g}")
        for name, choices in _CHOICES.items():
            need(name, getattr(self, name) in choices, f"be one of {', '.join(choices)}")
        most = self.maximum_length
        for name, method in _LENGTHS.items():
            used = method in (None, self.method)
            need(name, not used or getattr(self, name) <= most, f"be at most maximum_length = {most}")
        least = self.minimum_length
        need("initial_length", self.initial_length >= least, f"be at least minimum_length = {least}")
        need("hit_ratio", 0 < self.hit_ratio <= 1, "be in (0, 1]")
        need("batch_size", self.batch_size % self.group_size == 0, f"be a multiple of group_size = {self.group_size}")
        need("group_size", self.group_size >= 2 or self.method != "prune+grpo", "be at least 2 for prune+grpo")
        try:
            self.prune  # noqa: B018
        except (TypeError, ValueError) as error:
            raise TrainerError(str(error).replace("PruneConfig: ", "TrainConfig: ", 1)) from error

    @property
    def prune(self) -> PruneConfig:
        """Return the arguments of the operators."""
        return PruneConfig(**{field.name: getattr(self, field.name) for field in fields(PruneConfig)})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for YAML."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


_AT_LEAST = dict.fromkeys(["seed", "margin", "warmup_steps"], 0) | dict.fromkeys(
    "minimum_length truncate_length final_length length_step patience steps batch_size micro_batch_size group_size "
    "eval_every eval_prompts eval_samples eval_batch_size save_every keep_checkpoints".split(),
    1,
)
_LENGTHS = {"initial_length": None, "minimum_length": None, "truncate_length": "truncate", "final_length": "prefix"}
"""Lengths that the maximum bounds, and the only method that uses the length, if there is one."""
MAX_SEED = 2**63 - 1
LARGEST = 1e15  # of a factor: the product of two still fits into a float32
_CHOICES: dict[str, tuple[str, ...]] = {
    **{"preset": ("tiny", "smollm2"), "tracker": ("none", "trackio", "wandb"), "method": get_args(Method)},
    **{"match": get_args(Match), "strategy": get_args(Strategy)},
    **dict.fromkeys(["precision", "teacher_precision"], get_args(Precision)),
}

SMOLLM2: dict[str, Any] = {
    **{"pair": "drop4", "w_drop": 0.02, "length_step": 8, "margin": 8, "steps": 20, "learning_rate": 1e-4},
    **{"initial_length": 64, "minimum_length": 32, "maximum_length": 192, "truncate_length": 64, "final_length": 128},
    **{"batch_size": 8, "micro_batch_size": 4, "eval_prompts": 12, "eval_every": 10},
}
PRESETS = {"tiny": TrainConfig(), "smollm2": TrainConfig(preset="smollm2", **SMOLLM2)}
"""The presets by name."""


def with_values(config: TrainConfig, values: dict[str, Any], source: str) -> TrainConfig:
    """Return the configuration with some values, as YAML has them, each checked; an error names their `source`."""
    kinds = {field.name: str(field.type) for field in fields(TrainConfig)}
    for name in values:
        if name not in kinds:
            raise TrainerError(f"{source}: there is no option {shown(name)}")
    return replace(config, **{name: _of_kind(name, value, kinds[name], source) for name, value in values.items()})


def _of_kind(name: str, value: Any, kind: str, source: str) -> Any:
    if kind.endswith("| None") and value is None:
        return None
    kind = kind.removesuffix(" | None")
    if kind == "float" and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with suppress(OverflowError, ValueError):
            return float(value)  # also of a text: YAML reads 1e-4 as one
    if kind == "Path" and isinstance(value, str):
        return Path(value)
    if kind not in ("float", "Path") and type(value) is {"int": int, "bool": bool}.get(kind, str):
        return value
    article = {"int": "an integer", "bool": "true or false", "float": "a number"}.get(kind, "text")
    raise TrainerError(f"{source}: {name} must be {article}, got {shown(value)}")


def read_config(file: Path) -> TrainConfig:
    """Read a YAML file: the values it gives, and its preset's for the others."""
    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, RecursionError, ValueError, yaml.YAMLError) as error:
        raise TrainerError(f"the configuration {file} cannot be read: {reason(error)}") from error
    if not isinstance(values, dict):
        raise TrainerError(f"the configuration {file} must hold options with values, got {type(values).__name__}")
    preset = values.get("preset", "tiny")
    if not isinstance(preset, str) or preset not in PRESETS:
        rule = f"be one of {', '.join(PRESETS)}"
        raise TrainerError(f"the configuration {file}: preset must {rule}, got {shown(preset)}")
    return with_values(PRESETS[preset], values, f"the configuration {file}")


def write_config(config: TrainConfig, file: Path) -> None:
    """Write every value as YAML."""
    file.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
