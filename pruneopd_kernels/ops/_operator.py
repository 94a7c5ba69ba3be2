"""What follows from an operator's declaration: its schemas, its record of arguments, its function and docstring.

A module `ops/<op>.py` declares one operator, read downwards: the signature with its defaults and docstring, the type of
the result, `check` (the rules for its arguments) and `fake` (empty outputs). A differentiable operator also has
`SAVED`, what its forward pass makes for its backward pass, `kept`, all that this needs, and `backward`. Neither this
module nor the declarations import torch, so that `host` works without it. `dispatch.registration` makes the operators
for torch.

Only what reads logits is compiled, or the scan along responses. An operator whose module has `compute` is composed: it
runs a compiled pass, declared by `forward_pass`, and computes the rest in PyTorch.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, get_args

from .. import checks

if TYPE_CHECKING:
    from torch import Tensor as Tensor
else:
    Tensor = None  # the name is enough for a declaration, and importing it would import torch

Impl = Literal["auto", "reference", "cpp", "cuda", "triton"]
IMPLS = get_args(Impl)

# What `torch.ops` calls the operators. A copy of the package under another name, as the kernel hub's, has a namespace
# of its own, so that both may live in one process.
NAMESPACE = __name__.partition(".")[0].removesuffix("_kernels")

# What every function raises; a docstring does not repeat it.
RAISES = """\
Raises:
    ValueError: A shape or a value is not allowed.
    TypeError: A dtype is not allowed.
    RuntimeError: The implementation is not usable here.
