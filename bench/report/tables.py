"""Results for people: the plain table that a run prints, and the tables in the README and in the documentation.

The README and the documentation are written from the saved JSON lines.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from bench.measure.cases import READINGS, YARDSTICKS
from bench.operators import OPERATORS, USUAL
from bench.report import rows as results
from bench.report.rows import Row

ROOT = Path(__file__).parents[2]
README, PAGE, VERL_PAGE = ROOT / "README.md", ROOT / "docs/benchmarks.md", ROOT / "docs/integrations/verl.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
OPERATORS_BEGIN, OPERATORS_END = "<!-- bench:operators:begin -->", "<!-- bench:operators:end -->"
LINEAR_BEGIN, LINEAR_END = "<!-- bench:linear:begin -->", "<!-- bench:linear:end -->"
READING = {"read": "read only", "read_student": "read only, student", "copy": "copy"}
WAYS = {"eager": "log-softmax of all", "chunked": "chunks", "checkpointed": "chunks, recomputed"}
VERL_WAYS = {"verl full": "verl", "verl chunked": "verl, `use_chunked_topk`", "pruneopd": "`patch_verl`"}
BEST_FIRST = ("cuda", "triton", "avx512", "avx2", "portable", "torch", "reference")
NO_GPU = (
    "**The GPU kernels have not yet run on a GPU.** The tests run their source on a CPU. The speeds on an H200 are "
    "[predictions](#predictions) from the machine code."
)
NOT_YET = "Not measured yet."
PLAIN = {  # head -> (field, format)
    "median ms": ("median_ms", "10.3f"), "min ms": ("min_ms", "9.3f"), "GB/s": ("gb_s", "7.1f"),
    "of read": ("fraction_of_read", "8.3f"), "by min": ("fraction_of_read_min", "7.3f"),
    "of r/w": ("fraction_of_read_write", "7.3f"), "by min ": ("fraction_of_read_write_min", "7.3f"),
    "of copy": ("fraction_of_copy", "8.3f"), "x eager": ("times_faster_than_eager", "8.2f"),
    "x native": ("times_faster_than_eager_native", "8.2f"), "x compiled": ("times_faster_than_compiled", "10.2f"),
    "x chunked": ("times_faster_than_chunked", "9.2f"), "x ckpt": ("times_faster_than_checkpointed", "7.2f"),
    "/ k16": ("time_over_k16_random", "6.2f"),
}  # fmt: skip

T = TypeVar("T")
Columns = Mapping[str, Callable[[T], str]]


def plain(rows: Sequence[Row]) -> str:
    """Return a run as it is shown in the terminal."""
    widths = [int(form.split(".")[0]) for _, form in PLAIN.values()]
    lines = [f"{'':66} {' '.join(f'{head.strip():>{width}}' for head, width in zip(PLAIN, widths, strict=True))}"]
    for row in rows:
        passes = [row["passes"]] if "passes" in row else []
        name = " ".join([row["op"], row["dtype"], row["impl"], row["isa"], f"k={row['k']}", row["rows"], *passes])
        name += f" N={row['positions']}" if "positions" in row else ""
        values = [
            format(row[field], form) if field in row else " " * width
            for (field, form), width in zip(PLAIN.values(), widths, strict=True)
        ]
        lines.append(f"{name:66} {' '.join(values)}")
    return "\n".join(lines)


def write(path: Path | None) -> int:
    """Put the short tables between the README's markers, and the others between those of the pages."""
    return max(
        between_markers(README, summary(path)),
        between_markers(PAGE, tables(path), OPERATORS_BEGIN, OPERATORS_END),
        between_markers(PAGE, predictions()),
        between_markers(PAGE, linear(path), LINEAR_BEGIN, LINEAR_END),
        between_markers(VERL_PAGE, verl(path)),
    )


