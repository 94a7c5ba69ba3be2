"""What is timed: the rows of the results, and what belongs to each: its inputs, its call, its answer.

A loss has passes. "forward" computes it without autograd. "both" is what a training step pays: the public function
under autograd, then the gradient, which is allocated each time as it is in training. "backward" is the second half of
that alone, on a graph that is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.measure import answers, inputs, libraries
from bench.measure.implementations import NO_SET, operator, read_and_write_logits, read_logits, using
from bench.operators import LOGITS, LOSSES, OPERATORS, TOPK_OPS, USUAL, Operator

READINGS = ("read", "read_student")  # of both models' logits, of the student's
YARDSTICKS = (*READINGS, "copy")  # what a CPU's and a GPU's rows are compared with
PEERS = ("eager", "eager_native", "compiled", *USUAL)
BEYOND_CACHES = 2**28  # bytes; the L2 of an H200 holds 60 MB, of a B200 126 MB
EVERYTHING = slice(None)


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
    def operator(self) -> Operator | None:
        return OPERATORS.get(self.op)

    @property
    def reads(self) -> tuple[str, ...]:
        """The large inputs, by the name of the parameter."""
        if self.operator:
            return self.operator.reads
        return LOGITS[:1] if self.op in ("copy", "read_student") else LOGITS

    @property
    def has_k(self) -> bool:
        return self.operator.has_k if self.operator else self.op == "topk"

    @property
    def name(self) -> str:
        parts = [self.op, self.dtype, *filter(None, [self.passes])]
        parts += [f"k={self.k}"] if self.has_k else []
        parts += [] if self.op in TOPK_OPS else [self.rows]
        parts += [] if self.op in TOPK_OPS or self.device == "cpu" else [f"N={self.positions}"]
        return " ".join([*parts, self.impl, *([] if self.isa == NO_SET else [self.isa])])

    @property
    def shape(self) -> tuple[int, int]:
        """Responses, and positions in each."""
        if self.op in TOPK_OPS:
            return inputs.LONG[:2]
        responses = 4 if self.device == "cpu" else min(16, self.positions)
        return responses, self.positions // responses

    @property
    def shape_of_inputs(self) -> tuple[int, ...]:
        """Of one large input, in one set."""
        without_logits = {"drift": inputs.LONG[:2], "student_topk_ids": inputs.LONG}
        return without_logits.get(self.reads[0], (*self.shape, inputs.VOCABULARY))

    @property
    def sets(self) -> int:
        """Inputs that take turns, so that a GPU does not find in its cache what the call before it has read."""
        if self.device == "cpu":
            return 1
        responses, positions = self.shape
        row_bytes = {"drift": 14, "student_topk_ids": 2 * 8 * inputs.LONG[2]}
        logit_bytes = 2 * inputs.VOCABULARY * (4 if self.dtype == "float32" else 2)
        return -(-BEYOND_CACHES // (responses * positions * row_bytes.get(self.reads[0], logit_bytes)))


def large_inputs(case: Case, number: int = 0) -> tuple[Tensor, ...]:
    """Return the large tensors that are read, of one set; of an operator on logits, the logits."""
    if case.reads == ("drift",):
        return (inputs.drift(case.sets, case.device)[number],)
    if case.op in TOPK_OPS:
        return tuple(ids[number] for ids in inputs.topk_ids(case.sets, case.device))
    pair = inputs.logits(case.dtype, case.rows, (case.sets, *case.shape), case.device)
    return tuple(logits[number] for logits in pair[: len(case.reads)])


def reading(case: Case) -> Case:
    """Return the yardstick of an operator on logits on a CPU. With a loss's gradient it writes what that must, too."""
    op = "read" if len(case.reads) == 2 else "read_student"
    return Case(op, case.dtype, case.impl, case.isa, rows=case.rows, passes=case.passes)


def call(case: Case, number: int = 0) -> Callable[[], object]:
    """Return the call that is timed, on one set of the inputs."""
    tensors = large_inputs(case, number)
    if case.op in READINGS:
        return functools.partial(read_and_write_logits if case.passes == "both" else read_logits, *tensors)
    if case.op == "copy":
        to = inputs.like_logits(case.dtype, (case.sets, *case.shape), case.device)[number]
        return functools.partial(to.copy_, tensors[0])
    if case.op in libraries.PARTS:
        return functools.partial(libraries.PARTS[case.op][case.impl], *tensors)
    return call_on(case, function_of(case), tensors, given(case, number), upstream(case)[number])


def small_call(case: Case) -> Callable[[], object]:
    """Return the same call on two positions and 64 ids: it loads what is loaded when it is first used."""
    narrow = tuple(tensor[:1, :2][..., :64] for tensor in large_inputs(case))
    like = {name: inputs.given_like(name, case.k, (1, 2), case.device) for name in OPERATORS[case.op].given}
    return call_on(case, function_of(case), narrow, like, upstream(case)[0, :1, :2])


