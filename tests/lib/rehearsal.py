"""The whole program of the benchmarks on small inputs, on the CPU in place of a GPU too; its results go elsewhere."""

import contextlib
import functools

import torch

from bench import __main__ as command
from bench.measure import cases, devices, inputs, memory, plan, timing
from bench.report import rows as results


@contextlib.contextmanager
def small(monkeypatch, folder, vocabulary=1000):
    monkeypatch.setattr(inputs, "VOCABULARY", vocabulary)
    monkeypatch.setattr(inputs, "LONG", (8, 32, 16))
    monkeypatch.setattr(results, "FOLDER", folder)
    threads = torch.get_num_threads()
    command._forget()
    yield folder
    command._forget()
    torch.set_num_threads(threads)


@contextlib.contextmanager
def on_gpu(monkeypatch, folder):
    """At most 64 positions; cpp takes the place of cuda and triton."""

    def on_cpu(function):
        instead = functools.wraps(function)(lambda *arguments: function(*arguments[:-1], "cpu"))
        instead.cache_clear = function.cache_clear
        return instead

    def capture(calls):
        return lambda: [call() for call in calls], [call() for call in calls]

    real = cases.operator
    monkeypatch.setattr(cases, "BEYOND_CACHES", 2**17)
    monkeypatch.setattr(cases, "operator", lambda op, impl: real(op, {"cuda": "cpp", "triton": "cpp"}.get(impl, impl)))
    monkeypatch.setattr(plan, "FEW", (1, 16))
    monkeypatch.setattr(plan, "positions_that_fit", lambda device: 64)
    monkeypatch.setattr(plan, "usable_on", lambda device: ("cuda", "triton"))
    for function in inputs.CACHED:
        monkeypatch.setattr(inputs, function.__name__, on_cpu(function))
    monkeypatch.setattr(devices, "gpu_clock", timing.processor_clock)
    monkeypatch.setattr(devices, "capture", capture)
    monkeypatch.setattr(devices, "something_else", lambda device: torch.ones(2))
    monkeypatch.setattr(memory, "on_gpu", lambda run: 4096)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(results, "gpu", lambda device: "Some GPU")
    with small(monkeypatch, folder, vocabulary=600):
        yield folder / "some-gpu.jsonl"
