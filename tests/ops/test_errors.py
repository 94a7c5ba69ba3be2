"""Bad input: the words, one by one, from the functions, the raw operators, the reference and the NumPy twin."""

import re

import numpy as np
import pytest
import torch

import pruneopd_kernels
from implementations import LOSSES, OPERATORS, as_array
from test_all_operators import example, raw

F64 = torch.float64


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def ids(*shape, dtype=torch.int64, device="cpu"):
    return zeros(*shape, dtype=dtype, device=device)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def strided(x):
    """The same shape with stride 2 on the last axis."""
    return x.repeat_interleave(2, -1)[..., ::2]


PADDED = {
    "reliability": {"student_logits": zeros(2, 8, 64), "teacher_logits": zeros(2, 8, 64)},
    "token_stats": {"student_logits": zeros(2, 8, 64), "teacher_logits": zeros(2, 8, 64)},
    "reliability_from_topk": {"student_topk_ids": ids(2, 8, 16), "teacher_topk_ids": ids(2, 8, 16)},
    "reliability_from_drift": {"drift": zeros(2, 8, dtype=torch.bool)},
    "topk_policy_loss": {"student_logits": zeros(2, 8, 64), "topk_ids": ids(2, 8, 16), "advantages": zeros(2, 8, 16)},
    "reverse_kl": {"student_logits": zeros(2, 8, 64), "teacher_logits": zeros(2, 8, 64)},
    "topk_forward_kl": {
        "student_logits": zeros(2, 8, 64),
        "teacher_topk_ids": ids(2, 8, 16),
        "teacher_topk_logprobs": zeros(2, 8, 16),
    },
}
PACKED = {
    "reliability": {"student_logits": zeros(16, 64), "teacher_logits": zeros(16, 64)},
    "reliability_from_topk": {"student_topk_ids": ids(16, 16), "teacher_topk_ids": ids(16, 16)},
    "reliability_from_drift": {"drift": zeros(16, dtype=torch.bool)},
}
TOP_P = {"metric": "top_p", "token_ids": ids(2, 8)}
TOP_P_OF_TOPK = {**TOP_P, "teacher_topk_logprobs": zeros(2, 8, 16)}
FLOATS = "float32, bfloat16 or float16"
FLOATS_OF_REFERENCE = "float32, bfloat16, float16 or float64"


