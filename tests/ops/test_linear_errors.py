"""Bad input to the functions from hidden states: the words, before any product is made.

Of rules that the operators share, one row shows that they are asked.
"""

import inspect

import pytest
import torch

from hidden_states import LOSSES, OF_SERVERS
from pruneopd_kernels import InvalidType, InvalidValue, linear

OPS = {name: getattr(linear, name) for name in linear.__all__ if name.startswith("linear_")}
FLOATS = "float32, bfloat16 or float16"


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def ids(*shape, dtype=torch.int64):
    return zeros(*shape, dtype=dtype)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


HEADS = {"student_weight": zeros(64, 6), "teacher_weight": zeros(64, 5)}
PADDED = {"student_hidden": zeros(2, 8, 6), "teacher_hidden": zeros(2, 8, 5), **HEADS}
PACKED = {"student_hidden": zeros(16, 6), "teacher_hidden": zeros(16, 5), "cu_seqlens": i32(0, 16), **HEADS}
SERVER = {
    "student_hidden": zeros(2, 8, 6), "student_weight": zeros(64, 6), "loss": OF_SERVERS,
    "teacher_topk_ids": torch.arange(16).expand(2, 8, 16), "teacher_topk_logprobs": zeros(2, 8, 16),
}  # fmt: skip
SELECTED = {"hidden": zeros(2, 8, 6), "weight": zeros(64, 6), "token_ids": ids(2, 8, 3)}


def good(op):
    """The arguments of a good call."""
    return SELECTED if op == "linear_selected_logprobs" else PADDED


