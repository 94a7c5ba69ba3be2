"""The demo's two pictures: overlap and weight along the response, and one response coloured by weight."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from torch import Tensor

from pruneopd_kernels import PruneConfig

from .figures import FAINT, INK, STYLE
from .samples import COLOURS as WEIGHT_COLOURS
from .samples import RETURN

if TYPE_CHECKING:
    from .demo import Result

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
"""Okabe and Ito's, told apart by colour-blind readers."""
SETTINGS: Any = STYLE | {"font.size": 11, "axes.titlesize": 12, "savefig.dpi": 160}
WINDOW, FEWEST = 9, 3
FONT, LINE_LENGTH = "DejaVu Sans Mono", 92


def draw(
    results: Sequence[Result], prompts: Sequence[str], tokenizer: Any, config: PruneConfig, out: Path
) -> list[Path]:
    """Draw both pictures into `out` and return their paths."""
    paths = [out / "overlap_and_weight.png", out / "response.png"]
    # The response that agrees with the teacher at first and drifts later.
    scored = [(result, index) for result in results for index in range(len(prompts))]
    result, index = max(scored, key=lambda place: later_drifts(*place))
    tokens = result.rollouts.response_ids[index][result.scores.mask[index]].tolist()
    with matplotlib.rc_context(SETTINGS):
        draw_lines(results, config).savefig(paths[0])
        draw_response(result, index, prompts[index], [str(tokenizer.decode([t])) for t in tokens], config).savefig(
            paths[1]
        )
    return paths


def later_drifts(result: Result, index: int) -> int:
    """Return how many more drifts a response has in its second half than in its first."""
    drift = result.scores.drift[index][result.scores.mask[index]]
    half = len(drift) // 2
    return int(drift[half:].sum() - drift[:half].sum())


def mean_along(values: Tensor, mask: Tensor, window: int) -> Tensor:
    """Return the mean over responses and a window of positions; NaN if fewer than FEWEST responses last."""
    sums = torch.stack([(values * mask).sum(0), mask.float().sum(0)])[:, None]
    total, count = torch.nn.functional.conv1d(sums, torch.ones(1, 1, window), padding=window // 2)[:, 0]
    few: Tensor = mask.sum(0) < min(FEWEST, len(mask))
    return torch.where(few, torch.nan, total / count)


def draw_lines(results: Sequence[Result], config: PruneConfig) -> Figure:
    """Draw overlap and weight against position, one line a student."""
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for (name, _, _, scores), colour in zip(results, COLOURS, strict=False):
        position = torch.arange(1, scores.mask.shape[1] + 1)
        top.plot(position, mean_along(scores.overlap, scores.mask, 1), color=colour, linewidth=0.8, alpha=0.35)
        top.plot(position, mean_along(scores.overlap, scores.mask, WINDOW), color=colour, linewidth=2.2)
        bottom.plot(position, mean_along(scores.weight, scores.mask, 1), color=colour, linewidth=2.2, label=name)
    levels = ((top, config.threshold, "below {:g}:\ndrift"), (bottom, config.w_base, "at {:g}:\nreliability\nused up"))
    for axes, level, words in levels:
        axes.axhline(level, color=INK, linewidth=1, linestyle=(0, (5, 3)))
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
        axes.annotate(words.format(level), (1, level), xytext=(6, 0), color=INK, **place)
    top.set(title=f"Overlap of student's and teacher's top {config.k} (thick: mean of {WINDOW} tokens)")
    top.set(ylabel="overlap (share)", ylim=(0, 1.02))
    bottom.set(title=f"Weight of a token's reward (each drift up to it costs w_drop = {config.w_drop:g})")
    bottom.set(xlabel="position in the response (tokens)", ylabel="weight (factor)")
    bottom.set(xlim=(1, None), ylim=(0, 1.05 * (1 + config.w_base)))
    figure.align_ylabels()
    figure.legend(loc="outside upper center", ncols=len(results))
    return figure


def draw_response(result: Result, index: int, prompt: str, texts: Sequence[str], config: PruneConfig) -> Figure:
    """Draw one response, each token on the colour of its weight, underlined where it drifts."""
    scores, mask, places = result.scores, result.scores.mask[index], lay_out(texts)
    advance, leading = 15 / 160, 43 / 160  # inches; whole pixels, since letters are set on pixels
    margin, above, below = 0.25, 0.8, 0.85
    width, height = LINE_LENGTH * advance, (1 + max(line for line, _, _ in places)) * leading
    figure = Figure(figsize=(width + 2 * margin, height + above + below))
    total_width, total_height = figure.get_size_inches()
    left = margin / total_width
    axes = figure.add_axes((left, below / total_height, width / total_width, height / total_height))
    axes.set(xlim=(0, LINE_LENGTH), ylim=(height / leading, 0))
    axes.axis("off")
    shades = LinearSegmentedColormap.from_list("weight", WEIGHT_COLOURS)
    colours = ScalarMappable(Normalize(config.w_base, 1 + config.w_base), shades)
    font: Any = {"family": FONT, "size": 72 * advance / 0.602, "va": "center", "color": INK}  # a letter is 0.602 wide
    for (line, column, text), weight, drift in zip(
        places, scores.weight[index][mask], scores.drift[index][mask], strict=True
    ):
        axes.barh(line + 0.5, len(text), 0.86, column, color=shades(float(weight) - config.w_base))
        axes.text(column, line + 0.52, text, **font)
        if drift:
            start, end = column + len(text) - len(text.lstrip()) + 0.12, column + len(text) - 0.12
            axes.plot([start, end], [line + 0.87] * 2, color=INK, linewidth=0.9)
    figure.text(left, 1 - 0.17 / total_height, prompt, size=13, weight="bold", va="top", color=INK)
    student = f"a response of the student with {result.name} ({result.change})"
    figure.text(left, 1 - 0.46 / total_height, student, va="top", color=INK)
    bar = figure.add_axes((left, 0.5 / total_height, 0.42, 0.13 / total_height))
    figure.colorbar(colours, cax=bar, orientation="horizontal").outline.set_edgecolor(FAINT)  # type: ignore[operator]
    bar.set_xlabel("weight of the token's reward (factor)", labelpad=2)
    figure.text(left + 0.46, 0.5 / total_height, "underlined: the token drifts", color=INK)
    return figure


def lay_out(texts: Sequence[str]) -> list[tuple[int, int, str]]:
    """Return line, column and shown text of each token; lines break between words, at LINE_LENGTH characters."""
    glyphs = FT2Font(findfont(FONT)).get_charmap()
    places = []
    line = column = 0
    for index, text in enumerate(texts):
        rest = itertools.takewhile(lambda text: not text[:1].isspace(), texts[index + 1 :])
        word = text + "".join(rest) if index == 0 or text[:1].isspace() else text
        if column + len(word.rstrip()) > LINE_LENGTH:
            line, column = line + 1, 0
        shown = (text if column else text.removeprefix(" ")).replace("\n", RETURN)
        shown = "".join(letter if ord(letter) in glyphs else "\N{WHITE SQUARE}" for letter in shown)[:LINE_LENGTH]
        places.append((line, column, shown))
        line, column = (line + 1, 0) if "\n" in text else (line, column + len(shown))
    return places
