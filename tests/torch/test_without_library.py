"""The package where nothing has been compiled: the reference computes, and every refusal says what would help."""

import functools

import pytest

import processes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`processes.run`, but what it finds is a copy of the package without its compiled files."""
    folder = tmp_path_factory.mktemp("uncompiled")
    processes.copy_package(folder, "*.so")
    return functools.partial(processes.run, root=folder, cwd=folder)


def test_auto_takes_the_reference_and_the_compiled_ones_refuse(run):
    run(code="""
        import pytest, torch
        import pruneopd_kernels
        from pruneopd_kernels.ops import OPERATORS
        assert "uncompiled" in pruneopd_kernels.__file__
        logits = torch.randn(2, 3, 40)
        result = pruneopd_kernels.reference.reliability(logits, logits)
        assert torch.equal(torch.ops.pruneopd.reliability(logits, logits)[7], result.rewards)
        tensors = {"logits": logits, "ids": result.topk_ids, "drift": result.drift}
        for op, declared in OPERATORS.items():
            required = [name for name, p in declared.parameters.items() if p.default is p.empty]
            args = [tensors.get(name.rpartition("_")[2], result.rewards) for name in required]
            getattr(pruneopd_kernels, op)(*args)
            for impl, needs in (("cpp", "compiler"), ("cuda", "nvcc")):
                with pytest.raises(RuntimeError, match=f"^{op}: impl={impl!r} is not usable here: ") as raised:
                    getattr(pruneopd_kernels, op)(*args, impl=impl)
                assert f"_{impl}.so" in str(raised.value) and needs in str(raised.value)
        student = logits.clone().requires_grad_()
        pruneopd_kernels.reverse_kl(student, -logits).sum().backward()
        assert student.grad.any()
        compiled = torch.compile(pruneopd_kernels.reliability, fullgraph=True, backend="eager")
        assert compiled(logits, logits).overlap.tolist() == [[1.0] * 3] * 2
    """)  # fmt: skip


def test_host_refuses_in_one_sentence(run):
    run(code="""
        import sys
        import numpy as np
        import pytest
        from pruneopd_kernels import host
        words = "^reliability_from_drift: pruneopd_kernels.host is not usable here: .*compiler.*"
        with pytest.raises(RuntimeError, match=words):
            host.reliability_from_drift(np.zeros((1, 2), bool))
        assert "torch" not in sys.modules
    """)  # fmt: skip


def test_the_command_says_why(run):
    lines = run("-m", "pruneopd_kernels").splitlines()
    for words in (("_cpp.so", "compiler"), ("_cuda.so", "nvcc"), ("auto", "reference")):
        assert any(all(word in line for word in words) for line in lines), lines


def test_a_library_that_does_not_load(run):
    """As when it was built for a later torch: the reason is given, on one line."""
    run(code="""
        from pathlib import Path
        import pruneopd_kernels
        path = Path(pruneopd_kernels.__file__).with_name("_cpp.so")
        path.write_bytes(b"no library")
        try:
            import pytest, torch
            logits = torch.randn(1, 2, 30)
            pruneopd_kernels.reliability(logits, logits)
            with pytest.raises(RuntimeError, match="does not load") as raised:
                pruneopd_kernels.reliability(logits, logits, impl="cpp")
            assert "\\n" not in str(raised.value)
        finally:
            path.unlink()
    """)  # fmt: skip
