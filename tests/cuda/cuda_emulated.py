"""The CUDA operators, their own source run on the CPU by an emulator: a module over NumPy arrays."""

import functools
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

BUILT = Path(__file__).parents[2] / "build" / "tests-cuda"


@functools.cache
def module():
    """Return the compiled module; without it every test of it fails, with the reason."""
    sys.path.insert(0, str(BUILT))
    try:
        return import_module("_cuda_emulated")
    except ImportError as error:
        raise RuntimeError(f"{error}; make test-cuda builds it in {BUILT}") from error
    finally:
        sys.path.remove(str(BUILT))


@contextmanager
def device(multiprocessors=132, seed=1):
    """How many it has, which is what splits few rows over several blocks; the order of threads and blocks."""
    module().set_emulator(multiprocessors, seed)
    try:
        yield
    finally:
        module().set_emulator(132, 1)