def table():
    """operator, base, change, words (after `<op>: `), type."""
    rows = []

    def add(ops, change, words, error=ValueError, base=PADDED):
        rows.extend((op, base[op], change, words, error) for op in ops.split())

    both, along = "reliability token_stats", "reliability reliability_from_topk reliability_from_drift"
    two_rows, of_student = f"{both} reverse_kl", "topk_policy_loss topk_forward_kl"
    every = f"{along} token_stats reverse_kl {of_student}"

    # logits
    shapes = dict.fromkeys([*two_rows.split(), *of_student.split()], "[..., V]") | {
        "reliability": "[B, T, V] or [N, V]"
    }
    add("reliability", {"student_logits": zeros(3)}, f"student_logits must have shape {shapes['reliability']}, got [3]")
    add(
        "reliability",
        {"student_logits": zeros(1, 2, 3, 4)},
        f"student_logits must have shape {shapes['reliability']}, got [1, 2, 3, 4]",
    )
    for op in shapes:
        add(op, {"student_logits": zeros()}, f"student_logits must have shape {shapes[op]}, got []")
    for name, ops in (("student_logits", f"{two_rows} {of_student}"), ("teacher_logits", two_rows)):
        add(ops, {name: ids(2, 8, 64)}, f"{name} must have dtype {FLOATS}, got int64", TypeError)
        add(ops, {name: zeros(2, 8, 64, dtype=torch.bool)}, f"{name} must have dtype {FLOATS}, got bool", TypeError)
        add(
            ops,
            {name: zeros(2, 8, 64, dtype=torch.complex64)},
            f"{name} must have dtype {FLOATS}, got complex64",
            TypeError,
        )
        add(ops, {name: strided(zeros(2, 8, 64))}, f"{name} must have stride 1 on its last axis, got 2")
        add(ops, {name: zeros(2, 8, 1).expand(2, 8, 64)}, f"{name} must have stride 1 on its last axis, got 0")
        add(ops, {name: [[0.0]]}, f"{name} must be a tensor, got list", TypeError)
    add(two_rows, {"teacher_logits": zeros(2, 7, 64)}, "teacher_logits must have shape [2, 8, V], got [2, 7, 64]")
    add(two_rows, {"teacher_logits": zeros(16, 64)}, "teacher_logits must have shape [2, 8, V], got [16, 64]")
    add(two_rows, {"teacher_logits": zeros()}, "teacher_logits must have shape [2, 8, V], got []")
    add(
        "reliability",
        {"teacher_logits": zeros(15, 64), "cu_seqlens": i32(0, 16)},
        "teacher_logits must have shape [16, V], got [15, 64]",
        base=PACKED,
    )
    add(two_rows, {"teacher_logits": zeros(2, 8, 64, device="meta")}, "teacher_logits must be on cpu, got meta")
    add(
        two_rows,
        {"teacher_logits": zeros(2, 8, 72)},
        "vocab_size must be given when the last axes of student_logits and teacher_logits differ, got 64 and 72",
    )
    for value in (65, 0, -1):
        add(
            two_rows,
            {"vocab_size": value},
            f"vocab_size must be between 1 and min(student, teacher) width = 64, got {value}",
        )
    add(
        two_rows,
        {"vocab_size": 65, "teacher_logits": zeros(2, 8, 72)},
        "vocab_size must be between 1 and min(student, teacher) width = 64, got 65",
    )
    for value in (65, 0, -1):
        words = f"vocab_size must be between 1 and the student's width = 64, got {value}"
        add(of_student, {"vocab_size": value}, words)
    for value in (0, -1, 65):
        add(both, {"k": value}, f"k must be between 1 and min(vocab_size, 256) = 64, got {value}")
    add(both, {"k": 11, "vocab_size": 10}, "k must be between 1 and min(vocab_size, 256) = 10, got 11")
    wide = {"student_logits": zeros(2, 8, 300), "teacher_logits": zeros(2, 8, 300)}
    add(both, {**wide, "k": 257}, "k must be between 1 and min(vocab_size, 256) = 256, got 257")
    add(
        both,
        {"student_logits": zeros(2, 8, 4), "teacher_logits": zeros(2, 8, 4)},
        "k must be between 1 and min(vocab_size, 256) = 4, got 16",
    )

    # scalars
    for value in (0.0, -0.5, 1.5, float("nan"), float("inf")):
        add("reliability reliability_from_topk", {"threshold": value}, f"threshold must be in (0, 1], got {value}")
        add("reliability reliability_from_topk", {"top_p": value}, f"top_p must be in (0, 1], got {value}")
    for value in (-1.0, float("nan"), float("inf"), -float("inf")):
        for name in ("w_drop", "w_base", "eps"):
            add(along, {name: value}, f"{name} must be finite and >= 0, got {value}")
    for value in (0.0, -1.0, float("nan"), float("inf")):
        add(
            f"{two_rows} {of_student}",
            {"student_temperature": value},
            f"student_temperature must be finite and > 0, got {value}",
        )
        add(two_rows, {"teacher_temperature": value}, f"teacher_temperature must be finite and > 0, got {value}")
    for value in ("x", "", "Overlap", "top-p"):
        add(
            "reliability reliability_from_topk",
            {"metric": value},
            f"metric must be one of 'overlap', 'top_p', got {value!r}",
        )
    add("reliability", {"reward_weight": "x"}, "reward_weight must be one of 'student', 'teacher', 'none', got 'x'")
    add(every, {"impl": "x"}, "impl must be one of 'auto', 'reference', 'cpp', 'cuda', 'triton', got 'x'")

    # mask
    masks = {"[2, 8]": [(8,), (2, 7), (2, 8, 1), (16,)], "[16]": [(15,), (2, 8)]}
    for shape in masks["[2, 8]"]:
        add(every, {"mask": zeros(*shape)}, f"mask must have shape [2, 8], got {list(shape)}")
    for shape in masks["[16]"]:
        add(
            along,
            {"mask": zeros(*shape), "cu_seqlens": i32(0, 16)},
            f"mask must have shape [16], got {list(shape)}",
            base=PACKED,
        )
    add(
        every,
        {"mask": zeros(2, 8, dtype=torch.complex64)},
        "mask must have dtype bool, integer or float, got complex64",
        TypeError,
    )
    add(every, {"mask": zeros(2, 8, device="meta")}, "mask must be on cpu, got meta")
    add(every, {"mask": [True]}, "mask must be a tensor, got list", TypeError)

    # token_ids
    with_tokens = "reliability token_stats reliability_from_topk"
    add(with_tokens, {"token_ids": ids(8)}, "token_ids must have shape [2, 8], got [8]")
    for dtype in (torch.float32, torch.int16, torch.bool, torch.uint8):
        add(
            with_tokens,
            {"token_ids": ids(2, 8, dtype=dtype)},
            f"token_ids must have dtype int32 or int64, got {str(dtype)[6:]}",
            TypeError,
        )
    add(with_tokens, {"token_ids": ids(2, 8, device="meta")}, "token_ids must be on cpu, got meta")
    add("reliability", {"metric": "top_p"}, "token_ids must be given when metric is 'top_p', got None")
    add(
        "reliability_from_topk",
        {"metric": "top_p", "teacher_topk_logprobs": zeros(2, 8, 16)},
        "token_ids must be given when metric is 'top_p', got None",
    )
    add("reliability_from_topk", TOP_P, "teacher_topk_logprobs must be given when metric is 'top_p', got None")
    for value in (64, -1, -100, 2**40):
        add(
            "reliability",
            {**TOP_P, "token_ids": ids(2, 8) + value},
            f"token_ids must be between 0 and vocab_size - 1 = 63 where the position is valid, got {value}",
        )
    add(
        "reliability",
        {**TOP_P, "token_ids": ids(2, 8) + 20, "vocab_size": 20},
        "token_ids must be between 0 and vocab_size - 1 = 19 where the position is valid, got 20",
    )

    # candidates
    of_topk = "reliability_from_topk"
    for shape in ((16,), (2, 2, 8, 16), (2, 8, 0), (2, 8, 257)):
        add(
            of_topk,
            {"student_topk_ids": ids(*shape)},
            f"student_topk_ids must have shape [B, T, k] or [N, k] with 1 <= k <= 256, got {list(shape)}",
        )
    for shape in ((2, 8, 15), (2, 7, 16), (16, 16)):
        add(
            of_topk,
            {"teacher_topk_ids": ids(*shape)},
            f"teacher_topk_ids must have shape [2, 8, 16], got {list(shape)}",
        )
        add(
            of_topk,
            {"teacher_topk_logprobs": zeros(*shape)},
            f"teacher_topk_logprobs must have shape [2, 8, 16], got {list(shape)}",
        )
    for name in ("student_topk_ids", "teacher_topk_ids"):
        add(of_topk, {name: zeros(2, 8, 16)}, f"{name} must have dtype int32 or int64, got float32", TypeError)
        add(
            of_topk,
            {name: ids(2, 8, 16, dtype=torch.int8)},
            f"{name} must have dtype int32 or int64, got int8",
            TypeError,
        )
        add(of_topk, {name: "ids"}, f"{name} must be a tensor, got str", TypeError)
    add(of_topk, {"teacher_topk_ids": ids(2, 8, 16, device="meta")}, "teacher_topk_ids must be on cpu, got meta")
    add(
        of_topk,
        {"teacher_topk_logprobs": zeros(2, 8, 16, device="meta")},
        "teacher_topk_logprobs must be on cpu, got meta",
    )
    add(
        of_topk,
        {"teacher_topk_logprobs": ids(2, 8, 16)},
        f"teacher_topk_logprobs must have dtype {FLOATS_OF_REFERENCE}, got int64",
        TypeError,
    )

    # losses
    for op, name, letter, most in (
        ("topk_policy_loss", "topk_ids", "m", 512),
        ("topk_forward_kl", "teacher_topk_ids", "k", 256),
    ):
        for shape in ((16,), (2, 7, 16), (16, 16), (2, 8, 0), (2, 8, most + 1), ()):
            words = f"{name} must have shape [2, 8, {letter}] with 1 <= {letter} <= {most}, got {list(shape)}"
            add(op, {name: ids(*shape)}, words)
        for dtype in (torch.float32, torch.int16, torch.uint8):
            words = f"{name} must have dtype int32 or int64, got {str(dtype)[6:]}"
            add(op, {name: ids(2, 8, 16, dtype=dtype)}, words, TypeError)
        add(op, {name: ids(2, 8, 16, device="meta")}, f"{name} must be on cpu, got meta")
        add(op, {name: 3}, f"{name} must be a tensor, got int", TypeError)
        for value in (64, 2**40):
            words = f"{name} must be below vocab_size = 64 where the position is valid, got {value}"
            add(op, {name: ids(2, 8, 16) + value}, words)
        words = f"{name} must be below vocab_size = 20 where the position is valid, got 20"
        add(op, {name: ids(2, 8, 16) + 20, "vocab_size": 20}, words)
    few = {"student_logits": zeros(2, 8, 15)}
    words = "teacher_topk_ids must have at most vocab_size = 15 candidates, got 16"
    add("topk_forward_kl", few, words)
    add("topk_forward_kl", {"vocab_size": 15}, words)
    for op, name in (
        ("topk_policy_loss", "advantages"),
        ("topk_policy_loss", "old_logprobs"),
        ("topk_forward_kl", "teacher_topk_logprobs"),
    ):
        for shape in ((2, 8, 15), (2, 8), (16, 16)):
            add(op, {name: zeros(*shape)}, f"{name} must have shape [2, 8, 16], got {list(shape)}")
        words = f"{name} must have dtype {FLOATS_OF_REFERENCE}, got int64"
        add(op, {name: ids(2, 8, 16)}, words, TypeError)
        add(op, {name: zeros(2, 8, 16, device="meta")}, f"{name} must be on cpu, got meta")
        add(op, {name: [0.5]}, f"{name} must be a tensor, got list", TypeError)
    for shape in ((2, 7), (2, 8, 1), (16,)):
        add("reverse_kl", {"weight": zeros(*shape)}, f"weight must have shape [2, 8], got {list(shape)}")
    words = f"weight must have dtype {FLOATS_OF_REFERENCE}, got bool"
    add("reverse_kl", {"weight": zeros(2, 8, dtype=torch.bool)}, words, TypeError)
    add("reverse_kl", {"weight": zeros(2, 8, device="meta")}, "weight must be on cpu, got meta")
    add("reverse_kl", {"weight": 0.5}, "weight must be a tensor, got float", TypeError)
    for value in (-0.1, 1.1, float("nan"), float("inf")):
        add("topk_policy_loss", {"clip_low": value}, f"clip_low must be in [0, 1], got {value}")
    for value in (-0.1, float("nan"), float("inf")):
        add("topk_policy_loss", {"clip_high": value}, f"clip_high must be finite and >= 0, got {value}")
    for value in (1.0, 0.0, -3.0, float("nan"), -float("inf")):
        add("topk_policy_loss", {"clip_dual": value}, f"clip_dual must be > 1, got {value}")
    for value in (float("nan"), float("inf"), -float("inf")):
        add("topk_forward_kl", {"logprob_min": value}, f"logprob_min must be finite, got {value}")

    # drift
    for shape in ((), (2, 8, 1)):
        add(
            "reliability_from_drift",
            {"drift": zeros(*shape, dtype=torch.bool)},
            f"drift must have shape [B, T] or [N], got {list(shape)}",
        )
    add("reliability_from_drift", {"drift": ids(2, 8)}, "drift must have dtype bool, got int64", TypeError)
    add("reliability_from_drift", {"drift": 3}, "drift must be a tensor, got int", TypeError)

    # cu_seqlens
    first = {
        "reliability": ("student_logits are", ", V", "V"),
        of_topk: ("student_topk_ids are", ", k", "k"),
        "reliability_from_drift": ("drift is", "", ""),
    }
    for op, (are, comma_axis, _) in first.items():
        add(op, {}, f"cu_seqlens must be given when {are} [N{comma_axis}], got None", base=PACKED)
        add(op, {"cu_seqlens": i32(0, 4, 8)}, f"cu_seqlens must be None when {are} [B, T{comma_axis}], got shape [3]")
    for values, words in {
        (1, 16): "start at 0, got 1",
        (-1, 16): "start at 0, got -1",
        (0, 15): "end at N = 16, got 15",
        (0, 17): "end at N = 16, got 17",
        (0,): "end at N = 16, got 0",
        (0, 9, 4, 16): "be non-decreasing, got 9 before 4",
        (0, 20, 16): "be non-decreasing, got 20 before 16",
    }.items():
        add(along, {"cu_seqlens": i32(*values)}, f"cu_seqlens must {words}", base=PACKED)
    add(
        along,
        {"cu_seqlens": torch.tensor(0, dtype=torch.int32)},
        "cu_seqlens must have shape [B + 1], got []",
        base=PACKED,
    )
    add(along, {"cu_seqlens": i32()}, "cu_seqlens must have shape [B + 1], got [0]", base=PACKED)
    add(
        along,
        {"cu_seqlens": ids(2, 2, dtype=torch.int32)},
        "cu_seqlens must have shape [B + 1], got [2, 2]",
        base=PACKED,
    )
    add(along, {"cu_seqlens": i32(0, 16).long()}, "cu_seqlens must have dtype int32, got int64", TypeError, base=PACKED)
    add(along, {"cu_seqlens": i32(0, 16).to("meta")}, "cu_seqlens must be on cpu, got meta", base=PACKED)

    # drift_count
    add(along, {"drift_count": i32(0, 0, 0)}, "drift_count must have shape [2], got [3]")
    add(along, {"drift_count": torch.tensor(0, dtype=torch.int32)}, "drift_count must have shape [2], got []")
    add(
        along,
        {"drift_count": i32(0, 0), "cu_seqlens": i32(0, 16)},
        "drift_count must have shape [1], got [2]",
        base=PACKED,
    )
    add(along, {"drift_count": i32(0, 0).long()}, "drift_count must have dtype int32, got int64", TypeError)
    add(along, {"drift_count": i32(0, -1)}, "drift_count must be >= 0, got -1")
    add(along, {"drift_count": i32(0, 0).to("meta")}, "drift_count must be on cpu, got meta")

    # which of two comes first: tensors in the order of the signature, then scalars, then values
    add(
        "reliability",
        {"student_logits": ids(2, 8, 64), "mask": zeros(8), "k": 0},
        f"student_logits must have dtype {FLOATS}, got int64",
        TypeError,
    )
    add("reliability", {"mask": zeros(8), "k": 0, "threshold": 2.0}, "mask must have shape [2, 8], got [8]")
    add(
        "reliability",
        {"k": 0, "threshold": 2.0, "drift_count": i32(0, -1)},
        "k must be between 1 and min(vocab_size, 256) = 64, got 0",
    )
    add("reliability", {"threshold": 2.0, "w_drop": -1.0, "eps": -1.0}, "threshold must be in (0, 1], got 2.0")
    add("reliability", {"w_base": -1.0, "drift_count": i32(0, -1)}, "w_base must be finite and >= 0, got -1.0")
    outside = {"topk_ids": ids(2, 8, 16) + 64}
    add("topk_policy_loss", {**outside, "clip_dual": 1.0}, "clip_dual must be > 1, got 1.0")
    add(
        "topk_policy_loss",
        {"advantages": zeros(2, 8), "mask": zeros(8)},
        "advantages must have shape [2, 8, 16], got [2, 8]",
    )
    return rows


