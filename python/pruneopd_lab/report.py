"""`pruneopd report`: what runs found, as a table in Markdown and as figures."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from pruneopd_trainer.errors import TrainerError, reason

from .figures import draw
from .run_groups import Comparison, Group, Run, comparisons, find_runs

NONE, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
HEADINGS = ("time", "tokens", "kept", "final M", "overlap", "MiB")
NOTES = f"""\
Accuracy and what stands in its place are those of the last evaluation; ± is the standard error over seeds, or with * \
that over the held-out prompts of the only seed. Differences to opd are paired by seed. Time is spent in training, \
without evaluations and checkpoints; tokens are those generated, and kept are those whose reward has a weight. In \
brackets: the ratio ({TIMES}) to opd's at equal steps, paired by seed. M is the last length limit. Overlap is that of \
training with the teacher, at the first and at the last step. MiB is the most memory."""
UNFINISHED = "A run marked with its step has not reached its last one, and stands by itself."


def report(folders: Sequence[Path], out: Path | None = None) -> str:
    """Draw the figures of the runs in or below some folders, write `report.md`, and return its tables in Markdown.

    `report.md` and `figures/` are in `out`, by default in the only folder that is given.
    """
    if out is None and len(folders) != 1:
        raise TrainerError(f"out must say where to write a report of {len(folders)} folders, got None")
    found = comparisons(find_runs(folders))
    out = out or folders[0]
    text = "\n\n".join([*map(table, found), notes(found)]) + "\n"
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        pictures = []
        for comparison in found:
            suffix = "_" + re.sub(r"[^\w.=-]+", "-", comparison.name) if len(found) > 1 else ""
            pictures += draw(comparison, out / "figures", suffix)
        links = [f"![{file.stem.replace('_', ' ')}](figures/{file.name})" for file in pictures]
        (out / "report.md").write_text("\n\n".join([text.rstrip(), *links]) + "\n")
    except (OSError, ValueError) as error:
        raise TrainerError(f"the report in {out} cannot be written: {reason(error)}") from error
    return text


def show(text: str) -> None:
    """Print a report: as a table on a terminal, as Markdown elsewhere."""
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(Markdown(text))
    else:
        print(text, end="")


def notes(found: Sequence[Comparison]) -> str:
    """Return how to read the tables."""
    finished = all(group.finished for comparison in found for group in comparison.groups)
    return NOTES if finished else f"{NOTES} {UNFINISHED}"


# --- the table --------------------------------------------------------------------------------------------------------


def table(comparison: Comparison) -> str:
    """Return the groups of a comparison as a table in Markdown, one a line."""
    samples = sorted({group.config.eval_samples for group in comparison.groups})
    measured: dict[str, str] = {"eval_reverse_kl": "reverse KL, nats", "eval_overlap": "held-out overlap"}
    if comparison.graded:
        measured = {"accuracy": f"accuracy, % (Avg@{'/'.join(map(str, samples))})"}
    columns = ["method", "seeds"]
    for label in measured.values():
        columns += [label, "difference to opd"]
    rows = [row(group, comparison.baseline, list(measured)) for group in comparison.groups]
    lines = [[*columns, *HEADINGS], [":--", *["--:"] * (len(columns) - 1 + len(HEADINGS))], *rows]
    return "\n".join([f"**{comparison.name}**\n", *("| " + " | ".join(line) + " |" for line in lines)])


def row(group: Group, baseline: Group | None, measured: Sequence[str]) -> list[str]:
    """Return one line of the table."""
    cells = [group.label, str(len(group.runs))]
    pairs = paired(group, baseline)
    for name in measured:
        cells += [outcome(group, name), difference(group, pairs, name)]
    generated = [tokens(run, "tokens_generated") for run in group.runs]
    time_s = [run.metrics[-1]["time_s"] if run.metrics else 0.0 for run in group.runs]
    steps = [run.steps for run in group.runs if run.steps]
    cells.append(duration(mean(time_s)) + ratio(pairs, lambda run, step: until(run, step)[-1]["time_s"]))
    cells.append(amount(mean(generated)) + ratio(pairs, lambda run, step: tokens(run, "tokens_generated", step)))
    cells.append(amount(mean([tokens(run, "tokens_kept") for run in group.runs])))
    cells.append(number(mean([done[-1]["budget"] for done in steps]), 0))
    cells.append(" → ".join(number(mean([done[end]["overlap"] for done in steps]), 3) for end in (0, -1)))
    cells.append(number(mean([max((m["peak_memory_mib"] or 0 for m in done), default=0) for done in steps]), 0))
    return cells


