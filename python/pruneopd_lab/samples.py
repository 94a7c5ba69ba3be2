"""Responses to read, each token on the colour of its weight: on a terminal, and as a page for a browser."""

import unicodedata
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

from rich.console import Console
from rich.rule import Rule
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from pruneopd_trainer.atomic import replacing
from pruneopd_trainer.loop import Trainer, responses

COLOURS = ("#f2a65a", "#fbe3c4", "#f7f7f7", "#c6ddf0", "#6baed6")
"""From no weight (orange) over half to the largest (blue): told apart by colour-blind readers, all light enough for
dark text."""
INK = "#222222"
RETURN = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
PAGE = Path(__file__).with_suffix(".html")
"""The page's frame, with names such as $title."""
SHOWN = 8
"""Responses of a step that are shown."""


class Sample(NamedTuple):
    """One response, token by token."""

    prompt: str
    tokens: list[str]  # pieces of text, to be joined as they are
    weights: list[float]  # the factor of each token's reward, 0 .. 1 + w_base
    overlaps: list[float]
    drifts: list[bool]
    answer: str | None  # the right one, if it is known
    grade: float | None  # of the response, 0 .. 1; None if it is not graded
    finished: bool  # whether it ended by itself


def samples_of(run: Trainer) -> list[Sample]:
    """Return some responses of the last step with what they were trained with."""
    if run.last is None:
        return []
    rollouts, scores, given, examples = run.last
    grades = run.grade(examples, rollouts) if run.task.graded else [None] * len(examples)
    finished = run.finished(rollouts).tolist()
    samples = []
    for row, ids in enumerate(responses(rollouts)[:SHOWN]):
        length = len(ids)
        samples.append(
            Sample(
                prompt=examples[row].prompt,
                tokens=pieces(run.pair.tokenizer, ids),
                weights=given.weight[row, :length].tolist(),
                overlaps=scores.overlap[row, :length].tolist(),
                drifts=scores.drift[row, :length].tolist(),
                answer=examples[row].answer,
                grade=grades[row],
                finished=finished[row],
            )
        )
    return samples


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Return what each token adds to the text; a token that leaves a character incomplete adds nothing yet."""
    found, done = [], ""
    for count in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:count]))
        piece = "" if text.endswith("\N{REPLACEMENT CHARACTER}") else text[len(done) :]
        done = text if piece else done
        found.append(piece)
    return found


def colour(share: float) -> str:
    """Return the colour of a weight that is this share of the largest, as #rrggbb."""
    place = min(max(share, 0.0), 1.0) * (len(COLOURS) - 1)
    index = min(int(place), len(COLOURS) - 2)
    lower, upper = (bytes.fromhex(stop[1:]) for stop in COLOURS[index : index + 2])
    mixed = [round(a + (place - index) * (b - a)) for a, b in zip(lower, upper, strict=True)]
    return "#" + bytes(mixed).hex()


def visible(text: str) -> str:
    """Return the text with a replacement character for each that would steer a terminal or vanish on a page."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(letter)[0] == "C" and letter not in "\n\t" else letter
        for letter in text
    )


def facts(sample: Sample) -> str:
    """Return what there is to say about a response as a whole."""
    count, drifts = len(sample.tokens), sum(sample.drifts)
    parts = [
        f"{count} {'token' if count == 1 else 'tokens'}",
        "finished" if sample.finished else "cut off",
        f"{drifts} {'drifts' if drifts == 1 else 'drift'}",
    ]
    if sample.weights:
        parts.append(f"mean weight {sum(sample.weights) / count:.2f}")
    if sample.answer is not None:
        parts.append(f"answer {sample.answer}")
    if sample.grade is not None:
        parts.append(f"grade {sample.grade:g}")
    return ", ".join(parts)


def show(samples: Sequence[Sample], console: Console, w_base: float) -> None:
    """Print responses, each token on the colour of its weight; the largest weight is 1 + w_base."""
    largest = 1 + w_base
    console.print(_legend(largest))
    for sample in samples:
        console.print(Rule(style="dim"))
        console.print(Text(visible(sample.prompt), style="bold"))
        console.print(Text(visible(facts(sample)), style="dim"))
        response = Text()
        for token, weight, drift in zip(sample.tokens, sample.weights, sample.drifts, strict=True):
            style = f"{INK} on {colour(weight / largest)}{' underline' if drift else ''}"
            response.append(visible(token).replace("\n", f"{RETURN}\n"), style=style)
        console.print(response)


def _legend(largest: float) -> Text:
    legend = Text("weight of a token's reward: ")
    for share in (0, 0.25, 0.5, 0.75, 1):
        legend.append(f" {largest * share:.2f} ", style=f"{INK} on {colour(share)}")
    return legend.append("  ").append("underlined", style="underline").append(": the token drifts")


def write_html(samples: Sequence[Sample], file: Path, title: str, w_base: float) -> None:
    """Write responses as a page with nothing outside of it; the old page stays until the new one is complete."""
    ticks = "".join(f"<span>{(1 + w_base) * share:.2f}</span>" for share in (0, 0.25, 0.5, 0.75, 1))
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=escape(visible(title)),
        ink=INK,
        colours=", ".join(COLOURS),
        ticks=ticks,
        w_base=f"{w_base:g}",
        responses="\n".join(_article(sample, 1 + w_base) for sample in samples),
    )
    with replacing(file) as beside:
        beside.write_text(page, encoding="utf-8")


def _article(sample: Sample, largest: float) -> str:
    values = zip(sample.tokens, sample.weights, sample.overlaps, sample.drifts, strict=True)
    spans = "".join(_span(position, *value, largest) for position, value in enumerate(values))
    return (
        f"<article><h2>{escape(visible(sample.prompt))}</h2><p class='facts'>{escape(visible(facts(sample)))}</p>"
        f"<p class='response'>{spans}</p></article>"
    )


def _span(position: int, token: str, weight: float, overlap: float, drift: bool, largest: float) -> str:
    """Return one token; a line feed follows the sign for it, which cannot be copied."""
    told = f"position {position}, weight {weight:.3f}, overlap {overlap:.3f}{', drift' if drift else ''}"
    text = escape(visible(token)).replace("\n", "<i></i>\n")
    kind = " class='drift'" if drift else ""
    return f"<span{kind} style='background:{colour(weight / largest)}' title='{told}'>{text}</span>"
