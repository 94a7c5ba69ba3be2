"""Results for people: the plain table that a run prints, and those in the README and in the documentation.

The latter are written from the saved JSON lines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench import results
from bench.cases import READINGS, USUAL, YARDSTICKS

ROOT = Path(__file__).parent.parent
README, PAGE, VERL_PAGE = ROOT / "README.md", ROOT / "docs/benchmarks.md", ROOT / "docs/integrations/verl.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
READING = {"read": "plain reading", "read_student": "plain reading of the student"}
PASSES = {"both": "forward and backward"}
WAYS = {"eager": "log-softmax of all", "chunked": "chunks", "checkpointed": "chunks, computed twice"}
LINEAR_BEGIN, LINEAR_END = "<!-- bench:linear:begin -->", "<!-- bench:linear:end -->"
VERL_WAYS = {"verl full": "verl", "verl chunked": "verl, `use_chunked_topk`", "pruneopd": "`patch_verl`"}
NO_GPU = (
    "**The GPU kernels have not yet run on a GPU.** In the tests their source runs on a CPU; what their machine code "
    "promises on an H200 is among the [predictions](docs/benchmarks.md#predictions)."
)


def plain(rows: Sequence[results.Row]) -> str:
    """A run as it is shown in the terminal."""
    heads = (
        "median ms",
        "min ms",
        "GB/s",
        "of read",
        "by min",
        "of r/w",
        "by min",
        "of copy",
        "x eager",
        "x native",
        "x compiled",
        "x chunked",
        "x ckpt",
        "/ k16",
    )
    fields = (
        ("median_ms", "10.3f"), ("min_ms", "9.3f"), ("gb_s", "7.1f"), ("fraction_of_read", "8.3f"),
        ("fraction_of_read_min", "7.3f"), ("fraction_of_read_write", "7.3f"), ("fraction_of_read_write_min", "7.3f"),
        ("fraction_of_copy", "8.3f"), ("times_faster_than_eager", "8.2f"), ("times_faster_than_eager_native", "8.2f"),
        ("times_faster_than_compiled", "10.2f"), ("times_faster_than_chunked", "9.2f"),
        ("times_faster_than_checkpointed", "7.2f"), ("time_over_k16_random", "6.2f"),
    )  # fmt: skip
    widths = [int(form.split(".")[0]) for _, form in fields]
    lines = [f"{'':66} {' '.join(f'{head:>{width}}' for head, width in zip(heads, widths, strict=True))}"]
    for row in rows:
        passes = [row["passes"]] if "passes" in row else []
        name = " ".join([row["op"], row["dtype"], row["impl"], row["isa"], f"k={row['k']}", row["rows"], *passes])
        name += f" N={row['positions']}" if "positions" in row else ""
        values = [
            format(row[field], form) if field in row else " " * width
            for (field, form), width in zip(fields, widths, strict=True)
        ]
        lines.append(f"{name:66} {' '.join(values)}")
    return "\n".join(lines)


def write(path: Path | None) -> int:
    """Puts the tables between the README's markers, and the others between those of the page on benchmarks."""
    return max(
        _between_markers(README, tables(path)),
        _between_markers(PAGE, predictions()),
        _between_markers(PAGE, linear(path), LINEAR_BEGIN, LINEAR_END),
        _between_markers(VERL_PAGE, verl(path)),
    )


