"""The two pictures of a run: overlap and weight along the response, and one response coloured by weight."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pruneopd_kernels import PruneConfig

from .report import Result

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito's, told apart by colour-blind readers."""
WEIGHT_COLOURS = LinearSegmentedColormap.from_list("weight", ["#F2A65A", "#FBE3C4", "#F7F7F7", "#C6DDF0", "#6BAED6"])
"""From drifted (orange) to trusted (blue), all light enough for black text."""
DPI = 160
INK, FAINT = "#222222", "#8A8A8A"
LABEL: dict[str, Any] = {
    "xycoords": ("axes fraction", "data"),
    "xytext": (6, 0),
    "textcoords": "offset points",
    "va": "center",
    "color": INK,
}
STYLE: Any = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "savefig.dpi": DPI,
    "text.parse_math": False,
}
WINDOW = 9
FEWEST = 3
FONT, LINE_LENGTH = "DejaVu Sans Mono", 92


def draw(
    results: Sequence[Result],
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: PruneConfig,
    length: int,
    out: Path,
) -> list[Path]:
    """Draws both pictures into `out` and returns their paths."""
    with matplotlib.rc_context(STYLE):
        paths = [out / "overlap_and_weight.png", out / "response.png"]
        draw_lines(results, config, length).savefig(paths[0])
        result, index = telling_response(results)
        draw_response(result, index, prompts[index], tokenizer, config).savefig(paths[1])
    return paths


