"""The CUDA operators, run on the CPU by an emulator, as modules over NumPy arrays.

SOURCE is what a C++ compiler makes of their source; PTX is what nvcc makes of it, translated back to C++.
"""

import functools
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

BUILT = Path(__file__).parents[2] / "build" / "tests-cuda"
SOURCE, PTX = "_cuda_emulated", "_cuda_ptx"


def has_ptx():
    """Return whether PTX was compiled: `make test-cuda` does so if there is an nvcc."""
    return any(BUILT.glob(f"{PTX}.*"))


@functools.cache
def module(name=SOURCE):
    """Return the compiled module; without it every test of it fails, with the reason."""
    sys.path.insert(0, str(BUILT))
    try:
        return import_module(name)
    except ImportError as error:
        raise RuntimeError(f"{error}; make test-cuda builds it in {BUILT}") from error
    finally:
        sys.path.remove(str(BUILT))


@contextmanager
def device(multiprocessors=132, seed=1):
    """How many it has, which is what splits few rows over several blocks; the order of threads and blocks.

    It runs PTX, if there is an nvcc.
    """
    set_emulator = module(PTX if has_ptx() else SOURCE).set_emulator
    set_emulator(multiprocessors, seed)
    try:
        yield
    finally:
        set_emulator(132, 1)