def _between_markers(file: Path, new: str, begin: str = BEGIN, end: str = END) -> int:
    text = file.read_text()
    if begin not in text or end not in text:
        print(f"bench: {file} must hold the markers {begin} and {end}")
        return 1
    file.write_text(re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{new}\n{end}", text, flags=re.DOTALL))
    print(f"written to {file}")
    return 0


def tables(path: Path | None = None) -> str:
    """The tables of each machine, for one file of results or all that are saved; GPUs first.

    The losses have one of their own, with the time of both passes, and what is usual in place of one of them another.
    """
    saved = [rows for rows in _load(path, "time", "memory") if rows]
    on_gpu = [table for rows in saved if "gpu" in rows[0] for table in _of_machine(rows, on_gpu_markdown)]
    on_cpu = [table for rows in saved if "gpu" not in rows[0] for table in _of_machine(rows, markdown)]
    return "\n\n".join([*(on_gpu or [NO_GPU]), *on_cpu])


def _of_machine(rows: Sequence[results.Row], markdown: Callable[[Sequence[results.Row]], str]) -> Iterator[str]:
    operators = [row for row in rows if "passes" not in row]
    if any(row["op"] != "copy" for row in operators):
        yield markdown(operators)
    copies = [row for row in rows if row["op"] == "copy"]
    losses = [row for row in rows if "passes" in row]
    if losses:
        yield markdown([*copies, *losses])
    if any(row["impl"] in USUAL for row in losses):
        yield usual_markdown(losses)


def _load(path: Path | None, *measures: str) -> list[list[results.Row]]:
    """The rows of each machine that are of these measures."""
    files = [results.load(file) for file in ([path] if path else results.saved())]
    return [[row for row in rows if row["measure"] in measures] for rows in files]


def markdown(rows: Sequence[results.Row]) -> str:
    """The README's table for one CPU, of its operators or of its losses."""
    isas = [isa for isa in ("portable", "avx2", "avx512") if any(row["isa"] == isa for row in rows)]
    first = next(row for row in rows if row["measure"] == "time")
    caption = (
        f"{first['cpu']}, {first['threads']} threads, torch {first['torch']}, {str(first['date'])[:10]}. A cell is the "
        f"median time of a call; in brackets the speed as a fraction of {_yardstick(first)} with the same instruction "
        "set."
    )
    caption += _busy(rows)
    heads = ["operator", "input", "eager PyTorch", "torch.compile", *isas]
    heads += ["against eager", "extra memory, eager", "extra memory"]
    lines = []
    for same, extra in _by_input(rows):
        kernels = [same.get(("cpp", isa)) for isa in isas]
        best = next((row for row in reversed(kernels) if row), None)
        if best is None or (best["op"], best["rows"]) == ("read", "ascending"):
            continue
        lines.append(
            [
                READING[best["op"]] if best["op"] in READINGS else f"`{best['op']}`",
                _input(best),
                _time(same.get(("eager", "none"))),
                _time(same.get(("compiled", "none"))),
                *map(_time, kernels),
                _times(best, "times_faster_than_eager"),
                _extra(extra.get(("eager", "none"))),
                _extra(extra.get((best["impl"], best["isa"]))),
            ]
        )
    return _markdown(caption, heads, lines)


def on_gpu_markdown(rows: Sequence[results.Row]) -> str:
    """The README's table for one GPU, with what had been predicted for it."""
    copy = max((row for row in rows if row["op"] == "copy"), key=lambda row: row["positions"])
    caption = (
        f"{copy['gpu']}, torch {copy['torch']}, Triton {copy['triton']}, {str(copy['date'])[:10]}. A cell is the "
        "median time of a call; in brackets its bandwidth as a fraction of that of a device-to-device copy in the same "
        f"run, which read and wrote {copy['gb_s'] / 1e3:.2f} TB/s. *Predicted* was computed before the first "
        "measurement, from bytes and machine code."
    )
    expected = {results.key(row)[1:]: row for row in _predictions() if row["gpu"] == copy["gpu"]}
    heads = ["operator", "input", "eager PyTorch", "torch.compile", "triton", "cuda", "predicted", "against eager"]
    heads += ["against torch.compile", "extra memory, eager", "extra memory"]
    lines = []
    for same, extra in _by_input(rows):
        by_impl = {impl: row for (impl, _), row in same.items()}
        best = next((by_impl[impl] for impl in ("cuda", "triton", "torch", "reference") if impl in by_impl), None)
        if best is None:
            continue
        lines.append(
            [
                "copy" if best["op"] == "copy" else f"`{best['op']}`",
                _input(best),
                _time(by_impl.get("torch", by_impl.get("eager"))),
                _time(by_impl.get("compiled")),
                _time(by_impl.get("triton")),
                _time(by_impl.get("cuda")),
                _range(expected.get(results.key(best)[1:])),
                _times(best, "times_faster_than_eager"),
                _times(best, "times_faster_than_compiled"),
                _extra(extra.get(("eager", "none"))),
                _extra(extra.get((best["impl"], best["isa"]))),
            ]
        )
    return _markdown(caption, heads, lines)


def usual_markdown(losses: Sequence[results.Row]) -> str:
    """What is usual in place of `topk_forward_kl`, in time and memory, beside the best of the kernels."""
    caption = (
        "`topk_forward_kl`, forward and backward, beside what is usual: a log-softmax of all positions, chunks of a "
        "quarter of them, chunks of a sixteenth that are computed again in the backward pass. A cell is the median "
        "time of a call and what it needs beyond logits, loss and gradient."
    )
    lines = []
    for same, extra in _by_input([row for row in losses if row["op"] == "topk_forward_kl" and row["passes"] == "both"]):
        best = _best(same)
        if best is None:
            continue
        found = [best, *(same.get((way, "none")) for way in WAYS)]
        memory = [extra.get((row["impl"], row["isa"])) if row else None for row in found]
        cells = [
            ", ".join(filter(None, [_duration(row["median_ms"]) if row else "", _extra(bytes_)]))
            for row, bytes_ in zip(found, memory, strict=True)
        ]
        lines.append([_input(best), *cells])
    return _markdown(caption, ["input", "this library", *WAYS.values()], lines)


def _best(same: ByImplementation) -> results.Row | None:
    """The row of the best implementation of this library."""
    best = [("cuda", "none"), ("triton", "none"), *(("cpp", isa) for isa in ("avx512", "avx2", "portable"))]
    return next((same[one] for one in [*best, ("reference", "none")] if one in same), None)


def linear(path: Path | None = None) -> str:
    """The page's tables of the losses from hidden states, one a machine."""
    return "\n\n".join(linear_markdown(rows) for rows in _load(path, "linear") if rows) or "Not measured yet."


def linear_markdown(rows: Sequence[results.Row]) -> str:
    steps = [row for row in rows if "products_ms" in row]
    full = {row["loss"]: row for row in rows if row["reduction"] == "full logits"}
    first = steps[0]
    caption = (
        f"{first['cpu']}, {first['threads']} threads, torch {first['torch']}, {str(first['date'])[:10]}: "
        f"{first['positions']} positions, H = {first['hidden']}, V = {first['vocabulary']}, {first['dtype']}, "
        f"chunks of {first['chunk_size']} positions. Time of a step, forward and backward; memory beyond inputs, "
        "outputs and gradients."
    )
    heads = ["loss", "reduction", "time", "products alone", "over the products", "memory", "memory of full logits"]
    lines = []
    for row in steps:
        other = full.get(row["loss"])
        positions = f" at {other['positions']} positions" if other and other["positions"] != row["positions"] else ""
        times = [_duration(row["median_ms"]), _duration(row["products_ms"]), f"{row['time_over_products']:.2f}x"]
        lines.append([f"`{row['loss']}`", f"`{row['reduction']}`", *times, _extra(row), f"{_extra(other)}{positions}"])
    table = _markdown(caption, heads, lines)
    for row in rows:
        if "time_over_not_skipping" in row:
            table += (
                f"\n\nWith `skip_exhausted=True`, chunks of {row['chunk_size']} positions and {row['exhausted']:.0%} "
                f"of the positions exhausted, a step of `{row['loss']}` takes {_duration(row['median_ms'])}, "
                f"{row['time_over_not_skipping']:.2f} of what it takes without."
            )
    return table


def verl(path: Path | None = None) -> str:
    """The tables of verl's loss, one a machine."""
    return "\n\n".join(verl_markdown(rows) for rows in _load(path, "verl") if rows) or "Not measured yet."


def verl_markdown(rows: Sequence[results.Row]) -> str:
    first = rows[0]
    caption = (
        f"{first['cpu']}, {first['threads']} threads, torch {first['torch']}, verl {first['verl']}, "
        f"{str(first['date'])[:10]}: {first['positions']} positions, V = {first['vocabulary']}, k = {first['k']}. "
        "Median time of both passes; memory beyond the logits and their gradient." + _busy(rows)
    )
    lines = [
        [row["dtype"], VERL_WAYS[row["impl"]], _duration(row["median_ms"]), _times(row, "times_faster_than_verl"),
         _extra(row)]
        for row in rows
    ]  # fmt: skip
    return _markdown(caption, ["logits", "function", "time", "against verl", "memory"], lines)


def _busy(rows: Sequence[results.Row]) -> str:
    busiest = max(row["load_average"] for row in rows)
    if busiest <= results.BUSY:
        return ""
    return f" Other programs were running (load average {busiest}): take the numbers as a first impression."


def predictions() -> str:
    """The page's table of what is expected of a GPU, whether it has been measured or not."""
    heads = ["operator", "implementation", "input", "instructions a pair", "registers", "predicted time", "of copying"]
    lines = [
        [
            f"`{row['op']}`", row["impl"], _input(row), f"{row['slots_per_pair']:.1f}", str(row["registers"]),
            _duration(row["median_ms"]), _range(row),
        ]
        for row in _predictions()
    ]  # fmt: skip
    machines = ", ".join(dict.fromkeys(row["gpu"] for row in _predictions()))
    return _markdown(f"For {machines}:", heads, lines)


def _predictions() -> list[results.Row]:
    return results.load(results.FOLDER / results.PREDICTIONS)


# --- cells --------------------------------------------------------------------------------------------------------

ByImplementation = dict[tuple[str, str], results.Row]


def _by_input(rows: Sequence[results.Row]) -> Iterator[tuple[ByImplementation, ByImplementation]]:
    """The rows of one operator on one input, by (impl, isa): times, and memory."""
    found: dict[tuple[object, ...], dict[str, ByImplementation]] = {}
    for row in rows:
        what = tuple(row.get(name) for name in ("op", "dtype", "k", "rows", "positions", "passes"))
        found.setdefault(what, {"time": {}, "memory": {}})[row["measure"]][row["impl"], row["isa"]] = row
    return ((same["time"], same["memory"]) for same in found.values())


def _markdown(caption: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(
        [
            caption,
            "",
            f"| {' | '.join(heads)} |",
            "|---" * len(heads) + "|",
            *(f"| {' | '.join(line)} |" for line in lines),
        ]
    )


def _input(row: results.Row) -> str:
    if row["op"] == "reliability_from_topk":
        return "ids `[64, 12288, 16]`"
    if row["op"] == "reliability_from_drift":
        return "drift `[64, 12288]`"
    parts = [f"{row['positions']} position{'s' * (row['positions'] != 1)}"] if "positions" in row else []
    parts += [row["dtype"]]
    parts += [] if row["op"] in (*YARDSTICKS, "reverse_kl") else [f"k={row['k']}"]
    parts += [] if row["rows"] == "random" else [row["rows"]]
    parts += [_passes(row)] if "passes" in row else []
    return ", ".join(parts)


def _passes(row: results.Row) -> str:
    passes: str = row["passes"]
    if row["op"] in READINGS:
        return "twice, and writing the gradient" if passes == "both" else "once"
    return PASSES.get(passes, passes)


def _yardstick(row: results.Row) -> str:
    if "passes" not in row:
        return "plain reading"
    return "reading (forward), or of reading and writing (forward and backward), what the call must read and write"


def _time(row: results.Row | None) -> str:
    if row is None:
        return ""
    fractions = ("fraction_of_read", "fraction_of_read_write", "fraction_of_copy")
    of = next((row[name] for name in fractions if name in row), None)
    return _duration(row["median_ms"]) + ("" if of is None else f" ({of:.2f})")


def _duration(milliseconds: float) -> str:
    if milliseconds >= 1000:
        return f"{milliseconds / 1e3:.3g} s"
    return f"{milliseconds:.3g} ms" if milliseconds >= 0.1 else f"{milliseconds * 1e3:.3g} us"


def _range(row: results.Row | None) -> str:
    """The predicted fraction of copying, and between which it should be."""
    if row is None:
        return ""
    ends = f" ({row['at_worst']:.2f} to {row['at_best']:.2f})" if row["at_worst"] != row["at_best"] else ""
    return f"{row['fraction_of_copy']:.2f}{ends}"


def _times(row: results.Row, field: str) -> str:
    return f"{row[field]:.3g}x" if field in row else ""


def _extra(row: results.Row | None) -> str:
    if row is None:
        return ""
    kib = row["extra_bytes"] / 1024
    return f"{round(kib)} KiB" if kib < 1024 else f"{kib / 1024:.3g} MiB"
