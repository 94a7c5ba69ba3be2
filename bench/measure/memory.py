"""How memory is measured: what a call takes at its peak beyond its inputs and outputs.

On a CPU, in a process of its own: the growth of the peak of its resident memory, less the outputs. Freed memory goes
back to the system at once there, and huge pages are off. What a library keeps for itself (its code, an allocator's
arena) counts too, so the figure is an upper bound. On a GPU, the peak of torch's allocator.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from bench.measure.cases import Case

Outputs = TypeVar("Outputs")
PR_SET_THP_DISABLE = 41
M_MMAP_THRESHOLD = -3


def on_cpu(case: Case, threads: int) -> int:
    """Return the bytes of the whole process."""
    return of_process("bench.measure.memory", {**asdict(case), "threads": threads})


def on_gpu(run: Callable[[], Iterable[Tensor]]) -> int:
    """Return the bytes of torch's allocator at the peak of `run`, beyond what was there before and its outputs."""
    import torch

    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = run()
    torch.cuda.synchronize()
    blocks = sum(-(-tensor.nbytes // 512) * 512 for tensor in outputs)  # what the allocator gives for them
    return torch.cuda.max_memory_allocated() - before - blocks


def of_process(module: str, description: Mapping[str, object]) -> int:
    """Return what `python -m <module> --memory '<description as JSON>'` prints.

    Raises:
        RuntimeError: It failed.
    """
    command = [sys.executable, "-m", module, "--memory", json.dumps(description)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"bench: memory was not measured: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout.split()[-1])


def growth(small: Callable[[], object], run: Callable[[], Outputs]) -> tuple[int, Outputs]:
    """Return by how many bytes `run` raises the peak of this process, its outputs included; and these.

    Args:
        small: The same in small, which starts threads and loads what is loaded when it is first used.
        run: What is measured.
    """
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)  # what is larger goes back to the system as soon as it is freed
    small()
    gc.collect()
    libc.malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the peak starts again from here
    before = _status("VmRSS")
    outputs = run()
    return _status("VmHWM") - before, outputs


def _status(key: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key + ":"))


def _measure_here(description: dict[str, object]) -> int:
    import torch

    from bench.measure import answers, cases
    from bench.measure.implementations import using

    torch.set_num_threads(int(description.pop("threads")))  # type: ignore[call-overload]
    case = cases.Case(**description)  # type: ignore[arg-type]
    with using(case.isa):
        grown, outputs = growth(cases.small_call(case), cases.call(case))
    return grown - sum(tensor.nbytes for tensor in answers.fields(outputs).values())


if __name__ == "__main__":
    print(_measure_here(json.loads(sys.argv[2])))
