"""What is timed: the rows of the results, and what belongs to each: its inputs, its call, its answer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import answers, data, eager, others
from bench.implementations import NO_SET, operator, read_logits, using

LOGIT_OPS = ("reliability", "token_stats")
TOPK_OPS = ("reliability_from_topk", "reliability_from_drift")
YARDSTICKS = ("read", "copy")  # what a CPU's and a GPU's rows are compared with
PEERS = ("eager", "eager_native", "compiled")
BEYOND_CACHES = 2**28  # bytes; the L2 of an H200 holds 60 MB, of a B200 126 MB


@dataclass(frozen=True)
class Case:
    """One row: an operator on some data by one implementation.

    `op` may also be a yardstick, "read" or "copy" (a CPU's and a GPU's), or a part that others offer, "topk" or "kl".
    """

    op: str
    dtype: str  # of the logits; "int64" or "bool" for the operators without
    impl: str  # an implementation, or a peer: eager, eager_native, compiled, flashinfer, liger
    isa: str = NO_SET
    k: int = 16
    rows: str = "random"  # or "ascending": no logit smaller than the one before it
    device: str = "cpu"
    positions: int = 64  # of logits: on a CPU more than any cache holds

    @property
    def name(self) -> str:
        parts = [self.op, self.dtype]
        parts += [] if self.op in (*YARDSTICKS, "kl", "reliability_from_drift") else [f"k={self.k}"]
        parts += [] if self.op in TOPK_OPS else [self.rows]
        parts += [] if self.op in TOPK_OPS or self.device == "cpu" else [f"N={self.positions}"]
        return " ".join([*parts, self.impl, *([] if self.isa == NO_SET else [self.isa])])

    @property
    def shape(self) -> tuple[int, int]:
        """Responses, and positions in each."""
        if self.op in TOPK_OPS:
            return data.LONG[:2]
        responses = 4 if self.device == "cpu" else min(16, self.positions)
        return responses, self.positions // responses

    @property
    def sets(self) -> int:
        """Inputs that take turns, so that a GPU does not find in its cache what the call before it has read."""
        if self.device == "cpu":
            return 1
        row_bytes = {"reliability_from_topk": 2 * 8 * data.LONG[2], "reliability_from_drift": 14}
        logit_bytes = 2 * data.VOCABULARY * (4 if self.dtype == "float32" else 2)
        responses, positions = self.shape
        return -(-BEYOND_CACHES // (responses * positions * row_bytes.get(self.op, logit_bytes)))


def inputs(case: Case, number: int = 0) -> tuple[Tensor, ...]:
    """The tensors that are read, of one set."""
    if case.op == "reliability_from_topk":
        student_ids, teacher_ids = data.topk_ids(case.sets, case.device)
        return student_ids[number], teacher_ids[number]
    if case.op == "reliability_from_drift":
        return (data.drift(case.sets, case.device)[number],)
    student, teacher = data.logits(case.dtype, case.rows, (case.sets, *case.shape), case.device)
    return (student[number],) if case.op == "copy" else (student[number], teacher[number])


def call(case: Case, number: int = 0) -> Callable[[], object]:
    """The call that is timed, on one set of the inputs."""
    tensors = inputs(case, number)
    if case.op == "read":
        return functools.partial(read_logits, *tensors)
    if case.op == "copy":
        to = data.like_logits(case.dtype, (case.sets, *case.shape), case.device)[number]
        return functools.partial(to.copy_, tensors[0])
    if case.op in others.PARTS:
        return functools.partial(others.PARTS[case.op][case.impl], *tensors)
    options = _options(case, number)
    if case.impl not in PEERS:
        return functools.partial(operator(case.op, case.impl), *tensors, **options)
    if case.impl == "eager_native":
        options["logprob_dtype"] = None
    function = getattr(eager, case.op)
    if case.impl == "compiled":
        function = compiled(function)
    return functools.partial(function, *tensors, **options)


def _options(case: Case, number: int = 0, responses: slice = slice(None)) -> dict[str, object]:
    options: dict[str, object] = {} if case.op in TOPK_OPS else {"k": case.k}
    if case.op == "token_stats":
        options["token_ids"] = data.token_ids((case.sets, *case.shape), case.device)[number][responses]
    return options


@functools.cache
def compiled(function: Callable[..., object]) -> Callable[..., object]:
    return torch.compile(function, dynamic=False)


# --- answers ------------------------------------------------------------------------------------------------------


def complaints(case: Case) -> list[str]:
    """What is wrong with the answer that this case gives, against the reference."""
    if case.impl == "reference":
        return []
    with using(case.isa):
        got = call(case)()
    if case.op == "read":
        maxima = [tensor.amax(-1).float().flatten() for tensor in inputs(case)]
        right = all(map(torch.equal, maxima, [one.float().flatten() for one in got]))  # type: ignore[attr-defined]
        return [] if right else ["the row maxima are wrong"]
    if case.op == "copy":
        return [] if torch.equal(inputs(case)[0], got) else ["the copy differs"]  # type: ignore[arg-type]
    if case.op in others.PARTS:
        expected = others.PARTS[case.op]["eager"](*inputs(case))
        return answers.complaints(answers.fields(got), expected, answers.PEER_TOLERANCE["float32"])
    return wrong_fields(case, answers.fields(got))


def wrong_fields(case: Case, got: Mapping[str, Tensor]) -> list[str]:
    """The same for an operator's outputs on the first set."""
    expected = gold(case.op, case.dtype, case.k, case.rows, case.device, case.positions)
    checked = _checked(case)
    got = {name: tensor[checked] for name, tensor in got.items()}
    if case.impl not in PEERS:
        return answers.complaints(got, expected)
    student, teacher = (tensor[checked] for tensor in inputs(case)) if case.op in LOGIT_OPS else (None, None)
    sources = {"topk_ids": student, "student_topk_ids": student, "teacher_topk_ids": teacher}
    ids = {name: source for name, source in sources.items() if source is not None and name in expected}
    tolerance = answers.PEER_TOLERANCE["native" if case.impl == "eager_native" else "float32"]
    return answers.peer_complaints(got, expected, ids, tolerance)


