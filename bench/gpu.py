"""How a GPU is timed: the protocol of `bench/protocol.py` with the device's own clock.

A call is measured by two events on the stream. Just before the first one, 2 GiB of something else are read: the cache
holds nothing of the inputs after it, nor anything that must be written back, and while the device is busy with that,
the call is launched, so that the time of launching does not hide what is measured.

Where the inputs fit in the cache (few rows, as in decoding), a graph makes one call on each of several sets of them,
and its replay is measured: without gaps between the launches, and without finding in the cache what the last call has
read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from bench import answers, cases
from bench.cases import Case
from bench.protocol import Contender

READ_BYTES = 2**31


def clock(contender: Contender) -> float:
    """The device's seconds for one `run`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    contender.read()
    start.record()
    result = contender.run()
    end.record()
    end.synchronize()
    del result
    return float(start.elapsed_time(end)) / 1e3


def contender(case: Case) -> Contender:
    """Captures the graph where there is one; its answer has to be right, too."""
    read = functools.partial(torch.amax, _something_else(case.device))
    if case.sets == 1:
        return Contender(case.name, cases.call(case), read)
    replay, outputs = capture([cases.call(case, number) for number in range(case.sets)])
    replay()
    torch.cuda.synchronize()
    if case.op in cases.LOGIT_OPS + cases.TOPK_OPS and (wrong := cases.wrong_fields(case, answers.fields(outputs[0]))):
        raise RuntimeError(f"in a graph, {'; '.join(wrong)}")
    return Contender(case.name, replay, read, calls=case.sets)


def capture(calls: list[Callable[[], object]]) -> tuple[Callable[[], object], list[object]]:
    """One graph of all the calls, and their outputs, which a replay fills."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for call in calls]
    return graph.replay, outputs


def extra_bytes(case: Case) -> int:
    """Memory that a call takes from torch's allocator at its peak, beyond inputs and outputs."""
    run = cases.call(case)
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = answers.fields(run())
    torch.cuda.synchronize()
    blocks = sum(-(-tensor.nbytes // 512) * 512 for tensor in outputs.values())  # what the allocator gives for them
    return torch.cuda.max_memory_allocated() - before - blocks


@functools.cache
def _something_else(device: str) -> torch.Tensor:
    return torch.ones(READ_BYTES // 4, device=device)
