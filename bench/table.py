"""Results for people: the plain table that a run prints, and the README's, written from the saved JSON lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bench import results

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def plain(rows: Sequence[results.Row]) -> str:
    """A run as it is shown in the terminal."""
    heads = ("median ms", "min ms", "GB/s", "of read", "by min", "x eager", "x native", "x compiled", "/ k16")
    fields = (
        ("median_ms", "10.3f"), ("min_ms", "9.3f"), ("gb_s", "7.1f"), ("fraction_of_read", "8.3f"),
        ("fraction_of_read_min", "7.3f"), ("times_faster_than_eager", "8.2f"),
        ("times_faster_than_eager_native", "8.2f"), ("times_faster_than_compiled", "10.2f"),
        ("time_over_k16_random", "6.2f"),
    )  # fmt: skip
    widths = [int(form.split(".")[0]) for _, form in fields]
    lines = [f"{'':58} {' '.join(f'{head:>{width}}' for head, width in zip(heads, widths, strict=True))}"]
    for row in rows:
        name = f"{row['op']} {row['dtype']} {row['impl']} {row['isa']} k={row['k']} {row['rows']}"
        values = [
            format(row[field], form) if field in row else " " * width
            for (field, form), width in zip(fields, widths, strict=True)
        ]
        lines.append(f"{name:58} {' '.join(values)}")
    return "\n".join(lines)


def write(path: Path | None) -> int:
    """Puts the tables between the README's markers."""
    text = README.read_text()
    if BEGIN not in text or END not in text:
        print(f"bench: {README} must hold the markers {BEGIN} and {END}")
        return 1
    README.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{tables(path)}\n{END}", text, flags=re.DOTALL))
    print(f"written to {README}")
    return 0


def tables(path: Path | None = None) -> str:
    """One table a machine, for one file of results or all that are saved."""
    files = [path] if path else sorted(results.FOLDER.glob("*.jsonl"))
    return "\n\n".join(markdown(results.load(file)) for file in files)


def markdown(rows: Sequence[results.Row]) -> str:
    """The README's tables for one machine."""
    times = [row for row in rows if row["measure"] == "time"]
    extra = {results.key(row)[1:]: row for row in rows if row["measure"] == "memory"}
    isas = [isa for isa in ("portable", "avx2", "avx512") if any(row["isa"] == isa for row in times)]
    first = times[0]
    caption = (
        f"{first['cpu']}, {first['threads']} threads, torch {first['torch']}, {str(first['date'])[:10]}. A cell is the "
        "median time of a call; in brackets the speed as a fraction of plain reading with the same instruction set."
    )
    busiest = max(row["load_average"] for row in rows)
    if busiest > results.BUSY:
        caption += f" Other programs were running (load average {busiest}): take the numbers as a first impression."
    heads = ["operator", "input", "eager PyTorch", "torch.compile", *isas]
    heads += ["against eager", "extra memory, eager", "extra memory"]
    lines = [caption, "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for op, dtype, k, order in dict.fromkeys((row["op"], row["dtype"], row["k"], row["rows"]) for row in times):
        same = {
            (row["impl"], row["isa"]): row for row in times
            if (row["op"], row["dtype"], row["k"], row["rows"]) == (op, dtype, k, order)
        }  # fmt: skip
        kernels = [same.get(("cpp", isa)) for isa in isas]
        best = next((row for row in reversed(kernels) if row), None)
        if best is None or (op, order) == ("read", "ascending"):
            continue
        cells = [
            "plain reading" if op == "read" else f"`{op}`",
            _input(best),
            _time(same.get(("eager", "none"))),
            _time(same.get(("compiled", "none"))),
            *map(_time, kernels),
            f"{best['times_faster_than_eager']:.3g}x" if "times_faster_than_eager" in best else "",
            _extra(extra, same.get(("eager", "none"))),
            _extra(extra, best),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _input(row: results.Row) -> str:
    if row["op"] == "reliability_from_topk":
        return "ids `[64, 12288, 16]`"
    if row["op"] == "reliability_from_drift":
        return "drift `[64, 12288]`"
    what = "" if row["op"] == "read" else f", k={row['k']}"
    return f"{row['dtype']}{what}{'' if row['rows'] == 'random' else ', ' + str(row['rows'])}"


def _time(row: results.Row | None) -> str:
    if row is None:
        return ""
    fraction = f" ({row['fraction_of_read']:.2f})" if "fraction_of_read" in row else ""
    return f"{row['median_ms']:.3g} ms{fraction}"


def _extra(extra: dict[tuple[object, ...], results.Row], row: results.Row | None) -> str:
    found = extra.get(results.key(row)[1:]) if row else None
    if found is None:
        return ""
    kib = found["extra_bytes"] / 1024
    return f"{round(kib)} KiB" if kib < 1024 else f"{kib / 1024:.3g} MiB"
