"""The CUDA operators, their own source run on the CPU by the emulator: called as those of `pruneopd_kernels.host`."""

import sys
from importlib import import_module
from pathlib import Path
from unittest import mock

from pruneopd_kernels import host

BUILT = Path(__file__).parents[1] / "build" / "tests-cuda"


def _load():
    """The compiled module, or why there is none."""
    sys.path.insert(0, str(BUILT))
    try:
        return import_module("_cuda_emulated"), None
    except ImportError as error:
        return None, f"{error}; make test-cuda builds it in {BUILT}"
    finally:
        sys.path.remove(str(BUILT))


MODULE, WHY_NOT = _load()


def call(op, *args, **kwargs):
    """`call("token_stats", student_logits, teacher_logits, k=4)` with NumPy arrays."""
    with mock.patch.multiple(host, _HOST=MODULE, WHY_NOT=WHY_NOT):
        return getattr(host, op)(*args, **kwargs)
