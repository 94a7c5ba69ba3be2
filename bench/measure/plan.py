"""Which cases are timed on which device, in which runs: what is compared with each other is timed in one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from bench.measure import inputs, libraries
from bench.measure.cases import PEERS, Case, reading
from bench.measure.implementations import NO_SET, instruction_sets, usable_on
from bench.measure.inputs import DTYPES
from bench.operators import LOGIT_OPS, LOSSES, OPERATORS, TOPK_OPS

K_AND_ROWS = [(16, "random"), (64, "random"), (256, "random"), (16, "ascending")]
MANY, FEW = 8192, (1, 16, 64)  # positions on a GPU
LOSS_DTYPES = DTYPES[:2]  # unless another is asked for
DTYPE_OF = {op: "bool" if OPERATORS[op].reads == ("drift",) else "int64" for op in TOPK_OPS}
LONGER_K = tuple(op for op in LOGIT_OPS if OPERATORS[op].longer_k)


@dataclass(frozen=True)
class Wanted:
    """The command line's choice."""

    values: Mapping[str, Sequence[object]] = field(default_factory=dict)  # of a case's fields; none: everything
    peers: tuple[str, ...] = PEERS
    reference: bool = False  # on a CPU, in float32 only: it takes seconds a call

    def takes(self, case: Case) -> bool:
        chosen = {name: values for name, values in self.values.items() if values}
        if case.op in TOPK_OPS:
            chosen.pop("dtype", None)
        return all(getattr(case, name) in values for name, values in chosen.items())

    def dtypes(self, of: tuple[str, ...]) -> Sequence[str]:
        return self.values.get("dtype") or of  # type: ignore[return-value]


# --- a CPU --------------------------------------------------------------------------------------------------------


def on_cpu(wanted: Wanted) -> Iterator[list[Case]]:
    """The runs: one a dtype of the logits, one a loss and dtype, one an operator without logits."""
    for dtype in wanted.dtypes(DTYPES):
        yield _logits_on_cpu(dtype, wanted)
    for dtype in wanted.dtypes(LOSS_DTYPES):
        for loss in LOSSES:
            yield _loss_on_cpu(loss, dtype, wanted)
    for op in TOPK_OPS:
        rows = [Case(op, DTYPE_OF[op], impl, isa) for impl, isa in _compiled()[:1]]
        yield _with_peers([row for row in rows if wanted.takes(row)], ("eager", "compiled"), wanted)


def _compiled() -> list[tuple[str, str]]:
    """(impl, isa) for each that can be timed on this CPU."""
    return [("cpp", isa) for isa in instruction_sets()] or [("reference", NO_SET)]


def _logits_on_cpu(dtype: str, wanted: Wanted) -> list[Case]:
    """The rows of the run for one dtype, the readings and peers that they are compared with included."""
    rows = [
        Case(op, dtype, impl, isa, k, order)
        for op in LOGIT_OPS
        for k, order in K_AND_ROWS
        for impl, isa in _compiled()
        if op in LONGER_K or k == 16
    ]
    if instruction_sets() and wanted.reference and dtype == "float32":
        rows += [Case(op, dtype, "reference") for op in LOGIT_OPS]
    chosen = [row for row in rows if wanted.takes(row)]
    # A longer k and ascending rows are compared with k=16 on random rows, and everything with reading.
    base = [Case(row.op, dtype, row.impl, row.isa) for row in chosen]
    reads = [reading(row) for row in chosen if row.impl != "reference"]
    return list(dict.fromkeys([*reads, *base, *_with_peers(chosen, _peers_in(dtype), wanted)]))


def _loss_on_cpu(loss: str, dtype: str, wanted: Wanted) -> list[Case]:
    """The forward pass, and forward with backward, which is what the peers are compared with."""
    forward, both = (
        [row for impl, isa in _compiled() for row in [Case(loss, dtype, impl, isa, passes=passes)] if wanted.takes(row)]
        for passes in ("forward", "both")
    )
    reads = [reading(row) for row in [*forward, *both] if row.impl != "reference"]
    return [*reads, *forward, *_with_peers(both, _peers_in(dtype), wanted)]


def _peers_in(dtype: str) -> tuple[str, ...]:
    native = () if dtype == "float32" else ("eager_native",)
    compiled = () if dtype == "float16" else ("compiled",)
    return ("eager", *native, *compiled)


