"""What an import costs and changes, each in a fresh process."""

import shutil

import pytest

import processes
from processes import PACKAGE, ROOT

USE_RAW = """
logits = torch.randn(2, 3, 40)
assert torch.ops.pruneopd.reliability(logits, logits)[0].tolist() == [[1.0] * 3] * 2
"""


@pytest.fixture(params=["installed", "copied"])
def run(request, tmp_path):
    """`processes.run` beside an installed package, of which torch knows, and beside a plain copy of it."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "pruneopd_kernels").symlink_to(PACKAGE)
    shutil.copy(ROOT / "pruneopd_autoload.py", folder)
    if request.param == "installed":
        metadata = folder / "pruneopd_kernels-0.0.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pruneopd-kernels\nVersion: 0.0.0\n")
        (metadata / "entry_points.txt").write_text("[torch.backends]\npruneopd = pruneopd_autoload:register\n")

    def run(code):
        # What else is installed here stays out of sight; torch and NumPy do not.
        hide = f"""
import importlib.metadata as m
_find = m.Distribution.discover.__func__
m.Distribution.discover = classmethod(lambda cls, **k: (d for d in _find(cls, **k) if "{folder}" in str(d._path)))
"""
        return processes.run(code=hide + code, root=folder, cwd=folder)

    return run


@pytest.mark.parametrize("imports", [
    "import pruneopd_kernels, torch",
    "import torch, pruneopd_kernels",
    "import pruneopd_kernels.config\nimport torch",
    "import pruneopd_kernels, importlib\nimportlib.reload(pruneopd_kernels)\nimport torch",
    "import pruneopd_kernels\nfrom importlib.util import find_spec\nassert find_spec('torch')\nimport torch",
], ids=["before torch", "after torch", "a submodule", "reloaded", "torch is looked for"])  # fmt: skip
def test_operators_are_registered(run, imports):
    run(f"import sys\nbefore = list(sys.meta_path)\n{imports}\nassert sys.meta_path[: len(before)] == before" + USE_RAW)


def test_two_copies_live_in_one_process(tmp_path):
    """Each with operators of its own, as the kernel hub imports them."""
    for name in ("one_kernels", "two_kernels"):
        processes.copy_package(tmp_path, "*.so", name=name)
    code = """
import one_kernels, two_kernels, torch
logits = torch.randn(2, 3, 40)
for namespace, package in (("one", one_kernels), ("two", two_kernels)):
    operators = getattr(torch.ops, namespace)
    assert operators.reliability(logits, logits)[0].tolist() == [[1.0] * 3] * 2
    assert package.reliability(logits, logits).overlap.tolist() == [[1.0] * 3] * 2
"""
    processes.run(code=code, root=tmp_path, cwd=tmp_path)


def test_bare_import_is_light(run):
    """Of an installed package: it imports neither torch nor NumPy, and so does not host use torch."""
    installed = run("import importlib.metadata as m\nprint(len(m.entry_points(group='torch.backends')))") == "1\n"
    run(f"""
import sys
import pruneopd_kernels
heavy = {{"torch", "numpy", "triton", "ml_dtypes", "asyncio"}} & set(sys.modules)
assert not heavy or not {installed}, heavy
assert "triton" not in sys.modules
import numpy as np
from pruneopd_kernels import PruneConfig, host
logits = np.zeros((2, 3, 40), np.float32)
host.reliability(logits, logits), host.token_stats(logits, logits)
host.reliability_from_topk(*[np.arange(24).reshape(2, 3, 4)] * 2)
host.reliability_from_drift(np.zeros((2, 3), bool))
PruneConfig()
assert not {{"torch", "triton"}} & set(sys.modules) or not {installed}
import torch
""" + USE_RAW)  # fmt: skip


def test_without_torch_and_ml_dtypes(run):
    """The names stay importable; what needs torch says so, and the NumPy functions work, of float32."""
    run("""
import sys
sys.modules["torch"] = sys.modules["ml_dtypes"] = None  # an import raises ModuleNotFoundError
import pruneopd_kernels
from pruneopd_kernels import host
import numpy as np
logits = np.zeros((1, 2, 30), np.float32)
assert host.reliability(logits, logits).overlap.tolist() == [[1.0, 1.0]]
assert "vocab_size" in str(__import__("inspect").signature(pruneopd_kernels.reliability))
import pytest
with pytest.raises(ImportError, match="torch"):
    pruneopd_kernels.reliability(logits, logits)
""")


def test_an_import_of_torch_that_fails_is_not_hidden(run, tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('a broken torch')\n")
    run(f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import pytest
for _ in range(2):
    with pytest.raises(RuntimeError, match="^a broken torch$"):
        import pruneopd_kernels, torch
""")


def test_public_names_resolve_and_are_listed():
    """Without triton, except with `parallel`, whose torch.compiler imports it."""
    processes.run(code="""
import sys
import pruneopd_kernels
from pruneopd_kernels.ops import OPERATORS
names = "PruneConfig ResponseBudget opd_rewards sampled_drift next_drift_count " \\
        "linear_reliability linear_opd_loss linear_selected_logprobs reference host parallel"
assert {*OPERATORS, *names.split()} <= set(pruneopd_kernels.__all__) <= set(dir(pruneopd_kernels))
for name in sorted(pruneopd_kernels.__all__, key="parallel".__eq__):
    assert "triton" not in sys.modules, name
    assert getattr(pruneopd_kernels, name) is not None
import pytest
with pytest.raises(AttributeError, match="no_such_name"):
    pruneopd_kernels.no_such_name
""")  # fmt: skip


def test_without_triton_and_without_initialising_cuda():
    """Nothing but impl="triton" imports it, and only that is missing without it."""
    for missing in (False, True):
        processes.run(code=f"""
import sys
if {missing}:
    sys.modules["triton"] = None
import pytest, torch, pruneopd_kernels
logits = torch.randn(2, 3, 40)
pruneopd_kernels.reliability(logits, logits)
for impl in ("cuda", "triton"):
    words = "pip install" if {missing} and impl == "triton" else "not usable here"
    with pytest.raises(RuntimeError, match=words):
        pruneopd_kernels.reliability(logits, logits, impl=impl)
assert not sys.modules.get("triton") and not torch.cuda.is_initialized()
""")  # fmt: skip
