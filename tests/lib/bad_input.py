"""Rows of the table of errors that operators share: a change to a good call, the words after `<op>: `, the type.

The good call (`BASE` of tests/ops/<op>.py) has shape [2, 8] or [16], width 64 and 16 candidates.
"""

import torch

LOGITS = "float32, bfloat16 or float16"
FLOATS = "float32, bfloat16, float16 or float64"
NAN, INF = float("nan"), float("inf")


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def ids(*shape, dtype=torch.int64, device="cpu"):
    return zeros(*shape, dtype=dtype, device=device)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def logits(*names, shape="[..., V]", too_few=((),)):
    """Of the first logits and, where there is one, of the teacher's, which may have another width."""
    for bad in too_few:
        yield {names[0]: zeros(*bad)}, f"{names[0]} must have shape {shape}, got {list(bad)}"
    for name in names:
        yield {name: ids(2, 8, 64)}, f"{name} must have dtype {LOGITS}, got int64", TypeError
        yield {name: zeros(2, 8, 1).expand(2, 8, 64)}, f"{name} must have stride 1 on its last axis, got 0"
        yield {name: [[0.0]]}, f"{name} must be a tensor, got list", TypeError
    width = "min(student, teacher) width" if len(names) == 2 else "the logits' width"
    for value in (65, 0):
        yield {"vocab_size": value}, f"vocab_size must be between 1 and {width} = 64, got {value}"
    yield from temperature(names[0].replace("logits", "temperature"))
    if len(names) == 2:
        for bad in ((2, 7, 64), (16, 64), ()):
            yield {"teacher_logits": zeros(*bad)}, f"teacher_logits must have shape [2, 8, V], got {list(bad)}"
        yield {"teacher_logits": zeros(2, 8, 64, device="meta")}, "teacher_logits must be on cpu, got meta"
        words = "vocab_size must be given when the last axes of student_logits and teacher_logits differ, got 64 and 72"
        yield {"teacher_logits": zeros(2, 8, 72)}, words
        words = "vocab_size must be between 1 and min(student, teacher) width = 64, got 65"
        yield {"vocab_size": 65, "teacher_logits": zeros(2, 8, 72)}, words
        yield from temperature("teacher_temperature")


def temperature(name):
    for value in (0.0, NAN, INF):  # beyond either end of the range, and no number
        yield {name: value}, f"{name} must be finite and > 0, got {value}"


def number_of_candidates():
    for value in (0, 65):
        yield {"k": value}, f"k must be between 1 and min(vocab_size, 256) = 64, got {value}"
    yield {"k": 11, "vocab_size": 10}, "k must be between 1 and min(vocab_size, 256) = 10, got 11"
    wide = {"student_logits": zeros(2, 8, 300), "teacher_logits": zeros(2, 8, 300)}
    yield {**wide, "k": 257}, "k must be between 1 and min(vocab_size, 256) = 256, got 257"


def mask():
    yield {"mask": zeros(2, 8, 1)}, "mask must have shape [2, 8], got [2, 8, 1]"
    complex64 = zeros(2, 8, dtype=torch.complex64)
    yield {"mask": complex64}, "mask must have dtype bool, integer or float, got complex64", TypeError
    yield {"mask": zeros(2, 8, device="meta")}, "mask must be on cpu, got meta"
    yield {"mask": [True]}, "mask must be a tensor, got list", TypeError


def floats(name, shape, *bad_shapes, dtype=torch.int64):
    """Of a tensor of floats that has this shape."""
    for bad in bad_shapes:
        yield {name: zeros(*bad)}, f"{name} must have shape {list(shape)}, got {list(bad)}"
    words = f"{name} must have dtype {FLOATS}, got {str(dtype)[6:]}"
    yield {name: zeros(*shape, dtype=dtype)}, words, TypeError
    yield {name: zeros(*shape, device="meta")}, f"{name} must be on cpu, got meta"
    yield {name: [0.5]}, f"{name} must be a tensor, got list", TypeError


def token_ids():
    yield {"token_ids": ids(8)}, "token_ids must have shape [2, 8], got [8]"
    yield from dtypes_of_ids("token_ids", (2, 8))