"""
# An argument's entry in a docstring: its name and the rest.
_ENTRY = re.compile(r"^    (\w+): (.*\n(?:     .*\n)*)", re.MULTILINE)

# type in a schema: Python types that need no closer look
_EXACT = {"int": (int,), "SymInt": (int,), "float": (float,), "str": (str,), "bool": (bool,)}
_REQUIRED = inspect.Parameter.empty

OPERATORS: dict[str, Operator] = {}
FORWARD_PASSES: dict[str, Operator] = {}
BACKWARD_PASSES: dict[str, Operator] = {}
Function = TypeVar("Function", bound=Callable[..., Any])


def operator(function: Function) -> Function:
    """Declare an operator by its Python function, whose body is empty; return the function that calls it.

    An argument that its docstring leaves out is that of `reliability`, which is the first to be declared.
    """
    op = OPERATORS[function.__name__] = Operator(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return op.call(*args, **kwargs)

    call.__doc__ = op.docstring(op.signature.parameters)
    return call  # type: ignore[return-value]


def forward_pass(function: Function) -> Function:
    """Declare what composed operators read logits with; `compute(a, run)` runs it by its name."""
    FORWARD_PASSES[function.__name__] = Operator(function)
    return function


def backward_pass(function: Function) -> Function:
    """Declare the backward pass of a loss, `torch.ops.pruneopd._<name>`: the gradient of its first argument."""
    BACKWARD_PASSES[function.__name__] = Operator(function)
    return function


def run_backward(name: str, impl: str, *tensors: Any, **scalars: Any) -> Tensor:
    import torch

    gradient: Tensor = getattr(getattr(torch.ops, NAMESPACE), f"_{name}")(*tensors, **scalars, impl=impl)
    return gradient


def compiled() -> list[Operator]:
    """Return what every implementation has kernels for."""
    operators = [op for op in OPERATORS.values() if not op.is_composed]
    return [*operators, *FORWARD_PASSES.values(), *BACKWARD_PASSES.values()]


class Declared:
    """A function that is declared by its signature and docstring, from which others get theirs."""

    def __init__(self, function: Callable[..., Any], signature: inspect.Signature, *shared: str) -> None:
        self.name, self.module = function.__name__, sys.modules[function.__module__]
        self.function, self.signature = function, signature
        self.shared = shared  # texts with entries for arguments that the docstring leaves out

    def docstring(self, arguments: Iterable[str], summary: str = "", *shared: str) -> str | None:
        """Return the docstring with an entry for each argument, its own or that of the last shared text that has one.

        A `summary` takes the place of the first line; then there are no examples. Where there is one model, an argument
        without an entry has that of the student's.
        """
        if self.function.__doc__ is None:  # python -OO
            return None
        sections = re.split(r"^(?:Args|Returns|Examples):\n", inspect.getdoc(self.function) or "", flags=re.MULTILINE)
        before, *own, returns, examples = sections
        entries: dict[str, str] = {}
        first = [inspect.getdoc(op.function) for op in OPERATORS.values() if op.name == "reliability"]
        for text in (*first, *self.shared, *own, *shared):
            entries.update(_ENTRY.findall(text or ""))
        args = "".join(f"    {name}: {entries.get(name) or entries[f'student_{name}']}" for name in arguments)
        text = f"{before}Args:\n{args}\nReturns:\n{returns}{RAISES}"
        _, _, after_the_first_line = text.partition("\n")
        return f"{summary}\n{after_the_first_line}" if summary else f"{text}\nExamples:\n{examples}"

    def surface(
        self, call: Callable[..., Any], summary: str, extra: tuple[str, str, str] | None = None, with_impl: bool = False
    ) -> Any:
        """Give a function of another module this operator's name, signature and docstring, less `impl`.

        `extra` is the name, annotation and description of an argument that only this function has; its default is None.
        `with_impl` keeps `impl`.
        """
        parameters = [p for p in self.signature.parameters.values() if with_impl or p.name != "impl"]
        if extra:
            name, annotation, description = extra
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(name, kind, default=None, annotation=annotation))
        call.__name__ = call.__qualname__ = self.name
        call.__signature__ = self.signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        shared = [f"    {name}: {description}\n"] if extra else []
        call.__doc__ = self.docstring([p.name for p in parameters], summary, *shared)
        return call


class Operator(Declared):
    """One declaration, and what is derived from it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function, inspect.signature(function))
        # Neither `impl` nor anything else that only one surface has.
        self.parameters = {name: p for name, p in self.signature.parameters.items() if name != "impl"}
        self.kinds = {name: checks.KINDS[p.annotation] for name, p in self.parameters.items()}  # types in the schema
        self.tensors = [name for name, kind in self.kinds.items() if kind.startswith("Tensor")]
        self.scalars = [name for name in self.kinds if name not in self.tensors]
        assert [*self.tensors, *self.scalars] == [*self.kinds], f"{self.name}: tensors stand before scalars"
        self.record: Any = namedtuple("Arguments", self.parameters)  # type: ignore[misc]
        self._defaults = [p.default for p in self.parameters.values()]
        self._index = {name: index for index, name in enumerate(self.parameters)}
        self._types: dict[type, list[tuple[type, ...]]] = {}
        self._required = self._defaults.count(_REQUIRED)
        self._positional = [p.kind for p in self.parameters.values()].count(inspect.Parameter.POSITIONAL_OR_KEYWORD)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the operator; `dispatch.registration` replaces this method by one that computes."""
        import_module("..dispatch.registration", __package__)
        return self.call(*args, **kwargs)

    # What stands beside the signature in its module.

    @property
    def stem(self) -> str:
        """The name of the file that declares it, and of those that implement it."""
        return self.function.__module__.rpartition(".")[2]

    def check(self, a: Any, *, float64: bool = False, values: bool = False) -> None:
        """Raise if a record of arguments breaks a rule; `values` also looks at the values inside tensors."""
        self.check_plain(a)
        self.module.check(self.name, a, float64=float64, values=values)

    @functools.cached_property
    def result(self) -> Any:
        """The NamedTuple that the function returns; None if it returns one tensor."""
        name = self.signature.return_annotation
        return None if name == "Tensor" else getattr(self.module, name)

    @functools.cached_property
    def fields(self) -> tuple[str, ...]:
        single = "gradient" if self.name in BACKWARD_PASSES else "loss"
        return self.result._fields if self.result else (single,)

    @property
    def is_composed(self) -> bool:
        """Whether PyTorch computes it from the results of a compiled pass."""
        return self.name in OPERATORS and hasattr(self.module, "compute")

    @functools.cached_property
    def saved(self) -> tuple[str, ...]:
        """The names of what a forward pass makes for the backward pass, besides outputs; else nothing."""
        return getattr(self.module, "SAVED", ()) if self.name in OPERATORS else ()

    @functools.cached_property
    def differentiable(self) -> tuple[str, ...]:
        """The names of the outputs that have a gradient, if there is a backward pass."""
        return getattr(self.module, "DIFFERENTIABLE", self.fields[:1])

    # Schemas. Autograd registration refuses tensors after the `*`, so they stand before it.

    def schema(self, name: str, outputs: Sequence[str]) -> str:
        """The schema of an operator of `torch.ops.pruneopd`."""
        scalars = ", ".join([*map(self._argument, self.scalars), 'str impl="auto"'])
        returns = ", ".join(f"Tensor {output}" for output in outputs)
        return f"{name}({', '.join(map(self._argument, self.tensors))}, *, {scalars}) -> ({returns})"

    @property
    def private_schema(self) -> str:
        """The schema of a compiled implementation, which takes all arguments by position and returns `saved`, too."""
        arguments = ", ".join(f"{kind} {name}" for name, kind in self.kinds.items())
        returns = ", ".join(f"Tensor {output}" for output in (*self.fields, *self.saved))
        return f"{self.name}({arguments}) -> ({returns})"

    def _argument(self, name: str) -> str:
        default = self.parameters[name].default
        literal = "" if default is _REQUIRED else f"={json.dumps(default) if isinstance(default, str) else default}"
        return f"{self.kinds[name]} {name}{literal}"

    # Arguments of a call.

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the record of a call's arguments in the order of the signature, defaults filled in."""
        count, values = len(args), self._defaults.copy()
        if count > self._positional:
            self._refuse(args, kwargs)
        values[:count] = args
        for name, value in kwargs.items():
            index = self._index.get(name, -1)
            if index < count:  # unknown, or given twice
                self._refuse(args, kwargs)
            values[index] = value
        if any(value is _REQUIRED for value in values[count : self._required]):
            self._refuse(args, kwargs)
        return self.record._make(values)

    def raw_arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the same of a call by torch's dispatcher, which has bound the arguments already."""
        values = self._defaults.copy()
        values[: len(args)] = args
        for name, value in kwargs.items():
            values[self._index[name]] = value
        return self.record._make(values)

    def _refuse(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> NoReturn:
        try:
            self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.name}: {error}") from None
        raise AssertionError(f"{self.name}: arguments that Python can bind were refused")

    def check_plain(self, a: Any) -> None:
        """Raise if a tensor is none that kernels can read."""
        for value, name in zip(a, self.tensors, strict=False):
            if value is not None:
                checks.plain(self.name, name, value)

    def check_kinds(self, a: Any, array: type, noun: str) -> None:
        """Raise a TypeError if an argument has not the type that the schema names; a Tensor is an `array` here."""
        if array not in self._types:
            self._types[array] = [_python_types(kind, array) for kind in self.kinds.values()]
        for value, types, name in zip(a, self._types[array], self.kinds, strict=True):
            if type(value) not in types or (type(value) is int and not checks.fits(value, "int")):
                checks.kind(self.name, name, value, self.kinds[name], array, noun)


def _python_types(kind: str, array: type) -> tuple[type, ...]:
    types = _EXACT.get(kind.rstrip("?"), (array,))
    return (*types, type(None)) if kind.endswith("?") else types
