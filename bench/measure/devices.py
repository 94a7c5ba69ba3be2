"""How a case is timed on each device: what `bench/measure/timing.py` needs of it.

A GPU has a clock of its own: two events around a call. Just before the first one, 2 GiB of something else are read.
After that the cache holds nothing of the inputs, nor anything that must be written back; and while the device is busy
with it the call is launched, so that the time of launching does not hide what is measured.

If the inputs fit in the cache (few rows, as in decoding), a graph makes one call on each of several sets of them, and
its replay is measured: there are no gaps between the launches, and no call finds in the cache what the last one read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from bench.measure import answers, cases
from bench.measure.cases import Case
from bench.measure.implementations import read_logits, using
from bench.measure.timing import Contender
from bench.operators import OPERATORS, TOPK_OPS

READ_BYTES = 2**31


def on_cpu(case: Case) -> Contender:
    inputs = cases.large_inputs(case)

    def read() -> object:
        return [tensor.max() for tensor in inputs] if case.op in TOPK_OPS else read_logits(*inputs)

    slow = 2 if case.impl == "reference" else None
    return Contender(case.name, cases.call(case), read, functools.partial(using, case.isa), slow)


def on_gpu(case: Case) -> Contender:
    """Capture the graph if there is one; its answer has to be right, too."""
    read = functools.partial(torch.amax, something_else(case.device))
    if case.sets == 1:
        return Contender(case.name, cases.call(case), read)
    replay, outputs = capture([cases.call(case, number) for number in range(case.sets)])
    replay()
    torch.cuda.synchronize()
    if case.op in OPERATORS and not case.passes and (wrong := cases.wrong_fields(case, answers.fields(outputs[0]))):
        raise RuntimeError(f"in a graph, {'; '.join(wrong)}")
    return Contender(case.name, replay, read, calls=case.sets)


def gpu_clock(contender: Contender) -> float:
    """Return the device's seconds for one `run`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    contender.read()
    start.record()
    result = contender.run()
    end.record()
    end.synchronize()
    del result
    return float(start.elapsed_time(end)) / 1e3


def capture(calls: list[Callable[[], object]]) -> tuple[Callable[[], object], list[object]]:
    """Return one graph of all the calls, and their outputs, which a replay fills."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for call in calls]
    return graph.replay, outputs


@functools.cache
def something_else(device: str) -> torch.Tensor:
    return torch.ones(READ_BYTES // 4, device=device)