@functools.cache
def gold(op: str, dtype: str, k: int, rows: str, device: str, positions: int) -> Mapping[str, Tensor]:
    """The reference's answer, which takes long; so of the logits only for some responses."""
    case = Case(op, dtype, "reference", k=k, rows=rows, device=device, positions=positions)
    some = [tensor[_checked(case)] for tensor in inputs(case)]
    return answers.fields(operator(op, "reference")(*some, **_options(case, responses=_checked(case))))


def _checked(case: Case) -> slice:
    """The first response and the last; all of them where there are no logits."""
    return slice(0, None, max(case.shape[0] - 1, 1) if case.op in LOGIT_OPS else 1)


def counted_bytes(case: Case) -> int:
    """Every input read once, every output written once. From shapes alone: no tensor is made."""
    size = {"reliability_from_topk": (*data.LONG,), "reliability_from_drift": data.LONG[:2]}
    shape = size.get(case.op, (*case.shape, data.VOCABULARY))
    like = torch.empty(shape, dtype=getattr(torch, case.dtype), device="meta")
    tensors = [like] if case.op == "reliability_from_drift" else [like, like]
    if case.op in LOGIT_OPS + TOPK_OPS:
        options: dict[str, object] = {} if case.op in TOPK_OPS else {"k": case.k}
        if case.op == "token_stats":
            options["token_ids"] = torch.empty(case.shape, dtype=torch.int64, device="meta")
        outputs = operator(case.op, "auto")(*tensors, **options)
        tensors = [*tensors, *answers.fields(outputs).values()]
    return sum(tensor.nbytes for tensor in tensors)