def each_row(but=lambda change, words: False, ops=(*OPERATORS, *LOSSES)):
    rows = [row for row in table() if row[0] in ops and not but(row[2], row[3])]
    ids = [f"{op}-{words}" for op, _, _, words, _ in rows]
    return pytest.mark.parametrize(("op", "base", "change", "words", "error"), rows, ids=ids)


@each_row()
def test_function(op, base, change, words, error):
    with pytest.raises(error) as raised:
        getattr(pruneopd_kernels, op)(**{**base, **change})
    assert str(raised.value) == f"{op}: {words}"


@each_row(but=lambda change, words: "must be a tensor" in words)  # the dispatcher refuses that, in its own words
def test_raw_operator(op, base, change, words, error):
    with pytest.raises(RuntimeError) as raised:
        raw(op)(**{**base, **change})
    assert str(raised.value) == f"{op}: {words}"


@each_row(but=lambda change, words: "impl" in change)
def test_reference(op, base, change, words, error):
    if words.split()[0].endswith("_logits"):
        words = words.replace(FLOATS, FLOATS_OF_REFERENCE)
    with pytest.raises(error) as raised:
        getattr(pruneopd_kernels.reference, op)(**{**base, **change})
    assert str(raised.value) == f"{op}: {words}"


@each_row(but=lambda change, words: "impl" in change or "meta" in words, ops=OPERATORS)  # NumPy has no devices
def test_host(op, base, change, words, error):
    arrays = {name: as_array(x) for name, x in {**base, **change}.items()}
    with pytest.raises(error) as raised:
        getattr(pruneopd_kernels.host, op)(**arrays)
    assert str(raised.value) == f"{op}: {words.replace('must be a tensor', 'must be an array')}"


