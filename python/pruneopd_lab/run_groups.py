"""Run folders as a report needs them: read, checked, and put together where they differ in their seed alone."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pruneopd_trainer.config import BANDS, PRESETS, Method, TrainConfig, read_config
from pruneopd_trainer.errors import TrainerError, shown

SUBJECT = ("preset", "pair", "student", "teacher", "data")
"""What is trained on what: runs that differ in one of these are never compared."""
NUMBERS = ("tokens_generated", "tokens_kept", "budget")
MEANS = ("response_length_mean", "effective_length_mean", "overlap", "peak_memory_mib")
EVALUATION = ("accuracy", "accuracy_se", "eval_overlap", "eval_reverse_kl")
MATCHED = "matched to prune"
PHRASES = {
    ("weights", False): "without weights",
    ("weights", True): "with weights",
    ("budget", False): "without budget",
    ("budget", True): "with budget",
    ("match", "mass"): "equal mass",
    ("match", "tokens"): "equal tokens",
}


@dataclass(frozen=True)
class Run:
    """A run folder as it is now; the run may still be under way."""

    folder: Path
    config: TrainConfig
    metrics: list[dict[str, Any]]  # a dictionary a step, in order; step 0 has an evaluation only

    @property
    def last_step(self) -> int:
        """Return how many steps are done."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def finished(self) -> bool:
        """Return whether all configured steps are done."""
        return self.last_step >= self.config.steps

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Return the metrics of the training steps."""
        return [metrics for metrics in self.metrics if metrics["step"] > 0]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Return the metrics of the steps after which there was an evaluation."""
        return [metrics for metrics in self.metrics if "eval_overlap" in metrics]


class Group(NamedTuple):
    """Finished runs that differ in their seed alone, by seed; or a single run that is not finished."""

    label: str
    config: TrainConfig
    """That of the first run."""
    runs: list[Run]

    @property
    def finished(self) -> bool:
        """False for a run that stands by itself because it has not reached its last step."""
        return self.runs[0].finished


class Comparison(NamedTuple):
    """Groups with the same models and the same data."""

    name: str
    groups: list[Group]

    @property
    def graded(self) -> bool:
        """Return whether there is an accuracy; otherwise the student is measured by its agreement with the teacher."""
        evaluations = (metrics for group in self.groups for run in group.runs for metrics in run.evaluations)
        return all(metrics["accuracy"] is not None for metrics in evaluations)

    @property
    def baseline(self) -> Group | None:
        """Return the finished runs of `opd`, which the others are compared with."""
        return next((group for group in self.groups if group.config.method == "opd" and group.finished), None)


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """Read the runs that are in or below these folders, each once."""
    found: dict[Path, Run] = {}
    for folder in folders:
        if not os.path.isdir(folder):  # False for a name that no folder can have
            raise TrainerError(f"the folder {folder} is not there")
        files = sorted(folder.rglob("metrics.jsonl"))
        if not files:
            raise TrainerError(f"the folder {folder} holds no run: there is no metrics.jsonl in it")
        for file in files:
            if file.parent.resolve() not in found:
                found[file.parent.resolve()] = read_run(file.parent)
    return list(found.values())


def read_run(folder: Path) -> Run:
    """Read `config.yaml` and `metrics.jsonl`; a last line that is still being written is left out."""
    return Run(folder, read_config(folder / "config.yaml"), read_metrics(folder / "metrics.jsonl"))


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the metrics of each step; raise TrainerError for a line that is not valid."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise TrainerError(f"the metrics {file} cannot be read: {reason}") from error
    steps: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        place = f"the metrics {file}, line {number}"
        metrics = _parse(line, place)
        _check(metrics, place)
        expected = (steps[-1]["step"] + 1,) if steps else (0, 1)
        if metrics["step"] not in expected:
            raise TrainerError(f"{place}: step must be {' or '.join(map(str, expected))}, got {metrics['step']}")
        steps.append(metrics)
    return steps


