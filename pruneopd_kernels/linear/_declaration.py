"""How a function from hidden states is declared: its own arguments and, for `**arguments`, those of an operator."""

import functools
import inspect
from collections import namedtuple
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .. import checks
from ..dispatch import implementations
from ..dispatch.registration import refuse_forward_mode
from ..ops import OPERATORS
from ..ops._operator import Declared
from ._checks import check
from ._chunks import chunk_size_of
from ._scoring import Passes

Function = TypeVar("Function", bound=Callable[..., Any])

# What the docstrings share; an entry of the student's also serves where there is one model.
ENTRIES = """
    student_hidden: float32, bfloat16 or float16 `[B, T, H]` (padded) or `[N, H]` (packed), with any strides: what the
        head is applied to.
    student_weight: The head's weight `[V, H]`, of the same dtype unless under autocast.
    teacher_hidden: `[B, T, H']` or `[N, H']`; H' and dtype may differ from the student's.
    teacher_weight: `[V', H']`.
    mask: bool, integer or float `[B, T]` or `[N]`; non-zero where a position is valid. None: all positions are valid.
        On a GPU the valid positions are counted, which waits for it once.
    student_bias: `[V]`.
    teacher_bias: `[V']`.
    student_softcap: If given, the logits become `cap * tanh(logits / cap)`, after the bias and before the temperature,
        as in Gemma; finite and > 0.
    teacher_softcap: The same for the teacher.
    chunk_size: How many positions' logits exist at a time, >= 1. None: as many as fit into 256 MiB a model.
"""


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that interrupts a graph of `torch.compile`: loops and exchanges are no part of one."""

    def call(*args: Any, **kwargs: Any) -> Any:
        # A decorator of torch's that does so would import its compiler.
        run = torch.compiler.disable(function) if torch.compiler.is_compiling() else function
        return run(*args, **kwargs)

    return call


def from_hidden_states(op: str) -> Callable[[Function], Function]:
    """Declare a function by its signature and docstring, whose `**arguments` stand for the rest of an operator's."""

    def decorate(function: Function) -> Function:
        declared = Declaration(function, op)

        @functools.wraps(function)
        @outside_graphs
        def call(*args: Any, **kwargs: Any) -> Any:
            return declared.run(declared.module.compute, *args, **kwargs)

        call.__signature__ = declared.signature  # type: ignore[attr-defined]
        call.__doc__ = declared.docstring(declared.kinds)
        call.declared = declared  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


class Declaration(Declared):
    """One function from hidden states: its arguments and their rules. Its module's `compute(a)` takes a record of them.

    The record also has the function's name, the dtype of an autocast, which is off in `compute`, and what reads logits.
    For `compute`, `impl` and `chunk_size` are what they come to.
    """

    def __init__(self, function: Callable[..., Any], op: str) -> None:
        own = inspect.signature(function)
        parameters = {key: p for key, p in own.parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
        given = OPERATORS[op].signature.parameters.items()
        parameters.update({key: p for key, p in given if key not in parameters and not key.endswith("logits")})
        shared = inspect.getdoc(OPERATORS[op].function) or "", ENTRIES
        super().__init__(function, own.replace(parameters=[*parameters.values()]), *shared)
        self.kinds = {key: checks.KINDS[p.annotation] for key, p in parameters.items()}
        self.tensors = [key for key, kind in self.kinds.items() if kind.startswith("Tensor")]
        self.record = cast(Any, namedtuple)("Arguments", [*self.kinds, "op", "autocast", "passes"])

    def run(self, compute: Callable[[Any], Any], /, *args: Any, **kwargs: Any) -> Any:
        """Check a call's arguments, and compute with them."""
        a = self.arguments(args, kwargs)
        self.check_kinds(a, Tensor, "a tensor")
        refuse_forward_mode(self.name, a)
        self.check(a)
        impl = implementations.choose(self.name, a.impl, a[0].device)
        with torch.autocast(a[0].device.type, enabled=False):
            return compute(a._replace(impl=impl, chunk_size=chunk_size_of(a), passes=Passes(impl)))

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the record of a call's arguments, defaults filled in."""
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.name}: {error}") from None
        bound.apply_defaults()
        hidden = next(iter(bound.arguments.values()))
        kind = hidden.device.type if isinstance(hidden, Tensor) else "cpu"
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return self.record(**bound.arguments, op=self.name, autocast=autocast, passes=None)

    def check_kinds(self, a: Any, array: type, noun: str) -> None:
        """Raise a TypeError if an argument has not its type, or is no plain tensor; a Tensor is an `array` here."""
        for key, kind in self.kinds.items():
            checks.kind(self.name, key, getattr(a, key), kind, array, noun)

    def check(self, a: Any, **options: bool) -> None:
        """Raise if a record of arguments breaks a rule. The options of an operator's checks follow from them here."""
        check(self.name, a, getattr(self.module, "check", None))

    def compute(self, a: Any) -> Any:
        with torch.autocast(a[0].device.type, enabled=False):
            return self.module.compute(a)
