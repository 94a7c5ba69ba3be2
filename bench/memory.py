"""Memory that a call needs beyond its inputs and outputs, as the growth of the process's peak resident set.

Every case is measured in a process of its own (`python -m bench.memory '<case as JSON>'`), on its first call with
these tensors: the thread pool has been started and the operator called once on two positions of 64 logits (a peer only
where it is a loss: autograd imports much when it is first used), huge pages are off. What the call maps for good (code,
an allocator's arena) counts too, so that the figure is an upper bound.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TypeVar

Data = TypeVar("Data")
Outputs = TypeVar("Outputs")

PR_SET_THP_DISABLE = 41
M_MMAP_THRESHOLD = -3


def measure(case: object, threads: int) -> int | None:
    """Bytes, of the whole process; None where Linux does not say."""
    command = [sys.executable, "-m", "bench.memory", json.dumps({**asdict(case), "threads": threads})]  # type: ignore[call-overload]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"bench: memory was not measured: {done.stderr.strip().splitlines()[-1:]}")
        return None
    return int(done.stdout.split()[-1])


def of_process(module: str, description: Mapping[str, object]) -> int:
    """What `python -m <module> --memory '<description as JSON>'` prints: the figure of a process of its own.

    Raises:
        RuntimeError: It failed.
    """
    command = [sys.executable, "-m", module, "--memory", json.dumps(description)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"bench: memory was not measured: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout.split()[-1])


def growth(
    small: Callable[[], object], make: Callable[[], Data], run: Callable[[Data], Outputs]
) -> tuple[int, Outputs]:
    """By how many bytes `run(make())` raises the peak of this process, its outputs included; and these.

    Args:
        small: The same in small, which starts threads and loads what is loaded when it is first used.
        make: The inputs, which do not count.
        run: What is measured.
    """
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    small()
    data = make()
    gc.collect()
    libc.malloc_trim(0)
    _forget_peak()
    before = _status("VmRSS")
    outputs = run(data)
    return _status("VmHWM") - before, outputs


def _forget_peak() -> None:
    """The peak starts again from here."""
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")


def _status(key: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key + ":"))


def _measure_here(description: dict[str, object]) -> int:
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)  # what is larger goes back to the system as soon as it is freed
    import torch

    from bench import answers, cases
    from bench.implementations import using
    from bench.losses import LOSSES

    torch.set_num_threads(int(description.pop("threads")))  # type: ignore[call-overload]
    case = cases.Case(**description)  # type: ignore[arg-type]
    run = cases.call(case)
    with using(case.isa):
        for tensor in cases.inputs(case):
            tensor.amax(-1)
        if case.impl == "cpp" or case.op in LOSSES:
            _small_call(torch, cases.function_of(case), case.op)
        gc.collect()
        libc.malloc_trim(0)
        _forget_peak()
        before = _status("VmRSS")
        outputs = answers.fields(run())
        return _status("VmHWM") - before - sum(tensor.nbytes for tensor in outputs.values())


def _small_call(torch, function, op: str) -> None:  # type: ignore[no-untyped-def]
    from bench import losses

    if op in losses.LOSSES:
        given = losses.options_like(op, 2, (1, 2))
        given = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in given.items()}
        logits = torch.zeros(2, 1, 2, 64)[: 2 if losses.LOSSES[op] else 1]
        losses.call(function, "both", logits, given, torch.ones(1, 2))()
    elif op == "reliability_from_drift":
        function(torch.zeros(1, 2, dtype=torch.bool))
    elif op == "reliability_from_topk":
        function(*torch.arange(4).expand(2, 1, 2, 4))
    else:
        function(*torch.zeros(2, 1, 2, 64), k=2)


if __name__ == "__main__":
    print(_measure_here(json.loads(sys.argv[1])))
