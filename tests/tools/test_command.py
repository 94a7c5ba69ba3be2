"""`python -m pruneopd_kernels`."""

import torch

import pruneopd_kernels
from processes import run


def test_it_says_what_is_usable_and_what_would_make_the_rest_so():
    out = run("-m", "pruneopd_kernels")
    assert pruneopd_kernels.__version__ in out and torch.__version__ in out

    def line(*words):
        found = [text for text in out.splitlines() if all(word in text for word in words)]
        assert found, f"no line with {words} in\n{out}"
        return found[0]

    from pruneopd_kernels.dispatch.implementations import WHY_NOT

    assert WHY_NOT["reference"] is WHY_NOT["cpp"] is None
    for impl, why in WHY_NOT.items():
        assert line(f" {impl} ", "not usable: " + why if why else "  usable")
    line("auto", "cpp")
    line("host")


def test_without_torch_it_speaks_of_the_numpy_twin():
    code = "import sys, runpy; sys.modules['torch'] = None; runpy.run_module('pruneopd_kernels', run_name='__main__')"
    out = run(code=code)
    assert "host" in out and "torch" in out and "not usable" in out
