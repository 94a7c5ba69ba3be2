"""What an import costs and changes, each in a fresh process."""

import textwrap

import pytest

from processes import run

USE_RAW = """
logits = torch.randn(2, 3, 40)
result = torch.ops.pruneopd.reliability(logits, logits)
assert result[0].tolist() == [[1.0] * 3] * 2
"""


def test_bare_import_is_light():
    loaded = run(
        code="""
        import sys
        before = set(sys.modules)
        import pruneopd_kernels
        print(*sorted(set(sys.modules) - before))
    """
    ).split()
    heavy = {"torch", "numpy", "triton", "ml_dtypes", "asyncio", "inspect"} & {
        name.partition(".")[0] for name in loaded
    }
    assert "pruneopd_kernels" in loaded and heavy == set()


def test_public_names_resolve_and_are_listed():
    run(
        code="""
        import pruneopd_kernels
        names = "reliability reliability_from_topk reliability_from_drift token_stats topk_policy_loss reverse_kl " \
                "topk_forward_kl PruneConfig ResponseBudget opd_rewards sampled_drift next_drift_count " \
                "linear_reliability linear_opd_loss reference host parallel"
        for name in names.split():
            assert name in dir(pruneopd_kernels) and name in pruneopd_kernels.__all__, name
        assert set(pruneopd_kernels.__all__) <= set(dir(pruneopd_kernels))
        import sys
        for name in sorted(pruneopd_kernels.__all__, key="parallel".__eq__):
            assert "triton" not in sys.modules, name
            # parallel comes last: with it torch.compiler, which imports triton itself
            assert getattr(pruneopd_kernels, name) is not None
        try:
            pruneopd_kernels.no_such_name
        except AttributeError as error:
            assert "no_such_name" in str(error)
        else:
            raise SystemExit("no AttributeError")
    """
    )


@pytest.mark.parametrize("imports", ["import pruneopd_kernels, torch", "import torch, pruneopd_kernels"])
def test_operators_are_registered_in_either_order(imports):
    run(code=imports + USE_RAW)


def test_operators_are_registered_by_any_submodule():
    run(code="import pruneopd_kernels.config\nimport torch" + USE_RAW)


def test_the_import_hook_steps_aside():
    run(
        code="""
        import sys
        import importlib.util
        import pruneopd_kernels
        assert importlib.util.find_spec("torch")  # whoever only asks whether torch is there does not use it up
        import torch
        assert not [finder for finder in sys.meta_path if "pruneopd" in type(finder).__module__]
    """
        + textwrap.indent(USE_RAW, " " * 8)
    )


def test_operators_are_registered_without_triton_and_without_initialising_cuda():
    run(
        code="""
        import sys
        import torch, pruneopd_kernels
        logits = torch.randn(2, 3, 40)
        for op in ("reliability", "token_stats"):
            getattr(pruneopd_kernels, op)(logits, logits)
            for impl in ("cuda", "triton"):
                try:
                    getattr(pruneopd_kernels, op)(logits, logits, impl=impl)
                except RuntimeError as error:
                    assert "not usable here" in str(error)
                else:
                    raise SystemExit("no error")
        assert "triton" not in sys.modules and not torch.cuda.is_initialized()
    """
    )


def test_without_triton_only_it_is_missing():
    run(
        code="""
        import sys
        sys.modules["triton"] = None  # import triton raises ModuleNotFoundError
        import torch, pruneopd_kernels
        from pruneopd_kernels.dispatch.implementations import WHY_NOT
        logits = torch.randn(2, 3, 40)
        assert pruneopd_kernels.reliability(logits, logits).overlap.tolist() == [[1.0] * 3] * 2
        assert "pip install" in WHY_NOT["triton"]
    """
    )


def test_import_when_torch_is_missing():
    """The name stays importable; what needs torch says so, and the NumPy twin works."""
    run(
        code="""
        import sys
        sys.modules["torch"] = None  # import torch raises ModuleNotFoundError
        import pruneopd_kernels
        from pruneopd_kernels import host
        import numpy as np
        logits = np.zeros((1, 2, 30), np.float32)
        assert host.reliability(logits, logits).overlap.tolist() == [[1.0, 1.0]]
        try:
            pruneopd_kernels.reliability
        except ImportError as error:
            assert "torch" in str(error)
        else:
            raise SystemExit("no ImportError")
    """
    )


def test_host_imports_no_torch_and_uses_none():
    run(
        code="""
        import sys
        import numpy as np
        from pruneopd_kernels import host
        logits = np.random.default_rng(0).standard_normal((2, 3, 40), np.float32)
        host.reliability(logits, logits)
        host.token_stats(logits, logits)
        ids = np.zeros((2, 3, 4), np.int64)
        host.reliability_from_topk(ids, ids)
        host.reliability_from_drift(np.zeros((2, 3), bool))
        try:
            host.reliability(logits, logits, k=0)
        except ValueError:
            pass
        from pruneopd_kernels import PruneConfig
        PruneConfig()
        assert not {"torch", "triton"} & set(sys.modules), "torch was imported"
    """
    )


def test_an_import_of_torch_that_fails_is_not_hidden(tmp_path):
    """The import hook passes on whatever torch raises."""
    (tmp_path / "torch.py").write_text("raise RuntimeError('a broken torch')\n")
    run(
        code=f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import pruneopd_kernels
        try:
            import torch
        except RuntimeError as error:
            assert str(error) == "a broken torch"
        else:
            raise SystemExit("no error")
    """
    )


def test_bfloat16_without_ml_dtypes_is_one_sentence():
    """ml_dtypes is optional: whoever has bfloat16 arrays has it."""
    run(
        code="""
        import sys
        sys.modules["ml_dtypes"] = None
        import numpy as np
        from pruneopd_kernels import host
        logits = np.zeros((1, 2, 30), np.float32)
        host.reliability(logits, logits)
    """
    )
