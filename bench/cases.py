"""What is timed: the rows of the results, their tensors, and the contenders of a run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import answers, eager
from bench.implementations import NO_SET, instruction_sets, operator, read_logits, using
from bench.protocol import Contender

VOCABULARY = 151936
RESPONSES, POSITIONS = 4, 16  # 64 positions of logits: more than any cache holds
CHECKED = slice(0, None, RESPONSES - 1)  # the first response and the last
LONG = (64, 12288, 16)  # a training batch's top-k ids
DTYPES = ("float32", "bfloat16", "float16")
LOGIT_OPS = ("reliability", "token_stats")
TOPK_OPS = ("reliability_from_topk", "reliability_from_drift")
PEERS = ("eager", "eager_native", "compiled")


@dataclass(frozen=True)
class Case:
    """One row: an operator on some data by one implementation. `op` is "read" for the plain reading of the logits."""

    op: str
    dtype: str  # of the logits; "int64" or "bool" for the operators without
    impl: str  # cpp, reference, or a peer: eager, eager_native, compiled
    isa: str = NO_SET
    k: int = 16
    rows: str = "random"  # or "ascending": every logit larger than the one before it

    @property
    def name(self) -> str:
        parts = [self.op, self.dtype]
        parts += [] if self.op in ("read", "reliability_from_drift") else [f"k={self.k}"]
        parts += [] if self.op in TOPK_OPS else [self.rows]
        return " ".join([*parts, self.impl, *([] if self.isa == NO_SET else [self.isa])])


@dataclass(frozen=True)
class Wanted:
    """The command line's choice; an empty tuple is everything."""

    ops: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    isas: tuple[str, ...] = ()
    ks: tuple[int, ...] = ()
    rows: tuple[str, ...] = ()
    peers: tuple[str, ...] = PEERS
    reference: bool = False  # float32 only: it takes seconds a call

    def takes(self, case: Case) -> bool:
        pairs = [
            (case.op, self.ops), (case.dtype, () if case.op in TOPK_OPS else self.dtypes), (case.isa, self.isas),
            (case.k, self.ks), (case.rows, self.rows),
        ]  # fmt: skip
        return all(not wanted or value in wanted for value, wanted in pairs)


def kernels() -> list[tuple[str, str]]:
    """(impl, isa) for each that can be timed here."""
    return [("cpp", isa) for isa in instruction_sets()] or [("reference", NO_SET)]


def logit_cases(dtype: str, wanted: Wanted) -> list[Case]:
    """The rows of the run for one dtype, the readings and peers that they are compared with included."""
    rows = [
        Case(op, dtype, impl, isa, k, order)
        for op in LOGIT_OPS
        for k, order in [(16, "random"), (64, "random"), (256, "random"), (16, "ascending")]
        for impl, isa in kernels()
        if op == "reliability" or k == 16
    ]
    if instruction_sets() and wanted.reference and dtype == "float32":
        rows += [Case(op, dtype, "reference") for op in LOGIT_OPS]
    chosen = [row for row in rows if wanted.takes(row)]
    # A longer k and ascending rows are compared with k=16 on random rows, and everything with reading.
    base = [Case(row.op, dtype, row.impl, row.isa) for row in chosen]
    reads = [Case("read", dtype, row.impl, row.isa, rows=row.rows) for row in chosen if row.impl != "reference"]
    native = () if dtype == "float32" else ("eager_native",)
    peers = [
        Case(row.op, dtype, peer)
        for row in chosen
        for peer in ("eager", *native, "compiled")
        if peer in wanted.peers and not (peer == "compiled" and dtype == "float16")
    ]
    return list(dict.fromkeys(reads + base + chosen + peers))


def topk_cases(wanted: Wanted) -> list[Case]:
    dtypes = {"reliability_from_topk": "int64", "reliability_from_drift": "bool"}
    rows = [Case(op, dtypes[op], impl, isa) for op in TOPK_OPS for impl, isa in kernels()[:1]]
    chosen = [row for row in rows if wanted.takes(row)]
    peers = [Case(row.op, row.dtype, peer) for row in chosen for peer in ("eager", "compiled") if peer in wanted.peers]
    return chosen + peers


@functools.cache
def logits(dtype: str, rows: str) -> tuple[Tensor, Tensor]:
    """Student and teacher. Random rows overlap by about .65 at k=16; in half precision equal logits are common."""
    generator = torch.Generator().manual_seed(0)
    shape = (RESPONSES, POSITIONS, VOCABULARY)
    student = torch.randn(shape, generator=generator).mul_(2.5)
    teacher = torch.randn(shape, generator=generator).mul_(0.4).add_(student)
    pair = (student, teacher) if rows == "random" else (student.sort(-1).values, teacher.sort(-1).values)
    return pair[0].to(getattr(torch, dtype)), pair[1].to(getattr(torch, dtype))


