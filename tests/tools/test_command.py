"""`python -m pruneopd_kernels`."""

import torch

import pruneopd_kernels
from processes import run
from pruneopd_kernels.dispatch.implementations import WHY_NOT


def test_it_says_what_is_usable_and_what_would_make_the_rest_so():
    out = run("-m", "pruneopd_kernels")
    assert pruneopd_kernels.__version__ in out and torch.__version__ in out
    assert WHY_NOT["reference"] is WHY_NOT["cpp"] is None
    for impl, why in WHY_NOT.items():
        assert any(f" {impl} " in line and (why or "  usable") in line for line in out.splitlines()), out


def test_without_torch_it_speaks_of_the_numpy_twin():
    code = "import sys, runpy; sys.modules['torch'] = None; runpy.run_module('pruneopd_kernels', run_name='__main__')"
    out = run(code=code)
    assert "host" in out and "torch" in out and "not usable" in out
