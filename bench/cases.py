"""What is timed: the rows of the results, and what belongs to each: its inputs, its call, its answer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench import answers, data, eager, eager_losses, losses, others
from bench.implementations import NO_SET, operator, read_and_write_logits, read_logits, using
from bench.losses import LOSSES

LOGIT_OPS = ("reliability", "token_stats")
TOPK_OPS = ("reliability_from_topk", "reliability_from_drift")
READINGS = ("read", "read_student")  # of both models' logits, of the student's
YARDSTICKS = (*READINGS, "copy")  # what a CPU's and a GPU's rows are compared with
USUAL = ("chunked", "checkpointed")  # what else is usual in place of topk_forward_kl
PEERS = ("eager", "eager_native", "compiled", *USUAL)
BEYOND_CACHES = 2**28  # bytes; the L2 of an H200 holds 60 MB, of a B200 126 MB


@dataclass(frozen=True)
class Case:
    """One row: an operator on some data by one implementation.

    `op` may also be a yardstick (a CPU's readings, a GPU's copy), or a part that others offer, "topk" or "kl".
    """

    op: str
    dtype: str  # of the logits; "int64" or "bool" for the operators without
    impl: str  # an implementation, or a peer: one of PEERS, flashinfer, liger
    isa: str = NO_SET
    k: int = 16
    rows: str = "random"  # or "ascending": no logit smaller than the one before it
    device: str = "cpu"
    positions: int = 64  # of logits: on a CPU more than any cache holds
    passes: str = ""  # of a loss: "forward", "backward" or "both"; of its yardstick, the same

    @property
    def name(self) -> str:
        parts = [self.op, self.dtype, *filter(None, [self.passes])]
        parts += [] if self.op in (*YARDSTICKS, "kl", "reverse_kl", "reliability_from_drift") else [f"k={self.k}"]
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
    """The large tensors that are read, of one set; of an operator on logits, the logits."""
    if case.op == "reliability_from_topk":
        student_ids, teacher_ids = data.topk_ids(case.sets, case.device)
        return student_ids[number], teacher_ids[number]
    if case.op == "reliability_from_drift":
        return (data.drift(case.sets, case.device)[number],)
    student, teacher = data.logits(case.dtype, case.rows, (case.sets, *case.shape), case.device)
    return (student[number],) if _of_student_alone(case) else (student[number], teacher[number])


def _of_student_alone(case: Case) -> bool:
    return case.op in ("copy", "read_student") or not LOSSES.get(case.op, True)


def reading(case: Case) -> Case:
    """The yardstick of an operator on logits on a CPU. For a loss with its gradient it writes what that must, too."""
    op = "read" if LOSSES.get(case.op, True) else "read_student"
    return Case(op, case.dtype, case.impl, case.isa, rows=case.rows, passes=case.passes)


def call(case: Case, number: int = 0) -> Callable[[], object]:
    """The call that is timed, on one set of the inputs."""
    tensors = inputs(case, number)
    if case.op in READINGS:
        return functools.partial(read_and_write_logits if case.passes == "both" else read_logits, *tensors)
    if case.op == "copy":
        to = data.like_logits(case.dtype, (case.sets, *case.shape), case.device)[number]
        return functools.partial(to.copy_, tensors[0])
    if case.op in others.PARTS:
        return functools.partial(others.PARTS[case.op][case.impl], *tensors)
    options = _options(case, number)
    function = function_of(case)
    if case.impl == "eager_native":
        options["logprob_dtype"] = None
    if case.op in LOSSES:
        upstream = data.weights((case.sets, *case.shape), case.device)[number]
        return losses.call(function, case.passes, tensors, options, upstream)
    return functools.partial(function, *tensors, **options)


def function_of(case: Case) -> Callable[..., object]:
    """What a user calls, or would have to write."""
    if case.impl not in PEERS:
        return operator(case.op, case.impl)  # type: ignore[no-any-return]
    name = f"{case.op}_{case.impl}" if case.impl in USUAL else case.op
    function: Callable[..., object] = getattr(eager_losses if case.op in LOSSES else eager, name)
    return compiled(function) if case.impl == "compiled" else function


def _options(case: Case, number: int = 0, responses: slice = slice(None)) -> dict[str, object]:
    if case.op in LOSSES:
        given = losses.options(case.op, case.dtype, case.k, (case.sets, *case.shape), case.device)
        return {name: tensor[number][responses] for name, tensor in given.items()}
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
    if case.op in READINGS:
        return _reading_complaints(case, got)  # type: ignore[arg-type]
    if case.op == "copy":
        return [] if torch.equal(inputs(case)[0], got) else ["the copy differs"]  # type: ignore[arg-type]
    if case.op in others.PARTS:
        expected = others.PARTS[case.op]["eager"](*inputs(case))
        return answers.complaints(answers.fields(got), expected, answers.PEER_TOLERANCE["float32"])
    return wrong_fields(case, answers.fields(got))


def _reading_complaints(case: Case, got: tuple[Tensor, ...]) -> list[str]:
    student, *teacher = inputs(case)
    read = [student, *teacher]
    if case.passes == "both":
        *got_maxima, written = got
        read += teacher
        if not torch.equal(written, student):
            return ["what is written differs"]
    else:
        got_maxima = list(got)
    expected = torch.cat([logits.amax(-1).float().flatten() for logits in read])
    right = torch.equal(expected, torch.cat([maxima.float().flatten() for maxima in got_maxima]))
    return [] if right else ["the row maxima are wrong"]


def wrong_fields(case: Case, got: Mapping[str, Tensor]) -> list[str]:
    """The same for an operator's outputs on the first set."""
    passes = "both" if case.op in LOSSES else ""
    expected = gold(replace(case, impl="reference", isa=NO_SET, passes=passes))
    expected = {name: tensor for name, tensor in expected.items() if losses.belongs(name, case.passes)}
    checked = _checked(case)
    got = {name: tensor.detach()[checked] for name, tensor in got.items()}
    if case.impl not in PEERS:
        return answers.complaints(got, expected)
    logits = [] if case.op in TOPK_OPS else [tensor[checked] for tensor in inputs(case)]
    sources = {"topk_ids": logits[:1], "student_topk_ids": logits[:1], "teacher_topk_ids": logits[1:]}
    ids = {name: source for name, sources in sources.items() for source in sources if name in expected}
    tolerance = answers.PEER_TOLERANCE["native" if case.impl == "eager_native" else "float32"]
    return answers.peer_complaints(got, expected, ids, tolerance)


