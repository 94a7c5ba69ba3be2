"""How everything here is timed. There is no second way.

All contenders of a run work on the same tensors. A run is a number of rounds; in each round every contender is called
once, in an order that is shuffled anew (with a fixed seed), so that noise from the rest of the machine hits all alike
and nobody always follows the same neighbour. Just before a timed call the contender's inputs are read once, untimed,
so that each starts from the same state of the caches, whatever ran before it. Timed is one call, from Python, with
the allocation of its outputs; the garbage collector is off. A GPU has a clock of its own
(`bench/measure/devices.py`), which takes the place of the processor's; all else is the same.

Reported are the median and the minimum over the rounds. A ratio is always the ratio of two medians of the same run.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass


@dataclass(frozen=True)
class Contender:
    """Something to time: `run` is timed, `read` reads its inputs before it, both inside `setting`."""

    name: str
    run: Callable[[], object]
    read: Callable[[], object] = lambda: None
    setting: Callable[[], AbstractContextManager[object]] = nullcontext
    max_rounds: int | None = None  # for the very slow: takes part in the first rounds only, without a call to warm up
    calls: int = 1  # of the operator that one `run` makes


@dataclass(frozen=True)
class Timing:
    rounds: int
    median_s: float
    min_s: float


def processor_clock(contender: Contender) -> float:
    """The seconds of one `run`."""
    contender.read()
    before = time.perf_counter()
    result = contender.run()
    after = time.perf_counter()
    del result
    return after - before


def interleave(
    contenders: Sequence[Contender],
    *,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 40,
    seed: int = 0,
    clock: Callable[[Contender], float] = processor_clock,
) -> dict[str, Timing]:
    """Times the contenders against each other: rounds until `seconds` have passed, within the two bounds."""
    order = random.Random(seed)
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    if len(samples) != len(contenders):
        raise ValueError("interleave: contenders must have different names")
    for contender in contenders:  # one untimed call each: first-call work is not what is measured
        if contender.max_rounds is not None:
            continue
        with contender.setting():
            contender.run()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        for done in range(max_rounds):
            if done >= min_rounds and time.perf_counter() - started > seconds:
                break
            for contender in order.sample(contenders, len(contenders)):
                if contender.max_rounds is None or done < contender.max_rounds:
                    with contender.setting():
                        samples[contender.name].append(clock(contender) / contender.calls)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(len(times), statistics.median(times), min(times)) for name, times in samples.items()}