def is_no_matter_of_memory(change, words):
    """Ranges of scalars, values, what the stable ABI has other names for, and the order of checks."""
    protects = re.search(r"must (have|be given|be None)|(k|vocab_size) must be between", words)
    return not protects or "tensor, got" in words or "complex64" in words or "got []" in words or len(change) > 2


@each_row(but=is_no_matter_of_memory)
def test_compiled_operator_without_the_checks_of_python(op, base, change, words, error):
    """What protects memory is checked there once more, in the same words."""
    with pytest.raises(RuntimeError) as raised:
        getattr(torch.ops.pruneopd_cpp, op)(**{**base, **change})
    assert str(raised.value) == f"{op}: {words}"


def test_values_are_never_addresses():
    """On the compiled operators themselves: ids that do not exist are not accepted, cu_seqlens are clamped."""
    compiled = torch.ops.pruneopd_cpp
    for value in (64, -1, 2**40, -(2**63)):
        result = compiled.reliability(**PADDED["reliability"], token_ids=ids(2, 8) + value, metric="top_p")
        assert result[1].all()
        assert compiled.token_stats(**PADDED["token_stats"], token_ids=ids(2, 8) + value)[-1].isnan().all()
    for values in ((-(2**31), 2**31 - 1), (5, 3, 40), (2**31 - 1, -(2**31), 7), (0, 16, 0, 16)):
        for op, base in PACKED.items():
            result = getattr(compiled, op)(**base, cu_seqlens=i32(*values))
            assert all(x.shape[0] in (16, len(values) - 1) for x in result)