def table():
    """Function, arguments, words (after `<function>: `), type. A row is for each function that has its arguments."""
    rows = []

    def add(change, words, error=InvalidValue, base=PADDED, ops=tuple(OPS)):
        for op in ops:
            parameters = inspect.signature(OPS[op]).parameters
            if (set(base) - {"cu_seqlens"}) | set(change) <= set(parameters):
                rows.append((op, {name: x for name, x in (base | change).items() if name in parameters}, words, error))

    # shapes
    add({"student_hidden": zeros(6)}, "student_hidden must have shape [B, T, H] or [N, H], got [6]")
    add({"student_weight": zeros(64, 5)}, "student_weight must have shape [V, 6], got [64, 5]")
    add({"student_weight": zeros(6)}, "student_weight must have shape [V, 6], got [6]")
    add({"student_bias": zeros(63)}, "student_bias must have shape [64], got [63]")
    add({"teacher_hidden": zeros(2, 7, 5)}, "teacher_hidden must have shape [2, 8, H], got [2, 7, 5]")
    add({"teacher_hidden": zeros(16, 5)}, "teacher_hidden must have shape [2, 8, H], got [16, 5]")
    add({"teacher_hidden": zeros(15, 5)}, "teacher_hidden must have shape [16, H], got [15, 5]", base=PACKED)
    add({"teacher_weight": zeros(64, 6)}, "teacher_weight must have shape [V, 5], got [64, 6]")
    add({"teacher_bias": zeros(64, 1)}, "teacher_bias must have shape [64], got [64, 1]")
    add({"mask": zeros(2, 7)}, "mask must have shape [2, 8], got [2, 7]")
    add({"token_ids": ids(2, 7)}, "token_ids must have shape [2, 8], got [2, 7]")
    words = "cu_seqlens must be None when student_hidden is [B, T, H], got shape [2]"
    add({"cu_seqlens": i32(0, 16)}, words)

    add({"hidden": zeros(6)}, "hidden must have shape [B, T, H] or [N, H], got [6]", base=SELECTED)
    add({"weight": zeros(64, 5)}, "weight must have shape [V, 6], got [64, 5]", base=SELECTED)
    add({"bias": zeros(63)}, "bias must have shape [64], got [63]", base=SELECTED)
    add({"mask": zeros(2, 7)}, "mask must have shape [2, 8], got [2, 7]", base=SELECTED)
    words = "token_ids must have shape [2, 8, m] with 1 <= m <= 512, got "
    add({"token_ids": ids(2, 8)}, f"{words}[2, 8]", base=SELECTED)
    add({"token_ids": ids(2, 8, 513)}, f"{words}[2, 8, 513]", base=SELECTED)

    # dtypes and devices
    for name in ("student_hidden", "teacher_hidden"):
        x = PADDED[name]
        add({name: x.to(torch.int64)}, f"{name} must have dtype {FLOATS}, got int64", InvalidType)
        add({name: x.double()}, f"{name} must have dtype {FLOATS}, got float64", InvalidType)
    for side in ("student", "teacher"):
        name = f"{side}_weight"
        words = f"{name} must have dtype float32, as {side}_hidden has without autocast, got bfloat16"
        add({name: PADDED[name].bfloat16()}, words, InvalidType)
        words = f"{side}_bias must have dtype float32, as {side}_hidden has without autocast, got float16"
        add({f"{side}_bias": zeros(64, dtype=torch.float16)}, words, InvalidType)
        add({name: PADDED[name].to("meta")}, f"{name} must be on cpu, got meta")
    add({"student_hidden": [[0.0]]}, "student_hidden must be a tensor, got list", InvalidType)

    words = "weight must have dtype float32, as hidden has without autocast, got float16"
    add({"weight": SELECTED["weight"].half()}, words, InvalidType, base=SELECTED)
    add(
        {"token_ids": zeros(2, 8, 1)},
        "token_ids must have dtype int32 or int64, got float32",
        InvalidType,
        base=SELECTED,
    )

    # scalars
    for name, base in (("student_softcap", PADDED), ("teacher_softcap", PADDED), ("softcap", SELECTED)):
        add({name: 0.0}, f"{name} must be finite and > 0, got 0.0", base=base)
        add({name: "30"}, f"{name} must be a float, got str", InvalidType, base=base)
    add({"temperature": 0.0}, "temperature must be finite and > 0, got 0.0", base=SELECTED)
    add({"vocab_size": 65}, "vocab_size must be between 1 and the logits' width = 64, got 65", base=SELECTED)
    add({"chunk_size": 0}, "chunk_size must be >= 1, got 0")
    add({"chunk_size": 2.5}, "chunk_size must be an int, got float", InvalidType)
    add({"k": 65}, "k must be between 1 and min(vocab_size, 256) = 64, got 65")
    add({"threshold": 0.0}, "threshold must be in (0, 1], got 0.0")
    add({"metric": "top_p"}, "token_ids must be given when metric is 'top_p', got None")
    add({"vocab_size": 65}, "vocab_size must be between 1 and min(student, teacher) width = 64, got 65")
    words = "vocab_size must be given when the first axes of student_weight and teacher_weight differ, got 64 and 72"
    add({"teacher_weight": zeros(72, 5)}, words)
    add({"impl": "x"}, "impl must be one of 'auto', 'reference', 'cpp', 'cuda', 'triton', got 'x'")

    # values
    words = "token_ids must be between 0 and vocab_size - 1 = 63 where the position is valid, got -1"
    add({"metric": "top_p", "token_ids": ids(2, 8) - 1}, words)
    add({"cu_seqlens": i32(0, 15)}, "cu_seqlens must end at N = 16, got 15", base=PACKED)

    words = "token_ids must be below vocab_size = 64 where the position is valid, got 64"
    add({"token_ids": ids(2, 8, 1) + 64}, words, base=SELECTED)

    # a loss
    add({"weight": zeros(2, 7), "loss": OF_SERVERS}, "weight must have shape [2, 8], got [2, 7]")
    add({"tail": "x"}, "tail must be one of 'bucket', 'generalised', 'none', got 'x'")
    losses = ", ".join(map(repr, LOSSES))
    add({"loss": "x"}, f"loss must be one of {losses}, got 'x'")
    add({"reduction": "mean"}, "reduction must be one of 'none', 'sum', got 'mean'")
    add({"scale": zeros(2, 8)}, "scale must be None when reduction is 'none', got shape [2, 8]")
    add({"scale": 0.5, "reduction": "sum"}, "scale must be a tensor, got float", InvalidType)
    add({"scale": zeros(8), "reduction": "sum"}, "scale must have shape [] or [2, 8], got [8]")
    words = f"scale must have dtype {FLOATS.replace(' or float16', ', float16 or float64')}, got int64"
    add({"scale": ids(2, 8), "reduction": "sum"}, words, InvalidType)
    add({"skip_exhausted": True}, "w_base must be 0 when skip_exhausted is True, got 0.5")
    add({"skip_exhausted": "yes"}, "skip_exhausted must be a bool, got str", InvalidType)
    for name in ("teacher_hidden", "teacher_weight"):
        words = f"{name} must be given when teacher_topk_ids are not, got None"
        add({name: None}, words, ops=("linear_opd_loss",))
        words = f"{name} must be a tensor, got NoneType"
        add({name: None}, words, InvalidType, ops=("linear_reliability", "linear_token_stats"))

    # a teacher's server
    for one, other in (("ids", "logprobs"), ("logprobs", "ids")):
        words = f"teacher_topk_{one} must be given when teacher_topk_{other} are, got None"
        add({f"teacher_topk_{one}": None}, words, base=SERVER)
    for name, shape in (("hidden", (2, 8, 5)), ("weight", (64, 5)), ("bias", (64,))):
        words = f"teacher_{name} must be None when teacher_topk_ids are given, got a tensor"
        add({f"teacher_{name}": zeros(*shape)}, words, base=SERVER)
    add({"k": 10}, "teacher_topk_ids must have shape [2, 8, 10], got [2, 8, 16]", base=SERVER)
    words = "teacher_topk_logprobs must have shape [2, 8, 16], got [2, 8, 15]"
    add({"teacher_topk_logprobs": zeros(2, 8, 15)}, words, base=SERVER)
    words = "teacher_topk_ids must have dtype int32 or int64, got float32"
    add({"teacher_topk_ids": zeros(2, 8, 16)}, words, InvalidType, base=SERVER)
    add({"teacher_temperature": 2.0}, "teacher_temperature must be 1 when teacher_topk_ids are given, got 2.0",
             base=SERVER)  # fmt: skip
    words = f"loss must be {OF_SERVERS!r} when teacher_topk_ids are given, got 'reverse_kl'"
    add({"loss": "reverse_kl"}, words, base=SERVER)
    add({"vocab_size": 65}, "vocab_size must be between 1 and the logits' width = 64, got 65", base=SERVER)
    words = "teacher_topk_ids must hold no id twice in a position, got 0"
    add({"teacher_topk_ids": ids(2, 8, 16)}, words, base=SERVER)
    words = "teacher_topk_ids must be below vocab_size = 64 where the position is valid, got 64"
    add({"teacher_topk_ids": ids(2, 8, 16) + 64}, words, base=SERVER)
    return rows


