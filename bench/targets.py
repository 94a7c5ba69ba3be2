"""What the operators are meant to reach on a CPU and on a GPU, and whether saved results do (`python -m bench check`).

On a GPU the yardstick is a device-to-device copy in the same run, in bytes read and written; few rows (N = 1, 16, 64)
are compared with a copy of as many bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench import results
from bench.losses import LOSSES

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


def _on_cpu() -> list[Target]:
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
    return found + [target for loss in LOSSES for target in _loss_on_cpu(loss)] + _linear_on_cpu()


def _loss_on_cpu(loss: str) -> list[Target]:
    """A forward pass against reading its logits; with the gradient, against reading and writing what that takes."""
    fractions = {  # (passes, dtype) -> isa -> (must, aim)
        ("forward", "f32"): {"avx512": (0.65, 0.85), "avx2": (0.45, 0.65)},
        ("forward", "bf16"): {"avx512": (0.42, 0.60), "avx2": (0.26, 0.38)},
        ("both", "f32"): {"avx512": (0.50, 0.75), "avx2": (0.35, 0.55)},
        ("both", "bf16"): {"avx512": (0.35, 0.50), "avx2": (0.22, 0.32)},
    }
    of = {"forward": ("reading", "fraction_of_read"), "both": ("reading and writing", "fraction_of_read_write")}
    found = []
    for (passes, dtype), sets in fractions.items():
        what, field = of[passes]
        for isa, (must, aim) in sets.items():
            where = _row(loss, DTYPES[dtype], isa) | {"passes": passes}
            found.append(Target(f"fraction of {what}", "time", where, field, must, aim))
    for isa in ("avx512", "avx2"):
        for dtype, must, aim in (("float32", 4, 8), ("bfloat16", 8, 15)):
            where = _row(loss, dtype, isa) | {"passes": "both"}
            found.append(Target("times faster than eager", "time", where, "times_faster_than_eager", must, aim))
    return found


def _linear_on_cpu() -> list[Target]:
    """A loss from hidden states against the matrix products that it cannot do without."""
    found = []
    for loss in ("topk_policy", "reverse_kl", "topk_forward_kl"):
        for reduction in ("none", "sum"):
            where: dict[str, object] = {"op": "linear_opd_loss", "loss": loss, "reduction": reduction}
            found.append(Target("time over the products", "linear", where, "time_over_products", 1.25, 1.1, True))
            found.append(Target("extra bytes over allowed", "linear", where, "extra_over_allowed", 1, 1, True))
    return found


def _gpu_row(
    op: str, impl: str = "cuda", k: int = 16, rows: str = "random", positions: int = 8192
) -> dict[str, object]:
    return {"op": op, "dtype": "bfloat16", "impl": impl, "k": k, "rows": rows, "positions": positions}


def _on_gpu() -> list[Target]:
    def target(what: str, field: str, where: dict[str, object], must: float, aim: float, most: bool = False) -> Target:
        measure = "memory" if field == "extra_bytes" else "time"
        return Target(what, measure, where, field, must, aim, most)

    fractions = [
        (_gpu_row("reliability"), 0.85, 0.92),
        (_gpu_row("token_stats"), 0.75, 0.88),
        (_gpu_row("reliability", "triton"), 0.7, 0.9),
        (_gpu_row("token_stats", "triton"), 0.6, 0.85),
        (_gpu_row("reliability", k=64), 0.75, 0.85),
        (_gpu_row("reliability", k=256), 0.4, 0.6),
        (_gpu_row("reliability", positions=1), 0.2, 0.4),
        (_gpu_row("reliability", positions=16), 0.6, 0.8),
        (_gpu_row("reliability", positions=64), 0.7, 0.85),
    ]
    found = [target("fraction of copying", "fraction_of_copy", *rest) for rest in fractions]
    ascending = _gpu_row("reliability", rows="ascending")
    found.append(target("time over random rows", "time_over_k16_random", ascending, 2, 1.1, True))
    for op in ("reliability", "token_stats"):
        found.append(target("times faster than eager", "times_faster_than_eager", _gpu_row(op), 10, 25))
        found.append(target("times faster than torch.compile", "times_faster_than_compiled", _gpu_row(op), 4, 8))
        found += [
            target("extra bytes", "extra_bytes", _gpu_row(op, impl), 2**20, 2**20, True) for impl in ("cuda", "triton")
        ]
    for loss in LOSSES:
        for passes in ("forward", "backward"):
            where = _gpu_row(loss) | {"passes": passes}
            found.append(target("fraction of copying", "fraction_of_copy", where, 0.85, 0.92))
    return found


CPU, GPU = _on_cpu(), _on_gpu()


def report(path: Path) -> int:
    """Prints each target with what was measured; 1 if a must is missed or nothing was measured.

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
        if found:
            value = float(found[-1][target.field])
            verdicts.append(target.verdict(value))
            print(f"{name:72} {value:10.4g} {target.must:9.4g} {target.aim:9.4g}  {verdicts[-1]}")
        elif on_gpu:
            verdicts.append("NOT MEASURED")
            print(f"{name:72} {'':10} {target.must:9.4g} {target.aim:9.4g}  {verdicts[-1]}")
    missed = verdicts.count("MISSED") + verdicts.count("NOT MEASURED")
    print(f"{len(verdicts)} targets, {verdicts.count('aim met')} at their aim, {missed} missed")
    return 1 if not verdicts or missed else 0
