"""What the suites know of each operator. tests/ops/<op>.py says it; a new operator needs that file and no other.

Such a file has

- `tensors(student_logits, teacher_logits, k, seed, temperature, vocab_size)`: what the operator takes beside what many
  take (logits, mask, token_ids, cu_seqlens, drift_count), for these logits
- `VARIANTS`: arguments that the table of cases gives in turn; `EXAMPLE`: those of an ordinary call
- `RANDOM`: values that a random call draws from; or `problems()`, a Hypothesis strategy of all arguments
- `gold(a)`: every output in float64, and sizes (see `comparison.Answer`); of a loss `gold(into, a)`, with the gradient,
  where `into` is what comes in by each differentiable output; `a` has the arguments as attributes, arrays for tensors
- `eager(gold, a)`: the float outputs, computed in float32 from tensors
- `BASE` and `bad()`: a good call of zeros and what makes it bad (see bad_input.py)

and may have `CASES`, the names of the cases of its table, where not all of them apply.
"""

import functools
import itertools
import zlib
from importlib import import_module
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import cases
import comparison
import gold
import implementations
import tiers
from implementations import ALONG_RESPONSES, DECLARED, LOGITS, LOSSES, OPERATORS, flowing, leaf
from pruneopd_kernels.dispatch.registration import Empty

OF_SOLE_MODEL = ("student_logits", "student_temperature")
SLOWEST = (implementations.TRITON_INTERPRETED, *implementations.PARALLEL)
MODULES = {op: import_module(op) for op in OPERATORS}


def of_op(op, given):
    """Of these arguments those that the operator takes, in its order; what is the student's is a sole model's, too."""
    given = {name.removeprefix("student_"): x for name, x in given.items() if name in OF_SOLE_MODEL} | given
    return {name: given[name] for name in DECLARED[op].parameters if name in given}


def record(op, arguments):
    """All arguments of a call as attributes, defaults filled in; vocab_size is a number."""
    a = SimpleNamespace(**DECLARED[op].arguments((), arguments)._asdict())
    if op in LOGITS:
        a.vocab_size = a.vocab_size or getattr(a, leaf(op)).shape[-1]
    return a


def answer(op, upstream=None, **arguments):
    """The gold and the eager peer of a call."""
    module, a = MODULES[op], record(op, arguments)
    arrays = {n: cases.as_float64(x) if isinstance(x, torch.Tensor) else x for n, x in vars(a).items()}
    into = {}
    if op in LOSSES:
        declared = DECLARED[op]
        empty = dict(zip(declared.fields, declared.module.fake(a, Empty(declared.record(**vars(a)))), strict=False))
        into = flowing(op, empty, upstream)
    of_loss = [{name: cases.as_float64(x) for name, x in into.items()}] if into else []
    values, sizes = module.gold(*of_loss, SimpleNamespace(**arrays))
    return comparison.Answer(values, comparison.eager(module.eager, values, into, a), sizes)


def check(impl, op, upstream=None, *, least_size=0.0, **arguments):
    """Hold an implementation to the gold; return its outputs."""
    result = impl.run(op, upstream, **arguments)
    comparison.check(result, answer(op, upstream, **arguments), least_size)
    return result


# --- samples ---------------------------------------------------------------------------------------------------------


def example(op, shape=(2, 6), width=70, k=8, seed=0, dtype=torch.float32, packed=False):
    """The arguments of an ordinary call, with every tensor that may be given; packed: of `[B, T]` as `[B * T]`."""
    rng, k = cases.generator(seed), min(k, width)
    student = torch.randn(*shape, width, generator=rng) * 2
    teacher = student + torch.randn(student.shape, generator=rng)
    student, teacher = student.to(dtype), teacher.to(dtype)
    given = {
        "student_logits": student,
        "teacher_logits": teacher,
        "mask": torch.rand(shape, generator=rng) < 0.8,
        "token_ids": cases.token_ids(teacher, seed=seed),
        **MODULES[op].tensors(student, teacher, k, seed, (1.0, 1.0), None),
    }
    if packed:
        given = {name: x.flatten(0, 1) for name, x in given.items()}
        given["cu_seqlens"] = (torch.arange(shape[0] + 1) * shape[1]).int()
    if op in ALONG_RESPONSES:
        given["drift_count"] = torch.arange(shape[0]).int()
    return of_op(op, given | {"k": k} | MODULES[op].EXAMPLE)


