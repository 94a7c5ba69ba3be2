"""Counts how often passes read logits and write their gradient: what a training step costs on a large vocabulary."""

from collections import Counter
from contextlib import contextmanager
from math import prod
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from pruneopd_kernels.dispatch import implementations


@contextmanager
def counted(student, teacher):
    """Rows that compiled passes read, S or T by the width of the logits, and rows of gradients that they write, W.

    If both models have one width, all are S.
    """
    rows, run = Counter(), implementations.run

    def counting(op, impl, a):
        outputs = run(op, impl, a)
        if not op.is_composed:  # it runs passes, which are counted
            for name in (name for name in op.tensors if name.endswith("logits")):
                x = getattr(a, name)
                rows[{teacher: "T", student: "S"}[x.shape[-1]]] += prod(x.shape[:-1])
            if op.fields == ("gradient",):
                rows["W"] += prod(outputs[0].shape[:-1])
        return outputs

    with mock.patch.object(implementations, "run", counting):
        yield rows


@contextmanager
def others(*widths):
    """Rows as wide as a vocabulary that anything but a compiled pass reads or writes, by operator of torch."""
    mode, run = Others(widths), implementations.run

    def observed(op, impl, a):
        with mode if op.is_composed else _disable_current_modes():  # a mode does not see the insides of an operator
            return run(op, impl, a)

    with mock.patch.object(implementations, "run", observed), mode:
        yield mode.rows


class Others(TorchDispatchMode):
    """Views and empty tensors touch nothing."""

    def __init__(self, widths):
        super().__init__()
        self.widths, self.rows = widths, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **kwargs or {})
        if function.namespace != "pruneopd" and not function.is_view and "empty" not in function.name():
            tensors = [x for x in tree_leaves((args, kwargs, outputs)) if isinstance(x, torch.Tensor)]
            wide = [x.shape[:-1].numel() for x in tensors if x.ndim and x.shape[-1] in self.widths]
            self.rows += Counter({function.name(): sum(wide)})
        return outputs