@pytest.mark.parametrize("op", ["reliability", "token_stats"])
def test_float64_logits_are_for_the_reference(op):
    logits = torch.zeros(2, 8, 64, dtype=torch.float64)
    words = f"{op}: student_logits must have dtype {FLOATS}, got float64"
    with pytest.raises(TypeError) as raised:
        getattr(pruneopd_kernels, op)(logits, logits)
    assert str(raised.value) == words
    with pytest.raises(TypeError) as raised:
        getattr(pruneopd_kernels.host, op)(logits.numpy(), logits.numpy())
    assert str(raised.value) == words


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("num_threads", [0, -1])
def test_num_threads(op, num_threads):
    args, kwargs = example(op)
    args, kwargs = [as_array(x) for x in args], {name: as_array(x) for name, x in kwargs.items()}
    with pytest.raises(ValueError, match=rf"^{op}: num_threads must be .*, got {num_threads}$"):
        getattr(pruneopd_kernels.host, op)(*args, **kwargs, num_threads=num_threads)


@pytest.mark.parametrize("name", ["student_logits", "teacher_logits"])
def test_arrays_that_the_host_refuses(name):
    arrays = {"student_logits": np.zeros((2, 8, 64), np.float32), "teacher_logits": np.zeros((2, 8, 64), np.float32)}
    for array, words in (
        (np.zeros((2, 8, 64), np.longdouble), f"must have dtype {FLOATS}, got {np.dtype(np.longdouble)}"),
        (np.zeros((2, 8, 64), ">f4"), f"must have dtype {FLOATS}, got >f4"),
        (np.zeros((2, 8, 64), object), f"must have dtype {FLOATS}, got object"),
    ):
        with pytest.raises(TypeError) as raised:
            pruneopd_kernels.host.token_stats(**{**arrays, name: array})
        assert str(raised.value) == f"token_stats: {name} {words}"


@pytest.mark.parametrize(
    "change", [{"k": "x"}, {"k": 2.5}, {"w_drop": "x"}, {"metric": 3}, {"vocab_size": 40.0}], ids=str
)
def test_scalars_of_another_type(change):
    """In whatever words, it is a TypeError that names operator and argument; metric=3 may pass for a wrong value."""
    (name,) = change
    for function in (pruneopd_kernels.reliability, pruneopd_kernels.reference.reliability):
        with pytest.raises((TypeError, ValueError), match=rf"^reliability: {name} must be "):
            function(**PADDED["reliability"], **change)
    with pytest.raises((TypeError, ValueError), match=rf"^reliability: {name} must be "):
        pruneopd_kernels.host.reliability(**{n: as_array(x) for n, x in PADDED["reliability"].items()}, **change)


def test_positional_after_mask():
    logits = torch.zeros(2, 8, 64)
    with pytest.raises(TypeError, match="positional"):
        pruneopd_kernels.reliability(logits, logits, None, torch.zeros(2, 8).long())
