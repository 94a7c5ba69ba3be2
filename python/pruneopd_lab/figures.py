"""The figures of a report, one set for each comparison. Lines are means over seeds, bands their standard errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from pruneopd_trainer.config import BANDS

from .run_groups import Comparison, Group, Run

Array = NDArray[np.float64]

COLOURS = {
    "opd": "#8A8A8A",
    "truncate": "#56B4E9",
    "random": "#CC79A7",
    "prune": "#D55E00",
    "prefix": "#009E73",
    "prune+grpo": "#0072B2",
}
"""Okabe and Ito's, told apart by colour-blind readers."""
DASHES: Sequence[Any] = ("solid", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)))
MARKERS = "osD^vPX*"
"""Runs of the same method have the same colour: dashes and markers tell them apart."""
WIDTHS = {("opd", 0): (2.8, 3), ("prune", 0): (2.2, 5), ("prune+grpo", 0): (2.0, 5)}
"""Width of the line and its layer: `opd` lies below, where a thin line on top of it does not hide it."""
PROGRESS = ListedColormap(matplotlib.colormaps["viridis_r"](np.linspace(0.12, 1, 256)), "progress")
"""From the first step to the last, dark enough for a white page."""
INK, FAINT = "#222222", "#8A8A8A"
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ECECEC",
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.markersize": 3.5,
    "savefig.dpi": 150,
    "text.parse_math": False,
}
NOTE: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
NOTE |= {"size": 8, "color": "#6A6A6A"}
WIDTH = 6.4
ENDS = 0.1
"""The share of the steps that counts as the first, or the last."""
LINES = 8
"""Lines in the figure of weights, each the mean of as many steps."""


def draw(comparison: Comparison, folder: Path, suffix: str = "") -> list[Path]:
    """Draw all figures that the runs have the data for into PNG files, whose names end in `suffix`; return these."""
    measure = "accuracy" if comparison.graded else "agreement"
    figures: dict[str, Callable[[Comparison], Figure | None]] = {
        f"{measure}_by_time": lambda runs: draw_evaluations(runs, "time_s"),
        f"{measure}_by_step": lambda runs: draw_evaluations(runs, "step"),
        "weight_by_position": draw_weights,
        "lengths": draw_lengths,
        "overlap_by_depth": draw_overlap,
        "threshold": draw_thresholds,
    }
    files = []
    with matplotlib.rc_context(STYLE):
        for name, drawn in figures.items():
            figure = drawn(comparison)
            if figure is not None:
                figure.suptitle(comparison.name, x=0.01, ha="left", size=8.5, color=FAINT)
                files.append(folder / f"{name}{suffix}.png")
                figure.savefig(files[-1])
    return files


# --- numbers ----------------------------------------------------------------------------------------------------------


def mean_and_error(rows: Array) -> tuple[Array, Array]:
    """Return the mean over the first axis and its standard error, sd / sqrt(n); NaN is left out.

    Args:
        rows: `[n, ...]`, a row for each seed.

    Returns:
        Two arrays `[...]`; the mean is NaN where there is no value, the error where there are not two.
    """
    there = ~np.isnan(rows)
    count = there.sum(0)
    mean = np.where(there, rows, 0).sum(0) / np.where(count, count, np.nan)
    squares = np.where(there, rows - mean, 0) ** 2
    return mean, np.sqrt(squares.sum(0) / np.where(count > 1, count - 1, np.nan) / np.where(count, count, np.nan))


def table(runs: Iterable[Iterable[dict[str, Any]]], name: str) -> Array:
    """Return a value of each step of each run, `[runs, steps]` float64; null is NaN."""
    return np.array([[math.nan if m[name] is None else m[name] for m in steps] for steps in runs], dtype=float)


def final(group: Group, name: str) -> Array:
    """Return the value of each run at its end, `[runs]`; what evaluations measure is that of the last one."""
    lasts = [next(m for m in reversed(run.metrics) if name in m) for run in group.runs]
    return table([[metrics] for metrics in lasts], name)[:, 0]


def common_evaluations(group: Group) -> list[list[dict[str, Any]]]:
    """Return the evaluations of each run, after the steps at which all of the group's runs have been evaluated."""
    steps = set.intersection(*({metrics["step"] for metrics in run.evaluations} for run in group.runs))
    return [[metrics for metrics in run.evaluations if metrics["step"] in steps] for run in group.runs]


def evaluated(group: Group) -> bool:
    """Return whether the group's runs have an evaluation in common."""
    return len(common_evaluations(group)[0]) > 0


def by_band(run: Run, name: str, first: int, last: int) -> Array:
    """Return the mean over the tokens of steps `first` to `last` in each band of position: `[BANDS]`.

    NaN where there are fewer tokens than one response may have there: their mean would be noise.
    """
    steps = [metrics for metrics in run.steps if first <= metrics["step"] <= last]
    counts = np.array([metrics["band_tokens"] for metrics in steps], dtype=float)
    values = np.nan_to_num(np.array([metrics[name] for metrics in steps], dtype=float))
    total = counts.sum(0)
    mean: Array = (values * counts).sum(0) / np.where(total >= run.config.maximum_length / BANDS, total, np.nan)
    return mean


