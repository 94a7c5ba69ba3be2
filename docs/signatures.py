"""Signatures and docstrings as they are at run time: defaults are numbers, and derived functions have their text."""

import inspect
from importlib import import_module

import griffe

DERIVED = ("pruneopd_kernels.ops", "pruneopd_kernels.host", "pruneopd_kernels.parallel", "pruneopd_kernels.linear")


class Signatures(griffe.Extension):
    """Called for each function that the documentation's source reader finds."""

    def on_function(self, *, func, **_):
        module, _, name = func.path.rpartition(".")
        if not (func.path.startswith(DERIVED) and func.parent.is_module) or "._" in func.path:
            return
        runtime = getattr(import_module(module), name, None)
        if runtime is None:
            return
        func.docstring = griffe.Docstring(inspect.getdoc(runtime) or "", parent=func)
        func.parameters = griffe.Parameters(*map(parameter, inspect.signature(runtime).parameters.values()))


def parameter(p):
    """Return a parameter as the documentation's source reader would have found it."""
    default = None if p.default is inspect.Parameter.empty else repr(p.default)
    kind = griffe.ParameterKind(p.kind.description)
    return griffe.Parameter(p.name, annotation=str(p.annotation), kind=kind, default=default)