def required(op, arguments):
    """The same call with nothing that may be left out."""
    needed = [name for name, parameter in DECLARED[op].parameters.items() if parameter.default is parameter.empty]
    return {name: value for name, value in arguments.items() if name in [*needed, "cu_seqlens", "k"]}


def of_positions(arguments):
    """The names of the tensors whose leading axes are those of the positions."""
    return [n for n, x in arguments.items() if isinstance(x, torch.Tensor) and n not in ("cu_seqlens", "drift_count")]


def each_position(change, arguments):
    """The call with `change(tensor)` instead of each tensor of positions."""
    return arguments | {name: change(arguments[name]) for name in of_positions(arguments)}


def sample(op, case, dtypes, variant):
    """Upstream and arguments of a case of the table; of what is no loss, None."""
    student, teacher, kwargs = cases.make(case, dtypes)
    vocab_size = kwargs.get("vocab_size", min(student.shape[-1], teacher.shape[-1]))
    temperatures = kwargs.get("student_temperature", 1.0), kwargs.get("teacher_temperature", 1.0)
    given = {"student_logits": student, "teacher_logits": teacher, "token_ids": cases.token_ids(teacher, vocab_size)}
    given |= MODULES[op].tensors(student, teacher, kwargs.get("k", 16), 0, temperatures, vocab_size)
    upstream = cases.randn(*student.shape[:-1], seed=30, scale=1) if op in LOSSES else None
    return upstream, of_op(op, given | kwargs | MODULES[op].VARIANTS[variant])


@functools.cache
def answer_of_sample(*key):
    upstream, arguments = sample(*key)
    return answer(key[0], upstream, **arguments)


def variants_of(op):
    return range(len(MODULES[op].VARIANTS))


def table(op, impl):
    """Case, dtypes, variant: all of them with --all; else, and if it is slow, each case once and the others in turn."""
    names = getattr(MODULES[op], "CASES", list(cases.CASES))
    if impl.name.startswith("reference"):  # which takes the same path at every width
        names = [name for name in names if name not in cases.FOR_TILES]
    if impl in SLOWEST and op in LOGITS:  # seconds a case, or processes: two of the operators get each
        names = [name for i, name in enumerate(names) if (i + LOGITS.index(op)) % len(LOGITS) < 2]
    if not names:
        return []
    turns = list(itertools.product(cases.SAME_DTYPES, variants_of(op)))
    two_rows = "teacher_logits" in DECLARED[op].tensors
    mixed = list(itertools.product(cases.MIXED_DTYPES, variants_of(op))) if two_rows else []
    turn = zlib.crc32(repr(impl).encode()) % len(turns)
    turns = turns[turn:] + turns[:turn]  # so that implementations do not all take the same
    rows = tiers.combinations(names, turns, all_of_them=tiers.ALL and not impl.slow)
    if mixed:
        rows += tiers.combinations(cases.MIXED, mixed, all_of_them=tiers.ALL and not impl.slow)
    return [(name, dtypes, variant) for name, (dtypes, variant) in rows]


def each_sample():
    """Parametrize a test by everything in the tables."""
    rows = [
        pytest.param(op, impl, *row, marks=impl.marks, id=f"{op}-{row[0]}-{cases.case_id(row[1])}-{row[2]}-{impl}")
        for op in OPERATORS
        for impl in implementations.every(op)
        for row in table(op, impl)
    ]
    return pytest.mark.parametrize(("op", "impl", "case", "dtypes", "variant"), rows)