def _parse(line: str, place: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(constant)  # NaN is not JSON

    try:
        metrics = json.loads(line, parse_constant=refuse)
    except (ValueError, RecursionError):
        metrics = None
    if not isinstance(metrics, dict):
        raise TrainerError(f"{place}: it must be a JSON object, got {shown(line)}")
    return metrics


def _check(metrics: dict[str, Any], place: str) -> None:
    """Raise TrainerError for a value that a report needs and that is missing or of another kind."""

    def wrong(name: str, rule: str) -> TrainerError:
        got = shown(metrics[name]) if name in metrics else "nothing"
        return TrainerError(f"{place}: {name} must be {rule}, got {got}")

    if not (_is_number(metrics.get("step")) and isinstance(metrics["step"], int)):
        raise wrong("step", "an integer")
    trained = metrics["step"] > 0
    for name in ("time_s", *(NUMBERS if trained else ())):
        if not _is_number(metrics.get(name)):
            raise wrong(name, "a number")
    evaluated = "eval_overlap" in metrics or not trained
    for name in (*(MEANS if trained else ()), *(EVALUATION if evaluated else ())):
        if name not in metrics or not _is_number(metrics[name], or_null=True):
            raise wrong(name, "a number or null")
    for name in ("band_tokens", "band_overlap", "band_weight") if trained else ():
        bands = metrics.get(name)
        counts = name == "band_tokens"
        if not (
            isinstance(bands, list) and len(bands) == BANDS and all(_is_number(band, not counts) for band in bands)
        ):
            raise wrong(name, f"a list of {BANDS} numbers{'' if counts else ' or nulls'}")


def _is_number(value: object, or_null: bool = False) -> bool:
    if value is None:
        return or_null
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def comparisons(runs: Iterable[Run]) -> list[Comparison]:
    """Sort runs by models and data, and group those that differ in their seed (and tracker) alone."""
    by_subject: dict[str, list[Run]] = {}
    for run in runs:
        by_subject.setdefault(_subject(run.config), []).append(run)
    return [Comparison(name, _groups(by_subject[name])) for name in sorted(by_subject)]


def _subject(config: TrainConfig) -> str:
    """Return a name such as "tiny low", with the folders and the file that stand in for the preset's."""
    instead = [f"{name}={getattr(config, name)}" for name in SUBJECT[2:] if getattr(config, name) is not None]
    return " ".join([config.preset, config.pair, *instead])


def _groups(runs: list[Run]) -> list[Group]:
    values = _values_that_count([run.config for run in runs])
    alike: dict[tuple[tuple[str, Any], ...], list[Run]] = {}
    for run, counting in zip(runs, values, strict=True):
        alike.setdefault(tuple(counting.items()), []).append(run)
    keys = list(map(dict, alike))
    usual = {name: _usual(name, keys, runs[0].config) for name in keys[0]}

    def order(key: dict[str, Any]) -> list[Any]:
        differing = _differing(key, usual)
        return [get_args(Method).index(key["method"]), len(differing), [(n, v is None, v) for n, v in differing]]

    groups: list[Group] = []
    for key in sorted(keys, key=order):
        members = sorted(alike[tuple(key.items())], key=lambda run: run.config.seed)
        label = _label(key, usual)
        finished = [run for run in members if run.finished]
        for one, other in itertools.pairwise(finished):
            if one.config.seed == other.config.seed:
                raise TrainerError(f"{one.folder} and {other.folder} are the same run: {label}, seed {one.config.seed}")
        if finished:
            groups.append(Group(label, finished[0].config, finished))
        for run in members:
            if not run.finished:
                state = f"seed {run.config.seed}, step {run.last_step} of {run.config.steps}"
                groups.append(Group(f"{label} ({state})", run.config, [run]))
    return groups


def _values_that_count(configs: Sequence[TrainConfig]) -> list[dict[str, Any]]:
    """Return the values of each configuration that tell groups apart.

    `prefix` may have another final length with each seed, matched to prune's run of that seed. So it tells groups
    apart only where one seed has several.
    """
    ignored = {"seed", "tracker", *SUBJECT}
    values = [{n: v for n, v in config.to_dict().items() if n not in ignored} for config in configs]
    but_length = [tuple((n, v) for n, v in each.items() if n != "final_length") for each in values]
    repeated = Counter(zip(but_length, (config.seed for config in configs), strict=True))
    several = {key for (key, _), count in repeated.items() if count > 1}
    for each, key in zip(values, but_length, strict=True):
        if each["method"] == "prefix" and key not in several:
            each["final_length"] = MATCHED
    return values


def _usual(name: str, keys: Sequence[dict[str, Any]], config: TrainConfig) -> Any:
    """Return the value that most groups have; of several such values the preset's, or the first."""
    counts = Counter(key[name] for key in keys if key[name] != MATCHED)
    most = [value for value, count in counts.items() if count == max(counts.values())]
    preset = PRESETS[config.preset].to_dict()[name]
    return preset if preset in most else next(iter(most), None)


def _differing(key: dict[str, Any], usual: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(n, v) for n, v in key.items() if n != "method" and v != MATCHED and v != usual[n]]


def _label(key: dict[str, Any], usual: dict[str, Any]) -> str:
    """Return the method, and what else is not as in most groups."""
    differing = (PHRASES.get(pair, f"{pair[0]}={_text(pair[1])}") for pair in _differing(key, usual))
    return " ".join([key["method"], *differing])


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