@pytest.mark.parametrize(("op", "arguments", "words", "error"), table())
def test_words(op, arguments, words, error, monkeypatch):
    def product(*args, **kwargs):
        raise AssertionError("a product was made before the arguments were checked")

    monkeypatch.setattr(torch, "mm", product)
    with pytest.raises((TypeError, ValueError)) as raised:
        OPS[op](**arguments)
    assert str(raised.value) == f"{op}: {words}"
    assert type(raised.value) is error


def test_an_implementation_that_is_not_usable_here():
    for op, function in OPS.items():
        with pytest.raises(RuntimeError, match=f"^{op}: impl='cuda' is not usable here: "):
            function(**good(op), impl="cuda")


@pytest.mark.parametrize("op", OPS)
def test_float64_is_for_the_reference(op):
    double = {name: x.double() if x.is_floating_point() else x for name, x in good(op).items()}
    result = OPS[op](**double, impl="reference")
    assert torch.float64 in {x.dtype for x in result}


@pytest.mark.parametrize("op", OPS)
def test_dtypes_under_autocast(op):
    given = good(op)
    hidden, weight = next(iter(given)), next(name for name in given if name.endswith("weight"))
    mixed = given | {hidden: given[hidden].bfloat16()}
    if "teacher_weight" in given:
        mixed["teacher_weight"] = given["teacher_weight"].half()
    with torch.autocast("cpu", torch.bfloat16):
        OPS[op](**mixed, impl="reference")
        with pytest.raises(InvalidType) as raised:
            OPS[op](**mixed | {weight: given[weight].double()}, impl="reference")
    assert str(raised.value) == f"{op}: {weight} must have dtype {FLOATS}, got float64"
