"""The README's bar chart, drawn from the saved JSON lines: one group of bars for each operator."""

from __future__ import annotations

from html import escape
from pathlib import Path

from bench.report import tables

FILE = tables.ROOT / "docs/images/speed.svg"
BARS = {
    "eager": ("eager PyTorch", "#9aa0a6"),
    "compiled": ("torch.compile", "#e69f00"),
    "": ("this library", "#0072b2"),
}
WIDTH, LEFT, LONGEST = 800, 170, 540  # pixels: the picture, the labels, the longest bar
TOP, BAR, GAP = 84, 15, 14


def write(path: Path | None = None) -> int:
    FILE.write_text(svg(path))
    print(f"written to {FILE}")
    return 0


def svg(path: Path | None = None) -> str:
    """Return the chart of the first machine that has results; its scale is linear, from 0."""
    lines = tables.compared(path)[0]
    times = [[(line.times.get(name) if name else best, *bar) for name, bar in BARS.items()] for best, line in lines]
    scale = LONGEST / max(row["median_ms"] for group in times for row, *_ in group if row)
    parts, y = [], TOP
    for (best, _), group in zip(lines, times, strict=True):
        middle = y + 1.5 * BAR
        parts.append(text(LEFT - 10, middle - 3 if "passes" in best else middle + 4, best["op"], "end"))
        if "passes" in best:
            parts.append(text(LEFT - 10, middle + 12, "forward and backward", "end", 'class="small"'))
        for row, _, colour in group:
            if row:
                width = row["median_ms"] * scale
                parts.append(
                    f'<rect class="bar" x="{LEFT}" y="{y}" width="{width:.4g}" height="{BAR - 2}" fill="{colour}"/>'
                )
                parts.append(text(LEFT + width + 6, y + 11, f"{row['median_ms']:.3g} ms", "start", 'class="small"'))
            y += BAR
        y += GAP
    legend = []
    for place, (name, colour) in enumerate(BARS.values()):
        x = LEFT + 140 * place
        legend += [f'<rect x="{x}" y="56" width="13" height="13" fill="{colour}"/>', text(x + 19, 67, name)]
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img">',
        "<style>"
        "text { font: 13px sans-serif; fill: #222 } .small { font-size: 11px } .title { font-weight: 700 }</style>",
        f'<rect width="{WIDTH}" height="{y}" fill="white"/>',
        text(16, 24, "Time of a call (shorter is better)", "start", 'class="title"'),
        text(16, 43, tables.case_in_words(lines), "start", 'class="small"'),
        *legend,
        *parts,
        "</svg>\n",
    ])  # fmt: skip


def text(x: float, y: float, words: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.4g}" y="{y:.4g}" text-anchor="{anchor}" {more}>{escape(words)}</text>'