@functools.cache
def gold(case: Case) -> Mapping[str, Tensor]:
    """The reference's answer, which takes long; so of the logits only for some responses."""
    checked = _checked(case)
    some = [tensor[checked] for tensor in inputs(case)]
    function, options = operator(case.op, "reference"), _options(case, responses=checked)
    if case.op in LOSSES:
        upstream = data.weights((case.sets, *case.shape), case.device)[0][checked]
        found = losses.call(function, case.passes, some, options, upstream)()
        return {name: tensor.detach() for name, tensor in found.items()}
    return answers.fields(function(*some, **options))


def _checked(case: Case) -> slice:
    """The first response and the last; all of them where there are no logits."""
    return slice(0, None, 1 if case.op in TOPK_OPS else max(case.shape[0] - 1, 1))


def counted_bytes(case: Case) -> int:
    """Every input read once, every output written once, by each pass. From shapes alone: no tensor is made."""
    size = {"reliability_from_topk": (*data.LONG,), "reliability_from_drift": data.LONG[:2]}
    shape = size.get(case.op, (*case.shape, data.VOCABULARY))
    like = torch.empty(shape, dtype=getattr(torch, case.dtype), device="meta")
    tensors = [like] * (1 if case.op == "reliability_from_drift" or _of_student_alone(case) else 2)
    if case.op == "copy":
        return 2 * like.nbytes
    of_gradient = sum(tensor.nbytes for tensor in [*tensors, like])
    if case.passes == "backward":
        return of_gradient
    options: dict[str, object] = {}
    if case.op in LOSSES:
        options |= losses.options_like(case.op, case.k, case.shape)
    if case.op in LOGIT_OPS:
        options["k"] = case.k
    if case.op == "token_stats":
        options["token_ids"] = torch.empty(case.shape, dtype=torch.int64, device="meta")
    if case.op in (*LOGIT_OPS, *TOPK_OPS, *LOSSES):
        outputs = answers.fields(operator(case.op, "auto")(*tensors, **options))
        tensors += [*outputs.values(), *(value for value in options.values() if isinstance(value, Tensor))]
    return sum(tensor.nbytes for tensor in tensors) + (of_gradient if case.passes == "both" else 0)