@st.composite
def random_calls(draw, op):
    """Any width, k, dtypes, layout, mask and temperatures; quantised logits, so that much ties; some special values."""
    width, rng = draw(st.integers(1, 1600)), cases.generator(draw(st.integers(0, 2**31)))
    k = draw(st.integers(1, min(width, 256)))
    step, scale = draw(st.sampled_from([1e-3, 0.25, 1.0, 8.0])), draw(st.sampled_from([0.1, 1.0, 10.0]))
    magnitude = draw(st.sampled_from([1.0] * 6 + [1e-41, 1e30, 3e37]))
    offset = draw(st.sampled_from([0.0, -450.0, 300.0]))
    pair = [(torch.randn(1, 3, width, generator=rng) * scale / step).round() * step + offset for _ in range(2)]
    pair = [x * magnitude for x in pair]
    for special in draw(st.lists(st.sampled_from([-torch.inf, -torch.inf, 0.0, torch.inf, torch.nan]), max_size=2)):
        pair[draw(st.integers(0, 1))][torch.rand(1, 3, width, generator=rng) < 1.0 / width] = special
    student, teacher = (x.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))) for x in pair)
    temperatures = draw(st.sampled_from([1.0, 0.5, 3.0])), draw(st.sampled_from([1.0, 0.8]))
    given = {
        "student_logits": student,
        "teacher_logits": teacher,
        "mask": torch.rand(1, 3, generator=rng) < 0.8,
        "token_ids": cases.token_ids(teacher).to(draw(st.sampled_from([torch.int32, torch.int64]))),
        "k": k,
        "student_temperature": temperatures[0],
        "teacher_temperature": temperatures[1],
        **MODULES[op].tensors(student, teacher, k, 0, temperatures, None),
    }
    given = laid_out(given, draw(st.sampled_from(["padded", "padded", "strided", "packed"])), draw)
    return of_op(op, given | {name: draw(st.sampled_from(values)) for name, values in MODULES[op].RANDOM.items()})


def laid_out(given, layout, draw):
    """The same call of one response: as it is, with gaps in memory, or packed with responses of other lengths."""
    names = of_positions(given)
    if layout == "strided":
        gaps = {n: torch.cat([given[n]] * 2, -1)[..., : given[n].shape[-1]] for n in names if given[n].ndim == 3}
        return given | gaps
    if layout == "padded":
        return given
    bounds = draw(st.sampled_from([[0, 3], [0, 1, 3], [0, 0, 2, 2, 3]]))
    bounds = torch.tensor(bounds, dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    packed = {name: given[name].flatten(0, 1) for name in names}
    return given | packed | {"cu_seqlens": bounds, "drift_count": torch.arange(len(bounds) - 1).int()}


def calls(op):
    """A Hypothesis strategy of arguments."""
    module = MODULES[op]
    return module.problems() if hasattr(module, "problems") else random_calls(op)


def examples(impl, count=1.0, **strategies):
    """Decorate a function so that it runs at once, for few or many examples: as the tier and the speed of `impl` say.

    An example for which the gold has no single answer is passed over.
    """

    def run(function):
        @functools.wraps(function)
        def unless_undecided(**drawn):
            try:
                function(**drawn)
            except gold.UndecidedError:
                hypothesis.reject()
            tiers.counted += 1

        settings = hypothesis.settings(max_examples=max(1, round(tiers.examples(impl) * count)))
        settings(hypothesis.given(**strategies)(unless_undecided))()

    return run


def by_position(op):
    """Return `run` and `check` of one operator, which take its tensors by position, in the order of the signature.

    `run(impl, *tensors, **arguments)` returns the outputs as attributes, and of a loss the gradient beside them; a loss
    takes the upstream gradient first.
    """
    names = DECLARED[op].tensors

    def named(args):
        upstream, args = (args[0], args[1:]) if op in LOSSES else (None, args)
        return upstream, dict(zip(names, args, strict=False))

    def run(impl, *args, **kwargs):
        upstream, tensors = named(args)
        result = impl.run(op, upstream, **tensors, **kwargs)
        gradient = result.pop("gradient", None)
        outputs = SimpleNamespace(**result)
        return outputs if gradient is None else (outputs, gradient)

    def check_positional(impl, *args, **kwargs):
        upstream, tensors = named(args)
        return SimpleNamespace(**check(impl, op, upstream, **tensors, **kwargs))

    return run, check_positional
