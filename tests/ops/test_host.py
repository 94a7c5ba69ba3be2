"""What only the NumPy twin has: arrays of every kind, num_threads. Its numbers are tested with all the others."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import comparison
from arrays import as_array
from implementations import HOST, LOSSES, OPERATORS, Implementation
from operators import example
from pruneopd_kernels import host

OF_HOST = [op for op in OPERATORS if op not in LOSSES]


def same(a, b):
    return all(
        x.dtype == y.dtype and np.array_equal(x, y, equal_nan=x.dtype == np.float32) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("op", OF_HOST)
def test_same_bits_as_the_torch_operator_from_any_number_of_threads(op):
    arguments = example(op, (9, 40), 700)
    by_torch, by_host = Implementation("cpp").run(op, **arguments), HOST.run(op, **arguments)
    assert comparison.differing(by_torch, by_host) == []
    arrays = {name: as_array(value) for name, value in arguments.items()}
    results = [getattr(host, op)(**arrays, num_threads=n) for n in (1, 2, 3, 8, None)]
    assert all(same(results[0], result) for result in results[1:])
    assert all(type(x) is np.ndarray and x.flags.writeable and x.flags.c_contiguous for x in results[0])


def test_read_only_and_memory_mapped_arrays_and_strides_below_0(tmp_path):
    logits = np.random.default_rng(0).standard_normal((4, 3, 601), np.float32)
    np.save(tmp_path / "logits.npy", logits)
    mapped = np.load(tmp_path / "logits.npy", mmap_mode="r")
    mask, ids = np.arange(12).reshape(4, 3) % 3 != 0, np.arange(12).reshape(4, 3)
    expected = host.token_stats(logits[::-1].copy(), logits, mask[::-1].copy(), token_ids=ids[::-1, ::-1].copy())
    assert same(host.token_stats(mapped[::-1], mapped, mask[::-1], token_ids=ids[::-1, ::-1]), expected)


def test_the_lock_of_the_interpreter_is_released():
    """Another Python thread runs while rows are read."""
    logits = np.zeros((64, 151936), np.float32)
    logits[:, ::7] = 1.0
    ticks, done = [], threading.Event()

    def tick():
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    with ThreadPoolExecutor(1) as pool:
        pool.submit(tick)
        start = time.perf_counter()
        try:
            for _ in range(3):
                host.token_stats(logits, logits, num_threads=1)
        finally:
            end = time.perf_counter()
            done.set()
    during = [start, *(t for t in ticks if start < t < end), end]
    longest = max(b - a for a, b in itertools.pairwise(during))
    assert longest < 0.5 * (end - start), f"the other thread stood still for {longest:.3f} s of {end - start:.3f} s"


@pytest.mark.parametrize("impl", [HOST, Implementation("cpp")], ids=repr)
def test_python_threads_call_at_the_same_time(impl):
    """Each with threads of its own: the bits of one call."""
    arguments = example("reliability", (1, 40), 3000)
    expected = impl.run("reliability", **arguments)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: impl.run("reliability", **arguments), range(12)))
    assert all(comparison.differing(result, expected) == [] for result in results)