@functools.cache
def token_ids() -> Tensor:
    return torch.randint(VOCABULARY, (RESPONSES, POSITIONS), generator=torch.Generator().manual_seed(1))


@functools.cache
def topk_ids() -> tuple[Tensor, Tensor]:
    """Different ids in a row; about a third of the teacher's are not among the student's."""
    generator = torch.Generator().manual_seed(2)
    start = torch.randint(VOCABULARY, (*LONG[:2], 1), generator=generator)
    step = torch.randint(1, VOCABULARY // LONG[2], (*LONG[:2], 1), generator=generator)
    student = (start + step * torch.arange(LONG[2])) % VOCABULARY
    other = (torch.rand(LONG, generator=generator) < 0.3) * 7
    return student, (student.roll(3, -1) + other) % VOCABULARY


@functools.cache
def drift() -> Tensor:
    return torch.rand(LONG[:2], generator=torch.Generator().manual_seed(3)) < 0.02


def inputs(case: Case) -> tuple[Tensor, ...]:
    if case.op == "reliability_from_topk":
        return topk_ids()
    if case.op == "reliability_from_drift":
        return (drift(),)
    return logits(case.dtype, case.rows)


def call(case: Case) -> Callable[[], object]:
    """The call that is timed."""
    tensors = inputs(case)
    if case.op == "read":
        return functools.partial(read_logits, *tensors)
    options = _options(case)
    if case.impl not in PEERS:
        return functools.partial(operator(case.op, case.impl), *tensors, **options)
    if case.impl == "eager_native":
        options["logprob_dtype"] = None
    function = getattr(eager, case.op)
    if case.impl == "compiled":
        function = compiled(function)
    return functools.partial(function, *tensors, **options)


def _options(case: Case, responses: slice = slice(None)) -> dict[str, object]:
    options: dict[str, object] = {} if case.op in TOPK_OPS else {"k": case.k}
    return options | ({"token_ids": token_ids()[responses]} if case.op == "token_stats" else {})


@functools.cache
def compiled(function: Callable[..., object]) -> Callable[..., object]:
    return torch.compile(function, dynamic=False)


def read(case: Case) -> Callable[[], object]:
    if case.op in TOPK_OPS:
        return lambda: [tensor.max() for tensor in inputs(case)]
    return functools.partial(read_logits, *inputs(case))


def contender(case: Case) -> Contender:
    slow = 2 if case.impl == "reference" else None
    return Contender(case.name, call(case), read(case), functools.partial(using, case.isa), slow)


@functools.cache
def gold(op: str, dtype: str, k: int, rows: str) -> Mapping[str, Tensor]:
    """The reference's answer, which takes seconds; so of the logits only for some responses."""
    case = Case(op, dtype, "reference", k=k, rows=rows)
    some = [tensor[CHECKED] if op in LOGIT_OPS else tensor for tensor in inputs(case)]
    return answers.fields(operator(op, "reference")(*some, **_options(case, CHECKED)))


def complaints(case: Case) -> list[str]:
    """What is wrong with the answer that this case gives, against the reference."""
    if case.impl == "reference":
        return []
    with using(case.isa):
        if case.op == "read":
            maxima = [tensor.amax(-1).float().flatten() for tensor in inputs(case)]
            got = [maximum.float().flatten() for maximum in call(case)()]  # type: ignore[attr-defined]
            return [] if all(map(torch.equal, maxima, got)) else ["the row maxima are wrong"]
        got_fields = answers.fields(call(case)())
    if case.op in LOGIT_OPS:
        got_fields = {name: tensor[CHECKED] for name, tensor in got_fields.items()}
    expected = gold(case.op, case.dtype, case.k, case.rows)
    if case.impl not in PEERS:
        return answers.complaints(got_fields, expected)
    student, teacher = (tensor[CHECKED] for tensor in inputs(case)) if case.op in LOGIT_OPS else (None, None)
    sources = {"topk_ids": student, "student_topk_ids": student, "teacher_topk_ids": teacher}
    ids = {name: source for name, source in sources.items() if source is not None and name in expected}
    tolerance = answers.PEER_TOLERANCE["native" if case.impl == "eager_native" else "float32"]
    return answers.peer_complaints(got_fields, expected, ids, tolerance)


def counted_bytes(case: Case) -> int:
    """Every input read once, every output written once."""
    size = sum(tensor.nbytes for tensor in inputs(case))
    if case.op == "read":
        return size
    on_meta = {name: v.to("meta") if isinstance(v, Tensor) else v for name, v in _options(case).items()}
    outputs = operator(case.op, "auto")(*(tensor.to("meta") for tensor in inputs(case)), **on_meta)
    return size + sum(tensor.nbytes for tensor in answers.fields(outputs).values())