def mean_along(values: Tensor, mask: Tensor, window: int) -> Tensor:
    """The mean over responses at each position and `window` around it; NaN where fewer than FEWEST responses last."""
    kernel = torch.ones(1, 1, window)
    sums = torch.stack([(values * mask).sum(0), mask.float().sum(0)])[:, None]
    total, count = torch.nn.functional.conv1d(sums, kernel, padding=window // 2)[:, 0]
    few: Tensor = mask.sum(0) < min(FEWEST, len(mask))
    return torch.where(few, torch.nan, total / count)


def draw_lines(results: Sequence[Result], config: PruneConfig, length: int) -> Figure:
    """Overlap and weight against position, one line a student."""
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for result, colour in zip(results, COLOURS, strict=False):
        scores = result.scores
        position = torch.arange(1, scores.mask.shape[1] + 1)
        top.plot(position, mean_along(scores.overlap, scores.mask, 1), color=colour, linewidth=0.8, alpha=0.35)
        top.plot(position, mean_along(scores.overlap, scores.mask, WINDOW), color=colour, linewidth=2.2)
        bottom.plot(position, mean_along(scores.weight, scores.mask, 1), color=colour, linewidth=2.2, label=result.name)

    top.axhline(config.threshold, color=INK, linewidth=1, linestyle=(0, (5, 3)))
    top.annotate(f"below {config.threshold:g}:\ndrift", (1, config.threshold), **LABEL)
    top.set(title=f"Overlap of student's and teacher's top {config.k} (thick: mean of {WINDOW} tokens)")
    top.set(ylabel="overlap (share)", ylim=(0, 1.02))
    bottom.axhline(config.w_base, color=INK, linewidth=1, linestyle=(0, (5, 3)))
    bottom.annotate(f"at {config.w_base:g}:\nreliability\nused up", (1, config.w_base), **LABEL)
    bottom.set(title=f"Weight of a token's reward (each drift up to it costs w_drop = {config.w_drop:g})")
    bottom.set(xlabel="position in the response (tokens)", ylabel="weight (factor)")
    bottom.set(xlim=(1, max(2, length)), ylim=(0, 1.05 * (1 + config.w_base)))
    figure.align_ylabels()
    figure.legend(loc="outside upper center", ncols=len(results), frameon=False)
    return figure


def telling_response(results: Sequence[Result]) -> tuple[Result, int]:
    """The response whose weight falls furthest, and of those the one with the least drift: its result and its index."""

    def key(place: tuple[Result, int]) -> tuple[float, int]:
        scores, index = place[0].scores, place[1]
        return float(scores.weight[index][scores.mask[index]].min()), int(scores.drift[index].sum())

    return min(((result, index) for result in results for index in range(len(result.scores.mask))), key=key)


def draw_response(
    result: Result, index: int, prompt: str, tokenizer: PreTrainedTokenizerBase, config: PruneConfig
) -> Figure:
    """One response, each token on the colour of its weight, underlined where it drifts."""
    scores = result.scores
    mask = scores.mask[index]
    texts = [str(tokenizer.decode([token])) for token in result.rollouts.response_ids[index][mask].tolist()]
    places = lay_out(texts)
    lines = 1 + max((line for pieces in places for line, _, _ in pieces), default=0)

    advance, leading = 15 / DPI, 43 / DPI  # inches; whole pixels, since letters are set on pixels
    font_size, margin = 72 * advance / 0.602, 0.25  # in DejaVu Sans Mono a letter is 0.602 of the size wide
    width, height, above, below = LINE_LENGTH * advance, lines * leading, 0.8, 0.85
    figure = Figure(figsize=(width + 2 * margin, height + above + below))
    total_width, total_height = figure.get_size_inches()
    axes = figure.add_axes(
        (margin / total_width, below / total_height, width / total_width, height / total_height),
        xlim=(0, LINE_LENGTH),
        ylim=(lines, 0),
    )
    axes.axis("off")
    colours = ScalarMappable(Normalize(config.w_base, 1 + config.w_base), WEIGHT_COLOURS)
    for pieces, weight, drift in zip(places, scores.weight[index][mask], scores.drift[index][mask], strict=True):
        for line, column, text in pieces:
            axes.barh(line + 0.5, len(text), 0.86, column, color=WEIGHT_COLOURS(float(weight) - config.w_base))
            axes.text(column, line + 0.52, text, family=FONT, size=font_size, va="center", color=INK)
            if drift:
                start, end = column + len(text) - len(text.lstrip()) + 0.12, column + len(text) - 0.12
                axes.plot([start, end], [line + 0.87] * 2, color=INK, linewidth=0.9)

    left = margin / total_width
    figure.text(left, 1 - 0.17 / total_height, prompt, size=13, weight="bold", va="top", color=INK)
    student = f"{result.name} ({result.change})"
    figure.text(left, 1 - 0.46 / total_height, f"a response of the student with {student}", va="top", color=INK)
    bar = figure.add_axes((left, 0.5 / total_height, 0.42, 0.13 / total_height))
    figure.colorbar(colours, cax=bar, orientation="horizontal", ticks=config.w_base + torch.linspace(0, 1, 5).numpy())
    bar.spines["outline"].set_visible(False)
    bar.grid(visible=False)
    bar.set_xlabel("weight of the token's reward (factor)", labelpad=2)
    figure.text(left + 0.46, 0.5 / total_height, "underlined: the token drifts", color=INK)
    return figure


def lay_out(texts: Sequence[str]) -> list[list[tuple[int, int, str]]]:
    """Breaks a response into lines of at most LINE_LENGTH characters, between words where it can.

    Args:
        texts: The text of each token.

    Returns:
        For each token its pieces, as (line, column, text).
    """
    glyphs = FT2Font(findfont(FONT)).get_charmap()
    texts = ["".join(c if c in "\n" or ord(c) in glyphs else "\N{WHITE SQUARE}" for c in text) for text in texts]
    places: list[list[tuple[int, int, str]]] = []
    line = column = 0
    for index, text in enumerate(texts):
        rest = itertools.takewhile(lambda text: not text[:1].isspace(), texts[index + 1 :])
        word = text + "".join(rest) if index == 0 or text[:1].isspace() else ""
        if column + len(word.rstrip()) > LINE_LENGTH:
            line, column = line + 1, 0
        if not column:
            text = text.removeprefix(" ")
        shown = text.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
        pieces = []
        while shown:
            if column == LINE_LENGTH:
                line, column = line + 1, 0
            pieces.append((line, column, shown[: LINE_LENGTH - column]))
            shown, column = shown[LINE_LENGTH - column :], column + len(pieces[-1][2])
        if "\n" in text:
            line, column = line + 1, 0
        places.append(pieces)
    return places
