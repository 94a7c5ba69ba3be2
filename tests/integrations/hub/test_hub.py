"""The folder that `make hub` makes, loaded by Hugging Face's `kernels`; beside an installed package, in one process."""

import re
from pathlib import Path

import kernels
import pytest
import torch
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
from kernels.importer import get_loaded_kernels

import pruneopd_kernels

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "build" / "hub" / "pruneopd-kernels"
CPU = "torch-stable-abi211-cpu-x86_64-linux"
VARIANTS = sorted((FOLDER / "build").glob("*"))


@pytest.fixture(scope="module")
def kernel():
    assert FOLDER.exists(), f"there is no {FOLDER}: make hub"
    return kernels.get_local_kernel(FOLDER)


def metadata(variant):
    return Metadata.read_from_file(variant / "metadata.json")


def test_the_variant_for_this_torch_is_taken(kernel):
    assert Path(kernel.__file__).parent.name == CPU
    (loaded,) = [one for one in get_loaded_kernels() if one.module is kernel]
    assert loaded.metadata.name.python_name == "pruneopd_kernels"
    assert loaded.metadata.version == int(pruneopd_kernels.__version__.partition(".")[0])


def test_the_operators_run_compiled_in_a_namespace_of_their_own(kernel):
    student, teacher = torch.randn(2, 2, 9, 1000)
    outputs = kernel.reliability(student, teacher, impl="cpp")
    for output, expected in zip(outputs, pruneopd_kernels.reliability(student, teacher, impl="cpp"), strict=True):
        assert torch.equal(output, expected)
    namespace = getattr(torch.ops, kernel.__name__)
    assert kernel.__name__.startswith("_pruneopd_kernels_cpu_")
    assert torch.equal(namespace.reliability(student, teacher, impl="cpp")[0], outputs.overlap)
    assert namespace.reliability.default is not torch.ops.pruneopd.reliability.default


@pytest.mark.parametrize("impl", ["cpp", "reference"])
def test_a_loss_has_its_gradient(kernel, impl):
    student, teacher = torch.randn(2, 2, 9, 1000)
    gradients = []
    for package in (kernel, pruneopd_kernels):
        logits = student.clone().requires_grad_()
        package.reverse_kl(logits, teacher, impl=impl).sum().backward()
        gradients.append(logits.grad)
    assert gradients[0].any() and torch.equal(*gradients)


def test_errors_and_graphs_are_as_in_the_package(kernel):
    student, teacher = torch.randn(2, 2, 9, 1000)
    with pytest.raises(ValueError, match=r"^reliability: k must be between 1 and"):
        kernel.reliability(student, teacher, k=0)
    compiled = torch.compile(kernel.reliability, fullgraph=True, backend="eager")
    assert torch.equal(compiled(student, teacher).rewards, kernel.reliability(student, teacher).rewards)


def test_the_variant_without_compiled_code_takes_the_reference():
    kernel = kernels.get_local_kernel(FOLDER / "build" / "torch-cpu")
    assert not list(Path(kernel.__file__).parent.glob("*.so"))
    student, teacher = torch.randn(2, 2, 9, 1000)
    expected = pruneopd_kernels.reference.reliability(student, teacher)
    assert torch.equal(kernel.reliability(student, teacher).rewards, expected.rewards)
    with pytest.raises(RuntimeError, match="impl='cpp' is not usable here"):
        kernel.reliability(student, teacher, impl="cpp")


def test_no_two_variants_share_a_name():
    """Variants are imported under their names."""
    assert len({metadata(variant).id for variant in VARIANTS}) == len(VARIANTS) >= 3


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda path: path.name)
def test_metadata(variant):
    described = metadata(variant)
    backend = "cpu" if "-cpu" in variant.name else "cuda"
    assert str(described.backend.backend_type).lower() == backend
    assert described.id.startswith(f"_pruneopd_kernels_{backend}_") and described.id.isidentifier()
    assert not list(variant.rglob("integrations")) and not list(variant.rglob("__pycache__"))
    digest = Digest.hash_variant(DigestAlgorithm.SHA256, variant)
    assert described.digest is not None and described.digest.files == digest.files


def test_kernel_builder_reads_the_configuration():
    general = Build.open(FOLDER).general
    assert [str(backend) for backend in general.backends] == ["cpu", "cuda"]


def test_the_page_s_example_runs(kernel, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python3\n(.*?)```", (ROOT / "docs/integrations/hub.md").read_text(), re.DOTALL)
    exec(compile(code, "hub.md", "exec"), {})
    assert "tensor" in capsys.readouterr().out