def paired(group: Group, baseline: Group | None) -> list[tuple[Run, Run]]:
    """Return each run of a group with the baseline's of the same seed, if there is one; none for the baseline."""
    if baseline is None or group is baseline:
        return []
    by_seed = {run.config.seed: run for run in baseline.runs}
    return [(run, by_seed[run.config.seed]) for run in group.runs if run.config.seed in by_seed]


def outcome(group: Group, name: str) -> str:
    """Return the last evaluation: the mean over seeds and its standard error."""
    lasts = [run.evaluations[-1] for run in group.runs if run.evaluations]
    values = [last[name] for last in lasts if last[name] is not None]
    if not values:
        return NONE
    cell = plus_minus(name, mean(values), standard_error(values))
    if len(values) == 1 and name == "accuracy":
        cell = plus_minus(name, values[0], lasts[0]["accuracy_se"], mark="*")
    early = sorted({last["step"] for last in lasts if last["step"] < group.config.steps})
    return f"{cell} at step {early[0]}" if early else cell


def difference(group: Group, pairs: Sequence[tuple[Run, Run]], name: str) -> str:
    """Return the mean difference of finished runs to the baseline's of the same seeds, and its standard error."""
    lasts = [(run.evaluations[-1], other.evaluations[-1]) for run, other in pairs if run.evaluations and run.finished]
    both = [(one, other) for one, other in lasts if one[name] is not None and other[name] is not None]
    if not both:
        return NONE
    differences = [one[name] - other[name] for one, other in both]
    cell = plus_minus(name, mean(differences), standard_error(differences), sign="+")
    if len(both) == 1 and name == "accuracy" and None not in (errors := [m["accuracy_se"] for m in both[0]]):
        cell = plus_minus(name, differences[0], math.hypot(*errors), sign="+", mark="*")
    return cell if len(both) == len(group.runs) else f"{cell} ({len(both)} of {len(group.runs)} seeds)"


def ratio(pairs: Sequence[tuple[Run, Run]], of: Callable[[Run, int], float]) -> str:
    """Return the mean over pairs of the ratio of `of` for the run to `of` for the other, both at the same step."""
    ratios = []
    for run, other in pairs:
        step = min(run.last_step, other.last_step)
        if step > 0 and of(other, step) > 0:
            ratios.append(of(run, step) / of(other, step))
    return f" ({mean(ratios):.2f}{TIMES})" if ratios else ""


def until(run: Run, step: int | None = None) -> list[dict[str, Any]]:
    """Return the training steps up to one."""
    return [metrics for metrics in run.steps if step is None or metrics["step"] <= step]


def tokens(run: Run, name: str, step: int | None = None) -> int:
    """Tokens of all steps up to one."""
    return sum(metrics[name] for metrics in until(run, step))


# --- numbers ----------------------------------------------------------------------------------------------------------


def mean(values: Sequence[float | None]) -> float:
    """Return the mean of those that are there, or NaN."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else math.nan


def standard_error(values: Sequence[float]) -> float | None:
    """sd / sqrt(n), or None where there are not two values."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1) / len(values))


def plus_minus(name: str, value: float, error: float | None, sign: str = "", mark: str = "") -> str:
    """Return a value with its standard error; an accuracy in percent."""
    scale, digits = (100, 1) if name == "accuracy" else (1, 3)
    shown = f"{value * scale:{sign}.{digits}f}"
    return shown if error is None else f"{shown} ± {error * scale:.{digits}f}{mark}"


def number(value: float, digits: int) -> str:
    """Return a number, or a dash for NaN."""
    return NONE if math.isnan(value) else f"{value:.{digits}f}"


def amount(value: float) -> str:
    """Return a count to three digits, such as 1.23M."""
    units = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
    size, unit = next(((size, unit) for size, unit in units if value >= 0.9995 * size), (1, ""))
    return f"{value / size:.3g}{unit}"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
