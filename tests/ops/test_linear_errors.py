"""Bad input to the functions from hidden states: the words, before any product is made.

Of rules that the operators share, and of a model's four tensors, one row shows that they are asked. Kinds of scalars
are in test_kinds.py.
"""

import inspect

import pytest
import torch

from bad_input import FLOATS, LOGITS, i32, ids, zeros
from hidden_states import LOSSES, OF_SERVERS
from pruneopd_kernels import InvalidType, linear

OPS = {name: getattr(linear, name) for name in linear.__all__ if name.startswith("linear_")}
HEADS = {"student_weight": zeros(64, 6), "teacher_weight": zeros(64, 5)}
PADDED = {"student_hidden": zeros(2, 8, 6), "teacher_hidden": zeros(2, 8, 5), **HEADS}
PACKED = {"student_hidden": zeros(16, 6), "teacher_hidden": zeros(16, 5), "cu_seqlens": i32(0, 16), **HEADS}
SERVER = {
    "student_hidden": zeros(2, 8, 6), "student_weight": zeros(64, 6), "loss": OF_SERVERS,
    "teacher_topk_ids": torch.arange(16).expand(2, 8, 16), "teacher_topk_logprobs": zeros(2, 8, 16),
}  # fmt: skip
SELECTED = {"hidden": zeros(2, 8, 6), "weight": zeros(64, 6), "token_ids": ids(2, 8, 3)}
SUM = {"reduction": "sum"}


def good(op):
    """The arguments of a good call."""
    return SELECTED if op == "linear_selected_logprobs" else PADDED


# A change to a good call and the words after `<function>: `, for each function that has all of these arguments.
ROWS = [(PADDED, *row) for row in [
    # tensors
    ({"student_hidden": [[0.0]]}, "student_hidden must be a tensor, got list"),
    ({"student_hidden": zeros(6)}, "student_hidden must have shape [B, T, H] or [N, H], got [6]"),
    ({"student_weight": zeros(64, 5)}, "student_weight must have shape [V, 6], got [64, 5]"),
    ({"student_bias": zeros(63)}, "student_bias must have shape [64], got [63]"),
    ({"teacher_hidden": zeros(2, 7, 5)}, "teacher_hidden must have shape [2, 8, H], got [2, 7, 5]"),
    ({"teacher_weight": zeros(6)}, "teacher_weight must have shape [V, 5], got [6]"),
    ({"teacher_bias": zeros(64, 1)}, "teacher_bias must have shape [64], got [64, 1]"),
    ({"student_hidden": ids(2, 8, 6)}, f"student_hidden must have dtype {LOGITS}, got int64"),
    ({"teacher_hidden": zeros(2, 8, 5).double()}, f"teacher_hidden must have dtype {LOGITS}, got float64"),
    ({"student_weight": zeros(64, 6).bfloat16()},
     "student_weight must have dtype float32, as student_hidden has without autocast, got bfloat16"),
    ({"teacher_bias": zeros(64).half()},
     "teacher_bias must have dtype float32, as teacher_hidden has without autocast, got float16"),
    ({"teacher_weight": zeros(64, 5, device="meta")}, "teacher_weight must be on cpu, got meta"),
    ({"mask": zeros(2, 7)}, "mask must have shape [2, 8], got [2, 7]"),
    ({"token_ids": ids(2, 7)}, "token_ids must have shape [2, 8], got [2, 7]"),
    ({"cu_seqlens": i32(0, 16)}, "cu_seqlens must be None when student_hidden is [B, T, H], got shape [2]"),
    # scalars and values
    ({"teacher_softcap": 0.0}, "teacher_softcap must be finite and > 0, got 0.0"),
    ({"chunk_size": 0}, "chunk_size must be >= 1, got 0"),
    ({"k": 65}, "k must be between 1 and min(vocab_size, 256) = 64, got 65"),
    ({"threshold": 0.0}, "threshold must be in (0, 1], got 0.0"),
    ({"metric": "top_p"}, "token_ids must be given when metric is 'top_p', got None"),
    ({"vocab_size": 65}, "vocab_size must be between 1 and min(student, teacher) width = 64, got 65"),
    ({"teacher_weight": zeros(72, 5)},
     "vocab_size must be given when the first axes of student_weight and teacher_weight differ, got 64 and 72"),
    ({"impl": "x"}, "impl must be one of 'auto', 'reference', 'cpp', 'cuda', 'triton', got 'x'"),
    ({"metric": "top_p", "token_ids": ids(2, 8) - 1},
     "token_ids must be between 0 and vocab_size - 1 = 63 where the position is valid, got -1"),
    # a loss
    ({"weight": zeros(2, 7), "loss": OF_SERVERS}, "weight must have shape [2, 8], got [2, 7]"),
    ({"tail": "x"}, "tail must be one of 'bucket', 'generalised', 'none', got 'x'"),
    ({"loss": "x"}, f"loss must be one of {', '.join(map(repr, LOSSES))}, got 'x'"),
    ({"reduction": "mean"}, "reduction must be one of 'none', 'sum', got 'mean'"),
    ({"scale": zeros(2, 8)}, "scale must be None when reduction is 'none', got shape [2, 8]"),
    ({"scale": zeros(8), **SUM}, "scale must have shape [] or [2, 8], got [8]"),
    ({"scale": ids(2, 8), **SUM}, f"scale must have dtype {FLOATS}, got int64"),
    ({"skip_exhausted": True}, "w_base must be 0 when skip_exhausted is True, got 0.5"),
    ({"teacher_hidden": None, "loss": "reverse_kl"},
     "teacher_hidden must be given when teacher_topk_ids are not, got None"),
    ({"teacher_weight": None, "loss": "reverse_kl"},
     "teacher_weight must be given when teacher_topk_ids are not, got None"),
]] + [(PACKED, *row) for row in [
    ({"teacher_hidden": zeros(15, 5)}, "teacher_hidden must have shape [16, H], got [15, 5]"),
    ({"cu_seqlens": i32(0, 15)}, "cu_seqlens must end at N = 16, got 15"),
]] + [(SELECTED, *row) for row in [
    ({"bias": zeros(63)}, "bias must have shape [64], got [63]"),
    ({"token_ids": ids(2, 8, 513)}, "token_ids must have shape [2, 8, m] with 1 <= m <= 512, got [2, 8, 513]"),
    ({"weight": zeros(64, 6).half()}, "weight must have dtype float32, as hidden has without autocast, got float16"),
    ({"softcap": 0.0}, "softcap must be finite and > 0, got 0.0"),
    ({"temperature": 0.0}, "temperature must be finite and > 0, got 0.0"),
    ({"vocab_size": 65}, "vocab_size must be between 1 and the logits' width = 64, got 65"),
    ({"token_ids": ids(2, 8, 1) + 64}, "token_ids must be below vocab_size = 64 where the position is valid, got 64"),
]] + [(SERVER, *row) for row in [
    ({"teacher_topk_ids": None}, "teacher_topk_ids must be given when teacher_topk_logprobs are, got None"),
    ({"teacher_topk_logprobs": None}, "teacher_topk_logprobs must be given when teacher_topk_ids are, got None"),
    ({"teacher_hidden": zeros(2, 8, 5)}, "teacher_hidden must be None when teacher_topk_ids are given, got a tensor"),
    ({"teacher_weight": zeros(64, 5)}, "teacher_weight must be None when teacher_topk_ids are given, got a tensor"),
    ({"teacher_bias": zeros(64)}, "teacher_bias must be None when teacher_topk_ids are given, got a tensor"),
    ({"k": 10}, "teacher_topk_ids must have shape [2, 8, 10], got [2, 8, 16]"),
    ({"teacher_topk_logprobs": zeros(2, 8, 15)}, "teacher_topk_logprobs must have shape [2, 8, 16], got [2, 8, 15]"),
    ({"teacher_temperature": 2.0}, "teacher_temperature must be 1 when teacher_topk_ids are given, got 2.0"),
    ({"loss": "reverse_kl"}, f"loss must be {OF_SERVERS!r} when teacher_topk_ids are given, got 'reverse_kl'"),
    ({"vocab_size": 65}, "vocab_size must be between 1 and the logits' width = 64, got 65"),
    ({"teacher_topk_ids": ids(2, 8, 16)}, "teacher_topk_ids must hold no id twice in a position, got 0"),
    ({"teacher_topk_ids": torch.arange(64, 80).expand(2, 8, 16)},
     "teacher_topk_ids must be below vocab_size = 64 where the position is valid, got 64"),
]]  # fmt: skip


