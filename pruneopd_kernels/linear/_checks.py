"""Whether the arguments are what the operators from hidden states take, in the words of `pruneopd_kernels.checks`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import checks
from ..formulas import has_values
from ..ops import OPERATORS
from ..ops import _implementations as implementations
from ._products import autocast_dtype

Loss = Literal["topk_policy", "reverse_kl", "topk_forward_kl"]
Reduction = Literal["none", "sum"]

_KINDS = OPERATORS["reliability"].kinds | {"impl": "str"} | {
    "student_hidden": "Tensor", "student_weight": "Tensor", "student_bias": "Tensor?",
    "teacher_hidden": "Tensor", "teacher_weight": "Tensor", "teacher_bias": "Tensor?",
    "teacher_topk_ids": "Tensor?", "teacher_topk_logprobs": "Tensor?",
    "chunk_size": "int?", "loss": "str", "reduction": "str", "scale": "Tensor?", "skip_exhausted": "bool",
}  # fmt: skip


def check(op: str, arguments: dict[str, Any]) -> None:
    """For both operators; of `linear_reliability` what belongs to a loss is missing."""
    kinds = _KINDS
    if "teacher_topk_ids" in arguments:
        kinds = kinds | {"teacher_hidden": "Tensor?", "teacher_weight": "Tensor?"}
    for name, value in arguments.items():
        checks.kind(op, name, value, kinds[name], Tensor, "a tensor")
    hidden = arguments["student_hidden"]
    impl = implementations.choose(op, arguments["impl"], hidden.device)
    implementations.require_usable(op, impl, hidden.device)
    if hidden.ndim not in (2, 3):
        checks.bad_value(op, "student_hidden", "have shape [B, T, H] or [N, H]", list(hidden.shape))
    dtypes = checks.FLOATS if impl == "reference" else checks.LOGITS
    _side(op, "student", arguments, hidden, dtypes)
    from_server = arguments.get("teacher_topk_ids") is not None or arguments.get("teacher_topk_logprobs") is not None
    (_candidates if from_server else _teacher)(op, arguments, hidden, dtypes)
    shape = hidden.shape[:-1]
    checks.mask_of_positions(op, arguments["mask"], hidden, shape)
    checks.ids_of_positions(op, arguments["token_ids"], hidden, shape)
    layout = "student_hidden is {}, H]"
    checks.responses(op, arguments["cu_seqlens"], arguments["drift_count"], hidden, shape, layout)
    vocab_size = _scalars(op, arguments)
    if "loss" in arguments:
        _loss(op, arguments, hidden, from_server)
    if has_values(hidden):
        _values(op, arguments, shape, vocab_size)


def _teacher(op: str, arguments: dict[str, Any], hidden: Tensor, dtypes: Sequence[str]) -> None:
    for name in ("teacher_hidden", "teacher_weight"):
        if arguments[name] is None:
            checks.bad_value(op, name, "be given when teacher_topk_ids are not", None)
    _side(op, "teacher", arguments, hidden, dtypes)


def _candidates(op: str, arguments: dict[str, Any], hidden: Tensor, dtypes: Sequence[str]) -> None:
    ids, logprobs = arguments["teacher_topk_ids"], arguments["teacher_topk_logprobs"]
    for name, value, other in (("ids", ids, "logprobs"), ("logprobs", logprobs, "ids")):
        if value is None:
            checks.bad_value(op, f"teacher_topk_{name}", f"be given when teacher_topk_{other} are", None)
    for name in ("teacher_hidden", "teacher_weight", "teacher_bias"):
        if arguments[name] is not None:
            checks.bad_value(op, name, "be None when teacher_topk_ids are given", "a tensor")
    shape = (*hidden.shape[:-1], arguments["k"])
    for name, allowed in (("teacher_topk_ids", checks.IDS), ("teacher_topk_logprobs", checks.FLOATS)):
        checks.has_shape(op, name, arguments[name], shape)
        checks.has_dtype(op, name, arguments[name], allowed)
        checks.same_device(op, name, arguments[name], hidden)
    if arguments["teacher_temperature"] != 1:
        rule = "be 1 when teacher_topk_ids are given"
        checks.bad_value(op, "teacher_temperature", rule, arguments["teacher_temperature"])


def _side(op: str, side: str, arguments: dict[str, Any], student_hidden: Tensor, dtypes: Sequence[str]) -> None:
    """One model: its hidden states, weight and bias."""
    hidden, weight, bias = (arguments[f"{side}_{name}"] for name in ("hidden", "weight", "bias"))
    leading = list(student_hidden.shape[:-1])
    if hidden.ndim != student_hidden.ndim or list(hidden.shape[:-1]) != leading:
        words = ", ".join(str(size) for size in [*leading, "H"])
        checks.bad_value(op, f"{side}_hidden", f"have shape [{words}]", list(hidden.shape))
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        checks.bad_value(op, f"{side}_weight", f"have shape [V, {hidden.shape[-1]}]", list(weight.shape))
    if bias is not None:
        checks.has_shape(op, f"{side}_bias", bias, weight.shape[:1])
    dtype = str(hidden.dtype).removeprefix("torch.")
    free = autocast_dtype(hidden.device) is not None and dtype != "float64"
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            same = name == "hidden" or free
            allowed = checks.LOGITS if free else dtypes if name == "hidden" else (dtype,)
            words = "" if same else f"{dtype}, as {side}_hidden has without autocast"
            checks.has_dtype(op, f"{side}_{name}", tensor, allowed, words)
            checks.same_device(op, f"{side}_{name}", tensor, student_hidden)


def _scalars(op: str, arguments: dict[str, Any]) -> int:
    """The scalars of `reliability`; returns how many ids exist."""
    vocab_size: int | None = arguments["vocab_size"]
    weights = [arguments[name] for name in ("student_weight", "teacher_weight") if arguments[name] is not None]
    widths = [weight.shape[0] for weight in weights]
    if vocab_size is None:
        if widths[0] != widths[-1]:
            rule = "be given when the first axes of student_weight and teacher_weight differ"
            checks.bad_value(op, "vocab_size", rule, f"{widths[0]} and {widths[-1]}")
        vocab_size = widths[0]
    if not 1 <= vocab_size <= min(widths):
        which = "min(student, teacher)" if len(widths) == 2 else "the student's"
        checks.bad_value(op, "vocab_size", f"be between 1 and {which} width = {min(widths)}", vocab_size)
    if arguments["chunk_size"] is not None and arguments["chunk_size"] < 1:
        checks.bad_value(op, "chunk_size", "be >= 1", arguments["chunk_size"])
    checks.number_of_candidates(op, arguments["k"], vocab_size)
    record = OPERATORS["reliability"].record(**{"student_logits": None, "teacher_logits": None, **{
        name: arguments[name] for name in OPERATORS["reliability"].kinds if not name.endswith("_logits")}})  # fmt: skip
    checks.scalars(op, record)
    checks.needed_by_top_p(op, record, "token_ids")
    return vocab_size


def _loss(op: str, arguments: dict[str, Any], hidden: Tensor, from_server: bool) -> None:
    loss, reduction, scale = arguments["loss"], arguments["reduction"], arguments["scale"]
    checks.one_of(op, "loss", loss, get_args(Loss))
    if from_server and loss != "topk_forward_kl":
        checks.bad_value(op, "loss", "be 'topk_forward_kl' when teacher_topk_ids are given", repr(loss))
    checks.one_of(op, "reduction", reduction, get_args(Reduction))
    if scale is not None:
        if reduction == "none":
            checks.bad_value(op, "scale", "be None when reduction is 'none'", f"shape {list(scale.shape)}")
        if scale.ndim != 0 and scale.shape != hidden.shape[:-1]:
            rule = f"have shape [] or {list(hidden.shape[:-1])}"
            checks.bad_value(op, "scale", rule, list(scale.shape))
        checks.has_dtype(op, "scale", scale, checks.FLOATS)
        checks.same_device(op, "scale", scale, hidden)
    if arguments["skip_exhausted"] and arguments["w_base"] != 0:
        checks.bad_value(op, "w_base", "be 0 when skip_exhausted is True", arguments["w_base"])


def _values(op: str, arguments: dict[str, Any], shape: torch.Size, vocab_size: int) -> None:
    """What is inside tensors, where looking costs nothing."""
    mask = arguments["mask"]
    if arguments["metric"] == "top_p":
        checks.token_id_values(op, arguments["token_ids"], mask, vocab_size)
    checks.response_values(op, arguments["cu_seqlens"], arguments["drift_count"], shape)
    if arguments.get("teacher_topk_ids") is not None:
        checks.candidate_values(op, "teacher_topk_ids", arguments["teacher_topk_ids"], mask, vocab_size)