def dtypes_of_ids(name, shape):
    words = f"{name} must have dtype int32 or int64, got int16"
    yield {name: ids(*shape, dtype=torch.int16)}, words, TypeError
    yield {name: ids(*shape, device="meta")}, f"{name} must be on cpu, got meta"
    yield {name: 3}, f"{name} must be a tensor, got int", TypeError


def ids_of_a_loss(name, letter, most):
    """Candidates, [2, 8, m]."""
    for shape in ((2, 7, 16), (2, 8, 0), (2, 8, most + 1), ()):
        words = f"{name} must have shape [2, 8, {letter}] with 1 <= {letter} <= {most}, got {list(shape)}"
        yield {name: ids(*shape)}, words
    yield from dtypes_of_ids(name, (2, 8, 16))
    for change, size, value in (({}, 64, 64), ({}, 64, 2**40), ({"vocab_size": 20}, 20, 20)):
        words = f"{name} must be below vocab_size = {size} where the position is valid, got {value}"
        yield {name: ids(2, 8, 16) + value, **change}, words


def twice(name, logprobs):
    """Candidates from outside, [2, 8, 16], of which one comes twice; -0.0 is no log-probability of an empty slot."""
    given = torch.arange(16).expand(2, 8, 16).clone()
    given[1, 3, 2], given[1, 4, 7:9] = 9, -1  # padding may repeat
    words = f"{name} must hold no id twice in a position, got 9"
    yield {name: given}, words
    yield {name: given.int(), logprobs: zeros(2, 8, 16), "mask": torch.arange(16).view(2, 8) != 3}, words


def metric():
    """And the thresholds that decide about drift."""
    for name in ("threshold", "top_p"):
        for value in (0.0, 1.5, NAN):
            yield {name: value}, f"{name} must be in (0, 1], got {value}"
    yield {"metric": "Overlap"}, "metric must be one of 'overlap', 'top_p', got 'Overlap'"


def responses(packed, tensor, are, axes):
    """Weights of drift and the two tensors [B]; `packed` is what makes the call a packed one: `tensor` [N, ...]."""
    for name in ("w_drop", "w_base", "eps"):
        for value in (-1.0, NAN, INF):
            yield {name: value}, f"{name} must be finite and >= 0, got {value}"
    yield packed, f"cu_seqlens must be given when {tensor} {are} [N{axes}], got None"
    yield {"cu_seqlens": i32(0, 4, 8)}, f"cu_seqlens must be None when {tensor} {are} [B, T{axes}], got shape [3]"
    for values, words in {
        (1, 16): "start at 0, got 1",
        (0, 17): "end at N = 16, got 17",
        (0,): "end at N = 16, got 0",
        (0, 20, 16): "be non-decreasing, got 20 before 16",
        (): "have shape [B + 1], got [0]",
        ((0, 16),): "have shape [B + 1], got [1, 2]",
    }.items():
        yield {**packed, "cu_seqlens": i32(*values)}, f"cu_seqlens must {words}"
    starts = i32(0, 16)
    dtype = "cu_seqlens must have dtype int32 or int64, got int16"
    yield {**packed, "cu_seqlens": starts.short()}, dtype, TypeError
    yield {**packed, "cu_seqlens": starts.to("meta")}, "cu_seqlens must be on cpu, got meta"
    yield {**packed, "cu_seqlens": starts, "mask": zeros(15)}, "mask must have shape [16], got [15]"
    yield {**packed, "cu_seqlens": starts, "drift_count": i32(0, 0)}, "drift_count must have shape [1], got [2]"
    yield {"drift_count": i32(0, 0, 0)}, "drift_count must have shape [2], got [3]"
    yield {"drift_count": i32(0, 0).long()}, "drift_count must have dtype int32, got int64", TypeError
    yield {"drift_count": i32(0, -1)}, "drift_count must be >= 0, got -1"
    yield {"drift_count": i32(0, 0).to("meta")}, "drift_count must be on cpu, got meta"


def impl():
    yield {"impl": "x"}, "impl must be one of 'auto', 'reference', 'cpp', 'cuda', 'triton', got 'x'"