def _with_peers(chosen: list[Case], peers: tuple[str, ...], wanted: Wanted) -> list[Case]:
    found = [
        Case(row.op, row.dtype, peer, device=row.device, positions=row.positions, passes=row.passes)
        for row in chosen
        for peer in (*peers, *OPERATORS[row.op].usual)
        if peer in wanted.peers
    ]
    return list(dict.fromkeys([*chosen, *found]))


# --- a GPU --------------------------------------------------------------------------------------------------------


def on_gpu(wanted: Wanted, device: str = "cuda") -> Iterator[list[Case]]:
    """The runs in the order of their worth, for a machine that may be gone before the last one."""
    impls = usable_on(device) or ["reference"]
    many = positions_that_fit(device)

    def cases(ops: tuple[str, ...], **fields: object) -> list[Case]:
        found = [Case(op, DTYPE_OF.get(op, "bfloat16"), impl, device=device) for op in ops for impl in impls]
        return [row for one in found for row in [replace(one, **fields)] if wanted.takes(row)]  # type: ignore[arg-type]

    def at_all_k(**fields: object) -> list[Case]:
        longer = [row for k in (64, 256) for row in cases(LONGER_K, k=k, **fields)]
        return cases(LOGIT_OPS, **fields) + longer + cases(LOGIT_OPS, rows="ascending", **fields)

    def few(positions: int) -> list[Case]:
        return _with_peers(cases(LOGIT_OPS, positions=positions), ("eager",), wanted)

    def against(*peers: str, **fields: object) -> list[Case]:
        return _with_peers(cases(LOGIT_OPS, **fields), peers, wanted)

    def losses(passes: str) -> list[Case]:
        return cases(tuple(LOSSES), passes=passes, positions=many)

    def losses_against(*peers: str) -> Iterator[list[Case]]:
        for loss in LOSSES:  # of half the positions, for what autograd keeps
            yield _with_copy(_with_peers(cases((loss,), passes="both", positions=many // 2), peers, wanted), wanted)

    yield _with_copy(at_all_k(positions=many), wanted)
    yield _with_copy(losses("forward") + losses("backward"), wanted)
    for positions in FEW:
        yield _with_copy(few(positions), wanted)
    yield _with_copy(against("eager", "eager_native", positions=many), wanted)
    yield from losses_against("eager", "eager_native")
    for op in TOPK_OPS:
        yield _with_copy(_with_peers(cases((op,)), ("eager", "compiled"), wanted), wanted)
    yield _with_copy(against("eager", dtype="float32", positions=many // 4), wanted)
    if "compiled" in wanted.peers:
        yield _with_copy(against("eager", "eager_native", "compiled", positions=many), wanted)
        yield from losses_against("eager", "eager_native", "compiled")
        yield _with_copy(_parts(device, many, wanted), wanted)


def _with_copy(run: list[Case], wanted: Wanted) -> list[Case]:
    """And the copies of as many bytes of logits, with the base that a longer k or ascending rows are compared with."""
    base = [replace(row, k=16, rows="random") for row in run if row.op in LOGIT_OPS]
    copied = [("bfloat16", 512) if row.op in TOPK_OPS else (row.dtype, row.positions) for row in run]
    copies = [Case("copy", dtype, "torch", device=run[0].device, positions=positions) for dtype, positions in copied]
    return list(dict.fromkeys([*copies, *base, *run]))


def _parts(device: str, positions: int, wanted: Wanted) -> list[Case]:
    found = []
    for part, functions in libraries.PARTS.items():
        for impl in functions:
            case = Case(part, "bfloat16", impl, device=device, positions=positions)
            if not libraries.installed(impl):
                print(f"{impl} is not installed: its {part} is not timed")
            elif wanted.takes(case):
                found.append(case)
    return found


def positions_that_fit(device: str) -> int:
    """8192, unless eager PyTorch's copies of that many rows would not fit; it needs up to 40 bytes an element pair."""
    memory = torch.cuda.get_device_properties(device).total_memory if device == "cuda" else 2**62
    positions = MANY
    while positions * inputs.VOCABULARY * 60 > memory:
        positions //= 2
    return positions
