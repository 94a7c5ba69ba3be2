"""The Triton kernels without a GPU: compiled ahead for several, and what only the interpreter's process can show.

Their values are tested with those of every implementation, as `triton-interpreted`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import operators
import processes
from implementations import LOGITS, REFERENCE, TRITON_INTERPRETED

pytestmark = pytest.mark.thorough


def test_strides_beyond_32_bits(tmp_path):
    out = processes.run(
        code=f"""
        import interpreted
        interpreted.prepare()
        import torch
        from comparison import differing
        from implementations import LOGITS, Unregistered
        from operators import example, of_positions
        from test_layouts import far_apart
        from pathlib import Path
        impl = Unregistered("triton", interpreted.run_here)
        for op in LOGITS:
            arguments, upstream = example(op, (2, 2), 600, dtype=torch.float16), torch.randn(2, 2)
            expected = impl.run(op, upstream, **arguments)
            folder = Path({str(tmp_path)!r})
            far = {{name: far_apart(arguments[name], folder / name) for name in of_positions(arguments)}}
            assert differing(impl.run(op, upstream, **arguments | far), expected) == [], op
        print(len(LOGITS))
    """
    )
    assert out == f"{len(LOGITS)}\n"


def test_tensors_of_the_cpu_where_triton_interprets():
    """Every function takes them if TRITON_INTERPRET=1 is set; torch's dispatcher computes gradients."""
    out = processes.run(
        code="""
        import os
        os.environ["TRITON_INTERPRET"] = "1"
        import warnings
        warnings.filterwarnings("ignore", category=RuntimeWarning)  # NumPy's, of NaN and overflow
        from implementations import OPERATORS, Implementation
        from operators import check, example
        for op in OPERATORS:
            check(Implementation("triton"), op, **example(op, (1, 3)))
        print(len(OPERATORS))
    """
    )
    assert out == f"{len(operators.OPERATORS)}\n"


@pytest.mark.parametrize("op", ["token_stats", "reverse_kl", "opd_loss"])
def test_float64_where_float32_would_lose_a_term(op):
    """A probability that is 0 in float32 multiplies a huge difference, in either direction."""
    student = torch.full((1, 3, 9000), -50.0)
    student[..., 0] = 0.0
    teacher = student.clone()
    student[0, 0, 200], teacher[0, 0, 200] = -110.0, -1e38
    student[0, 1, 100], teacher[0, 1, 100] = -1e38, -110.0
    student[0, 2, 100], teacher[0, 2, 100] = -1e38, -1e38
    more = {"loss": "reverse_kl", "entropies": True} if op == "opd_loss" else {}
    arguments = operators.of_op(op, {"student_logits": student, "teacher_logits": teacher, "k": 2} | more)
    expected = REFERENCE.run(op, **arguments)
    result = TRITON_INTERPRETED.run(op, **arguments)
    assert expected.get("loss", expected.get("reverse_kl"))[0, 0] > 1e-10
    for name, values in expected.items():
        torch.testing.assert_close(result[name], values, rtol=1e-5, atol=1e-16, equal_nan=True, msg=name)


# --- compiled ahead --------------------------------------------------------------------------------------------------


def compiled_ahead(target):
    script = Path(__file__).with_name("triton_ahead.py")
    done = subprocess.run([sys.executable, str(script), target], capture_output=True, text=True,
                          env=processes.environment(), timeout=1200)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
# What a thread loads of a block of one row or of two, and what it stores of a gradient.
LOADS = {(2, 2): {"LDG.E.128": 8}, (4, 4): {"LDG.E.128": 16}, (2, 4): {"LDG.E.64": 8, "LDG.E.128": 8}}
LOADS |= {(2,): {"LDG.E.128": 4}, (4,): {"LDG.E.128": 8}}
STORES = {(2,): {"STG.E.128": 4}, (4,): {"STG.E.128": 8}, (2, 2): {"STG.E.128": 4}, (4, 4): {"STG.E.128": 8}}
STORES |= {(2, 4): {"STG.E.64": 8}}
# Instructions for an element of a row, or of a pair of rows.
INSTRUCTIONS = {"row_stats": 9, "logprobs_backward": 7, "reliability": 13.5, "opd_scores": 13.5, "token_stats": 20}
INSTRUCTIONS |= {"reverse_kl": 16, "reverse_kl_backward": 19}
# Those for what is computed on request.
INSTRUCTIONS |= {"entropy": 1.5, "entropy_coefficient": 3, "divergence": 3, "entropies": 1.5}
# Values spilled outside the loop: the registers just suffice inside.
SPILLS = dict.fromkeys([("reverse_kl", "fused"), ("opd_scores", "fused"), ("token_stats", "fused")], 30)


@pytest.mark.parametrize("target", ["80", "90", "100"])
def test_compiles_without_spills_and_loads_16_bytes_at_a_time(target):
    """In its loop a thread takes 32 elements of each row: one ex2 each, and one for each row's reference.

    A backward pass needs an exponential of the student's only, and its references are known.
    """
    kernels = compiled_ahead(target)
    assert {kernel["pass"] for kernel in kernels} == {None, "fused", "merge", "exact"}
    for kernel in kernels:
        allowed = SPILLS.get((kernel["op"], kernel["pass"]), 0)
        assert kernel["loop_spills"] == 0 and kernel["spills"] <= allowed, kernel
        widths = tuple(sorted(WIDTH[dtype] for dtype in kernel["dtypes"]))
        is_backward = kernel["op"].endswith("_backward")
        if kernel["kernel"].startswith("segments") or kernel["pass"] == "fused" or is_backward:
            assert kernel["loop_ex2"] == (32 if is_backward else 33 * len(widths)), kernel
            assert kernel["loop_loads"] == LOADS[widths], kernel
            assert kernel["loop"] / 32 < sum(INSTRUCTIONS[name] for name in (kernel["op"], *kernel["with"])), kernel
        if is_backward:
            assert kernel["loop_stores"] == STORES[widths], kernel


def test_compiles_for_amd():
    kernels = compiled_ahead("gfx942")
    assert {kernel["pass"] for kernel in kernels} == {None, "fused", "merge", "exact"}
