"""Bad input: the words, one by one. The tables stand in tests/ops/<op>.py; each surface is shown to look at them."""

import re

import ml_dtypes
import numpy as np
import pytest
import torch

import bad_input
import operators
import pruneopd_kernels
from arrays import as_array
from implementations import (
    ALONG_RESPONSES,
    COMPILED_PASSES,
    DECLARED,
    LOGITS,
    LOSSES,
    OPERATORS,
    compiled_alone,
    leaf,
    raw,
    temperature,
)
from operators import MODULES


def rows(op):
    for change, words, *error in [*MODULES[op].bad(), *bad_input.impl()]:
        yield op, MODULES[op].BASE | change, words, error[0] if error else ValueError


TABLE = [row for op in OPERATORS for row in rows(op)]


def each_row(table):
    ids = [f"{op}-{words}" for op, _, words, _ in table]
    return pytest.mark.parametrize(("op", "arguments", "words", "error"), table, ids=ids)


def check(function, op, arguments, words, error):
    with pytest.raises(error) as raised:
        function(**arguments)
    assert str(raised.value) == f"{op}: {words}"


@pytest.mark.parametrize("op", OPERATORS)
def test_the_base_is_good(op):
    getattr(pruneopd_kernels, op)(**MODULES[op].BASE)


@each_row(TABLE)
def test_function(op, arguments, words, error):
    check(getattr(pruneopd_kernels, op), op, arguments, words, error)


def protects_memory(arguments, words):
    """Not ranges of scalars, values, nor what the stable ABI has other names for, nor the order of checks."""
    rule = re.search(r"must (have|be given|be None)|(k|vocab_size) must be between", words)
    return rule and not re.search(r"tensor, got|complex64|got \[\]", words) and "threshold" not in arguments


PASS_OF = {op: op for op in COMPILED_PASSES} | {"selected_logprobs": "row_stats", "opd_loss": "opd_scores"}


def of_pass(op, arguments, words, error):
    """The same row for the compiled pass of a composed operator."""
    name = PASS_OF[op]
    whole = DECLARED[op].arguments((), {n: x for n, x in arguments.items() if n != "impl"})._asdict()
    given = (whole if op == "opd_loss" else arguments) | {"divergence": False}
    return name, {n: x for n, x in given.items() if n in COMPILED_PASSES[name].parameters}, words, error


OF_PASSES = [row for row in TABLE if row[0] in PASS_OF]


@each_row([of_pass(*row) for row in OF_PASSES if protects_memory(*row[1:3])])
def test_compiled_operator_without_the_checks_of_python(op, arguments, words, error):
    """What protects memory is checked there once more, in the same words."""
    check(lambda **given: compiled_alone(op, **given), op, arguments, words, RuntimeError)


# One row of each kind for each of the other surfaces: a dtype, a scalar, a value inside a tensor.
SURFACES = {
    "raw": (raw, OPERATORS),
    "reference": (lambda op: getattr(pruneopd_kernels.reference, op), OPERATORS),
    "host": (lambda op: host(op), [op for op in OPERATORS if op not in LOSSES]),
}


def host(op):
    def call(**arguments):
        return getattr(pruneopd_kernels.host, op)(**{name: as_array(x) for name, x in arguments.items()})

    return call


@pytest.mark.parametrize("surface", SURFACES)
def test_every_surface_looks_at_them(surface):
    function, ops = SURFACES[surface]
    complex64 = {"mask": bad_input.zeros(2, 8, dtype=torch.complex64)}
    errors = dict.fromkeys((TypeError, ValueError), RuntimeError) if surface == "raw" else {}
    for op in ops:
        name, rule = ("w_drop", ">= 0") if op in ALONG_RESPONSES else (temperature(op), "> 0")
        rows = [
            ({name: -1.0}, f"{name} must be finite and {rule}, got -1.0", ValueError),
            (complex64, "mask must have dtype bool, integer or float, got complex64", TypeError),
        ]
        if op in ALONG_RESPONSES:
            rows.append(({"drift_count": bad_input.i32(0, -1)}, "drift_count must be >= 0, got -1", ValueError))
        for name in [name for name in DECLARED[op].tensors if name.endswith("topk_ids") and op in LOSSES]:
            words = f"{name} must be below vocab_size = 64 where the position is valid, got 64"
            rows.append(({name: bad_input.ids(2, 8, 16) + 64}, words, ValueError))
        for change, words, error in rows:
            check(function(op), op, MODULES[op].BASE | change, words, errors.get(error, error))


