"""What the operators are meant to reach on a CPU and on a GPU, and whether saved results do (`python -m bench check`).

On a GPU the yardstick is a device-to-device copy in the same run, in bytes read and written; few rows (N = 1, 16, 64)
are compared with a copy of as many bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.measure.plan import DTYPE_OF
from bench.operators import LINEAR_LOSSES, LOGIT_OPS, LOSSES, TOPK_OPS
from bench.report import rows as results

DTYPES = ("float32", "bfloat16")
ISAS = ("avx512", "avx2")
RELIABILITY, TOKEN_STATS = LOGIT_OPS
MEASURES = {"extra_bytes": "memory", "extra_bytes_per_thread": "memory"}
MEASURES |= {"time_over_products": "linear", "extra_over_allowed": "linear"}
WORDS = {
    "fraction_of_read": "fraction of reading",
    "fraction_of_read_write": "fraction of reading and writing",
    "fraction_of_copy": "fraction of copying",
    "extra_bytes_per_thread": "extra bytes a thread",
    "time_over_k16_random": "time over k=16 random",
    "time_over_products": "time over the products",
    "times_faster_than_compiled": "times faster than torch.compile",
}


@dataclass(frozen=True)
class Target:
    where: dict[str, object]  # the row
    field: str
    must: float
    aim: float

    @property
    def what(self) -> str:
        return WORDS.get(self.field, self.field.replace("_", " "))

    @property
    def measure(self) -> str:
        return MEASURES.get(self.field, "time")

    def verdict(self, value: float) -> str:
        most = self.field.startswith(("time_over", "extra"))  # at most this; at least, otherwise

        def reaches(bound: float) -> bool:
            return value <= bound if most else value >= bound

        return "aim met" if reaches(self.aim) else "must met" if reaches(self.must) else "MISSED"


def _row(op: str, dtype: str, isa: str, k: int = 16, rows: str = "random", **passes: str) -> dict[str, object]:
    return {"op": op, "dtype": dtype, "impl": "cpp", "isa": isa, "k": k, "rows": rows, **passes}


def _on_cpu() -> Iterator[Target]:
    fractions = {  # operator -> dtype -> isa -> (must, aim)
        RELIABILITY: (((0.70, 0.90), (0.52, 0.72)), ((0.45, 0.65), (0.28, 0.40))),
        TOKEN_STATS: (((0.65, 0.85), (0.40, 0.55)), ((0.38, 0.52), (0.20, 0.28))),
    }
    for op, by_dtype in fractions.items():
        for dtype, by_isa in zip(DTYPES, by_dtype, strict=True):
            for isa, bounds in zip(ISAS, by_isa, strict=True):
                yield Target(_row(op, dtype, isa), "fraction_of_read", *bounds)
    for isa in ISAS:
        for dtype, bounds in zip(DTYPES, ((10, 20), (15, 35)), strict=True):
            yield Target(_row(RELIABILITY, dtype, isa), "times_faster_than_eager", *bounds)
            yield Target(_row(RELIABILITY, dtype, isa, 64), "time_over_k16_random", 1.3, 1.1)
            yield Target(_row(RELIABILITY, dtype, isa, 256), "time_over_k16_random", 2.5, 1.6)
            yield Target(_row(RELIABILITY, dtype, isa, rows="ascending"), "time_over_k16_random", 1.3, 1.0)
            for op in LOGIT_OPS:
                yield Target(_row(op, dtype, isa), "extra_bytes_per_thread", 2**20, 2**20)
        for op in TOPK_OPS:
            yield Target(_row(op, DTYPE_OF[op], isa), "times_faster_than_eager", 1, 1)
    for loss in LOSSES:
        yield from _loss_on_cpu(loss)
    for loss in LINEAR_LOSSES:  # against the matrix products that it cannot do without
        for reduction in ("none", "sum"):
            where: dict[str, object] = {"op": "linear_opd_loss", "loss": loss, "reduction": reduction}
            yield Target(where, "time_over_products", 1.25, 1.1)
            yield Target(where, "extra_over_allowed", 1, 1)


def _loss_on_cpu(loss: str) -> Iterator[Target]:
    """Yield a forward pass against reading its logits, and both passes against reading and writing what they take."""
    fractions = {  # (passes, field) -> dtype -> isa -> (must, aim)
        ("forward", "fraction_of_read"): (((0.65, 0.85), (0.45, 0.65)), ((0.42, 0.60), (0.26, 0.38))),
        ("both", "fraction_of_read_write"): (((0.50, 0.75), (0.35, 0.55)), ((0.35, 0.50), (0.22, 0.32))),
    }
    for (passes, field), by_dtype in fractions.items():
        for dtype, by_isa in zip(DTYPES, by_dtype, strict=True):
            for isa, bounds in zip(ISAS, by_isa, strict=True):
                yield Target(_row(loss, dtype, isa, passes=passes), field, *bounds)
    for isa in ISAS:
        for dtype, bounds in zip(DTYPES, ((4, 8), (8, 15)), strict=True):
            yield Target(_row(loss, dtype, isa, passes="both"), "times_faster_than_eager", *bounds)


def _on_gpu() -> Iterator[Target]:
    def row(op: str, impl: str = "cuda", k: int = 16, rows: str = "random", positions: int = 8192) -> dict[str, object]:
        return {"op": op, "dtype": "bfloat16", "impl": impl, "k": k, "rows": rows, "positions": positions}

    fractions = [
        (row(RELIABILITY), 0.85, 0.92),
        (row(TOKEN_STATS), 0.75, 0.88),
        (row(RELIABILITY, "triton"), 0.7, 0.9),
        (row(TOKEN_STATS, "triton"), 0.6, 0.85),
        (row(RELIABILITY, k=64), 0.75, 0.85),
        (row(RELIABILITY, k=256), 0.4, 0.6),
        (row(RELIABILITY, positions=1), 0.2, 0.4),
        (row(RELIABILITY, positions=16), 0.6, 0.8),
        (row(RELIABILITY, positions=64), 0.7, 0.85),
        *((row(loss) | {"passes": passes}, 0.85, 0.92) for loss in LOSSES for passes in ("forward", "backward")),
    ]
    for where, must, aim in fractions:
        yield Target(where, "fraction_of_copy", must, aim)
    yield Target(row(RELIABILITY, rows="ascending"), "time_over_k16_random", 2, 1.1)
    for op in LOGIT_OPS:
        yield Target(row(op), "times_faster_than_eager", 10, 25)
        yield Target(row(op), "times_faster_than_compiled", 4, 8)
        for impl in ("cuda", "triton"):
            yield Target(row(op, impl), "extra_bytes", 2**20, 2**20)


CPU, GPU = tuple(_on_cpu()), tuple(_on_gpu())


def report(path: Path) -> int:
    """Print each target with what was measured; return 1 if a must is missed or nothing was measured.

    A target of an instruction set that a CPU does not have is left out. On a GPU all of them must have been measured.
    """
    rows = results.load(path)
    on_gpu = any("gpu" in row for row in rows)
    print(f"{path}\n{'':72} {'measured':>10} {'must':>9} {'aim':>9}")
    verdicts = []
    for target in GPU if on_gpu else CPU:
        found = [
            row for row in rows
            if row["measure"] == target.measure and target.field in row
            and all(row.get(name) == value for name, value in target.where.items())
        ]  # fmt: skip
        where = {name: value for name, value in target.where.items() if name != "impl" or on_gpu}
        name = f"{' '.join(map(str, where.values()))}: {target.what}"
        if found or on_gpu:
            value = float(found[-1][target.field]) if found else None
            verdicts.append("NOT MEASURED" if value is None else target.verdict(value))
            shown = "" if value is None else f"{value:.4g}"
            print(f"{name:72} {shown:>10} {target.must:9.4g} {target.aim:9.4g}  {verdicts[-1]}")
    missed = verdicts.count("MISSED") + verdicts.count("NOT MEASURED")
    print(f"{len(verdicts)} targets, {verdicts.count('aim met')} at their aim, {missed} missed")
    return 1 if not verdicts or missed else 0