def between_markers(file: Path, new: str, begin: str = BEGIN, end: str = END) -> int:
    text = file.read_text()
    if begin not in text or end not in text:
        print(f"bench: {file} must hold the markers {begin} and {end}")
        return 1
    file.write_text(re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{new}\n{end}", text, flags=re.DOTALL))
    print(f"written to {file}")
    return 0


def _load(path: Path | None, *measures: str) -> list[list[Row]]:
    """Return the rows of each machine that are of these measures, if it has any."""
    files = [results.load(file) for file in ([path] if path else results.saved())]
    return list(filter(None, ([row for row in rows if row["measure"] in measures] for rows in files)))


# --- operators ----------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """The rows of one operator on one input: times and memory by implementation, or by instruction set on a CPU."""

    times: dict[str, Row]
    memory: dict[str, Row]

    @property
    def best(self) -> Row | None:
        """The row of the best implementation of this library, or of a yardstick."""
        return next((self.times[name] for name in BEST_FIRST if name in self.times), None)

    def memory_of_best(self) -> Row | None:
        return next((self.memory[name] for name in BEST_FIRST if name in self.memory), None)


def _lines(rows: Sequence[Row]) -> list[tuple[Row, Line]]:
    """Return the best row of each input with all the rows of that input."""
    found: dict[tuple[object, ...], Line] = {}
    for row in rows:
        what = tuple(row.get(name) for name in ("op", "dtype", "k", "rows", "positions", "passes"))
        line = found.setdefault(what, Line({}, {}))
        of = line.times if row["measure"] == "time" else line.memory
        of[row["isa"] if row["impl"] == "cpp" else row["impl"]] = row
    return [(line.best, line) for line in found.values() if line.best]


def tables(path: Path | None = None) -> str:
    """Return the tables of each machine, for one file of results or all that are saved; GPUs first.

    The losses have one of their own, with the time of both passes, and what is usual in place of one of them another.
    """
    saved = _load(path, "time", "memory")
    on_gpu = [table for rows in saved if "gpu" in rows[0] for table in _of_machine(rows, on_gpu_markdown)]
    on_cpu = [table for rows in saved if "gpu" not in rows[0] for table in _of_machine(rows, markdown)]
    return "\n\n".join([*(on_gpu or [NO_GPU]), *on_cpu])


def summary(path: Path | None = None) -> str:
    """Return the README's table of each machine, GPUs first: each operator once, beside PyTorch."""
    return "\n\n".join(map(summary_markdown, compared(path)))


def compared(path: Path | None = None) -> list[list[tuple[Row, Line]]]:
    """Return for each machine, GPUs first, the operators timed beside eager PyTorch on bfloat16 logits.

    A loss is timed with its backward pass. Of several numbers of positions, the largest counts.
    """
    machines = []
    for rows in sorted(_load(path, "time", "memory"), key=lambda rows: "gpu" not in rows[0]):
        lines: dict[str, tuple[Row, Line]] = {}
        for best, line in sorted(_lines(rows), key=lambda line: line[0].get("positions", 0)):
            wanted = (best["dtype"], best["rows"], best.get("passes", "both")) == ("bfloat16", "random", "both")
            if wanted and best["op"] in OPERATORS and "eager" in line.times:
                lines[best["op"]] = best, line
        machines.append([lines[name] for name in OPERATORS if name in lines])
    return list(filter(None, machines))


def summary_markdown(lines: Sequence[tuple[Row, Line]]) -> str:
    columns: Columns[tuple[Row, Line]] = {
        "operator": lambda line: f"`{line[0]['op']}`" + (f", {_passes(line[0])}" if "passes" in line[0] else ""),
        "eager PyTorch": lambda line: _duration(line[1].times["eager"]["median_ms"]),
        "torch.compile": lambda line: _time(line[1].times.get("compiled")),
        "this library": lambda line: _duration(line[0]["median_ms"]),
        "against eager": lambda line: _times(line[0], "times_faster_than_eager"),
        "against torch.compile": lambda line: _times(line[0], "times_faster_than_compiled"),
        "extra memory, eager": lambda line: _extra(line[1].memory.get("eager")),
        "extra memory": lambda line: _extra(line[1].memory_of_best()),
    }
    timed = [row for _, line in lines for row in line.times.values()]
    return markdown_table(f"{case_in_words(lines)}.{_busy(timed)}", columns, lines)


def case_in_words(lines: Sequence[tuple[Row, Line]]) -> str:
    """Return the machine and the input of a short table."""
    best, _ = lines[0]
    positions, vocabulary = best.get("positions", math.prod(best["shape"][:-1])), best["shape"][-1]
    return f"{_machine(best)}: {positions} positions, {vocabulary} ids, {best['dtype']}, k={best['k']}"


def _of_machine(rows: Sequence[Row], markdown: Callable[[Sequence[Row]], str]) -> Iterator[str]:
    operators = [row for row in rows if "passes" not in row]
    if any(row["op"] != "copy" for row in operators):
        yield markdown(operators)
    copies = [row for row in rows if row["op"] == "copy"]
    losses = [row for row in rows if "passes" in row]
    if losses:
        yield markdown([*copies, *losses])
    if any(row["impl"] in USUAL for row in losses):
        yield usual_markdown(losses)


def markdown(rows: Sequence[Row]) -> str:
    """Return the table for one CPU, of its operators or of its losses."""
    first = next(row for row in rows if row["measure"] == "time")
    yardstick = "the read-only pass"
    if "passes" in first:
        yardstick = "the read-only pass (forward), or of reading and writing the same bytes (forward and backward),"
    caption = (
        f"{_machine(first)}. Each cell is the median time of a call. The number in brackets is the speed as a "
        f"fraction of {yardstick} with the same instruction set." + _busy(rows)
    )
    isas = [isa for isa in ("portable", "avx2", "avx512") if any(row["isa"] == isa for row in rows)]
    lines = [line for line in _lines(rows) if (line[0]["op"], line[0]["rows"]) != ("read", "ascending")]
    return markdown_table(caption, _columns(isas, ["against eager"]), lines)


def on_gpu_markdown(rows: Sequence[Row]) -> str:
    """Return the table for one GPU, with what had been predicted for it."""
    copy = max((row for row in rows if row["op"] == "copy"), key=lambda row: row["positions"])
    caption = (
        f"{_machine(copy)}. Each cell is the median time of a call. The number in brackets is its bandwidth as a "
        f"fraction of a device-to-device copy in the same run, which read and wrote {copy['gb_s'] / 1e3:.2f} TB/s. "
        "*Predicted* was computed before the first measurement, from bytes and machine code."
    )
    expected = {results.key(row)[1:]: row for row in _predictions() if row["gpu"] == copy["gpu"]}
    columns = _columns(["triton", "cuda"], ["against eager", "against torch.compile"], expected)
    return markdown_table(caption, columns, _lines(rows))


def _columns(
    kernels: Sequence[str], ratios: Sequence[str], expected: Mapping[tuple[object, ...], Row] | None = None
) -> Columns[tuple[Row, Line]]:
    """Return the columns of both tables; the peers stand on the left of the kernels, their memory on the right."""

    def time_of(name: str) -> Callable[[tuple[Row, Line]], str]:
        return lambda line: _time(line[1].times.get(name))

    fields = {"against eager": "times_faster_than_eager", "against torch.compile": "times_faster_than_compiled"}
    columns: dict[str, Callable[[tuple[Row, Line]], str]] = {
        "operator": lambda line: READING.get(line[0]["op"], f"`{line[0]['op']}`"),
        "input": lambda line: _input(line[0]),
        "eager PyTorch": lambda line: _time(line[1].times.get("torch", line[1].times.get("eager"))),
        "torch.compile": time_of("compiled"),
        **{name: time_of(name) for name in kernels},
    }
    if expected is not None:
        columns["predicted"] = lambda line: _range(expected.get(results.key(line[0])[1:]))
    for ratio in ratios:
        columns[ratio] = lambda line, field=fields[ratio]: _times(line[0], field)  # type: ignore[misc]
    columns["extra memory, eager"] = lambda line: _extra(line[1].memory.get("eager"))
    columns["extra memory"] = lambda line: _extra(line[1].memory_of_best())
    return columns


def usual_markdown(losses: Sequence[Row]) -> str:
    """Return what is usual in place of a loss, in time and memory, beside the best of the kernels."""
    (name,) = (name for name, op in OPERATORS.items() if op.usual)
    caption = (
        f"`{name}`, forward and backward, beside three usual ways: a log-softmax of all positions, chunks of a quarter "
        "of them, and chunks of a sixteenth that the backward pass computes again. Each cell is the median time of a "
        "call and its memory beyond logits, loss and gradient."
    )

    def cell(time: Row | None, memory: Row | None) -> str:
        return ", ".join(filter(None, [_duration(time["median_ms"]) if time else "", _extra(memory)]))

    columns: dict[str, Callable[[tuple[Row, Line]], str]] = {
        "input": lambda line: _input(line[0]),
        "this library": lambda line: cell(line[0], line[1].memory_of_best()),
    }
    for way, words in WAYS.items():
        columns[words] = lambda line, way=way: cell(line[1].times.get(way), line[1].memory.get(way))  # type: ignore[misc]
    lines = _lines([row for row in losses if row["op"] == name and row["passes"] == "both"])
    return markdown_table(caption, columns, lines)


# --- other measurements -------------------------------------------------------------------------------------------


def linear(path: Path | None = None) -> str:
    """Return the page's tables of the losses from hidden states, one a machine."""
    return "\n\n".join(map(linear_markdown, _load(path, "linear"))) or NOT_YET


def linear_markdown(rows: Sequence[Row]) -> str:
    steps = [row for row in rows if "products_ms" in row]
    full = {row["loss"]: row for row in rows if row["reduction"] == "full logits"}
    first = steps[0]
    caption = (
        f"{_machine(first)}: {first['positions']} positions, H = {first['hidden']}, V = {first['vocabulary']}, "
        f"{first['dtype']}, chunks of {first['chunk_size']} positions. Time of a step, forward and backward; memory "
        "beyond inputs, outputs and gradients."
    )

    def of_full_logits(row: Row) -> str:
        other = full.get(row["loss"])
        at = f" at {other['positions']} positions" if other and other["positions"] != row["positions"] else ""
        return f"{_extra(other)}{at}"

    columns: Columns[Row] = {
        "loss": lambda row: f"`{row['loss']}`",
        "reduction": lambda row: f"`{row['reduction']}`",
        "time": lambda row: _duration(row["median_ms"]),
        "products alone": lambda row: _duration(row["products_ms"]),
        "relative to the products": lambda row: f"{row['time_over_products']:.2f}x",
        "memory": _extra,
        "memory with full logits": of_full_logits,
    }
    skipped = [
        f"\n\nWith `skip_exhausted=True`, chunks of {row['chunk_size']} positions and {row['exhausted']:.0%} of the "
        f"positions exhausted, a step of `{row['loss']}` takes {_duration(row['median_ms'])}, "
        f"{row['time_over_not_skipping']:.2f} of the time without it."
        for row in rows
        if "time_over_not_skipping" in row
    ]
    return markdown_table(caption, columns, steps) + "".join(skipped)


def verl(path: Path | None = None) -> str:
    """Return the tables of verl's loss, one a machine."""
    return "\n\n".join(map(verl_markdown, _load(path, "verl"))) or NOT_YET


def verl_markdown(rows: Sequence[Row]) -> str:
    first = rows[0]
    caption = (
        f"{_machine(first)}: {first['positions']} positions, V = {first['vocabulary']}, k = {first['k']}. "
        "Median time of both passes; memory beyond the logits and their gradient." + _busy(rows)
    )
    columns: Columns[Row] = {
        "logits": lambda row: str(row["dtype"]),
        "function": lambda row: VERL_WAYS[row["impl"]],
        "time": lambda row: _duration(row["median_ms"]),
        "against verl": lambda row: _times(row, "times_faster_than_verl"),
        "memory": _extra,
    }
    return markdown_table(caption, columns, rows)


def predictions() -> str:
    """Return the page's table of what is expected of a GPU, whether it has been measured or not."""
    columns: Columns[Row] = {
        "operator": lambda row: f"`{row['op']}`",
        "implementation": lambda row: str(row["impl"]),
        "input": _input,
        "instructions per pair": lambda row: f"{row['slots_per_pair']:.1f}",
        "registers": lambda row: str(row["registers"]),
        "predicted time": lambda row: _duration(row["median_ms"]),
        "fraction of copy speed": _range,
    }
    machines = ", ".join(dict.fromkeys(row["gpu"] for row in _predictions()))
    return markdown_table(f"For {machines}:", columns, _predictions())


def _predictions() -> list[Row]:
    return results.load(results.FOLDER / results.PREDICTIONS)


# --- cells --------------------------------------------------------------------------------------------------------


def markdown_table(caption: str, columns: Columns[T], lines: Sequence[T]) -> str:
    rows = [list(columns), *([cell(line) for cell in columns.values()] for line in lines)]
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([caption, "", head, "|---" * len(columns) + "|", *body])


def _machine(row: Row) -> str:
    device = f"{row['cpu']}, {row['threads']} threads" if "cpu" in row else row["gpu"]
    others = [f"{other} {row[name]}" for name, other in (("triton", "Triton"), ("verl", "verl")) if name in row]
    return ", ".join([device, f"torch {row['torch']}", *others, str(row["date"])[:10]])


def _busy(rows: Sequence[Row]) -> str:
    busiest = max(row["load_average"] for row in rows)
    if busiest <= results.BUSY:
        return ""
    return f" Other programs were running (load average {busiest}): take the numbers as a first impression."


def _input(row: Row) -> str:
    op = OPERATORS.get(row["op"])
    if op and not op.of_logits:
        return op.shape_in_words
    parts = [f"{row['positions']} position{'s' * (row['positions'] != 1)}"] if "positions" in row else []
    parts += [row["dtype"]]
    parts += [] if row["op"] in YARDSTICKS or (op and not op.has_k) else [f"k={row['k']}"]
    parts += [] if row["rows"] == "random" else [row["rows"]]
    parts += [_passes(row)] if "passes" in row else []
    return ", ".join(parts)


def _passes(row: Row) -> str:
    if row["op"] in READINGS:
        return "twice, and writing the gradient" if row["passes"] == "both" else "once"
    return "forward and backward" if row["passes"] == "both" else str(row["passes"])


def _time(row: Row | None) -> str:
    if row is None:
        return ""
    fractions = ("fraction_of_read", "fraction_of_read_write", "fraction_of_copy")
    of = next((row[name] for name in fractions if name in row), None)
    return _duration(row["median_ms"]) + ("" if of is None else f" ({of:.2f})")


def _duration(milliseconds: float) -> str:
    if milliseconds >= 1000:
        return f"{milliseconds / 1e3:.3g} s"
    return f"{milliseconds:.3g} ms" if milliseconds >= 0.1 else f"{milliseconds * 1e3:.3g} us"


def _range(row: Row | None) -> str:
    """Return the predicted fraction of copying, and between which it should be."""
    if row is None:
        return ""
    ends = f" ({row['at_worst']:.2f} to {row['at_best']:.2f})" if row["at_worst"] != row["at_best"] else ""
    return f"{row['fraction_of_copy']:.2f}{ends}"


def _times(row: Row, field: str) -> str:
    return f"{row[field]:.3g}x" if field in row else ""


def _extra(row: Row | None) -> str:
    if row is None:
        return ""
    kib = row["extra_bytes"] / 1024
    return f"{round(kib)} KiB" if kib < 1024 else f"{kib / 1024:.3g} MiB"
