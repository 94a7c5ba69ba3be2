"""Counts how often passes read logits and write their gradient: what a training step costs on a large vocabulary."""

from collections import Counter
from contextlib import contextmanager
from math import prod
from unittest import mock

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
