"""What the operators are meant to reach on a CPU, and whether saved results do (`python -m bench check`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench import results

DTYPES = {"f32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Target:
    what: str
    measure: str
    where: dict[str, object]  # the row
    field: str
    must: float
    aim: float
    most: bool = False  # the value is to be at most this, not at least

    def verdict(self, value: float) -> str:
        def reaches(bound: float) -> bool:
            return value <= bound if self.most else value >= bound

        return "aim met" if reaches(self.aim) else "must met" if reaches(self.must) else "MISSED"


def _row(op: str, dtype: str, isa: str, k: int = 16, rows: str = "random") -> dict[str, object]:
    return {"op": op, "dtype": dtype, "impl": "cpp", "isa": isa, "k": k, "rows": rows}


def _targets() -> list[Target]:
    fractions = {  # (op, dtype) -> isa -> (must, aim)
        ("reliability", "f32"): {"avx512": (0.70, 0.90), "avx2": (0.52, 0.72)},
        ("reliability", "bf16"): {"avx512": (0.45, 0.65), "avx2": (0.28, 0.40)},
        ("token_stats", "f32"): {"avx512": (0.65, 0.85), "avx2": (0.40, 0.55)},
        ("token_stats", "bf16"): {"avx512": (0.38, 0.52), "avx2": (0.20, 0.28)},
    }
    found = []
    for (op, dtype), sets in fractions.items():
        for isa, (must, aim) in sets.items():
            where = _row(op, DTYPES[dtype], isa)
            found.append(Target("fraction of reading", "time", where, "fraction_of_read", must, aim))
    for isa in ("avx512", "avx2"):
        for dtype, must, aim in (("float32", 10, 20), ("bfloat16", 15, 35)):
            where = _row("reliability", dtype, isa)
            found.append(Target("times faster than eager", "time", where, "times_faster_than_eager", must, aim))
        for dtype in DTYPES.values():
            for k, rows, must, aim in (
                (64, "random", 1.3, 1.1),
                (256, "random", 2.5, 1.6),
                (16, "ascending", 1.3, 1.0),
            ):
                where = _row("reliability", dtype, isa, k, rows)
                field = "time_over_k16_random"
                found.append(Target("time over k=16 random", "time", where, field, must, aim, most=True))
    for isa in ("avx512", "avx2"):
        for op in ("reliability", "token_stats"):
            for dtype in DTYPES.values():
                where, mib = _row(op, dtype, isa), 2**20
                found.append(Target("extra bytes a thread", "memory", where, "extra_bytes_per_thread", mib, mib, True))
        for op, dtype in (("reliability_from_topk", "int64"), ("reliability_from_drift", "bool")):
            where = _row(op, dtype, isa)
            found.append(Target("times faster than eager", "time", where, "times_faster_than_eager", 1, 1))
    return found


TARGETS = _targets()


def report(path: Path) -> int:
    """Prints each target with what was measured; 1 if a must is missed or nothing was measured."""
    rows = results.load(path)
    print(f"{path}\n{'':60} {'measured':>10} {'must':>9} {'aim':>9}")
    verdicts = []
    for target in TARGETS:
        found = [
            row for row in rows
            if row["measure"] == target.measure and target.field in row
            and all(row[name] == value for name, value in target.where.items())
        ]  # fmt: skip
        if not found:
            continue  # an instruction set that this machine does not have
        value = float(found[-1][target.field])
        where = target.where
        name = f"{where['op']} {where['dtype']} {where['isa']} k={where['k']} {where['rows']}: {target.what}"
        verdicts.append(target.verdict(value))
        print(f"{name:72} {value:10.4g} {target.must:9.4g} {target.aim:9.4g}  {verdicts[-1]}")
    print(f"{len(verdicts)} targets, {verdicts.count('aim met')} at their aim, {verdicts.count('MISSED')} missed")
    return 1 if not verdicts or "MISSED" in verdicts else 0
