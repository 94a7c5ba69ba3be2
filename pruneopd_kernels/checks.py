"""Rules for arguments: each raises `<op>: <argument> must <rule>, got <actual>` if its argument breaks it.

The operators' declarations (`ops/<op>.py`) call these functions; the raw operators, the reference and `host` share
them. There is no torch here: tensors and NumPy's arrays are asked for shape, dtype, device and strides. Only the last
section looks at values inside a tensor. Callers use it only if that neither waits for a GPU nor breaks a trace.

Rules are checked in the order of the signature: tensors, then scalars, then values inside tensors.
"""

import functools
import math
import sys
from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, Literal, NoReturn, get_args

from .errors import InvalidType, InvalidValue

Metric = Literal["overlap", "top_p"]
RewardWeight = Literal["student", "teacher", "none"]
PolicyLoss = Literal["topk_policy", "reverse_kl"]
Tail = Literal["bucket", "generalised", "none"]

POLICY_LOSSES = get_args(PolicyLoss)
REWARD_WEIGHTS = get_args(RewardWeight)
MAX_K = 256
MAX_POLICY_CANDIDATES = 512
LOGITS = ("float32", "bfloat16", "float16")
FLOATS = (*LOGITS, "float64")
IDS = ("int32", "int64")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

# annotation in a signature: the type that a schema has for it
KINDS = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "int": "int",
    "int | None": "SymInt?",
    "float": "float",
    "float | None": "float?",
    "bool": "bool",
    **dict.fromkeys(("Impl", "Loss", "Metric", "PolicyLoss", "Reduction", "RewardWeight", "Tail"), "str"),
}


def kind(op: str, argument: str, value: Any, wanted: str, array: type = object, noun: str = "") -> None:
    """Check that an argument has the type that a schema names; `noun` is what the caller calls a Tensor.

    A NumPy scalar is a number; an array or a tensor is none, whatever its shape, and a bool is no number.
    """
    if value is None and wanted.endswith("?"):
        return
    if wanted.startswith("Tensor"):
        held = isinstance(value, array)
    elif wanted == "str":
        held, noun = isinstance(value, str), "a str"
    elif wanted == "bool":
        held, noun = type(value).__name__ in ("bool", "bool_"), "a bool"  # NumPy's, too
    elif wanted.startswith("float"):
        held, noun = _is_number(value, Real), "a float"
    else:
        held, noun = _is_number(value, Integral), "an int"
    if not held:
        bad_type(op, argument, f"be {noun}", type(value).__name__)
    if wanted.startswith("Tensor"):
        plain(op, argument, value)
    elif isinstance(value, Integral) and not fits(int(value), wanted):
        rule = f"fit into {'a float64' if wanted.startswith('float') else 'an int64'}"
        bad_value(op, argument, rule, f"an integer of {int(value).bit_length()} bits")


def _is_number(value: Any, numbers: type) -> bool:
    is_symbolic = hasattr(value, "node")  # torch's, while a graph is traced
    return is_symbolic or (isinstance(value, numbers) and not isinstance(value, bool))


def fits(value: int, wanted: str) -> bool:
    """Return whether an integer fits into what a schema names."""
    return abs(value) <= sys.float_info.max if wanted.startswith("float") else -(2**63) <= value < 2**63


# Tensors: layout, shape, dtype, device, strides.


def plain(op: str, argument: str, array: Any) -> None:
    """Check that a tensor or an array is a dense one, whose elements lie in memory and are all there is to it."""
    get = getattr  # a NumPy array has none of these
    layout, is_nested = get(array, "layout", None), get(array, "is_nested", False)
    actual = _special(type(array), layout, is_nested, get(array, "is_quantized", False))  # type: ignore[arg-type]
    if actual is not None:
        bad_type(op, argument, f"be a plain {'array' if layout is None else 'tensor'}", actual)