def test_values_are_never_addresses():
    """On the compiled operators themselves: ids that do not exist are not accepted, cu_seqlens are clamped."""
    logits = {"student_logits": bad_input.zeros(2, 8, 64), "teacher_logits": bad_input.zeros(2, 8, 64)}
    for value in (64, -1, 2**40, -(2**63)):
        token_ids = bad_input.ids(2, 8) + value
        assert compiled_alone("reliability", **logits, token_ids=token_ids, metric="top_p", vocab_size=64)[1].all()
        assert compiled_alone("token_stats", **logits, token_ids=token_ids)[-1].isnan().all()
    for values in ((-(2**31), 2**31 - 1), (5, 3, 40), (2**31 - 1, -(2**31), 7), (0, 16, 0, 16)):
        for op in [op for op in ALONG_RESPONSES if op in COMPILED_PASSES]:
            arguments = operators.example(op, (2, 8), packed=True) | {"drift_count": None}
            result = compiled_alone(op, **arguments | {"cu_seqlens": bad_input.i32(*values)})
            assert all(x.shape[0] in (16, len(values) - 1) for x in result)


@pytest.mark.parametrize("op", LOGITS)
def test_float64_logits_are_for_the_reference(op):
    calls = [(getattr(pruneopd_kernels, op), torch.float64, bad_input.LOGITS)]
    calls += [(host(op), torch.float64, bad_input.LOGITS)] if op not in LOSSES else []
    calls += [(SURFACES["reference"][0](op), torch.complex64, bad_input.FLOATS)]
    for function, dtype, allowed in calls:
        words = f"{leaf(op)} must have dtype {allowed}, got {str(dtype)[6:]}"
        check(function, op, MODULES[op].BASE | {leaf(op): bad_input.zeros(2, 8, 64, dtype=dtype)}, words, TypeError)


def test_a_subnormal_mask_is_looked_at():
    """Whatever the processor takes subnormal numbers for, their positions are valid, and so are checked."""
    subnormal = {"mask": torch.ones(2, 8, dtype=torch.int32).view(torch.float32)}
    words = "token_ids must be between 0 and vocab_size - 1 = 63 where the position is valid, got 64"
    given = MODULES["reliability"].BASE | {"metric": "top_p", "token_ids": bad_input.ids(2, 8) + 64} | subnormal
    assert torch.set_flush_denormal(True)
    try:
        for function in (pruneopd_kernels.reliability, pruneopd_kernels.reference.reliability, host("reliability")):
            check(function, "reliability", given, words, ValueError)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("function", [pruneopd_kernels.reliability, pruneopd_kernels.host.reliability])
def test_arguments_that_python_refuses(function):
    x = np.zeros((2, 8, 64), np.float32)
    x = x if function is pruneopd_kernels.host.reliability else torch.from_numpy(x)
    for args, kwargs, words in (
        ((x, x, None, None), {}, "positional"), ((x,), {}, "teacher_logits"), ((x, x), {"unknown": 3}, "unknown")
    ):  # fmt: skip
        with pytest.raises(TypeError, match=words):
            function(*args, **kwargs)


# --- the NumPy functions alone ---------------------------------------------------------------------------------------


def test_what_the_host_refuses():
    base = {n: x.numpy() for n, x in MODULES["token_stats"].BASE.items()}
    rows = [({"num_threads": 0}, "num_threads must be >= 1, got 0", ValueError)]
    for dtype, name in ((np.longdouble, np.dtype(np.longdouble).name), (">f4", ">f4"), (object, "object")):
        words = f"teacher_logits must have dtype {bad_input.LOGITS}, got {name}"
        rows.append(({"teacher_logits": np.zeros((2, 8, 64), dtype)}, words, TypeError))
    backwards = np.zeros((2, 8, 64), ml_dtypes.bfloat16)[..., ::-1]
    words = "student_logits must have stride 1 on its last axis, got -1"
    rows.append(({"student_logits": backwards}, words, ValueError))
    for change, words, error in rows:
        check(pruneopd_kernels.host.token_stats, "token_stats", base | change, words, error)