def call_on(
    case: Case,
    function: Callable[..., object],
    tensors: tuple[Tensor, ...],
    given: Mapping[str, Tensor],
    upstream: Tensor,
) -> Callable[[], object]:
    """Return a call of an operator, or of a peer, on these tensors; of a loss, in the passes of the case.

    `upstream` is the gradient of each position's loss.
    """
    options: dict[str, object] = dict(given)
    if OPERATORS[case.op].takes_k:
        options["k"] = case.k
    if case.impl == "eager_native":
        options["logprob_dtype"] = None
    if case.passes in ("", "forward"):
        return functools.partial(function, *tensors, **options)
    student, *others = tensors
    student = student.detach().requires_grad_()

    def gradient_of(loss: Tensor, keep: bool = False) -> dict[str, Tensor]:
        (gradient,) = torch.autograd.grad(loss, student, upstream, retain_graph=keep)
        return {"gradient": gradient}

    def both() -> dict[str, Tensor]:
        outputs = answers.fields(function(student, *others, **options))
        return outputs | gradient_of(outputs["loss"])

    if case.passes == "both":
        return both
    loss = answers.fields(function(student, *others, **options))["loss"]
    return functools.partial(gradient_of, loss, keep=True)


def function_of(case: Case) -> Callable[..., object]:
    """Return what a user calls, or would have to write."""
    if case.impl not in PEERS:
        return operator(case.op, case.impl)  # type: ignore[no-any-return]
    known = OPERATORS[case.op]
    function: Callable[..., object] = known.usual.get(case.impl, known.eager)
    return compiled(function) if case.impl == "compiled" else function


def given(case: Case, number: int = 0, responses: slice = EVERYTHING) -> dict[str, Tensor]:
    """Return what the operator takes besides its large inputs, by name."""
    shape = (case.sets, *case.shape)
    names = OPERATORS[case.op].given
    return {name: inputs.given(name, case.dtype, case.k, shape, case.device)[number][responses] for name in names}


def upstream(case: Case) -> Tensor:
    """Return the gradient of each position's loss, for each set."""
    return inputs.given("weight", "", 0, (case.sets, *case.shape), case.device)


@functools.cache
def compiled(function: Callable[..., object]) -> Callable[..., object]:
    return torch.compile(function, dynamic=False)


# --- answers ------------------------------------------------------------------------------------------------------


def complaints(case: Case) -> list[str]:
    """Return what is wrong with the answer that this case gives, against the reference."""
    if case.impl == "reference":
        return []
    with using(case.isa):
        got = call(case)()
    if case.op in READINGS:
        return _reading_complaints(case, got)  # type: ignore[arg-type]
    if case.op == "copy":
        return [] if torch.equal(large_inputs(case)[0], got) else ["the copy differs"]  # type: ignore[arg-type]
    if case.op in libraries.PARTS:
        expected = libraries.PARTS[case.op]["eager"](*large_inputs(case))
        return answers.complaints(answers.fields(got), expected, answers.PEER_TOLERANCE["float32"])
    return wrong_fields(case, answers.fields(got))


def _reading_complaints(case: Case, got: tuple[Tensor, ...]) -> list[str]:
    student, *teacher = large_inputs(case)
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
    """Return the same for an operator's outputs on the first set."""
    passes = "both" if case.op in LOSSES else ""
    expected = gold(replace(case, impl="reference", isa=NO_SET, passes=passes))
    if case.passes in ("forward", "backward"):
        expected = {name: x for name, x in expected.items() if (name == "gradient") == (case.passes == "backward")}
    checked = _checked(case)
    got = {name: tensor.detach()[checked] for name, tensor in got.items()}
    if case.impl not in PEERS:
        return answers.complaints(got, expected)
    logits = [] if case.op in TOPK_OPS else [tensor[checked] for tensor in large_inputs(case)]
    sources = {"topk_ids": logits[:1], "student_topk_ids": logits[:1], "teacher_topk_ids": logits[1:]}
    ids = {name: source for name, sources in sources.items() for source in sources if name in expected}
    tolerance = answers.PEER_TOLERANCE["native" if case.impl == "eager_native" else "float32"]
    return answers.peer_complaints(got, expected, ids, tolerance)


@functools.cache
def gold(case: Case) -> Mapping[str, Tensor]:
    """Return the reference's answer, which takes long; so of the logits only for some responses."""
    checked = _checked(case)
    some = tuple(tensor[checked] for tensor in large_inputs(case))
    function, options = operator(case.op, "reference"), given(case, responses=checked)
    found = call_on(case, function, some, options, upstream(case)[0][checked])()
    return {name: tensor.detach() for name, tensor in answers.fields(found).items()}


def _checked(case: Case) -> slice:
    """Return the first response and the last; all of them if there are no logits."""
    return slice(0, None, 1 if case.op in TOPK_OPS else max(case.shape[0] - 1, 1))


def counted_bytes(case: Case) -> int:
    """Return every input read once, every output written once, by each pass. From shapes alone: no tensor is made."""
    like = torch.empty(case.shape_of_inputs, dtype=getattr(torch, case.dtype), device="meta")
    if case.op == "copy":
        return 2 * like.nbytes
    tensors = [like] * len(case.reads)
    of_gradient = (len(tensors) + 1) * like.nbytes
    if case.passes == "backward":
        return of_gradient
    if case.operator:
        options: dict[str, object] = {name: inputs.given_like(name, case.k, case.shape) for name in case.operator.given}
        tensors += [value for value in options.values() if isinstance(value, Tensor)]
        options |= {"k": case.k} if case.operator.takes_k else {}
        tensors += answers.fields(operator(case.op, "auto")(*[like] * len(case.reads), **options)).values()
    return sum(tensor.nbytes for tensor in tensors) + (of_gradient if case.passes == "both" else 0)