@functools.cache
def _special(kind: type, layout: Hashable, is_nested: bool, is_quantized: bool) -> str | None:
    """Return what else such a tensor is, and the way out."""
    if hasattr(kind, "to_local"):
        return "a DTensor: pass .to_local(), and use pruneopd_kernels.parallel where the vocabulary is split"
    if is_nested:
        return "a nested tensor: in layout torch.jagged, pass .values(), with cu_seqlens=.offsets() along responses"
    if is_quantized:
        return "a quantized tensor: pass .dequantize()"
    if str(layout) not in ("None", "torch.strided"):
        return f"one of layout {layout}: pass .to_dense()"
    if hasattr(kind, "get_mask") or hasattr(kind, "filled"):  # torch's and NumPy's
        return "a masked one: pass its data, and where it is valid as mask"
    return None


def has_shape(op: str, argument: str, array: Any, shape: Sequence[int]) -> None:
    if list(array.shape) != list(shape):
        bad_value(op, argument, f"have shape {list(shape)}", list(array.shape))


def has_dtype(op: str, argument: str, array: Any, allowed: Sequence[str], words: str = "") -> None:
    dtype = _dtype_name(array.dtype)
    if dtype not in allowed:
        bad_type(op, argument, f"have dtype {words or _either(allowed)}", dtype)


@functools.cache
def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def same_device(op: str, argument: str, array: Any, like: Any) -> None:
    device, wanted = getattr(array, "device", "cpu"), getattr(like, "device", "cpu")  # NumPy 1 knows no devices
    if device != wanted:
        bad_value(op, argument, f"be on {wanted}", device)


def logits(op: str, argument: str, array: Any, float64: bool, like: Any = None) -> None:
    """Check one model's logits; `like`, the other model's, gives the leading axes and the device."""
    if like is None:
        if array.ndim < 1:
            bad_value(op, argument, "have shape [..., V]", list(array.shape))
    elif array.shape[:-1] != like.shape[:-1] or array.ndim != like.ndim:
        bad_value(op, argument, f"have shape {_axes(like, 'V')}", list(array.shape))
    has_dtype(op, argument, array, FLOATS if float64 else LOGITS)
    if like is not None:
        same_device(op, argument, array, like)
    if array.shape[-1] > 1:
        stride = array.stride(-1) if hasattr(array, "stride") else array.strides[-1] // array.itemsize
        if stride != 1 and 0 not in array.shape:  # an empty array may have any strides
            bad_value(op, argument, "have stride 1 on its last axis", stride)


def candidates(op: str, argument: str, ids: Any, logits: Any, most: int, letter: str) -> None:
    """Check ids `[..., letter]` of candidates at each position of the logits."""
    if ids.shape[:-1] != logits.shape[:-1] or ids.ndim != logits.ndim or not 1 <= ids.shape[-1] <= most:
        rule = f"have shape {_axes(logits, letter)} with 1 <= {letter} <= {most}"
        bad_value(op, argument, rule, list(ids.shape))
    has_dtype(op, argument, ids, IDS)
    same_device(op, argument, ids, logits)


def has_one_for_each(
    op: str,
    argument: str,
    array: Any,
    like: Any,
    shape: Sequence[int],
    allowed: Sequence[str] = FLOATS,
    words: str = "",
) -> None:
    """Check an optional array of this shape on the device of `like`."""
    if array is not None:
        has_shape(op, argument, array, shape)
        has_dtype(op, argument, array, allowed, words)
        same_device(op, argument, array, like)


def mask_of_positions(op: str, mask: Any, like: Any, shape: Sequence[int]) -> None:
    has_one_for_each(op, "mask", mask, like, shape, ("bool", *INTEGERS, *FLOATS), "bool, integer or float")


def ids_of_positions(op: str, token_ids: Any, like: Any, shape: Sequence[int]) -> None:
    has_one_for_each(op, "token_ids", token_ids, like, shape, IDS)


