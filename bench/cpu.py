"""How a CPU is timed: what `bench/protocol.py` needs of a case."""

from __future__ import annotations

import functools
from collections.abc import Callable

from bench import cases
from bench.cases import Case
from bench.implementations import read_logits, using
from bench.protocol import Contender


def contender(case: Case) -> Contender:
    slow = 2 if case.impl == "reference" else None
    return Contender(case.name, cases.call(case), _read(case), functools.partial(using, case.isa), slow)


def _read(case: Case) -> Callable[[], object]:
    if case.op in cases.TOPK_OPS:
        return lambda: [tensor.max() for tensor in cases.inputs(case)]
    return functools.partial(read_logits, *cases.inputs(case))