def band_centres(group: Group) -> Array:
    """Return the middle of each band of position, in tokens: `[BANDS]`."""
    return (np.arange(BANDS) + 0.5) * group.config.maximum_length / BANDS


def trained(groups: Iterable[Group]) -> list[Group]:
    """Return the groups that have at least one step of training."""
    return [group for group in groups if group.runs[0].last_step > 0]


# --- lines ------------------------------------------------------------------------------------------------------------


def styles(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return how each group is drawn, in every figure alike."""
    found: list[dict[str, Any]] = []
    nth = dict.fromkeys(COLOURS, 0)
    for group in groups:
        method = group.config.method
        number = nth[method]
        nth[method] += 1
        width, order = WIDTHS.get((method, number), (1.2, 4))
        found.append(
            {
                "label": group.label,
                "color": COLOURS[method],
                "linestyle": DASHES[number % len(DASHES)] if group.finished else (0, (1, 3)),
                "marker": MARKERS[number % len(MARKERS)],
                "linewidth": width,
                "zorder": order,
            }
        )
    return found


def draw_line(axes: Axes, x: Array, rows: Array, style: dict[str, Any], markers: bool = True) -> None:
    """The mean of `rows`, `[seeds, points]`, with a band of its standard error."""
    mean, error = mean_and_error(rows)
    axes.plot(x, mean, **(style if markers else {**style, "marker": None}))
    axes.fill_between(x, mean - error, mean + error, color=style["color"], alpha=0.14, linewidth=0, zorder=2)


def add_legend(figure: Figure, axes: Axes) -> None:
    """A legend below the panels, in as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels), default=1)
    columns = max(1, min(len(labels), int(figure.get_figwidth() * 14 / (longest + 7))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=2.6)


def start(rows: int = 1, columns: int = 1, height: float = 3.4, **shared: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, read like a text."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **shared).flat)


def time_unit(longest: float) -> tuple[float, str]:
    """Seconds in the unit that suits, and its name."""
    return next(((size, unit) for size, unit in ((3600, "h"), (60, "min")) if longest >= 3 * size), (1, "s"))


# --- figures ----------------------------------------------------------------------------------------------------------


def measures(comparison: Comparison) -> list[tuple[str, str]]:
    """Return what evaluations are drawn by: names in the metrics and labels."""
    if comparison.graded:
        return [("accuracy", "accuracy on held-out prompts")]
    return [("eval_reverse_kl", "reverse KL (nats per token)"), ("eval_overlap", "overlap with the teacher")]


def draw_evaluations(comparison: Comparison, by: str) -> Figure | None:
    """Draw the evaluations against training time (`time_s`) or steps (`step`)."""
    groups = [(g, s) for g, s in zip(comparison.groups, styles(comparison.groups), strict=True) if evaluated(g)]
    if not groups:
        return None
    shown = measures(comparison)
    figure, panels = start(len(shown), height=3.6 if len(shown) == 1 else 5.2, sharex=True)
    longest = max(run.evaluations[-1]["time_s"] for group, _ in groups for run in group.runs)
    unit, unit_name = time_unit(longest) if by == "time_s" else (1, "")
    for axes, (name, label) in zip(panels, shown, strict=True):
        for group, style in groups:
            evaluations = common_evaluations(group)
            draw_line(axes, table(evaluations, by).mean(0) / unit, table(evaluations, name), style)
        axes.set(ylabel=label)
        if name == "accuracy":
            axes.yaxis.set_major_formatter(FuncFormatter(_percent))
    panels[-1].set(xlabel=f"training time ({unit_name})" if by == "time_s" else "step")
    if by == "step":
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    add_legend(figure, panels[0])
    return figure


def draw_lengths(comparison: Comparison) -> Figure | None:
    """Budget, response length and effective length by step, and the overlap below."""
    groups = [(g, s) for g, s in zip(comparison.groups, styles(comparison.groups), strict=True) if trained([g])]
    if not groups:
        return None
    figure, panels = start(2, 2, height=5, sharex=True)
    shown = {
        "budget": "length limit M of the next step (tokens)",
        "response_length_mean": "mean response length (tokens)",
        "effective_length_mean": "mean effective length (tokens)",
        "overlap": "mean overlap with the teacher",
    }
    for axes, (name, label) in zip(panels, shown.items(), strict=True):
        for group, style in groups:
            steps = [run.steps for run in group.runs]
            draw_line(axes, table(steps, "step")[0], table(steps, name), style, markers=False)
        axes.set(title=label)
        if name != "overlap":
            axes.set_ylim(bottom=0)
    for axes in panels[2:]:
        axes.set(xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    add_legend(figure, panels[0])
    return figure


def draw_weights(comparison: Comparison) -> Figure | None:
    """Draw the mean weight along the response of the first group of `prune` with weights, a line for several steps."""
    pruned = [g for g in trained(comparison.groups) if g.config.method.startswith("prune") and g.config.weights]
    if not pruned:
        return None
    group = pruned[0]
    last = min(run.last_step for run in group.runs)
    edges = [round(last * part / min(LINES, last)) for part in range(min(LINES, last) + 1)]
    figure, (axes,) = start()
    colours = ScalarMappable(Normalize(1, max(last, 2)), PROGRESS)
    for before, until in itertools.pairwise(edges):
        rows = np.array([by_band(run, "band_weight", before + 1, until) for run in group.runs])
        colour = PROGRESS(float(colours.norm((before + 1 + until) / 2)))
        axes.plot(band_centres(group), mean_and_error(rows)[0], color=colour, marker="o", linewidth=1.5)
    floor, ceiling = group.config.w_base, 1 + group.config.w_base
    for level, label in ((floor, "reliability used up"), (ceiling, "no drift yet")):
        axes.axhline(level, color=FAINT, linewidth=0.8, linestyle=(0, (5, 3)), zorder=1)
        axes.annotate(label, (1, level), xytext=(0, 3), **NOTE)
    axes.set(xlabel="position in the response (tokens)", ylabel="mean weight of a token's reward")
    axes.set(xlim=(0, None), ylim=(floor - 0.05, ceiling + 0.12))
    axes.set_title(f"{group.label}, each line the mean of {math.ceil(last / min(LINES, last))} steps")
    bar = figure.colorbar(colours, ax=axes, pad=0.02, aspect=30)
    bar.set_label("step")
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def draw_overlap(comparison: Comparison) -> Figure | None:
    """Draw the overlap along the response, in the first and in the last steps."""
    groups = [(g, s) for g, s in zip(comparison.groups, styles(comparison.groups), strict=True) if trained([g])]
    if not groups:
        return None
    figure, panels = start(1, 2, height=3.6, sharex=True, sharey=True)
    for axes, at_end in zip(panels, (False, True), strict=True):
        for group, style in groups:
            last = min(run.last_step for run in group.runs)
            some = math.ceil(ENDS * last)
            first, until = (last - some + 1, last) if at_end else (1, some)
            rows = np.array([by_band(run, "band_overlap", first, until) for run in group.runs])
            draw_line(axes, band_centres(group), rows, style, markers=False)
        axes.set(title=f"{'last' if at_end else 'first'} {ENDS:.0%} of the steps", xlabel="position (tokens)")
    longest = max(group.config.maximum_length for group, _ in groups)
    panels[0].set(xlim=(0, longest), ylabel="mean overlap with the teacher")
    add_legend(figure, panels[0])
    return figure


def draw_thresholds(comparison: Comparison) -> Figure | None:
    """Final measure, training time and M against the threshold, where groups differ in nothing else."""
    families: dict[tuple[Any, ...], list[Group]] = {}
    for group in comparison.groups:
        if group.finished and evaluated(group):
            rest = {n: v for n, v in group.config.to_dict().items() if n not in ("threshold", "seed", "tracker")}
            families.setdefault(tuple(rest.items()), []).append(group)
    swept = [sorted(family, key=lambda group: group.config.threshold) for family in families.values()]
    swept = [family for family in swept if len(family) > 1]
    if not swept:
        return None
    shown = {
        measures(comparison)[0][0]: "final accuracy" if comparison.graded else "final reverse KL (nats)",
        "time_s": "training time",
        "budget": "final limit M (tokens)",
    }
    figure, panels = start(1, 3, height=2.8)
    for axes, (name, label) in zip(panels, shown.items(), strict=True):
        finals = [[final(group, name) for group in family] for family in swept]
        unit, unit_name = time_unit(float(max(map(np.max, finals[0])))) if name == "time_s" else (1, "")
        for family, values, style in zip(swept, finals, styles([family[0] for family in swept]), strict=True):
            mean, error = np.array([mean_and_error(seeds / unit) for seeds in values]).T
            style["label"] = min((group.label for group in family), key=len)
            thresholds = [group.config.threshold for group in family]
            axes.errorbar(thresholds, mean, np.nan_to_num(error), **style, capsize=2, elinewidth=1)
            axes.set_xticks(thresholds)
        if comparison.baseline and evaluated(comparison.baseline):
            level = float(final(comparison.baseline, name).mean()) / unit
            axes.axhline(level, color=COLOURS["opd"], linewidth=1.2, linestyle=(0, (5, 3)), label="opd")
        axes.set(xlabel="threshold of the overlap", title=label + (f" ({unit_name})" if unit_name else ""))
        if name == "accuracy":
            axes.yaxis.set_major_formatter(FuncFormatter(_percent))
    add_legend(figure, panels[0])
    return figure


def _percent(value: float, _: object) -> str:
    """With as many digits as neighbouring ticks need to differ."""
    return f"{100 * value:.4g}%"