def table():
    for base, change, words in ROWS:
        for op, function in OPS.items():
            parameters = inspect.signature(function).parameters
            if (set(base) - {"cu_seqlens"}) | set(change) <= set(parameters):
                yield op, {name: x for name, x in (base | change).items() if name in parameters}, words


@pytest.mark.parametrize(("op", "arguments", "words"), list(table()))
def test_words(op, arguments, words, monkeypatch):
    def product(*args, **kwargs):
        raise AssertionError("a product was made before the arguments were checked")

    monkeypatch.setattr(torch, "mm", product)
    error = TypeError if " have dtype" in words or "be a tensor" in words else ValueError
    with pytest.raises(error) as raised:
        OPS[op](**arguments)
    assert str(raised.value) == f"{op}: {words}"


@pytest.mark.parametrize("op", OPS)
def test_implementations_and_dtypes(op):
    """An implementation that is not usable here; float64, which is for the reference; and dtypes under autocast."""
    given = good(op)
    with pytest.raises(RuntimeError, match=f"^{op}: impl='cuda' is not usable here: "):
        OPS[op](**given, impl="cuda")
    double = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    assert torch.float64 in {x.dtype for x in OPS[op](**double, impl="reference")}
    hidden, weight = next(iter(given)), [name for name in given if name.endswith("weight")][-1]
    mixed = given | {hidden: given[hidden].bfloat16(), weight: given[weight].half()}
    with torch.autocast("cpu", torch.bfloat16):
        OPS[op](**mixed, impl="reference")
        with pytest.raises(InvalidType) as raised:
            OPS[op](**mixed | {weight: given[weight].double()}, impl="reference")
    assert str(raised.value) == f"{op}: {weight} must have dtype {LOGITS}, got float64"