def responses(
    op: str, cu_seqlens: Any, drift_count: Any, like: Any, shape: Sequence[int], layout: str, carry: str = "drift_count"
) -> None:
    """Check how positions of this shape make up responses; `layout` names the tensor that decides about packing."""
    if len(shape) == 1:
        if cu_seqlens is None:
            bad_value(op, "cu_seqlens", f"be given when {layout.format('[N')}", None)
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
            bad_value(op, "cu_seqlens", "have shape [B + 1]", list(cu_seqlens.shape))
        has_dtype(op, "cu_seqlens", cu_seqlens, IDS)
        same_device(op, "cu_seqlens", cu_seqlens, like)
    elif cu_seqlens is not None:
        bad_value(op, "cu_seqlens", f"be None when {layout.format('[B, T')}", f"shape {list(cu_seqlens.shape)}")
    if drift_count is not None:
        count = shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        has_one_for_each(op, carry, drift_count, like, [count], ("int32",))


def _axes(logits: Any, letter: str) -> str:
    return f"[{', '.join(map(str, [*logits.shape[:-1], letter]))}]"


# Scalars.


def one_of(op: str, argument: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        bad_value(op, argument, f"be one of {', '.join(map(repr, allowed))}", repr(value))


def between(op: str, argument: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        bad_value(op, argument, f"be between {lowest} and {highest}", value)


def at_least(op: str, argument: str, value: int, lowest: int, what: str = "") -> None:
    if not value >= lowest:
        bad_value(op, argument, f"be >= {what}{lowest}", value)


def number(op: str, argument: str, value: float | None, rule: str) -> None:
    """Check a rule of `NUMBERS`, by its words."""
    if value is not None and not NUMBERS[rule](value):
        bad_value(op, argument, rule, value)


NUMBERS: dict[str, Callable[[float], bool]] = {
    "be in (0, 1]": lambda value: 0 < value <= 1,
    "be in [0, 1]": lambda value: 0 <= value <= 1,
    "be > 1": lambda value: value > 1,
    "be finite and >= 0": lambda value: 0 <= value < math.inf,
    "be finite and > 0": lambda value: 0 < value < math.inf,
    "be finite": math.isfinite,
}

# The rule for each scalar, or the values allowed, by its name: the same in every operator and in every configuration.
SCALARS: dict[str, str | tuple[str, ...]] = {
    "threshold": "be in (0, 1]",
    "w_drop": "be finite and >= 0",
    "w_base": "be finite and >= 0",
    "eps": "be finite and >= 0",
    "metric": get_args(Metric),
    "top_p": "be in (0, 1]",
    "reward_weight": REWARD_WEIGHTS,
    "tail": get_args(Tail),
    "clip_low": "be in [0, 1]",
    "clip_high": "be finite and >= 0",
    "clip_dual": "be > 1",
    "logprob_min": "be finite",
    "temperature": "be finite and > 0",
    "student_temperature": "be finite and > 0",
    "teacher_temperature": "be finite and > 0",
}


def scalars(op: str, a: Any) -> None:
    """Check every scalar that `a`, a record of arguments or a configuration, has and that `SCALARS` has a rule for."""
    for argument, check, rule in _scalar_rules(type(a)):  # type: ignore[arg-type]
        check(op, argument, getattr(a, argument), rule)


@functools.cache
def _scalar_rules(kind: Hashable) -> list[tuple[str, Any, Any]]:
    names = getattr(kind, "_fields", None) or kind.__dataclass_fields__  # type: ignore[attr-defined]
    rules = [(name, SCALARS[name]) for name in names if name in SCALARS]
    return [(name, number if isinstance(rule, str) else one_of, rule) for name, rule in rules]


def vocab_size(op: str, a: Any) -> int:
    """Check `a.vocab_size` against the widths of the logits; return how many ids exist."""
    names = [name for name in ("logits", "student_logits", "teacher_logits") if hasattr(a, name)]
    widths = [getattr(a, name).shape[-1] for name in names]
    return vocabulary(op, a.vocab_size, widths, "last axes of student_logits and teacher_logits")


def vocabulary(op: str, size: int | None, widths: Sequence[int], axes: str) -> int:
    """Check `vocab_size` against the student's width, and the teacher's if there is one."""
    if size is None:
        if widths[0] != widths[-1]:
            bad_value(op, "vocab_size", f"be given when the {axes} differ", f"{widths[0]} and {widths[-1]}")
        size = widths[0]
    if not 1 <= size <= min(widths):
        whose = "min(student, teacher)" if len(widths) == 2 else "the logits'"
        bad_value(op, "vocab_size", f"be between 1 and {whose} width = {min(widths)}", size)
    return size


def number_of_candidates(op: str, k: int, vocab_size: int) -> None:
    largest = min(vocab_size, MAX_K)
    if not 1 <= k <= largest:
        bad_value(op, "k", f"be between 1 and min(vocab_size, {MAX_K}) = {largest}", k)


def needed_by_top_p(op: str, a: Any, *arguments: str) -> None:
    for argument in arguments:
        if a.metric == "top_p" and getattr(a, argument) is None:
            bad_value(op, argument, "be given when metric is 'top_p'", None)


# Values inside tensors.


def token_id_values(op: str, token_ids: Any, mask: Any, vocab_size: int) -> None:
    outside = (token_ids < 0) | (token_ids >= vocab_size)
    if mask is not None:
        outside = outside & _is_set(mask)
    if outside.any():
        rule = f"be between 0 and vocab_size - 1 = {vocab_size - 1} where the position is valid"
        bad_value(op, "token_ids", rule, int(token_ids[outside][0]))


def candidate_values(op: str, argument: str, ids: Any, mask: Any, vocab_size: int) -> None:
    outside = ids >= vocab_size  # below 0 is padding
    if mask is not None:
        outside = outside & _is_set(mask)[..., None]
    if outside.any():
        rule = f"be below vocab_size = {vocab_size} where the position is valid"
        bad_value(op, argument, rule, int(ids[outside][0]))


def distinct(op: str, argument: str, ids: Any, logprobs: Any, mask: Any) -> None:
    """Check that no id is twice among the filled slots of a valid position."""
    filled = ids >= 0
    if logprobs is not None:
        filled = filled & (logprobs != -math.inf)
    if mask is not None:
        filled = filled & _is_set(mask)[..., None]
    library = _library_of(ids)
    slots = library.where(filled, ids, -1)
    ordered = slots.sort(-1)[0] if library.__name__ == "torch" else library.sort(slots, -1)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if twice.any():
        bad_value(op, argument, "hold no id twice in a position", int(ordered[..., 1:][twice][0]))


def _library_of(array: Any) -> Any:
    """Return torch or numpy."""
    return sys.modules["torch" if hasattr(array, "stride") else "numpy"]


def _is_set(mask: Any) -> Any:
    """Return where a mask is not 0: by its bits, because a processor may be told to take subnormal floats for 0."""
    if "float" not in _dtype_name(mask.dtype):
        return mask != 0
    return mask.view(getattr(_library_of(mask), f"int{8 * mask.itemsize}")) << 1 != 0  # without the sign


def response_values(
    op: str, cu_seqlens: Any, drift_count: Any, shape: Sequence[int], carry: str = "drift_count"
) -> None:
    if cu_seqlens is not None:
        ends, positions = cu_seqlens.tolist(), shape[0]
        if ends[0] != 0:
            bad_value(op, "cu_seqlens", "start at 0", ends[0])
        if ends[-1] != positions:
            bad_value(op, "cu_seqlens", f"end at N = {positions}", ends[-1])
        for before, after in pairwise(ends):
            if after < before:
                bad_value(op, "cu_seqlens", "be non-decreasing", f"{before} before {after}")
    if drift_count is not None and (drift_count < 0).any():
        bad_value(op, carry, "be >= 0", int(drift_count.min()))


# The words.


def bad_value(op: str, argument: str, rule: str, actual: object) -> NoReturn:
    raise InvalidValue(f"{op}: {argument} must {rule}, got {actual}")


def bad_type(op: str, argument: str, rule: str, actual: object) -> NoReturn:
    raise InvalidType(f"{op}: {argument} must {rule}, got {actual}")


def _either(words: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
